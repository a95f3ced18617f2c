"""Calls of the compiled CPU kernels (csrc/cpu): torch tensors in and out. RMSNorm's are in cpu_norm.py.

One function per kernel, with the arguments and results of its op's reference: it makes the tensors dense, allocates the
results and passes pointers and sizes. Shapes were checked by the op; tensors are float32 or bfloat16, vectors become
float32. A gradient nobody asked for is an empty tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels._ext import load
from jointnas_kernels.errors import JointNASError

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ISAS = ("the best of this processor", "scalar", "AVX2", "AVX-VNNI", "AVX-512", "AVX-512 with the kernel's extension",
        "AMX")
HUGE_FROM = 4 << 20  # bytes; glibc serves smaller blocks from memory that is already mapped
_ERRORS = {1: "an argument it does not support", 2: "this processor lacks the instructions", 3: "out of memory"}


def call(name: str, *args: Tensor | int | float | None, threads: int | None = None, isa: int = 0) -> None:
    """``_C.cpu_NAME(args..., threads, isa)``; tensors become addresses, None null, bool int.

    Args:
        threads: default torch's number; results do not depend on it.
        isa: index into ISAS, to force an instruction set.
    """
    # plain numbers first: of a product that takes 150 us, every microsecond here is visible
    values = [a if type(a) in (int, float) else a.data_ptr() if isinstance(a, Tensor) else int(a or 0) for a in args]
    error = getattr(load(), f"cpu_{name}")(*values, threads or torch.get_num_threads(), isa)
    if error:
        raise JointNASError(f"CPU kernel {name!r} with {ISAS[isa]}: {_ERRORS.get(error, f'error {error}')}")


# ---- arguments and results ----


def empty_like(tensor: Tensor) -> Tensor:
    """A dense result like ``tensor``, large ones on huge pages (csrc/include/cpu_ops.h says why)."""
    out = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    size = out.numel() * out.element_size()
    if size >= HUGE_FROM:
        load().cpu_huge_pages(out.data_ptr(), size)
    return out


def floats(*shape: int) -> Tensor:
    """An fp32 array, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def integers(values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")


def vector(tensor: Tensor) -> Tensor:
    """A dense fp32 copy or view."""
    return tensor.detach().to(torch.float32).contiguous()


def optional(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else vector(tensor)


def matrix(tensor: Tensor) -> tuple[int, int]:
    """(rows, width)."""
    width = tensor.shape[-1]
    return tensor.numel() // max(1, width), width


def chunking(rows: int, width: int, reduces: bool = False) -> tuple[int, int]:
    """(rows per chunk, chunks): about 32k elements each; with column sums at most 32 chunks, as each has its own."""
    per_chunk = max(1, 32768 // max(1, width))
    if reduces:
        per_chunk = max(per_chunk, -(-rows // 32))
    return per_chunk, -(-rows // per_chunk)


def total(partial: Tensor | None, like: Tensor | None) -> Tensor:
    """The sum over chunks in the dtype of ``like``."""
    return floats(0) if partial is None or like is None else partial.sum(0).to(like.dtype)


def wanted(tensor: Tensor | None) -> Tensor:
    return floats(0) if tensor is None else tensor


# ---- mixed_weight ----


def mixed_weight(weight: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """weight [M, N] * r[M, 1] * c[N]."""
    w = weight.contiguous()
    out = empty_like(w)
    call("mixed_weight", w, vector(r), vector(c), out, *w.shape, DTYPES[w.dtype])
    return out


def mixed_weight_backward(
    grad: Tensor, weight: Tensor, r: Tensor, c: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dweight, dc [N] and dr [M], the vectors in fp32."""
    g, w = grad.contiguous(), weight.contiguous()
    rows, width = w.shape
    per_chunk, chunks = chunking(rows, width, True)
    dw = empty_like(w) if need_weight else None
    dr, partial = floats(rows), floats(chunks, width)
    call("mixed_weight_backward", g, w, vector(r), vector(c), dw, dr, partial, rows, width, per_chunk, DTYPES[w.dtype])
    return wanted(dw), partial.sum(0), dr


# ---- elementwise with masks ----


def channel_mask(x: Tensor, mask: Tensor) -> Tensor:
    x = x.contiguous()
    rows, width = matrix(x)
    y = empty_like(x)
    call("channel_mask", x, None, vector(mask), y, None, rows, width, chunking(rows, width)[0], DTYPES[x.dtype])
    return y


def channel_mask_backward(grad: Tensor, x: Tensor, mask: Tensor, need_mask: bool) -> tuple[Tensor, Tensor]:
    g = grad.contiguous()
    rows, width = matrix(g)
    per_chunk, chunks = chunking(rows, width, need_mask)
    dx, partial = empty_like(g), floats(chunks, width) if need_mask else None
    source = x.contiguous() if need_mask else None
    call("channel_mask", g, source, vector(mask), dx, partial, rows, width, per_chunk, DTYPES[g.dtype])
    return dx, total(partial, mask)


def gated_residual(h: Tensor, y: Tensor, mask: Tensor | None, gate: Tensor | None, x: Tensor | None) -> Tensor:
    h, y, x = h.contiguous(), y.contiguous(), None if x is None else x.contiguous()
    rows, width = matrix(h)
    out = empty_like(h)
    call("gated_residual", h, y, optional(mask), optional(gate), x, out, rows, width, chunking(rows, width)[0],
         DTYPES[h.dtype])
    return out


def gated_residual_backward(
    grad: Tensor, h: Tensor, y: Tensor, mask: Tensor | None, gate: Tensor, x: Tensor, need_mask: bool, need_gate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dh, dy, dx, dmask, dgate."""
    g, h, y, x = grad.contiguous(), h.contiguous(), y.contiguous(), x.contiguous()
    rows, width = matrix(g)
    need_mask = need_mask and mask is not None
    per_chunk, chunks = chunking(rows, width, need_mask)
    dh, dx, dy = empty_like(g), empty_like(g), None if mask is None else empty_like(g)
    partial, dgate = floats(chunks, width) if need_mask else None, floats(chunks) if need_gate else None
    call("gated_residual_backward", g, h, y, optional(mask), vector(gate), x, dh, dy, dx, partial, dgate, rows, width,
         per_chunk, DTYPES[g.dtype])
    return dh, wanted(dy), dx, total(partial, mask), total(dgate, gate)


def masked_swiglu(gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    rows, width = matrix(gate)
    out = empty_like(gate)
    call("masked_swiglu", gate, up, vector(out_mask), vector(in_mask), out, rows, width, chunking(rows, width)[0],
         DTYPES[gate.dtype])
    return out


def masked_swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, need_out: bool, need_in: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dgate, dup, dout_mask, din_mask."""
    g, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    rows, width = matrix(g)
    per_chunk, chunks = chunking(rows, width, need_out or need_in)
    dgate, dup = empty_like(g), empty_like(g)
    dr, dc = (floats(chunks, width) if need else None for need in (need_out, need_in))
    call("masked_swiglu_backward", g, gate, up, vector(out_mask), vector(in_mask), dgate, dup, dr, dc, rows, width,
         per_chunk, DTYPES[g.dtype])
    return dgate, dup, total(dr, out_mask), total(dc, in_mask)


# ---- masked_rope ----


def tables(cos: Tensor, sin: Tensor, batch: int) -> tuple[Tensor, Tensor, int]:
    """cos and sin as [period, D] fp32, and the period: all positions, or all tokens where the batch has its own."""
    if cos.shape[0] != sin.shape[0]:
        cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    return vector(cos), vector(sin), cos.shape[0] * cos.shape[1]


def masked_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_mask: Tensor, k_mask: Tensor
) -> tuple[Tensor, Tensor]:
    cosine, sine, period = tables(cos, sin, q.shape[0])
    out = []
    for x, mask in ((q.contiguous(), q_mask), (k.contiguous(), k_mask)):
        y = empty_like(x)
        tokens, (heads, dim) = x.shape[0] * x.shape[1], x.shape[2:]
        call("masked_rope", x, vector(mask), cosine, sine, y, tokens, period, heads, dim,
             chunking(tokens, heads * dim)[0], DTYPES[x.dtype])
        out.append(y)
    return out[0], out[1]


def masked_rope_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_mask: Tensor, k_mask: Tensor,
    need_q_mask: bool, need_k_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dq_mask, dk_mask."""
    cosine, sine, period = tables(cos, sin, dq_out.shape[0])
    grads, masks = [], []
    for out, x, mask, need in ((dq_out, q, q_mask, need_q_mask), (dk_out, k, k_mask, need_k_mask)):
        g, source = out.contiguous(), x.contiguous() if need else None
        tokens, (heads, dim) = g.shape[0] * g.shape[1], g.shape[2:]
        per_chunk, chunks = chunking(tokens, heads * dim, need)
        dx, partial = empty_like(g), floats(chunks, heads, dim) if need else None
        call("masked_rope_backward", g, source, vector(mask), cosine, sine, dx, partial, tokens, period, heads, dim,
             per_chunk, DTYPES[g.dtype])
        grads.append(dx)
        masks.append(total(partial, mask))
    return grads[0], grads[1], masks[0], masks[1]
