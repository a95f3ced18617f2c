"""Triton kernels of mixed_rmsnorm. A row is S segments of SEG channels that no size cuts, so that all K prefix sums are
one scan of S numbers; the quantizer (Q > 0 precisions) is act_quant_mix's, its rows the segments, all of one scale."""

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core.backends import interpreting
from jointnas_kernels.ops.core.columns import STAGES, column_sums, partial_sums
from jointnas_kernels.ops.core.tensors import bad, dense, dense_like, in_dtype_of, power_of_two, processors, rows
from jointnas_kernels.ops.norm.rms.reference import Gradients, Sizes, of_column
from jointnas_kernels.ops.quant.kernels import (
    constants,
    larger,
    round_tile,
    scale_and_zero,
    smaller,
    store_sums,
    token_levels,
)

MAX_WIDTH = 32768  # a row is held in the registers of one program: 64 fp32 values per thread at 16 warps


@triton.jit
def of_every_row(
    w_ptr, mask_ptr, alpha_ptr, width, SIZES: tl.constexpr, K: tl.constexpr, S: tl.constexpr, SEG: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """(channels, which exist, their w m [S, SEG]; segments, channels up to their ends, the alpha ending there, whether
    a size does [S])."""
    segment = tl.arange(0, S)
    col = segment[:, None] * SEG + tl.arange(0, SEG)[None, :]
    ok = col < width
    end = tl.minimum((segment + 1) * SEG, width).to(tl.float32)
    scale = tl.load(w_ptr + col, mask=ok, other=0.0).to(tl.float32)
    if HAS_MASK:
        scale *= tl.load(mask_ptr + col, mask=ok, other=0.0).to(tl.float32)
    at_end = tl.zeros([S], tl.float32)
    ends = segment < 0
    for i in tl.static_range(K):
        here = segment == (SIZES[i] - 1) // SEG
        at_end += tl.where(here, tl.load(alpha_ptr + i).to(tl.float32), 0.0)
        ends = ends | here
    return col, ok, scale, segment, end, at_end, ends


@triton.jit
def spread(value, ends):
    """[S]: sums of value over the ends from each segment on; others' values, NaN perhaps, do not count."""
    return tl.cumsum(tl.where(ends, value, 0.0), axis=0, reverse=True)


@triton.jit
def rmsnorm_forward_kernel(
    x_ptr, add_ptr, w_ptr, alpha_ptr, mask_ptr, probs_ptr, h_ptr, y_ptr, inv_ptr, levels_ptr, count, width, x_stride,
    add_stride, norm_eps,
    SIZES: tl.constexpr, K: tl.constexpr, S: tl.constexpr, SEG: tl.constexpr, HAS_MASK: tl.constexpr,
    Q: tl.constexpr, LOW: tl.constexpr, INVERSE: tl.constexpr, REST: tl.constexpr, eps: tl.constexpr,
    SYMMETRIC: tl.constexpr, EXACT: tl.constexpr, ADDS: tl.constexpr, LOOP_STAGES: tl.constexpr,
):  # fmt: skip
    """Rows pid, pid + programs, ..; t is the suffix scan of alpha_i inv_i placed where the sizes end. ADDS: of h = x +
    mask add, which is written, too."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    col, ok, scale, segment, end, at_end, ends = of_every_row(
        w_ptr, mask_ptr, alpha_ptr, width, SIZES, K, S, SEG, HAS_MASK
    )
    zero = tl.zeros([S], tl.float32)
    for index in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=LOOP_STAGES):
        row = tl.cast(index, tl.int64)
        x = tl.load(x_ptr + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
        if ADDS:
            add = tl.load(add_ptr + row * add_stride + col, mask=ok, other=0.0).to(tl.float32)
            x = round_tile(add * tl.load(mask_ptr + col, mask=ok, other=0.0).to(tl.float32) + x, dtype, EXACT)
            tl.store(h_ptr + row * width + col, x.to(dtype), mask=ok)
        inv = tl.rsqrt(tl.cumsum(tl.sum(x * x, axis=1), axis=0) / end + norm_eps)  # [S]
        t = spread(at_end * inv, ends)
        y = x * scale * t[:, None]
        if Q > 0:
            v = round_tile(y, dtype, EXACT)
            least = smaller(tl.reduce(tl.reduce(v, 1, smaller), 0, smaller), 0.0)
            most = larger(tl.reduce(tl.reduce(v, 1, larger), 0, larger), 0.0)
            y = tl.zeros([S, SEG], tl.float32)
            for q in tl.static_range(Q):
                pi = tl.load(probs_ptr + q).to(tl.float32)
                if LOW[q] == 0.0:
                    y = tl.fma(v, tl.full([S, SEG], 1.0, tl.float32) * pi, y)
                else:
                    s, z = scale_and_zero(least, most, LOW[q], INVERSE[q], REST[q], eps, dtype, SYMMETRIC, EXACT)
                    tl.store(levels_ptr + (row * Q + q) * 2, s)
                    tl.store(levels_ptr + (row * Q + q) * 2 + 1, z)
                    level = token_levels(v, zero + s, zero + z, LOW[q], dtype, SYMMETRIC, EXACT)
                    y = tl.fma(level, tl.full([S, SEG], 1.0, tl.float32) * (pi * s), y)
        tl.store(y_ptr + row * width + col, y.to(dtype), mask=ok)
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
def rmsnorm_backward_kernel(
    g_ptr, x_ptr, w_ptr, alpha_ptr, mask_ptr, probs_ptr, inv_ptr, levels_ptr, gh_ptr, add_ptr, dx_ptr, dadd_ptr,
    shares_ptr, column_ptr, count, width, g_stride, x_stride, gh_stride, add_stride,
    SIZES: tl.constexpr, K: tl.constexpr, S: tl.constexpr, SEG: tl.constexpr, HAS_MASK: tl.constexpr,
    Q: tl.constexpr, LOW: tl.constexpr, INVERSE: tl.constexpr, REST: tl.constexpr, eps: tl.constexpr,
    SYMMETRIC: tl.constexpr, EXACT: tl.constexpr, NEED_ALPHA: tl.constexpr, NEED_COLUMN: tl.constexpr,
    NEED_PROBS: tl.constexpr, ADDS: tl.constexpr, LOOP_STAGES: tl.constexpr,
):  # fmt: skip
    """dx of the rows pid, pid + programs, .., and this program's share of dalpha and dprobs (a row of shares: K columns
    if NEED_ALPHA, then Q <= 4 if NEED_PROBS) and of the column sums of P g x t (NEED_COLUMN), P the sum of probs.

    ADDS: x is h = x + mask add, and gh what h has from elsewhere. dx = dh, dadd = mask dh, and the column sums are the
    mask's: w P g x t + dh add. Weight and mask are then read for each row, from the first-level cache: they are 32 of
    90 registers."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    col, ok, scale, segment, end, at_end, ends = of_every_row(
        w_ptr, mask_ptr, alpha_ptr, width, SIZES, K, S, SEG, HAS_MASK
    )
    which = tl.zeros([S], tl.int32)  # the size that ends in a segment, for one load of all inv_i; if none, any
    for i in tl.static_range(K):
        which = tl.where(segment == (SIZES[i] - 1) // SEG, i, which)
    total = 1.0 if Q == 0 else 0.0
    for q in tl.static_range(Q):
        total += tl.load(probs_ptr + q).to(tl.float32)
    column = tl.zeros([S, SEG], tl.float32)
    dalpha = tl.zeros([S], tl.float32)
    if NEED_PROBS:
        sum0 = folded(column, S, SEG)
        sum1, sum2, sum3 = sum0, sum0, sum0
    for index in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=LOOP_STAGES):
        row = tl.cast(index, tl.int64)
        inv = tl.load(inv_ptr + row * K + which, mask=ends, other=0.0)  # [S]
        x = tl.load(x_ptr + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + row * g_stride + col, mask=ok, other=0.0).to(tl.float32)
        h = g * scale
        share = tl.cumsum(tl.sum(h * x, axis=1), axis=0) * inv  # [S], inv_i S_i where sizes end, of g in place of P g
        t = tl.cumsum(at_end * inv, axis=0, reverse=True)
        back = spread(at_end * inv * inv * share / end, ends) * total
        whole = t * total
        if NEED_ALPHA:
            dalpha += share
        dx = h * whole[:, None] - x * back[:, None]
        of_mask = g * x * whole[:, None]
        if ADDS:
            dx += tl.load(gh_ptr + row * gh_stride + col, mask=ok, other=0.0).to(tl.float32)
            mask = tl.load(mask_ptr + col, mask=ok, other=0.0).to(tl.float32)
            tl.store(dadd_ptr + row * width + col, mask * dx, mask=ok)
            if NEED_COLUMN:
                add = tl.load(add_ptr + row * add_stride + col, mask=ok, other=0.0).to(tl.float32)
                w = tl.load(w_ptr + col, mask=ok, other=0.0).to(tl.float32)
                of_mask = w * of_mask + dx * add
        tl.store(dx_ptr + row * width + col, dx, mask=ok)
        if NEED_COLUMN:
            column += of_mask
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
        store_sums(at, sum0, sum1, sum2, sum3, Q)
    if NEED_COLUMN:
        tl.store(column_ptr + tl.program_id(0).to(tl.int64) * width + col, column, mask=ok)


