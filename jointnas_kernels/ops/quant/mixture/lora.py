"""dA and dB of linears that read the same input, ste="identity", in two launches however many linears there are.

    to_rank       U_j = x [A_j1; ..; A_jP]^T and V_j = g_j [B'_j1 .. B'_jP], both [T, P r]
    from_rank     dB_jp = scaling probs[p] g_j^T U_jp and dA_jp = probs[p] V_jp^T x, scaled in the accumulators

With the library it would be four products and four scalings for each of them: 56 launches in a block of seven linears,
in place of 8. U and V have P r columns, 96 of them as a rule, and T rows, too few tiles for a device: the channels are
cut into slices, and the last program to finish a tile adds the sums of its slices up, in their order.
"""

import functools
from collections.abc import Sequence
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core.arrival import counters, last_to_arrive
from jointnas_kernels.ops.core.tensors import power_of_two, rows
from jointnas_kernels.ops.quant.mixture.reference import Mixture

T = TypeVar("T")
MOST = 3  # linears of a group
SLICE = 1024  # channels of one program of to_rank: 288 programs for q, k and v of 8B at 1024 tokens
COLUMNS = 256  # the most that an accumulator has


@triton.jit
def one_of(index, first, second, third):
    """The pointer or number that belongs to a linear."""
    found = first
    if index == 1:
        found = second
    if index == 2:
        found = third
    return found


@triton.jit
def columns_of_rank(R, P: tl.constexpr, R_PAD: tl.constexpr, N: tl.constexpr):
    """(precision, number in its pair, which exist) of N columns."""
    n = tl.arange(0, N)
    return n // R_PAD, n % R_PAD, (n // R_PAD < P) & (n % R_PAD < R)


@triton.jit
def to_rank(
    from_ptr, pair_ptr, out_ptr, partial_ptr, counter_ptr, part, tile, T, C, R, stride, factor,
    OF_GRADIENT: tl.constexpr, SLICE: tl.constexpr, P: tl.constexpr, R_PAD: tl.constexpr, N: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, W_DTYPE: tl.constexpr, SLICED: tl.constexpr,
):  # fmt: skip
    """This slice of the channels of one tile of U or (OF_GRADIENT) V; out [T, N], partial [slices, T, N]."""
    dtype: tl.constexpr = from_ptr.dtype.element_ty
    p, r, exists = columns_of_rank(R, P, R_PAD, N)
    row = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    row_ok = (row < T)[:, None]
    total = tl.zeros([BLOCK_T, N], tl.float32)
    for first in tl.range(part * SLICE, min((part + 1) * SLICE, C), BLOCK, num_stages=STAGES):
        c = first + tl.arange(0, BLOCK)
        value = tl.load(from_ptr + row[:, None] * stride + c[None, :], mask=row_ok & (c < C)[None, :], other=0.0)
        if OF_GRADIENT:  # B [P, C, R]
            at = pair_ptr + (p * C * R + r)[None, :] + c[:, None] * R
            pair = tl.load(at, mask=exists[None, :] & (c < C)[:, None], other=0.0)
        else:  # A [P, R, C]
            at = pair_ptr + ((p * R + r) * C)[:, None] + c[None, :]
            pair = tl.trans(tl.load(at, mask=exists[:, None] & (c < C)[None, :], other=0.0))
        pair = (pair.to(tl.float32) * factor).to(W_DTYPE).to(dtype)
        total = tl.dot(value, pair, acc=total, input_precision="ieee")
    at = row[:, None] * N + tl.arange(0, N)[None, :]
    if not SLICED:
        tl.store(out_ptr + at, total.to(dtype), mask=row_ok)
    else:
        size = tl.cast(T, tl.int64) * N
        slices = tl.cdiv(C, SLICE)
        tl.store(partial_ptr + part * size + at, total, mask=row_ok)
        if last_to_arrive(counter_ptr, slices):
            total = tl.zeros([BLOCK_T, N], tl.float32)
            for i in range(slices):
                total += tl.load(partial_ptr + i * size + at, mask=row_ok, other=0.0, cache_modifier=".cg")
            tl.store(out_ptr + at, total.to(dtype), mask=row_ok)


