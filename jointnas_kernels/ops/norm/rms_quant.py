"""mixed_rmsnorm with the mixture of activation precisions behind it, in one read of x and one write of y.

    v = mixed_rmsnorm(x), rounded to x's dtype            y = sum_q probs[q] Q_q(v)

exactly mixed_rmsnorm followed by act_quant_mix (no mask there: it is in the norm), level by level: v is computed in the
order of the unfused kernel of the same backend. Backward, from g = dL/dy with P = sum_q probs[q] (straight through:
scales and zero points are constants):

    dprobs[q] = <g, Q_q(v)>, v recomputed from x and inv        dx, dalpha, din_mask, dweight: RMSNorm's, of dv = P g

Beside the inputs it saves inv [rows, K] and levels [rows, Q, 2], the scale and zero point of every row and precision
(the reference computes those again); v is never in memory. dv stays in fp32, where the two ops apart round it.

In the Triton kernels a row is S segments of SEG channels that no size cuts, as in rms.py; the quantizer is that of
act_quant_mix, whose rows are the segments, all of one scale and zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core import cpu
from jointnas_kernels.ops.core.backends import interpreting
from jointnas_kernels.ops.core.columns import partial_sums
from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import compute_dtype, dense, dense_like, in_dtype_of, processors, rows
from jointnas_kernels.ops.norm import rms
from jointnas_kernels.ops.norm.rms import Sizes, alpha_at_ends, channel_scale, choice_at_ends, launch_shape
from jointnas_kernels.ops.quant.activations import act_quant_mix_reference, probs_gradient
from jointnas_kernels.ops.quant.kernels import constants, round_tile, scale_and_zero, token_levels

Gradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # the norm's, then dprobs

# ---- reference ----


def _reference(
    x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, probs: Tensor, sizes: Sizes, eps: float,
    bits: Sequence[int], symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y like x, inv [rows, K] and levels [rows, Q, 2], here zeros."""
    v, inv = rms.reference(x, weight, alpha, in_mask, sizes, eps)
    levels = torch.zeros(inv.shape[0], len(bits), 2, dtype=torch.float32, device=x.device)
    return act_quant_mix_reference(v, bits, probs, symmetric), inv, levels


def _reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, probs: Tensor, inv: Tensor,
    levels: Tensor | None, sizes: Sizes, eps: float, bits: Sequence[int], symmetric: bool, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    g, dprobs = grad.to(compute_dtype(x.dtype)), None
    if need[4]:
        v = rms.normalised(x, weight, alpha, in_mask, inv, sizes)
        dprobs = probs_gradient(grad, v, probs, bits, symmetric)
    dv = g * probs.to(g.dtype).sum()
    return *rms.reference_backward(dv, x, weight, alpha, in_mask, inv, sizes, eps, need), dprobs


# ---- Triton ----


