"""Calls of the compiled CPU kernels (csrc/cpu): torch tensors in and out.

One function per kernel: makes the arguments dense, allocates the results, passes pointers and sizes. Callers (the ops)
have checked shapes; dtypes are float32 or bfloat16, vectors float32. ``isa`` forces an instruction set (1 scalar,
2 AVX2, 3 AVX-512, 4 AVX-512 with the extension the kernel uses; 0 the best of this machine) and ``threads`` a thread
count (default: torch's); results do not depend on the thread count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels._ext import load
from jointnas_kernels.errors import JointNASError

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ISAS = ("auto", "scalar", "AVX2", "AVX-512", "AVX-512 with the kernel's extension")
HUGE_FROM = 4 << 20  # bytes; glibc serves smaller blocks from memory that is already mapped
_ERRORS = {1: "an argument it does not support", 2: "this processor lacks the instruction set", 3: "out of memory"}


def call(name: str, *args: Tensor | int | float | None, isa: int = 0, threads: int | None = None) -> None:
    """``_C.cpu_NAME(args..., threads, isa)`` with tensors as addresses (None: null)."""
    values = [a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in args]
    error = getattr(load(), f"cpu_{name}")(*values, threads or torch.get_num_threads(), isa)
    if error:
        raise JointNASError(f"CPU kernel {name!r} ({ISAS[isa]}) refused: {_ERRORS.get(error, f'error {error}')}")


def empty_like(tensor: Tensor) -> Tensor:
    """A dense result like ``tensor``, large ones on huge pages (csrc/include/cpu_ops.h says why)."""
    out = torch.empty(tensor.shape, dtype=tensor.dtype)
    size = out.numel() * out.element_size()
    if size >= HUGE_FROM:
        load().cpu_huge_pages(out.data_ptr(), size)
    return out


def vector(tensor: Tensor) -> Tensor:
    """A dense float32 vector."""
    return tensor.detach().to(torch.float32).contiguous()


def mixed_weight(weight: Tensor, r: Tensor, c: Tensor, *, isa: int = 0, threads: int | None = None) -> Tensor:
    """weight [M, N] * r[M, 1] * c[N]."""
    w = weight.contiguous()
    out = empty_like(w)
    call("mixed_weight", w, vector(r), vector(c), out, *w.shape, DTYPES[w.dtype], isa=isa, threads=threads)
    return out


def quant_lora_mix(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, probs: Tensor, clip: Tensor | None, scaling: float,
    bits: Sequence[int], group_size: int, *, isa: int = 0, threads: int | None = None,
) -> Tensor:
    """sum_p probs[p] Q_p(weight + scaling lora_b[p] lora_a[p]), as ops/quant_lora_mix.py defines it."""
    w = weight.contiguous()
    out = empty_like(w)
    lora = torch.promote_types(lora_a.dtype, lora_b.dtype)
    lora = lora if lora in DTYPES else torch.float32
    a, b = lora_a.to(lora).contiguous(), lora_b.to(lora).contiguous()
    call(
        "quant_lora_mix", w, a, b, vector(probs), None if clip is None else vector(clip),
        torch.tensor(bits, dtype=torch.int32), out, *w.shape, len(bits), a.shape[1], group_size, float(scaling),
        DTYPES[w.dtype], DTYPES[lora], isa=isa, threads=threads,
    )
    return out


# ---- elementwise: the same arguments and results as the ops' own reference functions ----


def _chunks(rows: int, width: int, reduces: bool) -> tuple[int, int]:
    """(rows per chunk, chunks): about 32k elements each; with column sums at most 32 chunks, as each has its own."""
    per_chunk = max(1, 32768 // max(1, width))
    if reduces:
        per_chunk = max(per_chunk, -(-rows // 32))
    return per_chunk, -(-rows // per_chunk)


def _partial(wanted: bool, chunks: int, width: int) -> Tensor | None:
    return torch.empty(chunks, width) if wanted else None


def _total(partial: Tensor | None, like: Tensor | None) -> Tensor:
    """The column sums in the dtype of their vector; empty if nobody asked for them."""
    return torch.empty(0) if partial is None or like is None else partial.sum(0).to(like.dtype)


def _flat(tensor: Tensor) -> tuple[int, int]:
    width = tensor.shape[-1]
    return tensor.numel() // max(1, width), width


def channel_mask(x: Tensor, mask: Tensor, *, isa: int = 0, threads: int | None = None) -> Tensor:
    x = x.contiguous()
    rows, width = _flat(x)
    y = empty_like(x)
    call("channel_mask", x, None, vector(mask), y, None, rows, width, _chunks(rows, width, False)[0], DTYPES[x.dtype],
         isa=isa, threads=threads)
    return y


def channel_mask_backward(
    grad: Tensor, x: Tensor, mask: Tensor, need_mask: bool, *, isa: int = 0, threads: int | None = None
) -> tuple[Tensor, Tensor]:
    g = grad.contiguous()
    x = x.contiguous() if need_mask else x
    rows, width = _flat(g)
    per_chunk, chunks = _chunks(rows, width, need_mask)
    dx, partial = empty_like(g), _partial(need_mask, chunks, width)
    call("channel_mask", g, x if need_mask else None, vector(mask), dx, partial, rows, width, per_chunk, DTYPES[g.dtype],
         isa=isa, threads=threads)
    return dx, _total(partial, mask)


def gated_residual(
    h: Tensor, y: Tensor, mask: Tensor | None, gate: Tensor | None, x: Tensor | None, *,
    isa: int = 0, threads: int | None = None,
) -> Tensor:
    h, y, x = h.contiguous(), y.contiguous(), None if x is None else x.contiguous()
    rows, width = _flat(h)
    out = empty_like(h)
    call("gated_residual", h, y, None if mask is None else vector(mask), None if gate is None else vector(gate), x, out,
         rows, width, _chunks(rows, width, False)[0], DTYPES[h.dtype], isa=isa, threads=threads)
    return out


def gated_residual_backward(
    grad: Tensor, h: Tensor, y: Tensor, mask: Tensor | None, gate: Tensor, x: Tensor, need_mask: bool, need_gate: bool,
    *, isa: int = 0, threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g, h, y, x = grad.contiguous(), h.contiguous(), y.contiguous(), x.contiguous()
    rows, width = _flat(g)
    need_mask = need_mask and mask is not None
    per_chunk, chunks = _chunks(rows, width, need_mask)
    dh, dx, dy = empty_like(g), empty_like(g), None if mask is None else empty_like(g)
    partial, dgate = _partial(need_mask, chunks, width), _partial(need_gate, chunks, 1)
    call("gated_residual_backward", g, h, y, None if mask is None else vector(mask), vector(gate), x, dh, dy, dx, partial,
         dgate, rows, width, per_chunk, DTYPES[g.dtype], isa=isa, threads=threads)
    total = torch.empty(0) if dgate is None else dgate.sum().to(gate.dtype)
    return dh, torch.empty(0) if dy is None else dy, dx, _total(partial, mask), total


def masked_swiglu(
    gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, *, isa: int = 0, threads: int | None = None
) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    rows, width = _flat(gate)
    out = empty_like(gate)
    call("masked_swiglu", gate, up, vector(out_mask), vector(in_mask), out, rows, width, _chunks(rows, width, False)[0],
         DTYPES[gate.dtype], isa=isa, threads=threads)
    return out


def masked_swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, need_out: bool, need_in: bool, *,
    isa: int = 0, threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dgate, dup, dout_mask, din_mask."""
    g, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    rows, width = _flat(g)
    per_chunk, chunks = _chunks(rows, width, need_out or need_in)
    dgate, dup = empty_like(g), empty_like(g)
    dr, dc = _partial(need_out, chunks, width), _partial(need_in, chunks, width)
    call("masked_swiglu_backward", g, gate, up, vector(out_mask), vector(in_mask), dgate, dup, dr, dc, rows, width,
         per_chunk, DTYPES[g.dtype], isa=isa, threads=threads)
    return dgate, dup, _total(dr, out_mask), _total(dc, in_mask)


