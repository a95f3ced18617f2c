"""Triton kernels of ``quant_lora_mix`` and of the epilogue backward shared with ``quant_lora_linear``.

The decision to know: the forward reads W and writes W~ once (2 x 34 MB for a 4096 x 4096 bf16 weight, 16 us at
4.3 TB/s), so three quantizers per element have to fit into some 25 fp32 operations. Hence
  * x / s costs two operations when s is a half-type number: with 1/s = r + t to 45 bits, RN(x · r + RN(x · t)) is the
    correctly rounded quotient, because no quotient of a 24-bit by an 11-bit significand comes closer than 2^-36
    (relatively) to a rounding boundary without lying on the representable side. fp32 scales use Markstein's three.
  * rint is the addition of 1.5 · 2^23 (to nearest even), undone after clamping.
  * without clip ratios |x / s| <= (2^b - 1)/2 · (1 + 2^-8), so only the upper clamp can act; not in fp16, whose scales
    below 2^-14 are rounded to multiples of 2^-24 (fuzzing found a level of -131).
  * W enters as the accumulator of the LoRA product.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core.dispatch import interpreting, no_grad_slot
from jointnas_kernels.ops.quant.weights import TINY_SCALE

MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding it leaves no fraction bits, for either sign
TINY = tl.constexpr(TINY_SCALE)


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
    x, ratio, divisor: tl.constexpr, inverse: tl.constexpr, rest: tl.constexpr, high: tl.constexpr,
    dtype: tl.constexpr, NG: tl.constexpr, G: tl.constexpr, HAS_CLIP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """(levels, quotients) [BLOCK, NG, G] and (s, max|x|) [BLOCK, NG] of x [BLOCK, NG, G]; ratio [BLOCK, NG]."""
    unit = tl.max(tl.abs(x), axis=2)  # [BLOCK, NG]
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
    level = tl.minimum(y + MAGIC, MAGIC + high)
    if HAS_CLIP or dtype == tl.float16:
        level = tl.maximum(level, MAGIC - high - 1.0)
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
def mix_forward_kernel(
    w_ptr, a_ptr, b_ptr, probs_ptr, clip_ptr, out_ptr, scaling, O, I, R, groups,
    P: tl.constexpr, HIGH: tl.constexpr, DIVISOR: tl.constexpr, INVERSE: tl.constexpr, REST: tl.constexpr,
    G: tl.constexpr, G_PAD: tl.constexpr, NG: tl.constexpr, R_PAD: tl.constexpr, BLOCK: tl.constexpr,
    HAS_CLIP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK rows by NG groups: one read of W, one write of W~."""
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    row = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    row_ok = row < O
    group = tl.program_id(0) * NG + tl.arange(0, NG)
    lane = tl.arange(0, NG * G_PAD)
    col_group = tl.program_id(0) * NG + lane // G_PAD
    col = col_group * G + lane % G_PAD  # [N]
    col_ok = (lane % G_PAD < G) & (col_group < groups)
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
            tl.reshape(x, [BLOCK, NG, G_PAD]), ratio, DIVISOR[p], INVERSE[p], REST[p], HIGH[p],
            dtype, NG, G_PAD, HAS_CLIP, EXACT,
        )  # fmt: skip
        pi = tl.load(probs_ptr + p).to(tl.float32)
        mixed = tl.fma(level, tl.broadcast_to(tl.expand_dims(pi * s, 2), mixed.shape), mixed)
    tl.store(out_ptr + at, tl.reshape(mixed, [BLOCK, NG * G_PAD]).to(dtype), mask=ok)


@triton.jit
def columns_of(first_group, groups, G: tl.constexpr, G_PAD: tl.constexpr, NG: tl.constexpr):
    """(channels [NG * G_PAD], which of them exist, groups [NG]) of a tile; group padding does not exist."""
    lane = tl.arange(0, NG * G_PAD)
    of = first_group + lane // G_PAD
    return of * G + lane % G_PAD, (lane % G_PAD < G) & (of < groups), first_group + tl.arange(0, NG)