@triton.jit
def norm_quant_forward_kernel(
    x_ptr, w_ptr, alpha_ptr, mask_ptr, probs_ptr, y_ptr, inv_ptr, levels_ptr, count, width, x_stride, norm_eps,
    SIZES: tl.constexpr, K: tl.constexpr, S: tl.constexpr, SEG: tl.constexpr, HAS_MASK: tl.constexpr,
    Q: tl.constexpr, LOW: tl.constexpr, INVERSE: tl.constexpr, REST: tl.constexpr, eps: tl.constexpr,
    SYMMETRIC: tl.constexpr, EXACT: tl.constexpr, LOOP_STAGES: tl.constexpr,
):  # fmt: skip
    """Rows pid, pid + programs, ..; x * scale * t as in rmsnorm_forward_kernel, so that the levels are the same."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    segment = tl.arange(0, S)
    col = segment[:, None] * SEG + tl.arange(0, SEG)[None, :]  # [S, SEG]
    ok = col < width
    end = tl.minimum((segment + 1) * SEG, width).to(tl.float32)
    scale = channel_scale(w_ptr, mask_ptr, col, ok, HAS_MASK)
    at_end = alpha_at_ends(alpha_ptr, segment, SIZES, K, SEG)
    zero = tl.zeros([S], tl.float32)
    for index in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=LOOP_STAGES):
        row = tl.cast(index, tl.int64)
        x = tl.load(x_ptr + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
        inv = tl.rsqrt(tl.cumsum(tl.sum(x * x, axis=1), axis=0) / end + norm_eps)  # [S]
        t = tl.cumsum(at_end * inv, axis=0, reverse=True)
        v = round_tile(x * scale * t[:, None], dtype, EXACT)
        least = tl.minimum(tl.min(tl.min(v, axis=1), axis=0), 0.0)
        most = tl.maximum(tl.max(tl.max(v, axis=1), axis=0), 0.0)
        mixed = tl.zeros([S, SEG], tl.float32)
        for q in tl.static_range(Q):
            pi = tl.load(probs_ptr + q).to(tl.float32)
            if LOW[q] == 0.0:
                mixed = tl.fma(v, tl.full([S, SEG], 1.0, tl.float32) * pi, mixed)
            else:
                s, z = scale_and_zero(least, most, LOW[q], INVERSE[q], REST[q], eps, dtype, SYMMETRIC, EXACT)
                tl.store(levels_ptr + (row * Q + q) * 2, s)
                tl.store(levels_ptr + (row * Q + q) * 2 + 1, z)
                level = token_levels(v, zero + s, zero + z, LOW[q], dtype, SYMMETRIC, EXACT)
                mixed = tl.fma(level, tl.full([S, SEG], 1.0, tl.float32) * (pi * s), mixed)
        tl.store(y_ptr + row * width + col, mixed.to(dtype), mask=ok)
        for i in tl.static_range(K):
            tl.store(inv_ptr + row * K + i + segment * 0, inv, mask=segment == (SIZES[i] - 1) // SEG)


@triton.jit
def folded(v, S: tl.constexpr, SEG: tl.constexpr):
    """[S, SEG] summed down to one value per thread where each holds two runs of 8 channels (launch_shape)."""
    F: tl.constexpr = SEG if SEG < 8 else 8
    runs: tl.constexpr = S * SEG // F
    H: tl.constexpr = runs if runs < 2 else 2
    return tl.sum(tl.sum(tl.reshape(v, [H, runs // H, F]), axis=2), axis=0)


@triton.jit
def product(
    g, v, levels_ptr, row, q: tl.constexpr, Q: tl.constexpr, LOW: tl.constexpr, S: tl.constexpr, SEG: tl.constexpr,
    dtype: tl.constexpr, SYMMETRIC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """g ⊙ Q_q(v) of one row, folded."""
    if LOW[q] == 0.0:
        return folded(g * v, S, SEG)
    else:
        zero = tl.zeros([S], tl.float32)
        s, z = tl.load(levels_ptr + (row * Q + q) * 2), tl.load(levels_ptr + (row * Q + q) * 2 + 1)
        return folded(g * (token_levels(v, zero + s, zero + z, LOW[q], dtype, SYMMETRIC, EXACT) * s), S, SEG)


@triton.jit
def norm_quant_backward_kernel(
    g_ptr, x_ptr, w_ptr, alpha_ptr, mask_ptr, probs_ptr, inv_ptr, levels_ptr, dx_ptr, shares_ptr, column_ptr, count,
    width, g_stride, x_stride,
    SIZES: tl.constexpr, K: tl.constexpr, S: tl.constexpr, SEG: tl.constexpr, HAS_MASK: tl.constexpr,
    Q: tl.constexpr, LOW: tl.constexpr, INVERSE: tl.constexpr, REST: tl.constexpr, eps: tl.constexpr,
    SYMMETRIC: tl.constexpr, EXACT: tl.constexpr, NEED_ALPHA: tl.constexpr, NEED_COLUMN: tl.constexpr,
    NEED_PROBS: tl.constexpr, LOOP_STAGES: tl.constexpr,
):  # fmt: skip
    """dx of the rows pid, pid + programs, .., and this program's share of dalpha and dprobs (a row of shares: K columns
    if NEED_ALPHA, then Q if NEED_PROBS) and of the column sums of P g x t (NEED_COLUMN). Q <= 4."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    segment = tl.arange(0, S)
    col = segment[:, None] * SEG + tl.arange(0, SEG)[None, :]  # [S, SEG]
    ok = col < width
    end = tl.minimum((segment + 1) * SEG, width).to(tl.float32)
    scale = channel_scale(w_ptr, mask_ptr, col, ok, HAS_MASK)
    at_end = alpha_at_ends(alpha_ptr, segment, SIZES, K, SEG)
    which = choice_at_ends(segment, SIZES, K, SEG)
    total = 0.0
    for q in tl.static_range(Q):
        total += tl.load(probs_ptr + q).to(tl.float32)
    column = tl.zeros([S, SEG], tl.float32)
    dalpha = tl.zeros([S], tl.float32)
    sum0 = folded(column, S, SEG)
    sum1, sum2, sum3 = sum0, sum0, sum0
    for index in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=LOOP_STAGES):
        row = tl.cast(index, tl.int64)
        inv = tl.load(inv_ptr + row * K + which)  # [S]
        x = tl.load(x_ptr + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + row * g_stride + col, mask=ok, other=0.0).to(tl.float32)
        h = g * scale
        share = tl.cumsum(tl.sum(h * x, axis=1), axis=0) * inv  # [S], inv_i S_i where sizes end, of g in place of P g
        t = tl.cumsum(at_end * inv, axis=0, reverse=True)
        back = tl.cumsum(at_end * inv * inv * share / end, axis=0, reverse=True) * total
        whole = t * total
        if NEED_ALPHA:
            dalpha += share
        tl.store(dx_ptr + row * width + col, h * whole[:, None] - x * back[:, None], mask=ok)
        if NEED_COLUMN:
            column += g * x * whole[:, None]
        if NEED_PROBS:
            v = round_tile(x * scale * t[:, None], dtype, EXACT)
            sum0 += product(g, v, levels_ptr, row, 0, Q, LOW, S, SEG, dtype, SYMMETRIC, EXACT)
            if Q > 1:
                sum1 += product(g, v, levels_ptr, row, 1, Q, LOW, S, SEG, dtype, SYMMETRIC, EXACT)
            if Q > 2:
                sum2 += product(g, v, levels_ptr, row, 2, Q, LOW, S, SEG, dtype, SYMMETRIC, EXACT)
            if Q > 3:
                sum3 += product(g, v, levels_ptr, row, 3, Q, LOW, S, SEG, dtype, SYMMETRIC, EXACT)
    at = shares_ptr
    if NEED_ALPHA:
        at += tl.program_id(0) * (K + Q if NEED_PROBS else K)
        for i in tl.static_range(K):
            tl.store(at + i + segment * 0, dalpha * total, mask=segment == (SIZES[i] - 1) // SEG)
        at += K
    elif NEED_PROBS:
        at += tl.program_id(0) * Q
    if NEED_PROBS:
        tl.store(at, tl.sum(sum0))
        if Q > 1:
            tl.store(at + 1, tl.sum(sum1))
        if Q > 2:
            tl.store(at + 2, tl.sum(sum2))
        if Q > 3:
            tl.store(at + 3, tl.sum(sum3))
    if NEED_COLUMN:
        tl.store(column_ptr + tl.program_id(0).to(tl.int64) * width + col, column, mask=ok)


def _launch(
    x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, probs: Tensor, sizes: Sizes, eps: float,
    bits: Sequence[int], symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    flat = rms.rows_in_registers(x)
    count, width = flat.shape
    y, inv = dense_like(x), torch.empty(count, len(sizes), dtype=torch.float32, device=x.device)
    levels = torch.empty(count, len(bits), 2, dtype=torch.float32, device=x.device)
    s, seg, warps, stages = launch_shape(tuple(sizes), width, width * x.element_size())
    if count > 0:
        with torch.cuda.device_of(x):
            norm_quant_forward_kernel[(min(count, max(1, 16 // warps) * processors(x)),)](
                flat, weight.contiguous(), alpha.contiguous(), dense(in_mask), probs.contiguous(), y, inv, levels,
                count, width, flat.stride(0), eps, SIZES=tuple(sizes), K=len(sizes), S=s, SEG=seg, LOOP_STAGES=stages,
                num_warps=warps, **constants(x.dtype, tuple(bits), symmetric, in_mask is not None, interpreting()),
            )  # fmt: skip
    return y, inv, levels


def _launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, probs: Tensor, inv: Tensor,
    levels: Tensor | None, sizes: Sizes, eps: float, bits: Sequence[int], symmetric: bool, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    g, flat, weight, in_mask = rows(grad), rows(x), weight.contiguous(), dense(in_mask)
    count, width = flat.shape
    need_column = need[1] or (need[3] and in_mask is not None)
    s, seg, warps, stages = launch_shape(tuple(sizes), width, 2 * width * x.element_size())
    programs = rms.backward_programs(x, count, warps, need_column)
    alphas, precisions = len(sizes) * need[2], len(bits) * need[4]
    dx, shares = dense_like(x), partial_sums(need[2] or need[4], programs, alphas + precisions, x.device)
    column = partial_sums(need_column, programs, width, x.device)
    if count > 0:
        with torch.cuda.device_of(x):
            norm_quant_backward_kernel[(programs,)](
                g, flat, weight, alpha.contiguous(), in_mask, probs.contiguous(), inv, levels, dx, shares, column,
                count, width, g.stride(0), flat.stride(0), SIZES=tuple(sizes), K=len(sizes), S=s, SEG=seg,
                NEED_ALPHA=need[2], NEED_COLUMN=need_column, NEED_PROBS=need[4], LOOP_STAGES=stages, num_warps=warps,
                **constants(x.dtype, tuple(bits), symmetric, in_mask is not None, interpreting()),
            )  # fmt: skip
    dw, dmask, sums = rms.summed(column, shares, weight, in_mask, need)
    dalpha = in_dtype_of(sums[:alphas], alpha) if sums is not None and need[2] else None
    dprobs = in_dtype_of(sums[alphas:], probs) if sums is not None and need[4] else None
    return dx, dw, dalpha, dmask, dprobs


# ---- C++ ----


def _cpu(
    x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, probs: Tensor, sizes: Sizes, eps: float,
    bits: Sequence[int], symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x = x.contiguous()
    count, width = cpu.matrix(x)
    ends, kept = rms.segments(tuple(sizes))
    y, inv, levels = cpu.empty_like(x), cpu.floats(count, len(sizes)), cpu.floats(count, len(bits), 2)
    cpu.call("mixed_rmsnorm_quant", x, rms.masked_scale(weight, in_mask), cpu.vector(alpha), ends, kept,
             cpu.vector(probs), cpu.integers(bits), y, inv, levels, count, width, len(ends), len(sizes), len(bits),
             symmetric, float(eps), cpu.chunking(count, width)[0], cpu.DTYPES[x.dtype])
    return y, inv, levels


def _cpu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, probs: Tensor, inv: Tensor,
    levels: Tensor | None, sizes: Sizes, eps: float, bits: Sequence[int], symmetric: bool, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    """Without dprobs it is the norm's backward of P g, P put into the weight."""
    mass = float(probs.float().sum())
    if levels is None or not need[4]:
        scaled = cpu.vector(weight) * mass
        dx, dw, dalpha, dmask = rms.cpu_backward(grad, x, scaled, alpha, in_mask, inv, sizes, eps, need)
        return dx, None if dw is None else (dw * mass).to(weight.dtype), dalpha, dmask, None
    g, x = grad.contiguous(), x.contiguous()
    count, width = cpu.matrix(g)
    ends, kept = rms.segments(tuple(sizes))
    need_column = need[1] or (need[3] and in_mask is not None)
    per_chunk, chunks = cpu.chunking(count, width, need_column)
    dx, shares = cpu.empty_like(g), cpu.partial_sums(need[2], count, len(sizes))
    dprobs, partial = cpu.floats(count, len(bits)), cpu.partial_sums(need_column, chunks, width)
    cpu.call("mixed_rmsnorm_quant_backward", g, x, rms.masked_scale(weight, in_mask), cpu.vector(alpha),
             inv.contiguous(), ends, kept, levels.contiguous(), cpu.integers(bits), dx, shares, dprobs, partial, count,
             width, len(ends), len(sizes), len(bits), mass, per_chunk, cpu.DTYPES[g.dtype])
    dw, dmask = rms.of_column(None if partial is None else partial.sum(0), weight, in_mask, need)
    return dx, dw, cpu.total(shares, alpha), dmask, cpu.total(dprobs, probs)


op = Op(
    "mixed_rmsnorm_quant",
    {"triton": _launch, "cpu": _cpu, "reference": _reference},
    {"triton": _launch_backward, "cpu": _cpu_backward, "reference": _reference_backward},
    read_for={"saved1": ("probs",)},
    public="mixed_rmsnorm",
)