@functools.lru_cache(maxsize=1024)
def launch_shape(sizes: tuple[int, ...], width: int, row_bytes: int) -> tuple[int, int, int, int]:
    """(S, SEG, warps, stages): the widest power-of-two segments that no size cuts; 16 fp32 values of a row per thread
    up to 8192 channels, then more; rows in flight up to 64 KB of shared memory per program."""
    inner = [size for size in sizes if size < width]
    divisor = math.gcd(*inner) if inner else power_of_two(width)
    seg = min(divisor & -divisor, power_of_two(width))
    warps = max(1, min(16, power_of_two(width) // 512))
    return power_of_two(-(-width // seg)), seg, warps, max(1, min(STAGES, 65536 // row_bytes))


def launch(
    x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, probs: Tensor | None, sizes: Sizes, eps: float,
    bits: Sequence[int], symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """y, inv and, with probs, levels."""
    return launch_sum(x, None, weight, alpha, in_mask, probs, sizes, eps, bits, symmetric)[1:]


def launch_sum(
    x: Tensor, add: Tensor | None, weight: Tensor, alpha: Tensor, mask: Tensor | None, probs: Tensor | None,
    sizes: Sizes, eps: float, bits: Sequence[int], symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """h = x + mask add, or x itself, and y, inv, levels of h."""
    flat, more = rows(x), None if add is None else rows(add)
    count, width = flat.shape
    if width > MAX_WIDTH:
        raise bad("mixed_rmsnorm", f"the Triton kernel holds rows of at most {MAX_WIDTH}, got {width}")
    h = x if add is None else dense_like(x)
    y, inv = dense_like(x), torch.empty(count, len(sizes), dtype=torch.float32, device=x.device)
    levels = None if probs is None else torch.empty(count, len(bits), 2, dtype=torch.float32, device=x.device)
    s, seg, warps, stages = launch_shape(tuple(sizes), width, width * x.element_size())
    programs = min(count, max(1, (32 if probs is None else 16) // warps) * processors(x))
    if count > 0:
        with torch.cuda.device_of(x):
            rmsnorm_forward_kernel[(programs,)](
                flat, more, weight.contiguous(), alpha.contiguous(), dense(mask), dense(probs), h, y, inv, levels,
                count, width, flat.stride(0), 0 if more is None else more.stride(0), eps, SIZES=tuple(sizes),
                K=len(sizes), S=s, SEG=seg, ADDS=add is not None, LOOP_STAGES=stages, num_warps=warps,
                **constants(x.dtype, tuple(bits), symmetric, mask is not None, interpreting()),
            )  # fmt: skip
    return h, y, inv, levels


def launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, probs: Tensor | None, inv: Tensor,
    levels: Tensor | None, sizes: Sizes, eps: float, bits: Sequence[int], symmetric: bool, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    """Of both; without probs of the norm alone."""
    dx, _, dalpha, column, dprobs = launch_sum_backward(
        None, grad, x, None, weight, alpha, in_mask, probs, inv, levels, sizes, eps, bits, symmetric,
        (True, True, need[2], need[1] or (need[3] and in_mask is not None), need[4]), scaled=not need[1],
    )  # fmt: skip
    dw, dmask = of_column(column, weight, in_mask, need, scaled=not need[1])
    return dx, dw, dalpha, dmask, dprobs


def launch_sum_backward(
    of_h: Tensor | None, grad: Tensor, h: Tensor, add: Tensor | None, weight: Tensor, alpha: Tensor,
    mask: Tensor | None, probs: Tensor | None, inv: Tensor, levels: Tensor | None, sizes: Sizes, eps: float,
    bits: Sequence[int], symmetric: bool, need: Sequence[bool], scaled: bool = False,
) -> Gradients:  # fmt: skip
    """dx, dadd, dalpha, dmask, dprobs from the gradients of h and y. Without one of h, nothing was added: then column
    sums P (``scaled``: w P) in place of dmask, no dadd."""
    g, flat, weight, mask, adds = rows(grad), rows(h), weight.contiguous(), dense(mask), of_h is not None
    gh, more = g if of_h is None else rows(of_h), g if add is None else rows(add)
    count, width = flat.shape
    need_column = need[3]
    s, seg, warps, stages = launch_shape(tuple(sizes), width, (4 if adds else 2) * width * h.element_size())
    # what fits beside ~90 registers per thread; beside few rows, half of it keeps the partial column sums small
    programs = min(count, max(1, (8 if need_column and count < 4096 else 16) // warps) * processors(h))
    alphas, precisions = len(sizes) * need[2], len(bits) * need[4]
    dx, shares = dense_like(h), partial_sums(need[2] or need[4], programs, alphas + precisions, h.device)
    dadd, column = dense_like(h) if adds else None, partial_sums(need_column, programs, width, h.device)
    if count > 0:
        with torch.cuda.device_of(h):
            rmsnorm_backward_kernel[(programs,)](
                g, flat, weight, alpha.contiguous(), mask, dense(probs), inv, levels, gh, more, dx, dadd, shares,
                column, count, width, g.stride(0), flat.stride(0), gh.stride(0), more.stride(0), SIZES=tuple(sizes),
                K=len(sizes), S=s, SEG=seg, NEED_ALPHA=need[2], NEED_COLUMN=need_column, NEED_PROBS=need[4], ADDS=adds,
                LOOP_STAGES=stages, num_warps=warps,
                **constants(h.dtype, tuple(bits), symmetric, mask is not None, interpreting()),
            )  # fmt: skip
    # dm = w P; with a weight gradient too, P itself is needed and scaled by torch
    total, sums = column_sums(column, shares, weight if scaled else None)
    dalpha = in_dtype_of(sums[:alphas], alpha) if sums is not None and need[2] else None
    dprobs = in_dtype_of(sums[alphas:], probs) if sums is not None and need[4] else None
    return dx, dadd, dalpha, in_dtype_of(total, mask) if adds else total, dprobs
