"""Calls of the compiled CPU kernels of mixed_rmsnorm, alone and with quantization; conventions as in cpu.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels.ops.core import cpu_calls as cpu
from jointnas_kernels.ops.core.cpu_calls import DTYPES, chunking, empty_like, floats, integers, matrix, total, vector


def segments(sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(where choices end, ascending; for each choice the index of the last segment it keeps)."""
    ends = sorted(set(sizes))
    return integers(ends, torch.int64), integers([ends.index(size) for size in sizes], torch.int64)


def masked_scale(weight: Tensor, in_mask: Tensor | None) -> Tensor:
    return vector(weight) if in_mask is None else vector(weight) * vector(in_mask)


def mixed_rmsnorm(
    x: Tensor, weight: Tensor, alpha: Tensor, sizes: Sequence[int], eps: float, in_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    rows, width = matrix(x)
    ends, kept = segments(sizes)
    y, inv = empty_like(x), floats(rows, len(sizes))
    cpu.call("mixed_rmsnorm", x, masked_scale(weight, in_mask), vector(alpha), ends, kept, y, inv, rows, width,
              len(ends), len(sizes), float(eps), chunking(rows, width)[0], DTYPES[x.dtype])
    return y, inv


def norm_vectors(
    partial: Tensor | None, weight: Tensor, in_mask: Tensor | None, need_weight: bool, need_mask: bool
) -> tuple[Tensor, Tensor]:
    """dweight and din_mask from the chunks' column sums of g x t."""
    dw, dmask = floats(0), floats(0)
    if partial is not None:
        column = partial.sum(0)
        if need_weight:
            dw = (column if in_mask is None else column * in_mask).to(weight.dtype)
        if need_mask and in_mask is not None:
            dmask = (column * weight).to(in_mask.dtype)
    return dw, dmask


def mixed_rmsnorm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, inv: Tensor, sizes: Sequence[int], in_mask: Tensor | None,
    need_weight: bool, need_alpha: bool, need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dalpha, din_mask."""
    g, x = grad.contiguous(), x.contiguous()
    rows, width = matrix(g)
    ends, kept = segments(sizes)
    need_mask = need_mask and in_mask is not None
    need_column = need_weight or need_mask
    per_chunk, chunks = chunking(rows, width, need_column)
    dx, dalpha = empty_like(g), floats(rows, len(sizes)) if need_alpha else None
    partial = floats(chunks, width) if need_column else None
    cpu.call("mixed_rmsnorm_backward", g, x, masked_scale(weight, in_mask), vector(alpha), inv.contiguous(), ends,
              kept, dx, dalpha, partial, rows, width, len(ends), len(sizes), per_chunk, DTYPES[g.dtype])
    dw, dmask = norm_vectors(partial, weight, in_mask, need_weight, need_mask)
    return dx, dw, total(dalpha, alpha), dmask


def mixed_rmsnorm_quant(
    x: Tensor, weight: Tensor, alpha: Tensor, sizes: Sequence[int], eps: float, in_mask: Tensor | None,
    bits: Sequence[int], probs: Tensor, symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, inv, levels."""
    x = x.contiguous()
    rows, width = matrix(x)
    ends, kept = segments(sizes)
    y, inv, levels = empty_like(x), floats(rows, len(sizes)), floats(rows, len(bits), 2)
    cpu.call("mixed_rmsnorm_quant", x, masked_scale(weight, in_mask), vector(alpha), ends, kept, vector(probs),
              integers(bits), y, inv, levels, rows, width, len(ends), len(sizes), len(bits), symmetric, float(eps),
              chunking(rows, width)[0], DTYPES[x.dtype])
    return y, inv, levels


def mixed_rmsnorm_quant_backward(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, inv: Tensor, levels: Tensor, sizes: Sequence[int],
    in_mask: Tensor | None, bits: Sequence[int], probs: Tensor, need_weight: bool, need_alpha: bool, need_mask: bool,
    need_probs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dalpha, din_mask, dprobs. Without dprobs it is the norm's backward of P g, P put into the weight."""
    mass = float(probs.float().sum())
    if not need_probs:
        of_norm = mixed_rmsnorm_backward(
            grad, x, vector(weight) * mass, alpha, inv, sizes, in_mask, need_weight, need_alpha, need_mask
        )
        return of_norm[0], (of_norm[1] * mass).to(weight.dtype), *of_norm[2:], floats(0)
    g, x = grad.contiguous(), x.contiguous()
    rows, width = matrix(g)
    ends, kept = segments(sizes)
    need_mask = need_mask and in_mask is not None
    need_column = need_weight or need_mask
    per_chunk, chunks = chunking(rows, width, need_column)
    dx, dalpha = empty_like(g), floats(rows, len(sizes)) if need_alpha else None
    dprobs, partial = floats(rows, len(bits)), floats(chunks, width) if need_column else None
    cpu.call("mixed_rmsnorm_quant_backward", g, x, masked_scale(weight, in_mask), vector(alpha), inv.contiguous(),
              ends, kept, levels.contiguous(), integers(bits), dx, dalpha, dprobs, partial, rows, width, len(ends),
              len(sizes), len(bits), mass, per_chunk, DTYPES[g.dtype])
    dw, dmask = norm_vectors(partial, weight, in_mask, need_weight, need_mask)
    return dx, dw, total(dalpha, alpha), dmask, total(dprobs, probs)
