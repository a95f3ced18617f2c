"""act_quant_mix: the mixture of an activation's precisions, y = sum_q probs[q] Q_q(mask * x), with Q_16 the identity.

Q_q is the token quantizer of spec.py. Its values enter the mixture unrounded; that is summed in fp32 (fp64 for fp64)
and rounded once, which for a one-hot mixture is what compressed-tensors does.

Backward (straight through, Bengio et al., arXiv 1308.3432; s and z constant), with P = sum_q probs[q]:

    dx = P mask * g      dprobs[q] = <g, Q_q>      dmask[n] = P sum_tokens g x

dx alone reads neither x nor levels, so that x need not stay alive. The Triton forward holds narrow token rows in
registers and reads wide ones twice. It writes down each row's scales and zero points, so that the backward is free to
work in column blocks.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.errors import unknown
from jointnas_kernels.ops.core import cpu
from jointnas_kernels.ops.core.arrival import counters, last_to_arrive, sum_columns
from jointnas_kernels.ops.core.backends import interpreting
from jointnas_kernels.ops.core.columns import partial_sums, total_of
from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import bad, compute_dtype, dense, dense_like, in_dtype_of, rows
from jointnas_kernels.ops.quant.kernels import (
    constants,
    larger,
    round_tile,
    scale_and_zero,
    smaller,
    store_sums,
    token_levels,
)
from jointnas_kernels.ops.quant.spec import ACT_BITS, fake_quant_tokens, straight_through

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # dx, dprobs, dmask


def act_quant_mix_reference(
    x: Tensor, bits: Sequence[int], probs: Tensor, symmetric: bool = False, mask: Tensor | None = None
) -> Tensor:
    """The public function in plain differentiable torch."""
    dtype = compute_dtype(x.dtype)
    if mask is not None:
        x = (x.to(dtype) * mask.to(dtype)).to(x.dtype)
    wide = x.to(dtype)
    out = torch.zeros_like(wide)
    for p, width in zip(probs.to(dtype), bits, strict=True):
        out = out + p * straight_through(fake_quant_tokens(x.detach(), width, symmetric), wide)
    return out.to(x.dtype)


def _reference(
    x: Tensor, probs: Tensor, mask: Tensor | None, bits: Sequence[int], symmetric: bool
) -> tuple[Tensor, Tensor]:
    """y, and the rows' scales and zero points [rows, Q, 2]; zeros from a backend that does not need them."""
    return act_quant_mix_reference(x, bits, probs, symmetric, mask), no_levels(x, bits)


def no_levels(x: Tensor, bits: Sequence[int]) -> Tensor:
    """Zeros in their place."""
    return torch.zeros(x.shape[:-1].numel(), len(bits), 2, dtype=torch.float32, device=x.device)


def probs_gradient(grad: Tensor, x: Tensor, probs: Tensor, bits: Sequence[int], symmetric: bool) -> Tensor:
    """dprobs of an input that is masked already."""
    g = grad.to(compute_dtype(grad.dtype))
    return torch.stack([(g * fake_quant_tokens(x, b, symmetric)).sum() for b in bits]).to(probs.dtype)


