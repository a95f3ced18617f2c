"""Triton kernels of a GPU's step: all of a block that is no product.

    x += y; h = RMSNorm(x)                                                 add_norm
    head norms, rotation, cache append, attention of one token             attend (its parts: merge)
    head norms, rotation, cache append of a prompt's tokens                rotate
    SwiGLU                                                                 swiglu

What changes from token to token is read from device memory, so that a captured launch can be replayed: `where` int64
[4 + 2 blocks] holds the slot of the first token, the positions that caches have, and the addresses of cosines, sines
[length, D] and of every block's keys and values. Sums are fp32; vectors are rounded where transformers rounds them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core.tensors import power_of_two, processors

SLOT, LENGTH, COSINES, SINES, CACHES = range(5)  # in `where`
MOST_PARTS = 64  # of the positions of a sequence
STAGE_BYTES = 16384  # of keys that are loaded at once, and as many of values
STAGES = 3  # of such loads under way


@triton.jit
def add_norm_kernel(x_ptr, y_ptr, w_ptr, out_ptr, width, eps, BLOCK: tl.constexpr):
    """Row: x += y where there is y; out = w * RN(x / rms(x))."""
    row = tl.program_id(0).to(tl.int64) * width
    j = tl.arange(0, BLOCK)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row + j, mask=j < width, other=0.0).to(tl.float32)
    if y_ptr is not None:
        x = (x + tl.load(y_ptr + row + j, mask=j < width, other=0.0).to(tl.float32)).to(dtype)
        tl.store(x_ptr + row + j, x, mask=j < width)
        x = x.to(tl.float32)
    w = tl.load(w_ptr + j, mask=j < width, other=0.0).to(tl.float32)
    inv = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    tl.store(out_ptr + row + j, w * (x * inv).to(dtype).to(tl.float32), mask=j < width)


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, width, gate_stride, up_stride, BLOCK: tl.constexpr):
    """out = RN(silu(gate)) * up, of a row's columns."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    g = tl.load(gate_ptr + row * gate_stride + j, mask=j < width, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + row * up_stride + j, mask=j < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + j, (g / (1.0 + tl.exp(-g))).to(dtype).to(tl.float32) * u, mask=j < width)


@triton.jit
def rotated(x_ptr, norm_ptr, where_ptr, position, eps, rows, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Heads [ROWS, DP] (the dims behind D and the rows behind `rows` are 0) of a token: normalised where there is a
    norm, then rotated. NaN at a position that has no angles."""
    r = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, DP)[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    ok = (r < rows) & (d < D)
    other = tl.where(d < D // 2, d + D // 2, d - D // 2)  # the other one of the pair
    x = tl.load(x_ptr + r * D + d, mask=ok, other=0.0).to(tl.float32)
    pair = tl.load(x_ptr + r * D + other, mask=ok, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        inv = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        w = tl.load(norm_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        x = (w * (x * inv).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        w = tl.load(norm_ptr + other, mask=d < D, other=0.0).to(tl.float32)
        pair = (w * (pair * inv).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    known = tl.where((position >= 0) & (position < tl.load(where_ptr + 1)), D, 0)  # dims that have angles: all or none
    cosines = tl.load(where_ptr + 2).to(tl.pointer_type(dtype)) + position * D
    sines = tl.load(where_ptr + 3).to(tl.pointer_type(dtype)) + position * D
    cosine = tl.load(cosines + d, mask=d < known, other=float("nan")).to(tl.float32)
    sine = tl.load(sines + d, mask=d < known, other=float("nan")).to(tl.float32)
    turned = (pair * sine).to(dtype).to(tl.float32)
    y = (x * cosine).to(dtype).to(tl.float32) + tl.where(d < D // 2, -turned, turned)
    return tl.where(d < D, y, 0.0).to(dtype)


@triton.jit
def caches(where_ptr, block, sequence, group, KV, dtype: tl.constexpr, D: tl.constexpr):
    """(keys, values): where those of a sequence and key-value head begin."""
    keys = tl.multiple_of(tl.load(where_ptr + 4 + 2 * block).to(tl.pointer_type(dtype)), 16)
    values = tl.multiple_of(tl.load(where_ptr + 5 + 2 * block).to(tl.pointer_type(dtype)), 16)
    first = (sequence.to(tl.int64) * KV + group) * tl.load(where_ptr + 1) * D
    return keys + first, values + first


@triton.jit(do_not_specialize=["block", "count"])
def rotate_kernel(
    q_ptr, k_ptr, v_ptr, q_norm_ptr, k_norm_ptr, where_ptr, positions_ptr, out_ptr, block, count, q_stride, k_stride,
    v_stride, KV, eps, SHARE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """A token's queries of one key-value head to out [batch, heads, count, D], its key and value to the caches."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    sequence = token // count
    at = token % count
    position = tl.load(positions_ptr + token)
    r = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, DP)[None, :]
    q = rotated(q_ptr + token * q_stride + group * SHARE * D, q_norm_ptr, where_ptr, position, eps, SHARE, ROWS, D, DP)
    place = ((sequence * KV + group) * SHARE + r) * count + at
    tl.store(out_ptr + place * D + d, q, mask=(r < SHARE) & (d < D))
    k = rotated(k_ptr + token * k_stride + group * D, k_norm_ptr, where_ptr, position, eps, 1, 1, D, DP)
    v = tl.load(v_ptr + token * v_stride + group * D + d, mask=d < D, other=0.0)
    keys, values = caches(where_ptr, block, sequence, group, KV, q_ptr.dtype.element_ty, D)
    slot = tl.load(where_ptr) + at
    tl.store(keys + slot * D + d, k, mask=d < D)
    tl.store(values + slot * D + d, v, mask=d < D)