@triton.jit
def reduce_tile(
    dw, tile, row, row_ok, first_group, w_ptr, a_ptr, b_ptr, probs_ptr, clip_ptr,
    da_ptr, db_ptr, dprobs_ptr, dclip_ptr, scaling, O, I, R, groups, tiles,
    P: tl.constexpr, HIGH: tl.constexpr, DIVISOR: tl.constexpr, INVERSE: tl.constexpr, REST: tl.constexpr,
    G: tl.constexpr, G_PAD: tl.constexpr, NG: tl.constexpr, R_PAD: tl.constexpr, BLOCK: tl.constexpr,
    HAS_CLIP: tl.constexpr, EXACT: tl.constexpr, CLIP_STE: tl.constexpr,
    WANT_LORA: tl.constexpr, WANT_PROBS: tl.constexpr, WANT_CLIP: tl.constexpr,
):  # fmt: skip
    """Reduce dw [BLOCK, NG * G_PAD] against the quantizers of its tile."""
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    N: tl.constexpr = NG * G_PAD
    col, col_ok, group = columns_of(first_group, groups, G, G_PAD, NG)
    ok = row_ok[:, None] & col_ok[None, :]
    base = tl.load(w_ptr + row[:, None] * I + col[None, :], mask=ok, other=0.0).to(tl.float32)
    dw3 = tl.reshape(dw, [BLOCK, NG, G_PAD])
    ratio = tl.full([BLOCK, NG], 1.0, tl.float32)
    group_at = row[:, None] * groups + group[None, :]
    group_ok = row_ok[:, None] & (group < groups)[None, :]
    rank = tl.arange(0, R_PAD)
    for p in tl.static_range(P):
        w, a, b = lora_tile(base, a_ptr, b_ptr, p, scaling, row, row_ok, col, col_ok, O, I, R, dtype, R_PAD)
        if HAS_CLIP:
            ratio = tl.load(clip_ptr + p * O * groups + group_at, mask=group_ok, other=1.0).to(tl.float32)
        level, y, s, unit = quantize_tile(
            tl.reshape(w, [BLOCK, NG, G_PAD]), ratio, DIVISOR[p], INVERSE[p], REST[p], HIGH[p],
            dtype, NG, G_PAD, HAS_CLIP, EXACT,
        )  # fmt: skip
        if WANT_PROBS:
            inner = tl.sum(tl.sum(dw3 * level, axis=2) * s)
            tl.store(dprobs_ptr + p * tiles + tile, inner)
        if WANT_LORA or WANT_CLIP:
            pi = tl.load(probs_ptr + p).to(tl.float32)
            masked = dw3
            if CLIP_STE:
                # Inside unless rint(y) left the range: a half-integral bound is a tie and rounds to the even
                # neighbour, which for the upper end (odd `high`) is outside and for the lower end is inside.
                inside = (y < HIGH[p] + 0.5) & (y >= -HIGH[p] - 1.5)
                masked = tl.where(inside, dw3, 0.0)
                if WANT_CLIP:
                    slope = tl.sum(dw3 * level - masked * y, axis=2)
                    d = pi * slope * tl.div_rn(unit, unit * 0.0 + DIVISOR[p])
                    tl.store(dclip_ptr + p * O * groups + group_at, d.to(dclip_ptr.dtype.element_ty), mask=group_ok)
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