def _reference_backward(
    grad: Tensor, x: Tensor | None, probs: Tensor, mask: Tensor | None, levels: Tensor | None, bits: Sequence[int],
    symmetric: bool, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    dtype = compute_dtype(grad.dtype)
    g, total = grad.to(dtype), probs.to(dtype).sum()
    dx = dprobs = dmask = None
    if need[0]:
        dx = (g * total if mask is None else g * mask.to(dtype) * total).to(grad.dtype)
    if need[1] and x is not None:
        masked = x if mask is None else (x.to(dtype) * mask.to(dtype)).to(x.dtype)
        dprobs = probs_gradient(grad, masked, probs, bits, symmetric)
    if need[2] and x is not None and mask is not None:
        dmask = ((g * x.to(dtype)).flatten(0, -2).sum(0) * total).to(mask.dtype)
    return dx, dprobs, dmask


@triton.jit
def swiglu_value(a, v, c):
    """silu(a) v c. In one place, because the quantizers of forward and backward pass have to see the same bits."""
    return a / (1.0 + tl.exp(-a)) * v * c


@triton.jit
def masked_tile(
    x_ptr, up_ptr, r_ptr, mask_ptr, row, col, count, N, stride, up_stride, dtype: tl.constexpr, HAS_MASK: tl.constexpr,
    SWIGLU: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """mask * x, or with SWIGLU silu(r x) (r up) mask, rounded to ``dtype``, [rows, columns] in fp32; 0 outside."""
    ok = (row < count)[:, None] & (col < N)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
    if SWIGLU:
        r = tl.load(r_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
        u = r * tl.load(up_ptr + row[:, None] * up_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
        x = swiglu_value(r * x, u, tl.load(mask_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :])
        x = round_tile(x, dtype, EXACT)
    elif HAS_MASK:
        x = round_tile(x * tl.load(mask_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :], dtype, EXACT)
    return x


@triton.jit
def act_forward_kernel(
    x_ptr, up_ptr, r_ptr, mask_ptr, probs_ptr, out_ptr, levels_ptr, count, N, stride, up_stride,
    Q: tl.constexpr, LOW: tl.constexpr, INVERSE: tl.constexpr, REST: tl.constexpr, eps: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, SYMMETRIC: tl.constexpr, HAS_MASK: tl.constexpr,
    SWIGLU: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """ROWS tokens per program, whole in registers or BLOCK columns at a time, read twice. LOW[q] = -2^(b-1), 0 for the
    identity (16 bits); levels [count, Q, 2] gets (s, z)."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x = masked_tile(
        x_ptr, up_ptr, r_ptr, mask_ptr, row, col, count, N, stride, up_stride, dtype, HAS_MASK, SWIGLU, EXACT
    )
    low, high = x, x
    if WHOLE:
        until = 1
    else:
        until = N
        for start in range(BLOCK, N, BLOCK):
            more = masked_tile(
                x_ptr, up_ptr, r_ptr, mask_ptr, row, start + col, count, N, stride, up_stride, dtype, HAS_MASK, SWIGLU,
                EXACT,
            )  # fmt: skip
            low, high = smaller(low, more), larger(high, more)
    least = smaller(tl.reduce(low, 1, smaller), 0.0)
    most = larger(tl.reduce(high, 1, larger), 0.0)
    for start in range(0, until, BLOCK):
        if not WHOLE:
            x = masked_tile(
                x_ptr, up_ptr, r_ptr, mask_ptr, row, start + col, count, N, stride, up_stride, dtype, HAS_MASK, SWIGLU,
                EXACT,
            )  # fmt: skip
        mixed = tl.zeros([ROWS, BLOCK], tl.float32)
        for q in tl.static_range(Q):
            pi = tl.load(probs_ptr + q).to(tl.float32)
            if LOW[q] == 0.0:
                mixed = tl.fma(x, tl.full([ROWS, BLOCK], 1.0, tl.float32) * pi, mixed)
            else:
                s, z = scale_and_zero(least, most, LOW[q], INVERSE[q], REST[q], eps, dtype, SYMMETRIC, EXACT)
                if start == 0:
                    tl.store(levels_ptr + (row * Q + q) * 2, s, mask=row < count)
                    tl.store(levels_ptr + (row * Q + q) * 2 + 1, z, mask=row < count)
                level = token_levels(x, s, z, LOW[q], dtype, SYMMETRIC, EXACT)
                mixed = tl.fma(level, tl.broadcast_to((pi * s)[:, None], level.shape), mixed)
        ok = (row < count)[:, None] & (start + col < N)[None, :]
        tl.store(out_ptr + row[:, None] * N + (start + col)[None, :], mixed.to(dtype), mask=ok)


@triton.jit
def product(
    g, x, levels_ptr, row, count, q: tl.constexpr, Q: tl.constexpr, LOW: tl.constexpr,
    dtype: tl.constexpr, SYMMETRIC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """g ⊙ Q_q(x)."""
    if LOW[q] == 0.0:
        return g * x
    else:
        at = levels_ptr + (row * Q + q) * 2
        s = tl.load(at, mask=row < count, other=1.0)
        z = tl.load(at + 1, mask=row < count, other=0.0)
        return g * (token_levels(x, s, z, LOW[q], dtype, SYMMETRIC, EXACT) * s[:, None])


@triton.jit
def act_backward_kernel(
    grad_ptr, x_ptr, mask_ptr, probs_ptr, levels_ptr, dx_ptr, dprobs_part_ptr, dmask_part_ptr, dprobs_ptr, dmask_ptr,
    counter_ptr, count, N, grad_stride, stride,
    Q: tl.constexpr, LOW: tl.constexpr, INVERSE: tl.constexpr, REST: tl.constexpr, eps: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SYMMETRIC: tl.constexpr, HAS_MASK: tl.constexpr, EXACT: tl.constexpr,
    WANT_X: tl.constexpr, WANT_PROBS: tl.constexpr, WANT_MASK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns, ROWS tokens at a time: program (c, i) takes row tiles i, i + programs, ...

    Partial sums: of dprobs [programs of the whole grid, Q] (Q <= 4), of dmask [programs of axis 1, N]; their sums by
    the last program of all, and of those with the same columns.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    col_ok = col < N
    total = 0.0
    for q in tl.static_range(Q):
        total += tl.load(probs_ptr + q).to(tl.float32)
    sum0 = tl.zeros([ROWS, BLOCK], tl.float32)
    sum1 = tl.zeros([ROWS, BLOCK], tl.float32)
    sum2 = tl.zeros([ROWS, BLOCK], tl.float32)
    sum3 = tl.zeros([ROWS, BLOCK], tl.float32)
    dmask = tl.zeros([ROWS, BLOCK], tl.float32)
    weight = tl.full([BLOCK], 1.0, tl.float32)
    if HAS_MASK:
        weight = tl.load(mask_ptr + col, mask=col_ok, other=0.0).to(tl.float32)
    for start in range(tl.program_id(1) * ROWS, count, tl.num_programs(1) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        ok = (row < count)[:, None] & col_ok[None, :]
        g = tl.load(grad_ptr + row[:, None] * grad_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
        if WANT_X:
            dx = g * total
            if HAS_MASK:
                dx = g * weight[None, :] * total
            tl.store(dx_ptr + row[:, None] * N + col[None, :], dx.to(dtype), mask=ok)
        if WANT_PROBS or WANT_MASK:
            x = tl.load(x_ptr + row[:, None] * stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
            if WANT_MASK:
                dmask += g * x
            if WANT_PROBS:
                if HAS_MASK:
                    x = round_tile(x * weight[None, :], dtype, EXACT)
                sum0 += product(g, x, levels_ptr, row, count, 0, Q, LOW, dtype, SYMMETRIC, EXACT)
                if Q > 1:
                    sum1 += product(g, x, levels_ptr, row, count, 1, Q, LOW, dtype, SYMMETRIC, EXACT)
                if Q > 2:
                    sum2 += product(g, x, levels_ptr, row, count, 2, Q, LOW, dtype, SYMMETRIC, EXACT)
                if Q > 3:
                    sum3 += product(g, x, levels_ptr, row, count, 3, Q, LOW, dtype, SYMMETRIC, EXACT)
    if WANT_PROBS:
        at = dprobs_part_ptr + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * Q
        store_sums(at, sum0, sum1, sum2, sum3, Q)
    if WANT_MASK:
        tl.store(dmask_part_ptr + tl.program_id(1) * N + col, tl.sum(dmask, axis=0) * total, mask=col_ok)
        if last_to_arrive(counter_ptr + 1 + tl.program_id(0), tl.num_programs(1)):
            sum_columns(dmask_part_ptr, dmask_ptr, tl.num_programs(1), N, col, col_ok, BLOCK)
    if WANT_PROBS:
        programs = tl.num_programs(0) * tl.num_programs(1)
        if last_to_arrive(counter_ptr, programs):
            one = tl.arange(0, 16)
            sum_columns(dprobs_part_ptr, dprobs_ptr, programs, Q, one, one < Q, 16, 128)


def row_config(columns: int) -> dict[str, int | bool]:
    """Of the forward. Up to 4096 columns a row stays in registers (72 at 32 elements per thread), unless blocks of 1024
    have less padding. Then, and where it is wider, it goes by in these (56 registers at 8): a row of 14336 took 74 in
    512 threads, so that one program filled a multiprocessor and nothing hid its reads."""
    block, passing = triton.next_power_of_2(columns), triton.cdiv(columns, 1024) * 1024
    if block > 4096 or block > passing:
        return {"BLOCK": 1024, "ROWS": 1, "WHOLE": False, "num_warps": 4}
    return {"BLOCK": block, "ROWS": max(1, 1024 // block), "WHOLE": True, "num_warps": 4}


def backward_config(columns: int) -> dict[str, int]:
    """Columns and rows per tile (4096 elements) and warps."""
    block = min(512, triton.next_power_of_2(columns))
    return {"BLOCK": block, "ROWS": min(32, 4096 // block), "num_warps": 8}


def launch(
    x: Tensor, probs: Tensor, mask: Tensor | None, bits: Sequence[int], symmetric: bool, up: Tensor | None = None,
    out_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and the rows' levels; with ``up``, of masked_swiglu(x, up, out_mask, mask) in place of mask * x."""
    out, flat, config = dense_like(x), rows(x), row_config(x.shape[-1])
    other = flat if up is None else rows(up)
    count, n = flat.shape
    levels = torch.empty(count, len(bits), 2, dtype=torch.float32, device=x.device)
    if out.numel():
        with torch.cuda.device_of(x):
            act_forward_kernel[(triton.cdiv(count, config["ROWS"]),)](
                flat, other, dense(out_mask), dense(mask), probs.contiguous(), out, levels, count, n, flat.stride(0),
                other.stride(0), SWIGLU=up is not None, **config,
                **constants(x.dtype, tuple(bits), symmetric, mask is not None, interpreting()),
            )  # fmt: skip
    return out, levels


def _launch_backward(
    grad: Tensor, x: Tensor | None, probs: Tensor, mask: Tensor | None, levels: Tensor | None, bits: Sequence[int],
    symmetric: bool, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    want_x, want_probs, want_mask = need[0], need[1], need[2] and mask is not None
    g, flat, config = rows(grad), rows(grad if x is None else x), backward_config(grad.shape[-1])
    count, n = g.shape
    blocks = triton.cdiv(n, config["BLOCK"])
    # four per multiprocessor of an H200; none of no rows, whose partial sums nobody would write
    programs = min(triton.cdiv(count, config["ROWS"]), max(1, 528 // blocks))
    dx = dense_like(grad) if want_x else None
    parts = (
        partial_sums(want_probs, programs * blocks, len(bits), g.device), partial_sums(want_mask, programs, n, g.device)
    )  # fmt: skip
    of_probs, of_mask = map(total_of, parts)
    if grad.numel():
        with torch.cuda.device_of(grad):
            act_backward_kernel[(blocks, programs)](
                g, flat, dense(mask), probs.contiguous(), levels, dx, *parts, of_probs, of_mask,
                counters(g, 1 + blocks) if want_probs or want_mask else None, count, n, g.stride(0), flat.stride(0),
                WANT_X=want_x, WANT_PROBS=want_probs, WANT_MASK=want_mask, **config,
                **constants(grad.dtype, tuple(bits), symmetric, mask is not None, interpreting()),
            )  # fmt: skip
    return dx, in_dtype_of(of_probs, probs), in_dtype_of(of_mask, mask)


def on_cpu(
    x: Tensor, probs: Tensor, mask: Tensor | None, bits: Sequence[int], symmetric: bool
) -> tuple[Tensor, Tensor]:
    """The same by the C++ kernel."""
    x = x.contiguous()
    count, width, per_chunk, _ = cpu.chunking(x)
    y = cpu.empty_like(x)
    cpu.call("act_quant_mix", x, cpu.vector(probs), cpu.optional(mask), cpu.integers(bits), y, count, width, len(bits),
             symmetric, per_chunk, cpu.DTYPES[x.dtype])
    return y, no_levels(x, bits)


def backward_on_cpu(
    grad: Tensor, x: Tensor | None, probs: Tensor, mask: Tensor | None, levels: Tensor | None, bits: Sequence[int],
    symmetric: bool, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    """Of the C++ kernel."""
    g = grad.contiguous()
    need_mask = need[2] and mask is not None
    count, width, per_chunk, chunks = cpu.chunking(g, need_mask)
    dx = cpu.empty_like(g) if need[0] else None
    dprobs, dmask = cpu.partial_sums(need[1], count, len(bits)), cpu.partial_sums(need_mask, chunks, width)
    total = float(probs.float().sum())
    source = g if x is None else x.contiguous()
    cpu.call("act_quant_mix_backward", g, source, cpu.optional(mask), cpu.integers(bits), dx, dprobs, dmask, count,
             width, len(bits), symmetric, total, per_chunk, cpu.DTYPES[g.dtype])
    sums = cpu.total(dmask, mask)
    return dx, cpu.total(dprobs, probs), None if sums is None else sums * total


_op = Op(
    "act_quant_mix",
    {"triton": launch, "cpu": on_cpu, "reference": _reference},
    {"triton": _launch_backward, "cpu": backward_on_cpu, "reference": _reference_backward},
    read_for={"x": ("probs", "mask"), "saved0": ("probs", "mask")},
)


def check_precisions(op: str, bits: Sequence[int], probs: Tensor) -> None:
    """Raise unless probs has one entry for each of one to four bit widths."""
    for width in bits:
        if width not in ACT_BITS:
            raise unknown("activation bit width", width, ACT_BITS, where=op)
    if not 1 <= len(bits) <= 4:
        raise bad(op, f"mixes one to four bit widths, got {list(bits)}")
    if tuple(probs.shape) != (len(bits),):
        raise bad(op, f"probs must have one entry per bit width {list(bits)}, got shape {tuple(probs.shape)}")


def act_quant_mix(
    x: Tensor, bits: Sequence[int], probs: Tensor, symmetric: bool = False, mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """y = sum_q probs[q] Q_q(mask * x), each token quantized dynamically (Eq. 8 of arXiv 2606.04063).

    One-hot it is bit for bit what compressed-tensors executes on a reloaded checkpoint (formulas: ops/quant/spec.py).

    Args:
        x: [..., N] in any floating dtype; a token is a row of the last dim.
        bits: one to four bit widths of 2 to 8 and 16, the identity.
        probs: [Q], fp32.
        symmetric: signed levels around 0; else the range of a token has a zero point.
        mask: [N], fp32, rounded to x's dtype after multiplying; None: ones.
        backend: "triton", "cpu" or "reference"; None: by device and dtype.

    Returns:
        [..., N] in x's dtype; gradients to x (straight through), probs and mask.

    Raises:
        JointNASError: bits or shapes that do not exist or fit, or a backend that cannot run.
    """
    check_precisions("act_quant_mix", bits, probs)
    if mask is not None and tuple(mask.shape) != (x.shape[-1],):
        raise bad("act_quant_mix", f"mask must have shape ({x.shape[-1]},), got {tuple(mask.shape)}")
    return _op(x, probs, mask, list(bits), symmetric, backend)[0]
