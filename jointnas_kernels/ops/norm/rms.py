"""mixed_rmsnorm without quantization: the expectation of RMSNorm over hidden-size choices.

At one-hot alpha it is RMSNorm over the first N_i channels; full-width statistics would be off by sqrt(N_i / N).

    inv_i = rsqrt(mean_{k < N_i} x_k^2 + eps)           t_k = sum_{i: k < N_i} alpha_i inv_i           y = m w x t

Backward, with g = dL/dy, h = m w g and prefix sums S_i = sum_{k < N_i} h_k x_k:

    dx_k = h_k t_k - x_k sum_{i: k < N_i} alpha_i S_i inv_i^3 / N_i        dalpha_i = sum over rows of inv_i S_i
    P_k = sum over rows of g_k x_k t_k,   dm = w P,   dw = m P             (only when asked for)

inv [rows, K] is the only thing saved beside the inputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core import cpu
from jointnas_kernels.ops.core.columns import STAGES, column_sums, partial_sums
from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import (
    bad,
    compute_dtype,
    dense,
    dense_like,
    in_dtype_of,
    power_of_two,
    processors,
    rows,
)

Sizes = Sequence[int]
Gradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # dx, dweight, dalpha, din_mask
MAX_WIDTH = 32768  # a row is held in the registers of one program: 64 fp32 values per thread at 16 warps


# ---- reference ----


def _segments(sizes: Sizes) -> list[tuple[int, int, list[int]]]:
    """(start, end, choices that keep it) for each stretch of channels kept by the same choices."""
    bounds = [0, *sorted(set(sizes))]
    return [(lo, hi, [i for i, size in enumerate(sizes) if size >= hi]) for lo, hi in pairwise(bounds)]


def _prefix_sums(v: Tensor, sizes: Sizes) -> Tensor:
    """[rows, K]: sum of the first sizes[i] channels, each channel read once."""
    out = v.new_zeros(v.shape[0], len(sizes))
    for lo, hi, kept_by in _segments(sizes):
        out[:, kept_by] += v[:, lo:hi].sum(-1, keepdim=True)
    return out


def _spread(value: Tensor, sizes: Sizes, n: int) -> Tensor:
    """[rows, n]: sum of value[:, i] over the choices that keep the channel."""
    parts = [value[:, kept_by].sum(-1, keepdim=True).expand(-1, hi - lo) for lo, hi, kept_by in _segments(sizes)]
    parts.append(value.new_zeros(value.shape[0], n - max(sizes)))
    return torch.cat(parts, dim=-1)


def reference(
    x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, sizes: Sizes, eps: float
) -> tuple[Tensor, Tensor]:
    """y like x and inv [rows, K]."""
    v = rows(x).to(compute_dtype(x.dtype))
    inv = torch.rsqrt(_prefix_sums(v.square(), sizes) / v.new_tensor(sizes) + eps)
    return normalised(x, weight, alpha, in_mask, inv, sizes), inv


def normalised(
    x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, inv: Tensor, sizes: Sizes
) -> Tensor:  # fmt: skip
    """y like x from inv [rows, K]."""
    acc = compute_dtype(x.dtype)
    t = _spread(inv * alpha.to(acc), sizes, x.shape[-1])
    scale = weight.to(acc) if in_mask is None else weight.to(acc) * in_mask.to(acc)
    return (rows(x).to(acc) * t * scale).to(x.dtype).reshape(x.shape)


def reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, inv: Tensor, sizes: Sizes,
    eps: float, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    """The formulas above."""
    acc = compute_dtype(x.dtype)
    n = x.shape[-1]
    v, g, a = rows(x).to(acc), rows(grad).to(acc), alpha.to(acc)
    h = g * (weight.to(acc) if in_mask is None else weight.to(acc) * in_mask.to(acc))
    prefix = _prefix_sums(h * v, sizes)
    t = _spread(inv * a, sizes, n)
    dx = h * t - v * _spread(a * prefix * inv**3 / v.new_tensor(sizes), sizes, n)
    dalpha = (inv * prefix).sum(0).to(alpha.dtype) if need[2] else None
    dw, dmask = of_column((g * v * t).sum(0) if need[1] or need[3] else None, weight, in_mask, need)
    return dx.to(x.dtype).reshape(x.shape), dw, dalpha, dmask


def of_column(
    column: Tensor | None, weight: Tensor, in_mask: Tensor | None, need: Sequence[bool], scaled: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """dweight and din_mask from P [N]; ``scaled``: it is w P already."""
    dw = dmask = None
    if column is not None and need[1]:
        dw = (column if in_mask is None else column * in_mask).to(weight.dtype)
    if column is not None and need[3] and in_mask is not None:
        dmask = (column if scaled else column * weight).to(in_mask.dtype)
    return dw, dmask


# ---- Triton ----


@triton.jit
def channel_scale(w_ptr, mask_ptr, col, ok, HAS_MASK: tl.constexpr):
    """w, times the mask if there is one."""
    scale = tl.load(w_ptr + col, mask=ok, other=0.0).to(tl.float32)
    if HAS_MASK:
        scale *= tl.load(mask_ptr + col, mask=ok, other=0.0).to(tl.float32)
    return scale


@triton.jit
def alpha_at_ends(alpha_ptr, segment, SIZES: tl.constexpr, K: tl.constexpr, SEG: tl.constexpr):
    """[S]: the sum of alpha_i over the sizes that end in a segment."""
    at_end = tl.zeros(segment.shape, tl.float32)
    for i in tl.static_range(K):
        at_end += tl.where(segment == (SIZES[i] - 1) // SEG, tl.load(alpha_ptr + i).to(tl.float32), 0.0)
    return at_end


@triton.jit
def choice_at_ends(segment, SIZES: tl.constexpr, K: tl.constexpr, SEG: tl.constexpr):
    """[S]: the choice whose size ends in a segment, for one load of all inv_i; where none does, any: at_end is 0."""
    which = tl.zeros(segment.shape, tl.int32)
    for i in tl.static_range(K):
        which = tl.where(segment == (SIZES[i] - 1) // SEG, i, which)
    return which


@triton.jit
def rmsnorm_forward_kernel(
    x_ptr, w_ptr, alpha_ptr, mask_ptr, y_ptr, inv_ptr, count, width, x_stride, eps,
    SIZES: tl.constexpr, K: tl.constexpr, S: tl.constexpr, SEG: tl.constexpr, HAS_MASK: tl.constexpr,
    LOOP_STAGES: tl.constexpr,
):  # fmt: skip
    """Rows pid, pid + programs, .., each seen as S segments of SEG channels. No size ends inside a segment, so all K
    prefix sums are one scan of S numbers, and t is the suffix scan of alpha_i inv_i placed where the sizes end."""
    segment = tl.arange(0, S)
    col = segment[:, None] * SEG + tl.arange(0, SEG)[None, :]  # [S, SEG]
    ok = col < width
    end = tl.minimum((segment + 1) * SEG, width).to(tl.float32)
    scale = channel_scale(w_ptr, mask_ptr, col, ok, HAS_MASK)
    at_end = alpha_at_ends(alpha_ptr, segment, SIZES, K, SEG)
    for index in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=LOOP_STAGES):
        row = tl.cast(index, tl.int64)
        x = tl.load(x_ptr + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
        inv = tl.rsqrt(tl.cumsum(tl.sum(x * x, axis=1), axis=0) / end + eps)  # [S]
        t = tl.cumsum(at_end * inv, axis=0, reverse=True)
        tl.store(y_ptr + row * width + col, x * scale * t[:, None], mask=ok)
        for i in tl.static_range(K):
            tl.store(inv_ptr + row * K + i + segment * 0, inv, mask=segment == (SIZES[i] - 1) // SEG)


@triton.jit
def rmsnorm_backward_kernel(
    g_ptr, x_ptr, w_ptr, alpha_ptr, mask_ptr, inv_ptr, dx_ptr, dalpha_ptr, column_ptr, count, width, g_stride,
    x_stride,
    SIZES: tl.constexpr, K: tl.constexpr, S: tl.constexpr, SEG: tl.constexpr, HAS_MASK: tl.constexpr,
    NEED_ALPHA: tl.constexpr, NEED_COLUMN: tl.constexpr, LOOP_STAGES: tl.constexpr,
):  # fmt: skip
    """dx of the rows pid, pid + programs, .., and this program's share of dalpha (NEED_ALPHA) and P (NEED_COLUMN)."""
    segment = tl.arange(0, S)
    col = segment[:, None] * SEG + tl.arange(0, SEG)[None, :]  # [S, SEG]
    ok = col < width
    end = tl.minimum((segment + 1) * SEG, width).to(tl.float32)
    scale = channel_scale(w_ptr, mask_ptr, col, ok, HAS_MASK)
    at_end = alpha_at_ends(alpha_ptr, segment, SIZES, K, SEG)
    which = choice_at_ends(segment, SIZES, K, SEG)
    column = tl.zeros([S, SEG], tl.float32)
    dalpha = tl.zeros([S], tl.float32)
    for index in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=LOOP_STAGES):
        row = tl.cast(index, tl.int64)
        inv = tl.load(inv_ptr + row * K + which)  # [S]
        x = tl.load(x_ptr + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + row * g_stride + col, mask=ok, other=0.0).to(tl.float32)
        h = g * scale
        share = tl.cumsum(tl.sum(h * x, axis=1), axis=0) * inv  # [S], inv_i S_i where sizes end
        t = tl.cumsum(at_end * inv, axis=0, reverse=True)
        back = tl.cumsum(at_end * inv * inv * share / end, axis=0, reverse=True)
        tl.store(dx_ptr + row * width + col, h * t[:, None] - x * back[:, None], mask=ok)
        if NEED_ALPHA:
            dalpha += share
        if NEED_COLUMN:
            column += g * x * t[:, None]
    if NEED_ALPHA:
        for i in tl.static_range(K):
            at = dalpha_ptr + tl.program_id(0) * K + i + segment * 0
            tl.store(at, dalpha, mask=segment == (SIZES[i] - 1) // SEG)
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


def rows_in_registers(x: Tensor) -> Tensor:
    """x as [rows, N], if N fits."""
    flat = rows(x)
    if flat.shape[1] > MAX_WIDTH:
        raise bad("mixed_rmsnorm", f"the Triton kernel holds rows of at most {MAX_WIDTH}, got {flat.shape[1]}")
    return flat


def _launch(
    x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, sizes: Sizes, eps: float
) -> tuple[Tensor, Tensor]:
    flat, sizes = rows_in_registers(x), tuple(sizes)
    count, width = flat.shape
    y, inv = dense_like(x), torch.empty(count, len(sizes), dtype=torch.float32, device=x.device)
    s, seg, warps, stages = launch_shape(sizes, width, width * x.element_size())
    if count > 0:
        with torch.cuda.device_of(x):
            rmsnorm_forward_kernel[(min(count, 32 // warps * processors(x)),)](
                flat, weight.contiguous(), alpha.contiguous(), dense(in_mask), y, inv, count, width, flat.stride(0),
                eps, SIZES=sizes, K=len(sizes), S=s, SEG=seg, HAS_MASK=in_mask is not None, LOOP_STAGES=stages,
                num_warps=warps,
            )  # fmt: skip
    return y, inv


def backward_programs(x: Tensor, count: int, warps: int, need_column: bool) -> int:
    """What fits beside ~90 registers per thread; beside few rows, half of it keeps the partial column sums small."""
    return min(count, max(1, (8 if need_column and count < 4096 else 16) // warps) * processors(x))


def summed(
    column: Tensor | None, shares: Tensor | None, weight: Tensor, in_mask: Tensor | None, need: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dweight, din_mask and the sums of ``shares``, from each program's part; dm is w P, which one launch can make."""
    scale = None if need[1] else weight
    total, sums = column_sums(column, shares, scale)
    return *of_column(total, weight, in_mask, need, scale is not None), sums


def _launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, inv: Tensor, sizes: Sizes,
    eps: float, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    g, v, weight, in_mask, sizes = rows(grad), rows(x), weight.contiguous(), dense(in_mask), tuple(sizes)
    count, width = v.shape
    need_column = need[1] or (need[3] and in_mask is not None)
    s, seg, warps, stages = launch_shape(sizes, width, 2 * width * x.element_size())
    programs = backward_programs(x, count, warps, need_column)
    dx = dense_like(x)
    shares = partial_sums(need[2], programs, len(sizes), x.device)
    column = partial_sums(need_column, programs, width, x.device)
    if count > 0:
        with torch.cuda.device_of(x):
            rmsnorm_backward_kernel[(programs,)](
                g, v, weight, alpha.contiguous(), in_mask, inv, dx, shares, column, count, width, g.stride(0),
                v.stride(0), SIZES=sizes, K=len(sizes), S=s, SEG=seg, HAS_MASK=in_mask is not None,
                NEED_ALPHA=need[2], NEED_COLUMN=need_column, LOOP_STAGES=stages, num_warps=warps,
            )  # fmt: skip
    dw, dmask, dalpha = summed(column, shares, weight, in_mask, need)
    return dx, dw, in_dtype_of(dalpha, alpha), dmask


# ---- C++ ----


@functools.lru_cache(maxsize=1024)
def segments(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(where choices end, ascending; for each choice the index of the last segment it keeps), for the C++ kernels."""
    ends = sorted(set(sizes))
    return cpu.integers(ends, torch.int64), cpu.integers([ends.index(size) for size in sizes], torch.int64)


def masked_scale(weight: Tensor, in_mask: Tensor | None) -> Tensor:
    """[N] fp32."""
    return cpu.vector(weight) if in_mask is None else cpu.vector(weight) * cpu.vector(in_mask)


def _cpu(
    x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, sizes: Sizes, eps: float
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    count, width = cpu.matrix(x)
    ends, kept = segments(tuple(sizes))
    y, inv = cpu.empty_like(x), cpu.floats(count, len(sizes))
    cpu.call("mixed_rmsnorm", x, masked_scale(weight, in_mask), cpu.vector(alpha), ends, kept, y, inv, count, width,
             len(ends), len(sizes), float(eps), cpu.chunking(count, width)[0], cpu.DTYPES[x.dtype])
    return y, inv


def cpu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, inv: Tensor, sizes: Sizes,
    eps: float, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    """The C++ kernel."""
    g, x = grad.contiguous(), x.contiguous()
    count, width = cpu.matrix(g)
    ends, kept = segments(tuple(sizes))
    need_column = need[1] or (need[3] and in_mask is not None)
    per_chunk, chunks = cpu.chunking(count, width, need_column)
    dx, shares = cpu.empty_like(g), cpu.partial_sums(need[2], count, len(sizes))
    partial = cpu.partial_sums(need_column, chunks, width)
    cpu.call("mixed_rmsnorm_backward", g, x, masked_scale(weight, in_mask), cpu.vector(alpha), inv.contiguous(), ends,
             kept, dx, shares, partial, count, width, len(ends), len(sizes), per_chunk, cpu.DTYPES[g.dtype])
    dw, dmask = of_column(None if partial is None else partial.sum(0), weight, in_mask, need)
    return dx, dw, cpu.total(shares, alpha), dmask


op = Op(
    "mixed_rmsnorm",
    {"triton": _launch, "cpu": _cpu, "reference": reference},
    {"triton": _launch_backward, "cpu": cpu_backward, "reference": reference_backward},
)