@triton.jit
def mix_backward_kernel(
    grad_ptr, x_ptr, w_ptr, a_ptr, b_ptr, probs_ptr, clip_ptr,
    da_ptr, db_ptr, dprobs_ptr, dclip_ptr, scaling, T, O, I, R, groups,
    P: tl.constexpr, HIGH: tl.constexpr, DIVISOR: tl.constexpr, INVERSE: tl.constexpr, REST: tl.constexpr,
    G: tl.constexpr, G_PAD: tl.constexpr, NG: tl.constexpr, R_PAD: tl.constexpr,
    BLOCK: tl.constexpr, HALVES: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr,
    HAS_CLIP: tl.constexpr, EXACT: tl.constexpr, DENSE: tl.constexpr, CLIP_STE: tl.constexpr,
    WANT_LORA: tl.constexpr, WANT_PROBS: tl.constexpr, WANT_CLIP: tl.constexpr,
):  # fmt: skip
    """One tile of dW = gradᵀ x (or of a given dW if DENSE), reduced against the quantizers without being written.

    The tile is HALVES (1 or 2) times NG groups wide: two accumulators share the grad operand, and each is reduced on
    its own, so that the epilogue's registers are those of one half. dprobs_ptr [P, programs * HALVES] gets partial
    sums; da [P, R, I] and db [P, O, R] are fp32 and accumulated by atomic additions, since every tile contributes.
    """
    # 8 row tiles side by side before the next column tile: their x and grad slabs stay in L2.
    tiles_n = tl.cdiv(groups, NG * HALVES)
    tiles_m = tl.cdiv(O, BLOCK)
    pid = tl.program_id(0)
    band = pid // (8 * tiles_n)
    height = tl.minimum(tiles_m - band * 8, 8)
    pid_m = band * 8 + (pid % (8 * tiles_n)) % height
    first_group = (pid % (8 * tiles_n)) // height * (NG * HALVES)

    N: tl.constexpr = NG * G_PAD
    row = (pid_m * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    row_ok = row < O
    col, col_ok, _ = columns_of(first_group, groups, G, G_PAD, NG)
    col1, col1_ok, _ = columns_of(first_group + NG, groups, G, G_PAD, NG)
    if DENSE:
        at = grad_ptr + row[:, None] * I
        dw = tl.load(at + col[None, :], mask=row_ok[:, None] & col_ok[None, :], other=0.0).to(tl.float32)
        if HALVES == 2:
            dw1 = tl.load(at + col1[None, :], mask=row_ok[:, None] & col1_ok[None, :], other=0.0).to(tl.float32)
    else:
        dw = tl.zeros([BLOCK, N], tl.float32)
        dw1 = tl.zeros([BLOCK, N], tl.float32)
        step = tl.arange(0, BLOCK_T)
        for start in tl.range(0, T, BLOCK_T, num_stages=STAGES):
            token = (start + step).to(tl.int64)
            token_ok = (token < T)[:, None]
            g = tl.load(grad_ptr + token[:, None] * O + row[None, :], mask=token_ok & row_ok[None, :], other=0.0)
            x = tl.load(x_ptr + token[:, None] * I + col[None, :], mask=token_ok & col_ok[None, :], other=0.0)
            dw = tl.dot(tl.trans(g), x, acc=dw, input_precision="ieee")
            if HALVES == 2:
                x1 = tl.load(x_ptr + token[:, None] * I + col1[None, :], mask=token_ok & col1_ok[None, :], other=0.0)
                dw1 = tl.dot(tl.trans(g), x1, acc=dw1, input_precision="ieee")
    tiles = tl.num_programs(0) * HALVES
    reduce_tile(
        dw, pid, row, row_ok, first_group, w_ptr, a_ptr, b_ptr, probs_ptr, clip_ptr,
        da_ptr, db_ptr, dprobs_ptr, dclip_ptr, scaling, O, I, R, groups, tiles,
        P, HIGH, DIVISOR, INVERSE, REST, G, G_PAD, NG, R_PAD, BLOCK,
        HAS_CLIP, EXACT, CLIP_STE, WANT_LORA, WANT_PROBS, WANT_CLIP,
    )  # fmt: skip
    if HALVES == 2:
        reduce_tile(
            dw1, pid + tl.num_programs(0), row, row_ok, first_group + NG, w_ptr, a_ptr, b_ptr, probs_ptr, clip_ptr,
            da_ptr, db_ptr, dprobs_ptr, dclip_ptr, scaling, O, I, R, groups, tiles,
            P, HIGH, DIVISOR, INVERSE, REST, G, G_PAD, NG, R_PAD, BLOCK,
            HAS_CLIP, EXACT, CLIP_STE, WANT_LORA, WANT_PROBS, WANT_CLIP,
        )  # fmt: skip


# ---- launchers ----


def bit_constants(bits: Sequence[int]) -> dict[str, tuple[float, ...]]:
    """Per precision: the top level, the divisor (2^b - 1)/2 and its reciprocal in two fp32 numbers."""
    divisor = [(2**b - 1) / 2 for b in bits]
    inverse = [float(np.float32(1 / d)) for d in divisor]
    rest = [float(np.float32(1 / d - i)) for d, i in zip(divisor, inverse, strict=True)]
    return {
        "HIGH": tuple(float(2 ** (b - 1) - 1) for b in bits),
        "DIVISOR": tuple(divisor),
        "INVERSE": tuple(inverse),
        "REST": tuple(rest),
    }


def tile_config(group_size: int, rank: int, width: int) -> dict[str, int]:
    """Group padding, groups per tile (at least ``width`` columns) and rank padding (tl.dot takes 16 or more)."""
    padded = triton.next_power_of_2(group_size)
    return {
        "G": group_size,
        "G_PAD": padded,
        "NG": max(1, width // padded),
        "R_PAD": max(16, triton.next_power_of_2(rank)),
    }


def hopper(tensor: Tensor) -> bool:
    """Whether dot products go through wgmma: 64 rows per 4 warps, one row's groups inside one warp."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] >= 9


def forward_config(group_columns: int, has_clip: bool, wgmma: bool) -> dict[str, int]:
    """Rows per tile and warps; each pair compiles without spills (tests/aot)."""
    if group_columns > 128:
        return {"BLOCK": max(16, 4096 // group_columns), "num_warps": 4}
    return {"BLOCK": 64 if wgmma and not has_clip else 32, "num_warps": 4}


def backward_config(group_columns: int, epilogue_gemms: bool) -> dict[str, int]:
    """Rows per tile and warps; the two extra products of the epilogue need registers."""
    if group_columns > 128:
        return {"BLOCK": 16, "HALVES": 1, "num_warps": 8}
    return {"BLOCK": 32, "HALVES": 1, "num_warps": 8} if epilogue_gemms else {"BLOCK": 64, "HALVES": 1, "num_warps": 4}


def mix_forward_triton(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    probs: Tensor,
    clip: Tensor | None,
    scaling: float,
    bits: Sequence[int],
    group_size: int,
) -> Tensor:
    """W~ [O, I] in the dtype of ``weight``."""
    weight, lora_a, lora_b, probs = (t.contiguous() for t in (weight, lora_a, lora_b, probs))
    (o, i), rank, groups = weight.shape, lora_a.shape[1], weight.shape[1] // group_size
    out = torch.empty_like(weight)
    if out.numel() == 0:
        return out
    shape = tile_config(group_size, rank, 128)
    config = forward_config(shape["NG"] * shape["G_PAD"], clip is not None, hopper(weight))
    grid = (triton.cdiv(groups, shape["NG"]), triton.cdiv(o, config["BLOCK"]))
    with torch.cuda.device_of(weight):
        mix_forward_kernel[grid](
            weight, lora_a, lora_b, probs, weight if clip is None else clip.contiguous(), out,
            scaling, o, i, rank, groups, P=len(bits), HAS_CLIP=clip is not None, EXACT=interpreting(),
            **config, **shape, **bit_constants(bits),
        )  # fmt: skip
    return out


def mix_backward_triton(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    probs: Tensor,
    clip: Tensor | None,
    scaling: float,
    bits: Sequence[int],
    group_size: int,
    ste: str,
    want: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dA, dB, dprobs, dclip) of dW = gradᵀ x (grad [T, O], x [T, I]), or of dW = grad [O, I] where x is None."""
    grad, weight, lora_a, lora_b, probs = (t.contiguous() for t in (grad, weight, lora_a, lora_b, probs))
    x = None if x is None else x.to(grad.dtype).contiguous()
    clip = None if clip is None else clip.contiguous()
    (o, i), rank, groups, p = weight.shape, lora_a.shape[1], weight.shape[1] // group_size, len(bits)
    want_lora, want_probs, want_clip = want
    new = weight.new_zeros
    da = new(lora_a.shape, dtype=torch.float32) if want_lora else no_grad_slot(weight)
    db = new(lora_b.shape, dtype=torch.float32) if want_lora else no_grad_slot(weight)
    dclip = torch.empty_like(clip) if want_clip and clip is not None else no_grad_slot(weight)
    shape = tile_config(group_size, rank, 128)
    config = backward_config(shape["NG"] * shape["G_PAD"], want_lora or want_clip)
    programs = triton.cdiv(groups, shape["NG"] * config["HALVES"]) * triton.cdiv(o, config["BLOCK"])
    sums = weight.new_empty(p, programs * config["HALVES"], dtype=torch.float32) if want_probs else no_grad_slot(weight)
    if programs:
        with torch.cuda.device_of(weight):
            mix_backward_kernel[(programs,)](
                grad, grad if x is None else x, weight, lora_a, lora_b, probs, weight if clip is None else clip,
                da, db, sums, dclip, scaling, 0 if x is None else x.shape[0], o, i, rank, groups,
                P=p, BLOCK_T=64, STAGES=3, HAS_CLIP=clip is not None, EXACT=interpreting(), DENSE=x is None,
                CLIP_STE=ste == "clip", WANT_LORA=want_lora, WANT_PROBS=want_probs, WANT_CLIP=want_clip,
                **config, **shape, **bit_constants(bits),
            )  # fmt: skip
    return (
        da.to(lora_a.dtype) if want_lora else da,
        db.to(lora_b.dtype) if want_lora else db,
        sums.sum(1).to(probs.dtype) if want_probs else sums,
        dclip,
    )