@triton.jit
def to_rank_kernel(
    x_ptr, g0_ptr, g1_ptr, g2_ptr, a0_ptr, a1_ptr, a2_ptr, b0_ptr, b1_ptr, b2_ptr, out_ptr, partial_ptr, counter_ptr,
    T, I, O0, O1, O2, R, x_stride, g0_stride, g1_stride, g2_stride, slices, scaling,
    SLICE: tl.constexpr, P: tl.constexpr, R_PAD: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, W_DTYPE: tl.constexpr, SLICED: tl.constexpr,
):  # fmt: skip
    """Program (slice, tile, 2 j + [V_j rather than U_j])."""
    part, tile, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    size = tl.cast(T, tl.int64) * N
    out = out_ptr + which * size
    partial, counter = partial_ptr, counter_ptr
    if SLICED:
        partial += which * size * slices
        counter += which * tl.num_programs(1) + tile
    if which % 2 == 0:
        if part * SLICE < I:
            a = one_of(which // 2, a0_ptr, a1_ptr, a2_ptr)
            to_rank(x_ptr, a, out, partial, counter, part, tile, T, I, R, x_stride, 1.0, False, SLICE, P, R_PAD, N,
                    BLOCK_T, BLOCK, STAGES, W_DTYPE, SLICED)  # fmt: skip
    else:
        outputs = one_of(which // 2, O0, O1, O2)
        if part * SLICE < outputs:
            g, b = one_of(which // 2, g0_ptr, g1_ptr, g2_ptr), one_of(which // 2, b0_ptr, b1_ptr, b2_ptr)
            stride = one_of(which // 2, g0_stride, g1_stride, g2_stride)
            to_rank(g, b, out, partial, counter, part, tile, T, outputs, R, stride, scaling, True, SLICE, P, R_PAD, N,
                    BLOCK_T, BLOCK, STAGES, W_DTYPE, SLICED)  # fmt: skip


@triton.jit
def from_rank(
    from_ptr, rank_ptr, out_ptr, probs_ptr, tile, T, C, R, stride, factor,
    OF_GRADIENT: tl.constexpr, P: tl.constexpr, R_PAD: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK channels of dA or (OF_GRADIENT) dB."""
    p, r, exists = columns_of_rank(R, P, R_PAD, N)
    c = tile * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(probs_ptr + p, mask=exists, other=0.0).to(tl.float32) * factor
    if OF_GRADIENT:
        total = tl.zeros([BLOCK, N], tl.float32)
    else:
        total = tl.zeros([N, BLOCK], tl.float32)
    for first in tl.range(0, T, BLOCK_T, num_stages=STAGES):
        row = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
        row_ok = (row < T)[:, None]
        value = tl.load(from_ptr + row[:, None] * stride + c[None, :], mask=row_ok & (c < C)[None, :], other=0.0)
        ranks = tl.load(rank_ptr + row[:, None] * N + tl.arange(0, N)[None, :], mask=row_ok, other=0.0)
        if OF_GRADIENT:
            total = tl.dot(tl.trans(value), ranks, acc=total, input_precision="ieee")
        else:
            total = tl.dot(tl.trans(ranks), value, acc=total, input_precision="ieee")
    out = out_ptr.dtype.element_ty
    if OF_GRADIENT:  # [P, C, R]
        at = out_ptr + (p * C * R + r)[None, :] + c[:, None] * R
        tl.store(at, (total * scale[None, :]).to(out), mask=exists[None, :] & (c < C)[:, None])
    else:  # [P, R, C]
        at = out_ptr + ((p * R + r) * C)[:, None] + c[None, :]
        tl.store(at, (total * scale[:, None]).to(out), mask=exists[:, None] & (c < C)[None, :])


@triton.jit
def from_rank_kernel(
    x_ptr, g0_ptr, g1_ptr, g2_ptr, rank_ptr, da0_ptr, da1_ptr, da2_ptr, db0_ptr, db1_ptr, db2_ptr, probs_ptr,
    T, I, O0, O1, O2, R, x_stride, g0_stride, g1_stride, g2_stride, scaling,
    P: tl.constexpr, R_PAD: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program (tile, 2 j + [dB_j rather than dA_j])."""
    tile, which = tl.program_id(0), tl.program_id(1)
    size = tl.cast(T, tl.int64) * N
    if which % 2 == 0:
        if tile * BLOCK < I:
            da = one_of(which // 2, da0_ptr, da1_ptr, da2_ptr)
            from_rank(x_ptr, rank_ptr + (which + 1) * size, da, probs_ptr, tile, T, I, R, x_stride, 1.0, False, P,
                      R_PAD, N, BLOCK_T, BLOCK, STAGES)  # fmt: skip
    else:
        outputs = one_of(which // 2, O0, O1, O2)
        if tile * BLOCK < outputs:
            g, db = one_of(which // 2, g0_ptr, g1_ptr, g2_ptr), one_of(which // 2, db0_ptr, db1_ptr, db2_ptr)
            stride = one_of(which // 2, g0_stride, g1_stride, g2_stride)
            from_rank(g, rank_ptr + (which - 1) * size, db, probs_ptr, tile, T, outputs, R, stride, scaling, True, P,
                      R_PAD, N, BLOCK_T, BLOCK, STAGES)  # fmt: skip


def width(precisions: int, rank: int) -> tuple[int, int]:
    """(columns of a pair, of all pairs), padded."""
    padded = max(16, power_of_two(rank))
    return padded, padded * power_of_two(precisions)


def config(columns: int) -> dict[str, int]:
    """Tiles and warps of both kernels: an accumulator of 64 fp32 values per thread."""
    return {"BLOCK_T": 64, "BLOCK": 64, "STAGES": 3, "num_warps": 4 if columns <= 128 else 8}


def fits(mixes: Sequence[Mixture]) -> bool:
    """Whether the kernels take these."""
    first = mixes[0]
    alike = {t.dtype for mix in mixes for t in mix[1:3]}
    return width(len(first.bits), first.lora_a.shape[1])[1] <= COLUMNS and len(alike) == 1


def _three(values: Sequence[T]) -> tuple[T, ...]:
    """With the first in place of those that are not there, which no program chooses."""
    return (*values, *[values[0]] * (MOST - len(values)))


def gradients(grads: Sequence[Tensor], x: Tensor, mixes: Sequence[Mixture]) -> list[tuple[Tensor, Tensor]]:
    """(dA, dB) of each linear from its grad [T, O] and x [T, I], all of one dtype; they share probs, rank, scaling."""
    first, x, grads = mixes[0], rows(x), [rows(g) for g in grads]
    (tokens, inputs), (precisions, rank, _) = x.shape, first.lora_a.shape
    padded, columns = width(precisions, rank)
    tile, outputs = config(columns), [g.shape[1] for g in grads]
    like = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    found = [(like(mix.lora_a), like(mix.lora_b)) for mix in mixes]
    if not tokens:
        return [(da.zero_(), db.zero_()) for da, db in found]
    tiles, slices = -(-tokens // tile["BLOCK_T"]), -(-max(inputs, *outputs) // SLICE)
    size = (2 * len(mixes), tokens, columns)
    ranks = torch.empty(size, dtype=x.dtype, device=x.device)
    partial = torch.empty((*size[:1], slices, *size[1:]), dtype=torch.float32, device=x.device) if slices > 1 else None
    pairs_a, pairs_b = _three([m.lora_a.contiguous() for m in mixes]), _three([m.lora_b.contiguous() for m in mixes])
    of_a, of_b = (_three([pair[i] for pair in found]) for i in (0, 1))
    gradient, sizes = _three(grads), (tokens, inputs, *_three(outputs), rank)
    strides = (x.stride(0), *_three([g.stride(0) for g in grads]))
    shape = {"P": precisions, "R_PAD": padded, "N": columns, **tile}
    kinds = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    with torch.cuda.device_of(x):
        to_rank_kernel[(slices, tiles, size[0])](
            x, *gradient, *pairs_a, *pairs_b, ranks, partial, counters(x, tiles * size[0]) if slices > 1 else None,
            *sizes, *strides, slices, first.scaling, SLICE=SLICE, SLICED=slices > 1,
            W_DTYPE=kinds.get(first.weight.dtype, tl.float32), **shape,
        )  # fmt: skip
        from_rank_kernel[(-(-max(inputs, *outputs) // tile["BLOCK"]), size[0])](
            x, *gradient, ranks, *of_a, *of_b, first.probs.contiguous(), *sizes, *strides, first.scaling, **shape
        )
    return found