@triton.jit(do_not_specialize=["block", "window"])
def attend_kernel(
    q_ptr, k_ptr, v_ptr, q_norm_ptr, k_norm_ptr, where_ptr, positions_ptr, starts_ptr, out_ptr, part_ptr, stat_ptr,
    block, q_stride, k_stride, v_stride, KV, window, eps, scale,
    PARTS: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, LOOP_STAGES: tl.constexpr,
):  # fmt: skip
    """One token's queries of one key-value head with a part of the positions it sees; the last part has the token
    itself, and appends it. Several parts: sums to part [batch, heads, PARTS, D] and the largest score and the sum of
    the exponentials to stat [batch, heads, PARTS, 2]; otherwise the result to out [batch, heads, D]."""
    sequence = tl.program_id(0)
    group = tl.program_id(1)
    part = tl.program_id(2)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    slot = tl.load(where_ptr).to(tl.int32)
    first = tl.maximum(tl.load(starts_ptr + sequence), 0).to(tl.int32)
    if window > 0:
        first = tl.maximum(first, slot + 1 - window)
    first = tl.minimum(first, slot)
    size = tl.cdiv(tl.cdiv(slot - first, PARTS), BLOCK) * BLOCK
    begin = first + part * size
    end = tl.minimum(begin + size, slot)
    position = tl.load(positions_ptr + sequence)
    r = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, DP)
    token = sequence.to(tl.int64)
    keys, values = caches(where_ptr, block, sequence, group, KV, dtype, D)
    q = rotated(q_ptr + token * q_stride + group * SHARE * D, q_norm_ptr, where_ptr, position, eps, SHARE, ROWS, D, DP)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    if part == PARTS - 1:
        k = rotated(k_ptr + token * k_stride + group * D, k_norm_ptr, where_ptr, position, eps, 1, 1, D, DP)
        v = tl.load(v_ptr + token * v_stride + group * D + d[None, :], mask=d[None, :] < D, other=0.0)
        tl.store(keys + slot.to(tl.int64) * D + d[None, :], k, mask=d[None, :] < D)
        tl.store(values + slot.to(tl.int64) * D + d[None, :], v, mask=d[None, :] < D)
        most = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
        total += 1.0
        acc += v.to(tl.float32)
    for start in tl.range(begin, end, BLOCK, num_stages=LOOP_STAGES):
        at = start + tl.arange(0, BLOCK)
        place = at[:, None].to(tl.int64) * D + d[None, :]
        ok = (at < end)[:, None] & (d < D)[None, :]
        k = tl.load(keys + place, mask=ok, other=0.0)
        v = tl.load(values + place, mask=ok, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((at < end)[None, :], scores, float("-inf"))
        now = tl.maximum(most, tl.max(scores, 1))
        by = tl.exp(most - now)
        e = tl.exp(scores - now[:, None])
        total = total * by + tl.sum(e, 1)
        acc = acc * by[:, None] + tl.dot(e.to(dtype), v, input_precision="ieee")
        most = now
    head = (token * KV + group) * SHARE + r
    ok = (r < SHARE) & (d < D)[None, :]
    if PARTS == 1:
        tl.store(out_ptr + head * D + d[None, :], acc / total[:, None], mask=ok)
    else:
        place = head * PARTS + part
        tl.store(part_ptr + place * D + d[None, :], acc, mask=ok)
        tl.store(stat_ptr + place * 2, most[:, None], mask=r < SHARE)
        tl.store(stat_ptr + place * 2 + 1, total[:, None], mask=r < SHARE)


@triton.jit
def merge_kernel(part_ptr, stat_ptr, out_ptr, PARTS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """A head's result from those of its parts."""
    head = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, PARTS)
    d = tl.arange(0, DP)
    place = head * PARTS + p
    most = tl.load(stat_ptr + place * 2)
    share = tl.exp(most - tl.max(most, 0))
    acc = tl.load(part_ptr + place[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    total = tl.sum(share * tl.load(stat_ptr + place * 2 + 1), 0)
    tl.store(out_ptr + head * D + d, tl.sum(acc * share[:, None], 0) / total, mask=d < D)


class Heads(NamedTuple):
    """What a block's attention reads, for M tokens.

    Attributes:
        q: [M, heads D]; k, v: [M, kv_heads D]; rows may be parts of longer ones.
        q_norm, k_norm: [D], or None.
        where: see the module.
        positions: int64 [M], rotary.
        block: whose caches.
        kv_heads, dim: numbers of key-value heads, and D.
        eps: of the norms.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    where: Tensor
    positions: Tensor
    block: int
    kv_heads: int
    dim: int
    eps: float

    @property
    def share(self) -> int:
        """Query heads of a key-value head."""
        return self.q.shape[1] // self.dim // self.kv_heads


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm [M, N] of x [M, N], to which y [M, N] is added first, in place."""
    out, width = torch.empty_like(x), x.shape[1]
    block = power_of_two(width)
    with torch.cuda.device_of(x):
        add_norm_kernel[(len(x),)](x, y, weight, out, width, eps, BLOCK=block, num_warps=4 if block <= 2048 else 8)
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [M, F]; rows may be parts of longer ones."""
    count, width = gate.shape
    out, block = torch.empty(count, width, dtype=gate.dtype, device=gate.device), min(1024, power_of_two(width))
    with torch.cuda.device_of(gate):
        swiglu_kernel[(count, -(-width // block))](
            gate, up, out, width, gate.stride(0), up.stride(0), BLOCK=block, num_warps=4
        )
    return out


def attend_shape(share: int, dim: int, itemsize: int) -> dict[str, int]:
    """Constants and warps of `attend_kernel`: 16 rows or more, which is what products on tensor cores take; fp32 has
    none, and spilled with 4 warps."""
    width = max(16, power_of_two(dim))
    return {
        "SHARE": share, "ROWS": max(16, power_of_two(share)), "D": dim, "DP": width,
        "BLOCK": max(16, min(64, STAGE_BYTES // (width * itemsize))), "LOOP_STAGES": STAGES,
        "num_warps": 8 if itemsize == 4 else 4,
    }  # fmt: skip


def rotate(h: Heads, batch: int) -> Tensor:
    """Rotated queries [batch, heads, count, D] of a prompt's tokens; their keys and values go to the caches."""
    tokens, heads = len(h.q), h.kv_heads * h.share
    count = tokens // batch
    out = torch.empty(batch, heads, count, h.dim, dtype=h.q.dtype, device=h.q.device)
    with torch.cuda.device_of(h.q):
        rotate_kernel[(tokens, h.kv_heads)](
            h.q, h.k, h.v, h.q_norm, h.k_norm, h.where, h.positions, out, h.block, count, h.q.stride(0), h.k.stride(0),
            h.v.stride(0), h.kv_heads, h.eps, SHARE=h.share, ROWS=power_of_two(h.share), D=h.dim,
            DP=power_of_two(h.dim), num_warps=4,
        )  # fmt: skip
    return out


def parts_for(h: Heads) -> int:
    """Parts of the positions, a power of two: two programs for every processor, however many positions there are."""
    programs = len(h.q) * h.kv_heads
    return min(MOST_PARTS, power_of_two(max(1, 2 * processors(h.q) // programs)))


def attend(h: Heads, starts: Tensor, window: int, scale: float, parts: int | None = None) -> Tensor:
    """Attention [M, heads D] of one token of each of M sequences with the caches, to which it is appended.

    Args:
        h: of these tokens.
        starts: int64 [M]; the first position that a sequence sees.
        window: positions that a token looks back at, itself included; 0: all.
        scale: of the scores.
        parts: of the positions, a power of two; None: `parts_for`.
    """
    batch, heads, parts = len(h.q), h.kv_heads * h.share, parts or parts_for(h)
    out = torch.empty(batch, heads * h.dim, dtype=h.q.dtype, device=h.q.device)
    part = stat = None
    if parts > 1:
        part = torch.empty(batch * heads, parts, h.dim, dtype=torch.float32, device=h.q.device)
        stat = torch.empty(batch * heads, parts, 2, dtype=torch.float32, device=h.q.device)
    with torch.cuda.device_of(h.q):
        attend_kernel[(batch, h.kv_heads, parts)](
            h.q, h.k, h.v, h.q_norm, h.k_norm, h.where, h.positions, starts, out, part, stat, h.block, h.q.stride(0),
            h.k.stride(0), h.v.stride(0), h.kv_heads, window, h.eps, scale, PARTS=parts,
            **attend_shape(h.share, h.dim, h.q.element_size()),
        )  # fmt: skip
    if part is not None:
        with torch.cuda.device_of(part):
            merge_kernel[(batch * heads,)](part, stat, out, PARTS=parts, D=h.dim, DP=power_of_two(h.dim), num_warps=4)
    return out
