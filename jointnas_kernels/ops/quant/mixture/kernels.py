"""Triton kernels of the mixture: the forward, and the backward that reduces tiles of G without writing them.

The decision to know: the forward reads W and writes W~ once (2 x 34 MB for a 4096 x 4096 bf16 weight, 16 us at
4.3 TB/s), so three quantizers per element have to fit into some 25 fp32 operations. Hence
  * x / s costs two operations when s is a half-type number: with 1/s = r + t to 45 bits, RN(x · r + RN(x · t)) is the
    correctly rounded quotient, because no quotient of a 24-bit by an 11-bit significand comes closer than 2^-36
    (relatively) to a rounding boundary without lying on the representable side. fp32 scales use Markstein's three.
  * rint is the addition of MAGIC, undone after clamping.
  * without clip ratios |x / s| <= (2^b - 1)/2 · (1 + 2^-8), so only the upper clamp can act; not in fp16, whose scales
    below 2^-14 are rounded to multiples of 2^-24 (fuzzing found a level of -131).
  * W enters as the accumulator of the LoRA product.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core.backends import interpreting
from jointnas_kernels.ops.core.tensors import in_dtype_of
from jointnas_kernels.ops.quant.kernels import MAGIC, TINY, bit_constants, larger, smaller
from jointnas_kernels.ops.quant.mixture.reference import Gradients, Mixture, Upstream, Want


@triton.jit
def divide(x, s, r, t, EXACT: tl.constexpr, SHORT: tl.constexpr):
    """RN(x / s) given r + t = 1/s (SHORT: s has at most 11 significant bits) or r = RN(1/s)."""
    if EXACT:  # the interpreter has no fused multiply-add
        return tl.div_rn(x, s)
    elif SHORT:
        return tl.fma(x, r, x * t)
    else:
        y = x * r
        return tl.fma(tl.fma(-y, s, x), r, y)


@triton.jit
def quantize_tile(
    x, ratio, low: tl.constexpr, inverse: tl.constexpr, rest: tl.constexpr, dtype: tl.constexpr,
    HAS_CLIP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """(levels, quotients) [BLOCK, NG, G] and (s, max|x|) [BLOCK, NG] of x [BLOCK, NG, G]; ratio [BLOCK, NG]."""
    high: tl.constexpr = -low - 1.0
    divisor: tl.constexpr = high + 0.5
    unit = tl.reduce(tl.abs(x), 2, larger)  # [BLOCK, NG]
    raw = unit
    if HAS_CLIP:
        raw = ratio * unit
    SHORT: tl.constexpr = dtype != tl.float32
    if EXACT:
        raw = tl.div_rn(raw, raw * 0.0 + divisor)
    else:
        raw = tl.fma(raw, inverse, raw * rest)  # = RN(raw / divisor): the divisor has at most 8 bits
    s = raw.to(dtype).to(tl.float32)
    s = tl.where(s < TINY, 1.0, s)
    if SHORT:
        r = 1.0 / s  # approximate; t makes up for it
        t = tl.fma(-s, r, 1.0) * r
    else:
        r = tl.div_rn(s * 0.0 + 1.0, s)
        t = r
    s3 = tl.expand_dims(s, 2)
    if EXACT:
        s3 = tl.broadcast_to(s3, x.shape)
    y = divide(x, s3, tl.expand_dims(r, 2), tl.expand_dims(t, 2), EXACT, SHORT)
    level = smaller(y + MAGIC, MAGIC + high)
    if HAS_CLIP or dtype == tl.float16:
        level = larger(level, MAGIC + low)
    return level - MAGIC, y, s, unit


@triton.jit
def lora_tile(
    base, a_ptr, b_ptr, p: tl.constexpr, scaling, row, row_ok, col, col_ok, O, I, R,
    dtype: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """(W + B'_p A_p, A_p, B'_p) of one tile; base [BLOCK, N] fp32."""
    rank = tl.arange(0, R_PAD)
    a = tl.load(
        a_ptr + p * R * I + rank[:, None] * I + col[None, :], mask=(rank < R)[:, None] & col_ok[None, :], other=0.0
    ).to(dtype)  # [R_PAD, N]
    b = tl.load(
        b_ptr + (p * O + row)[:, None] * R + rank[None, :], mask=row_ok[:, None] & (rank < R)[None, :], other=0.0
    )  # [BLOCK, R_PAD]
    b = (b.to(tl.float32) * scaling).to(dtype)
    return tl.dot(b, a, acc=base, input_precision="ieee"), a, b


@triton.jit
def columns_of(first_group, groups, G: tl.constexpr, G_PAD: tl.constexpr, NG: tl.constexpr):
    """(channels [NG * G_PAD], which of them exist, groups [NG]) of a tile; group padding does not exist."""
    lane = tl.arange(0, NG * G_PAD)
    of = first_group + lane // G_PAD
    return of * G + lane % G_PAD, (lane % G_PAD < G) & (of < groups), first_group + tl.arange(0, NG)


@triton.jit
def mix_forward_kernel(
    w_ptr, a_ptr, b_ptr, probs_ptr, clip_ptr, out_ptr, scaling, O, I, R, groups,
    P: tl.constexpr, LOW: tl.constexpr, INVERSE: tl.constexpr, REST: tl.constexpr, G: tl.constexpr,
    G_PAD: tl.constexpr, NG: tl.constexpr, R_PAD: tl.constexpr, BLOCK: tl.constexpr, HAS_CLIP: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK rows by NG groups: one read of W, one write of W~."""
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    row = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    row_ok = row < O
    col, col_ok, group = columns_of(tl.program_id(0) * NG, groups, G, G_PAD, NG)
    at = row[:, None] * I + col[None, :]
    ok = row_ok[:, None] & col_ok[None, :]
    base = tl.load(w_ptr + at, mask=ok, other=0.0).to(tl.float32)  # [BLOCK, N]
    mixed = tl.zeros([BLOCK, NG, G_PAD], tl.float32)
    ratio = tl.full([BLOCK, NG], 1.0, tl.float32)
    for p in tl.static_range(P):
        x, _, _ = lora_tile(base, a_ptr, b_ptr, p, scaling, row, row_ok, col, col_ok, O, I, R, dtype, R_PAD)
        if HAS_CLIP:
            ratio = tl.load(
                clip_ptr + (p * O + row)[:, None] * groups + group[None, :],
                mask=row_ok[:, None] & (group < groups)[None, :], other=1.0,
            ).to(tl.float32)  # fmt: skip
        level, _, s, _ = quantize_tile(
            tl.reshape(x, [BLOCK, NG, G_PAD]), ratio, LOW[p], INVERSE[p], REST[p], dtype, HAS_CLIP, EXACT
        )
        pi = tl.load(probs_ptr + p).to(tl.float32)
        mixed = tl.fma(level, tl.broadcast_to(tl.expand_dims(pi * s, 2), mixed.shape), mixed)
    tl.store(out_ptr + at, tl.reshape(mixed, [BLOCK, NG * G_PAD]).to(dtype), mask=ok)


