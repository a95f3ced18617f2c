"""Calls of the CPU kernels of the mixture (csrc/cpu)."""

import torch
from torch import Tensor

from jointnas_kernels.ops.core import cpu
from jointnas_kernels.ops.core.tensors import in_dtype_of
from jointnas_kernels.ops.quant.mixture.reference import Gradients, Mixture, Upstream, Want, tiles

# Rows of G held at once: 512 x 14336 bf16 are 14 MB; each tile costs one packing of A (0.4 ms at rank 32, 4096 inputs)
# against 30 ms for the product that makes the tile.
ROW_TILE = 512


def _lora(mix: Mixture) -> tuple[Tensor, Tensor, int]:
    """A and B in one dtype the kernels read, and its code."""
    dtype = torch.bfloat16 if mix.lora_a.dtype == mix.lora_b.dtype == torch.bfloat16 else torch.float32
    return mix.lora_a.to(dtype).contiguous(), mix.lora_b.to(dtype).contiguous(), cpu.DTYPES[dtype]


def forward(mix: Mixture, out: Tensor | None = None) -> Tensor:
    """W~, in `out` if there is one."""
    w, (a, b, lora) = mix.weight.contiguous(), _lora(mix)
    out = cpu.empty_like(w) if out is None else out
    cpu.call("quant_lora_mix", w, a, b, cpu.vector(mix.probs), cpu.optional(mix.clip), cpu.integers(mix.bits), out,
             *w.shape, len(mix.bits), a.shape[1], mix.group_size, float(mix.scaling), cpu.DTYPES[w.dtype], lora)
    return out


def gradients(mix: Mixture, upstream: Upstream, want: Want) -> Gradients:
    """The gradients that are wanted."""
    w, (a, b, lora), p = mix.weight.contiguous(), _lora(mix), len(mix.bits)
    rows, width = w.shape
    dclip = cpu.floats(*mix.clip.shape) if want.clip and mix.clip is not None else None
    dprobs = cpu.floats(p).zero_() if want.probs else None
    da, db = (cpu.floats(*a.shape).zero_(), cpu.floats(*b.shape)) if want.lora else (None, None)
    pi, clips, bits = cpu.vector(mix.probs), cpu.optional(mix.clip), cpu.integers(mix.bits)
    for tile in tiles(rows, ROW_TILE):
        g, masked = upstream.rows(tile).contiguous(), None
        count = tile.stop - tile.start
        if want.probs or mix.ste == "clip":
            if want.lora and mix.ste == "clip":
                masked = torch.empty((p, count, width), dtype=g.dtype, device=g.device)
            partial = cpu.floats(-(-count // 12), p)
            cpu.call("quant_lora_mix_backward", w, a, b, pi, clips, bits, g, masked, partial, dclip, tile.start, count,
                     rows, width, p, a.shape[1], mix.group_size, float(mix.scaling), cpu.DTYPES[w.dtype], lora,
                     cpu.DTYPES[g.dtype])
            if dprobs is not None:
                dprobs += partial.sum(0)
        if da is not None and db is not None:
            of_each, factor = g.expand(p, -1, -1) if masked is None else masked, pi.view(-1, 1, 1)
            right, left = a.to(w.dtype).to(g.dtype), (b[:, tile].float() * mix.scaling).to(w.dtype).to(g.dtype)
            db[:, tile] = (of_each @ right.mT).float() * (factor * mix.scaling)
            da += (left.mT @ of_each).float() * factor
    return (
        in_dtype_of(da, mix.lora_a), in_dtype_of(db, mix.lora_b), in_dtype_of(dprobs, mix.probs),
        in_dtype_of(dclip, mix.clip),
    )  # fmt: skip
