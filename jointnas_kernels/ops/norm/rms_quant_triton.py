"""Triton kernels of mixed_rmsnorm_quant.py. A row is S segments of SEG channels that no size cuts, as in
mixed_rmsnorm.py; the quantizer is act_quant_mix_triton.py's, whose rows are the segments, all of one scale and zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core.columns import column_sums
from jointnas_kernels.ops.core.dispatch import bad, interpreting, no_grad_slot, processors, rows
from jointnas_kernels.ops.norm.rms import MAX_WIDTH, alpha_at_ends, channel_scale, choice_at_ends, launch_shape
from jointnas_kernels.ops.quant.kernels import constants, round_tile, scale_and_zero, token_levels


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


# ---- launchers ----


def launch_forward(
    x: Tensor, weight: Tensor, alpha: Tensor, sizes: Sequence[int], eps: float, in_mask: Tensor | None,
    bits: Sequence[int], probs: Tensor, symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, inv, levels."""
    flat = rows(x)
    count, width = flat.shape
    if width > MAX_WIDTH:
        raise bad("mixed_rmsnorm", f"the Triton kernel holds rows of at most {MAX_WIDTH}, got {width}")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inv = torch.empty(count, len(sizes), dtype=torch.float32, device=x.device)
    levels = torch.empty(count, len(bits), 2, dtype=torch.float32, device=x.device)
    s, seg, warps, stages = launch_shape(tuple(sizes), width, width * x.element_size())
    if count > 0:
        with torch.cuda.device_of(x):
            norm_quant_forward_kernel[(min(count, max(1, 16 // warps) * processors(x)),)](
                flat, weight.contiguous(), alpha.contiguous(), None if in_mask is None else in_mask.contiguous(),
                probs.contiguous(), y, inv, levels, count, width, flat.stride(0), eps, SIZES=tuple(sizes),
                K=len(sizes), S=s, SEG=seg, LOOP_STAGES=stages, num_warps=warps,
                **constants(x.dtype, tuple(bits), symmetric, in_mask is not None, interpreting()),
            )  # fmt: skip
    return y, inv, levels


def launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, inv: Tensor, levels: Tensor, sizes: Sequence[int],
    in_mask: Tensor | None, bits: Sequence[int], probs: Tensor, symmetric: bool, need_weight: bool, need_alpha: bool,
    need_mask: bool, need_probs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dweight, dalpha, din_mask, dprobs; an empty tensor for each one not wanted."""
    g, flat, weight = rows(grad), rows(x), weight.contiguous()
    count, width = flat.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    need_column = need_weight or (need_mask and in_mask is not None)
    s, seg, warps, stages = launch_shape(tuple(sizes), width, 2 * width * x.element_size())
    programs = min(count, max(1, 8 // warps if need_column and count < 4096 else 16 // warps) * processors(x))
    alphas, precisions = len(sizes) * need_alpha, len(bits) * need_probs
    shares = torch.empty(programs, alphas + precisions, dtype=torch.float32, device=x.device)
    column = torch.empty(programs, width, dtype=torch.float32, device=x.device) if need_column else None
    if count > 0:
        with torch.cuda.device_of(x):
            norm_quant_backward_kernel[(programs,)](
                g, flat, weight, alpha.contiguous(), None if in_mask is None else in_mask.contiguous(),
                probs.contiguous(), inv, levels, dx, shares, column, count, width, g.stride(0), flat.stride(0),
                SIZES=tuple(sizes), K=len(sizes), S=s, SEG=seg, NEED_ALPHA=need_alpha, NEED_COLUMN=need_column,
                NEED_PROBS=need_probs, LOOP_STAGES=stages, num_warps=warps,
                **constants(x.dtype, tuple(bits), symmetric, in_mask is not None, interpreting()),
            )  # fmt: skip
    dw, dalpha, dmask, dprobs = (no_grad_slot(x) for _ in range(4))
    sums = None
    if column is not None:
        # dm = w P; with a weight gradient too, P itself is needed and scaled by torch
        total, sums = column_sums(column, shares if shares.shape[1] else None, None if need_weight else weight)
        if need_mask and in_mask is not None:
            dmask = (total * weight if need_weight else total).to(in_mask.dtype)
        if need_weight:
            dw = (total if in_mask is None else total * in_mask).to(weight.dtype)
    elif shares.shape[1]:
        sums = column_sums(shares)[0]
    if sums is not None and need_alpha:
        dalpha = sums[:alphas].to(alpha.dtype)
    if sums is not None and need_probs:
        dprobs = sums[alphas:].to(probs.dtype)
    return dx, dw, dalpha, dmask, dprobs