@triton.jit
def mix_backward_kernel(
    grad_ptr, x_ptr, w_ptr, a_ptr, b_ptr, probs_ptr, clip_ptr,
    da_ptr, db_ptr, dprobs_ptr, dclip_ptr, scaling, T, O, I, R, groups,
    P: tl.constexpr, LOW: tl.constexpr, INVERSE: tl.constexpr, REST: tl.constexpr, G: tl.constexpr,
    G_PAD: tl.constexpr, NG: tl.constexpr, R_PAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr, HAS_CLIP: tl.constexpr, EXACT: tl.constexpr, DENSE: tl.constexpr, CLIP_STE: tl.constexpr,
    WANT_LORA: tl.constexpr, WANT_PROBS: tl.constexpr, WANT_CLIP: tl.constexpr,
):  # fmt: skip
    """One tile of dW = gradᵀ x (or of a given dW if DENSE), reduced against the quantizers without being written.

    dprobs_ptr [P, programs] gets partial sums; da [P, R, I] and db [P, O, R] are fp32 and accumulated by atomic
    additions, since every tile contributes.
    """
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    N: tl.constexpr = NG * G_PAD
    # 8 row tiles side by side before the next column tile: their x and grad slabs stay in L2.
    tiles_n = tl.cdiv(groups, NG)
    tiles_m = tl.cdiv(O, BLOCK)
    pid = tl.program_id(0)
    band = pid // (8 * tiles_n)
    height = tl.minimum(tiles_m - band * 8, 8)
    pid_m = band * 8 + (pid % (8 * tiles_n)) % height
    first_group = (pid % (8 * tiles_n)) // height * NG
    row = (pid_m * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    row_ok = row < O
    col, col_ok, group = columns_of(first_group, groups, G, G_PAD, NG)
    ok = row_ok[:, None] & col_ok[None, :]
    if DENSE:
        dw = tl.load(grad_ptr + row[:, None] * I + col[None, :], mask=ok, other=0.0).to(tl.float32)
    else:
        dw = tl.zeros([BLOCK, N], tl.float32)
        step = tl.arange(0, BLOCK_T)
        for start in tl.range(0, T, BLOCK_T, num_stages=STAGES):
            token = (start + step).to(tl.int64)
            token_ok = (token < T)[:, None]
            g = tl.load(grad_ptr + token[:, None] * O + row[None, :], mask=token_ok & row_ok[None, :], other=0.0)
            x = tl.load(x_ptr + token[:, None] * I + col[None, :], mask=token_ok & col_ok[None, :], other=0.0)
            dw = tl.dot(tl.trans(g), x, acc=dw, input_precision="ieee")
    base = tl.load(w_ptr + row[:, None] * I + col[None, :], mask=ok, other=0.0).to(tl.float32)
    dw3 = tl.reshape(dw, [BLOCK, NG, G_PAD])
    ratio = tl.full([BLOCK, NG], 1.0, tl.float32)
    group_ok = row_ok[:, None] & (group < groups)[None, :]
    rank = tl.arange(0, R_PAD)
    for p in tl.static_range(P):
        w, a, b = lora_tile(base, a_ptr, b_ptr, p, scaling, row, row_ok, col, col_ok, O, I, R, dtype, R_PAD)
        group_at = (p * O + row)[:, None] * groups + group[None, :]
        if HAS_CLIP:
            ratio = tl.load(clip_ptr + group_at, mask=group_ok, other=1.0).to(tl.float32)
        level, y, s, unit = quantize_tile(
            tl.reshape(w, [BLOCK, NG, G_PAD]), ratio, LOW[p], INVERSE[p], REST[p], dtype, HAS_CLIP, EXACT
        )
        if WANT_PROBS:
            inner = tl.sum(tl.sum(dw3 * level, axis=2) * s)
            tl.store(dprobs_ptr + p * tl.num_programs(0) + pid, inner)
        if WANT_LORA or WANT_CLIP:
            pi = tl.load(probs_ptr + p).to(tl.float32)
            masked = dw3
            if CLIP_STE:
                # Inside unless rint(y) left the range: a half-integral bound is a tie and rounds to the even
                # neighbour, which for the upper end (odd level) is outside and for the lower end is inside.
                inside = (y < -LOW[p] - 0.5) & (y >= LOW[p] - 0.5)
                masked = tl.where(inside, dw3, 0.0)
                if WANT_CLIP:
                    slope = tl.sum(dw3 * level - masked * y, axis=2)
                    d = pi * slope * tl.div_rn(unit, unit * 0.0 + (-LOW[p] - 0.5))
                    tl.store(dclip_ptr + group_at, d.to(dclip_ptr.dtype.element_ty), mask=group_ok)
            if WANT_LORA:
                flat = tl.reshape(masked, [BLOCK, N]).to(dtype)
                db = tl.dot(flat, tl.trans(a), input_precision="ieee") * (pi * scaling)  # [BLOCK, R_PAD]
                tl.atomic_add(
                    db_ptr + (p * O + row)[:, None] * R + rank[None, :], db,
                    mask=row_ok[:, None] & (rank < R)[None, :], sem="relaxed",
                )  # fmt: skip
                da = tl.dot(tl.trans(b), flat, input_precision="ieee") * pi  # [R_PAD, N]
                tl.atomic_add(
                    da_ptr + p * R * I + rank[:, None] * I + col[None, :], da,
                    mask=(rank < R)[:, None] & col_ok[None, :], sem="relaxed",
                )  # fmt: skip


def tile_constants(bits: Sequence[int], group_size: int, rank: int, has_clip: bool) -> dict[str, Any]:
    """What both kernels are compiled for: the quantizers, 128 columns or one group per tile, and the rank padded to
    the 16 that tl.dot takes at least."""
    padded = triton.next_power_of_2(group_size)
    return {
        "P": len(bits), **bit_constants(tuple(bits), True), "G": group_size, "G_PAD": padded,
        "NG": max(1, 128 // padded), "R_PAD": max(16, triton.next_power_of_2(rank)), "HAS_CLIP": has_clip,
        "EXACT": interpreting(),
    }  # fmt: skip


def hopper(tensor: Tensor) -> bool:
    """Whether dot products go through wgmma: 64 rows per 4 warps, one row's groups inside one warp."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] >= 9


def forward_config(group_size: int, has_clip: bool, wgmma: bool) -> dict[str, int]:
    """Rows per tile and warps; each pair compiles without spills (tests/aot)."""
    if group_size > 128:
        return {"BLOCK": max(16, 4096 // triton.next_power_of_2(group_size)), "num_warps": 4}
    return {"BLOCK": 64 if wgmma and not has_clip else 32, "num_warps": 4}


def backward_config(group_size: int, epilogue_gemms: bool) -> dict[str, int]:
    """Rows per tile and warps; the two extra products of the epilogue need registers."""
    if group_size > 128:
        return {"BLOCK": 16, "num_warps": 8}
    return {"BLOCK": 32, "num_warps": 8} if epilogue_gemms else {"BLOCK": 64, "num_warps": 4}


def forward(mix: Mixture, out: Tensor | None = None) -> Tensor:
    """W~, in `out` if there is one."""
    mix = mix.dense()
    (o, i), rank, has_clip = mix.weight.shape, mix.lora_a.shape[1], mix.clip is not None
    groups, out = i // mix.group_size, torch.empty_like(mix.weight) if out is None else out
    tile = tile_constants(mix.bits, mix.group_size, rank, has_clip)
    config = forward_config(mix.group_size, has_clip, hopper(mix.weight))
    if out.numel():
        with torch.cuda.device_of(mix.weight):
            mix_forward_kernel[(triton.cdiv(groups, tile["NG"]), triton.cdiv(o, config["BLOCK"]))](
                *mix[:5], out, mix.scaling, o, i, rank, groups, **config, **tile
            )
    return out


def gradients(mix: Mixture, upstream: Upstream, want: Want) -> Gradients:
    """The gradients that are wanted."""
    mix, grad, x = mix.dense(), upstream.grad.contiguous(), upstream.x
    x = None if x is None else x.to(grad.dtype).contiguous()
    (o, i), (precisions, rank, _) = mix.weight.shape, mix.lora_a.shape
    groups, new = i // mix.group_size, mix.weight.new_empty
    da, db = (torch.zeros_like(t, dtype=torch.float32) if want.lora else None for t in (mix.lora_a, mix.lora_b))
    dclip = torch.empty_like(mix.clip) if want.clip and mix.clip is not None else None
    tile = tile_constants(mix.bits, mix.group_size, rank, mix.clip is not None)
    config = backward_config(mix.group_size, want.lora or want.clip)
    programs = triton.cdiv(groups, tile["NG"]) * triton.cdiv(o, config["BLOCK"])
    sums = new(precisions, programs, dtype=torch.float32) if want.probs else None
    if programs:
        with torch.cuda.device_of(mix.weight):
            mix_backward_kernel[(programs,)](
                grad, x, *mix[:5], da, db, sums, dclip, mix.scaling, 0 if x is None else x.shape[0], o, i, rank,
                groups, BLOCK_T=64, STAGES=3, DENSE=x is None, CLIP_STE=mix.ste == "clip", WANT_LORA=want.lora,
                WANT_PROBS=want.probs, WANT_CLIP=want.clip, **config, **tile,
            )  # fmt: skip
    dprobs = None if sums is None else sums.sum(1)
    return in_dtype_of(da, mix.lora_a), in_dtype_of(db, mix.lora_b), in_dtype_of(dprobs, mix.probs), dclip