def _segments(sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(ends ascending, for each choice the index of its last segment)."""
    ends = sorted(set(sizes))
    return torch.tensor(ends), torch.tensor([ends.index(size) for size in sizes])


def _scale(weight: Tensor, in_mask: Tensor | None) -> Tensor:
    return vector(weight) if in_mask is None else vector(weight) * vector(in_mask)


def mixed_rmsnorm(
    x: Tensor, weight: Tensor, alpha: Tensor, sizes: Sequence[int], eps: float, in_mask: Tensor | None, *,
    isa: int = 0, threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    rows, width = _flat(x)
    ends, kept = _segments(sizes)
    y, inv = empty_like(x), torch.empty(rows, len(sizes))
    call("mixed_rmsnorm", x, _scale(weight, in_mask), vector(alpha), ends, kept, y, inv, rows, width, len(ends),
         len(sizes), eps, _chunks(rows, width, False)[0], DTYPES[x.dtype], isa=isa, threads=threads)
    return y, inv


def mixed_rmsnorm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, inv: Tensor, sizes: Sequence[int], in_mask: Tensor | None,
    need_weight: bool, need_alpha: bool, need_mask: bool, *, isa: int = 0, threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g, x = grad.contiguous(), x.contiguous()
    rows, width = _flat(g)
    ends, kept = _segments(sizes)
    need_mask = need_mask and in_mask is not None
    per_chunk, chunks = _chunks(rows, width, need_weight or need_mask)
    dx, dalpha = empty_like(g), _partial(need_alpha, rows, len(sizes))
    partial = _partial(need_weight or need_mask, chunks, width)
    call("mixed_rmsnorm_backward", g, x, _scale(weight, in_mask), vector(alpha), inv, ends, kept, dx, dalpha, partial, rows,
         width, len(ends), len(sizes), per_chunk, DTYPES[g.dtype], isa=isa, threads=threads)
    dw, dmask = torch.empty(0), torch.empty(0)
    if partial is not None:
        column = partial.sum(0)
        if need_weight:
            dw = (column if in_mask is None else column * in_mask).to(weight.dtype)
        if need_mask and in_mask is not None:
            dmask = (column * weight.float()).to(in_mask.dtype)
    return dx, dw, _total(dalpha, alpha), dmask


def _tables(cos: Tensor, sin: Tensor, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """cos and sin as [period, D] fp32: one row per position, or per token where they differ within the batch."""
    if cos.shape[0] != sin.shape[0]:
        cos, sin = cos.expand(x.shape[0], -1, -1), sin.expand(x.shape[0], -1, -1)
    return vector(cos), vector(sin), cos.shape[0] * cos.shape[1]


def masked_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_mask: Tensor, k_mask: Tensor, *,
    isa: int = 0, threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    cosine, sine, period = _tables(cos, sin, q)
    out = []
    for x, mask in ((q.contiguous(), q_mask), (k.contiguous(), k_mask)):
        y = empty_like(x)
        tokens, (heads, dim) = x.shape[0] * x.shape[1], x.shape[2:]
        call("masked_rope", x, vector(mask), cosine, sine, y, tokens, period, heads, dim,
             _chunks(tokens, heads * dim, False)[0], DTYPES[x.dtype], isa=isa, threads=threads)
        out.append(y)
    return out[0], out[1]


def masked_rope_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_mask: Tensor, k_mask: Tensor,
    need_q_mask: bool, need_k_mask: bool, *, isa: int = 0, threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cosine, sine, period = _tables(cos, sin, dq_out)
    grads, masks = [], []
    for g, x, mask, need in ((dq_out, q, q_mask, need_q_mask), (dk_out, k, k_mask, need_k_mask)):
        g, x = g.contiguous(), x.contiguous() if need else None
        tokens, (heads, dim) = g.shape[0] * g.shape[1], g.shape[2:]
        per_chunk, chunks = _chunks(tokens, heads * dim, need)
        dx, partial = empty_like(g), _partial(need, chunks, heads * dim)
        call("masked_rope_backward", g, x, vector(mask), cosine, sine, dx, partial, tokens, period, heads, dim, per_chunk,
             DTYPES[g.dtype], isa=isa, threads=threads)
        grads.append(dx)
        masks.append(_total(partial, mask).reshape(mask.shape if need else 0))
    return grads[0], grads[1], masks[0], masks[1]


def mixed_weight_backward(
    grad: Tensor, weight: Tensor, r: Tensor, c: Tensor, need_weight: bool, *, isa: int = 0, threads: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dweight (empty unless asked for), dc [N], dr [M], the vectors in fp32."""
    g, w = grad.contiguous(), weight.contiguous()
    rows, width = w.shape
    per_chunk, chunks = _chunks(rows, width, True)
    dw = empty_like(w) if need_weight else None
    dr, partial = torch.empty(rows), torch.empty(chunks, width)
    call("mixed_weight_backward", g, w, vector(r), vector(c), dw, dr, partial, rows, width, per_chunk, DTYPES[w.dtype],
         isa=isa, threads=threads)
    return torch.empty(0) if dw is None else dw, partial.sum(0), dr


def act_quant_mix(
    x: Tensor, probs: Tensor, mask: Tensor | None, bits: Sequence[int], symmetric: bool, *,
    isa: int = 0, threads: int | None = None,
) -> Tensor:
    x = x.contiguous()
    rows, width = _flat(x)
    y = empty_like(x)
    call("act_quant_mix", x, vector(probs), None if mask is None else vector(mask), torch.tensor(bits, dtype=torch.int32),
         y, rows, width, len(bits), int(symmetric), _chunks(rows, width, False)[0], DTYPES[x.dtype], isa=isa,
         threads=threads)
    return y


def act_quant_mix_backward(
    grad: Tensor, x: Tensor, probs: Tensor, mask: Tensor | None, bits: Sequence[int], symmetric: bool,
    want: Sequence[bool], *, isa: int = 0, threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dprobs, dmask, as ``want`` says."""
    g, x = grad.contiguous(), x.contiguous()
    rows, width = _flat(g)
    need_mask = want[2] and mask is not None
    per_chunk, chunks = _chunks(rows, width, need_mask)
    dx, partial = empty_like(g) if want[0] else None, _partial(need_mask, chunks, width)
    dprobs = _partial(want[1], rows, len(bits))
    total = float(probs.float().sum())
    call("act_quant_mix_backward", g, x, None if mask is None else vector(mask), torch.tensor(bits, dtype=torch.int32), dx,
         dprobs, partial, rows, width, len(bits), int(symmetric), total, per_chunk, DTYPES[g.dtype], isa=isa,
         threads=threads)
    return torch.empty(0) if dx is None else dx, _total(dprobs, probs), _total(partial, mask) * total


# ---- low-bit linear ----


def lowbit_linear(
    x: Tensor, packed: Tensor, scale: Tensor, w_bits: int, a_bits: int, group_size: int, symmetric: bool, *,
    isa: int = 0, threads: int | None = None,
) -> Tensor:
    """x [..., I] times packed weights [O, I w_bits/32], as ops/lowbit_linear.py defines it."""
    x, packed = x.contiguous(), packed.contiguous()
    scale = (scale if scale.dtype in DTYPES else scale.float()).contiguous()
    rows, width = _flat(x)
    y = torch.empty(*x.shape[:-1], packed.shape[0], dtype=x.dtype)
    call("lowbit_linear", x, packed, scale, y, rows, packed.shape[0], width, w_bits, a_bits, group_size, int(symmetric),
         DTYPES[x.dtype], DTYPES[scale.dtype], isa=isa, threads=threads)
    return y
