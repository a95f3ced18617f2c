"""What the quantizers' Triton kernels share: constants, and the token quantizer with fewer instructions.

Every operation of the token quantizer is rounded to the storage type, as the reference (and compressed-tensors) does
it. The same bits come cheaper:
  * bf16: RN_bf16(x · r) with any r within 2^-20 of 1/s equals RN_bf16(x / s), since a quotient of two 8-bit
    significands is never a 9-bit rounding boundary and never within 2^-17 (relatively) of one.
  * fp16: x · r + RN(x · t) with r + t = 1/s (two operations); fp32: Markstein's three.
  * half types: two quotients are rounded by one packed conversion (a single one runs at an eighth of the rate), and
    z, min and max act on the pair (``level_code``).
  * rint, - z: + MAGIC rounds and one subtraction of MAGIC + z undoes both.

NaN and infinity make a token NaN, as in the reference: extremes keep NaN, and the scale of a range that is not finite
is NaN. Scales below fp32's normal numbers, for which 1/s could be infinite, become the smallest of these.
"""

import functools

import numpy as np
import torch
import triton
import triton.language as tl

from jointnas_kernels.ops.quant.spec import TINY_SCALE, divisor, level_range

MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding it rounds to an integer, to nearest even, below 2^22
TINY = tl.constexpr(TINY_SCALE)
NORMAL = tl.constexpr(2.0**-126)  # fp32's smallest normal number


@functools.cache
def bit_constants(bits: tuple[int, ...], symmetric: bool) -> dict[str, tuple[float, ...]]:
    """Per precision: the lowest level (0 for 16 bits: none), and 1 / divisor as a sum of two fp32 numbers."""
    exact = [1 / divisor(b, symmetric) for b in bits]
    inverse = [float(np.float32(e)) for e in exact]
    return {
        "LOW": tuple(0.0 if b == 16 else float(level_range(b)[0]) for b in bits),
        "INVERSE": tuple(inverse),
        "REST": tuple(float(np.float32(e - i)) for e, i in zip(exact, inverse, strict=True)),
    }


@functools.cache
def constants(
    dtype: torch.dtype, bits: tuple[int, ...], symmetric: bool, has_mask: bool, exact: bool
) -> dict[str, object]:
    """Compile-time arguments of kernels with the token quantizer; ``exact``: in the interpreter."""
    return {
        "Q": len(bits), **bit_constants(bits, symmetric), "eps": torch.finfo(dtype).eps, "SYMMETRIC": symmetric,
        "HAS_MASK": has_mask, "EXACT": exact,
    }  # fmt: skip


def pair_code(half: str, *steps: str) -> tl.constexpr:
    """PTX on two fp32 values $2, $3: rounded to a pair p of halves, ``steps`` (on p), widened to $0, $1."""
    widen = {
        "bf16": "shl.b32 q, p, 16; mov.b32 $0, q; and.b32 q, p, 0xffff0000; mov.b32 $1, q;",
        "f16": "mov.b32 {h, k}, p; cvt.f32.f16 $0, h; cvt.f32.f16 $1, k;",
    }
    code = (".reg .b32 p, q, z; .reg .b16 h, k;", f"cvt.rn.{half}x2.f32 p, $3, $2;", *steps, widen[half])
    return tl.constexpr("{ " + " ".join(code) + " }")


def level_code(half: str, one: int) -> tl.constexpr:
    """The same, then clamp(RN(. + z)): $4 and $5 the values' zero points, which differ where a pair spans two rows, in
    the lower half; $6 the lower, $8 the upper bound, in both halves."""
    join = "prmt.b32 z, $4, $5, 0x5410;"
    add = f"mov.b32 q, {one}; fma.rn.{half}x2 p, p, q, z;"  # 1 · p + z: sm_80 has no packed bf16 addition
    return pair_code(half, join, add, f"max.NaN.{half}x2 p, p, $6;", f"min.NaN.{half}x2 p, p, $8;")


ROUND_BF16, ROUND_F16 = pair_code("bf16"), pair_code("f16")
LEVEL_BF16, LEVEL_F16 = level_code("bf16", 0x3F803F80), level_code("f16", 0x3C003C00)


@triton.jit
def larger(a, b):
    """max(a, b), NaN if either is; tl.max and tl.maximum by themselves take the number."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):
    """min(a, b), NaN if either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 values rounded to ``dtype``."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def round_tile(x, dtype: tl.constexpr, EXACT: tl.constexpr):
    """The same for many values, two at a time."""
    if EXACT or dtype == tl.float32:
        return round_to(x, dtype)
    else:
        code: tl.constexpr = ROUND_BF16 if dtype == tl.bfloat16 else ROUND_F16
        return tl.inline_asm_elementwise(code, "=f,=f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2)


@triton.jit
def store_sums(at, sum0, sum1, sum2, sum3, Q: tl.constexpr):
    """The sums of the first Q of four tiles, beside each other."""
    tl.store(at, tl.sum(sum0))
    if Q > 1:
        tl.store(at + 1, tl.sum(sum1))
    if Q > 2:
        tl.store(at + 2, tl.sum(sum2))
    if Q > 3:
        tl.store(at + 3, tl.sum(sum3))


@triton.jit
def scale_and_zero(
    least, most, low: tl.constexpr, inverse: tl.constexpr, rest: tl.constexpr, eps: tl.constexpr, dtype: tl.constexpr,
    SYMMETRIC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """(s, z) [R] of rows with extremes least <= 0 <= most; inverse + rest = 1 / (number of steps)."""
    high: tl.constexpr = -low - 1.0
    span: tl.constexpr = (high - low) / 2 if SYMMETRIC else high - low
    unit = larger(-least, most) if SYMMETRIC else round_to(most - least, dtype)
    if EXACT:  # the interpreter has no fused multiply-add
        s = tl.div_rn(unit, unit * 0.0 + span)
    else:
        s = tl.fma(unit, inverse, unit * rest)  # = RN(unit / span): the divisor has at most 8 bits
    s = round_to(s, dtype)
    s = tl.where(s == 0.0, eps, tl.maximum(s, NORMAL) + (s - s))  # infinity becomes NaN
    z = s * 0.0
    if not SYMMETRIC:
        if EXACT or dtype == tl.float32:
            bottom = tl.div_rn(least, s)
        else:
            r = 1.0 / s
            bottom = tl.fma(least, r, least * (tl.fma(-s, r, 1.0) * r))
        z = round_to(low - round_to(bottom, dtype), dtype)
        z = (smaller(larger(z, low), high) + MAGIC) - MAGIC
    return s, z


@triton.jit
def lower_half(value, dtype: tl.constexpr):
    """fp32 values that ``dtype`` holds exactly, in the lower half of 32-bit words."""
    return value.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def both_halves(value, dtype: tl.constexpr):
    """The same in both halves."""
    word = lower_half(value, dtype)
    return word | (word << 16)


@triton.jit
def token_levels(x, s, z, low: tl.constexpr, dtype: tl.constexpr, SYMMETRIC: tl.constexpr, EXACT: tl.constexpr):
    """Levels minus zero point of rows x [R, N]; s, z [R]."""
    high: tl.constexpr = -low - 1.0
    if EXACT or dtype == tl.float32:
        s2 = tl.broadcast_to(s[:, None], x.shape)
        if EXACT:
            v = round_to(tl.div_rn(x, s2), dtype)
        else:
            r = tl.broadcast_to(tl.div_rn(s * 0.0 + 1.0, s)[:, None], x.shape)
            v = x * r
            v = tl.fma(tl.fma(-v, s2, x), r, v)
        if not SYMMETRIC:
            v = round_to(v + z[:, None], dtype)
        v = smaller(larger(v, low), high)
    else:
        r = 1.0 / s
        v = x * r[:, None]
        if dtype == tl.float16:
            rest = tl.fma(-s, r, 1.0) * r
            v = tl.fma(x, tl.broadcast_to(r[:, None], x.shape), x * rest[:, None])
        code: tl.constexpr = LEVEL_BF16 if dtype == tl.bfloat16 else LEVEL_F16
        lower = both_halves(tl.full(s.shape, low, tl.float32), dtype)
        upper = both_halves(tl.full(s.shape, high, tl.float32), dtype)
        v = tl.inline_asm_elementwise(
            code, "=f,=f,f,f,r,r,r,r,r,r",
            [v, tl.broadcast_to(lower_half(z, dtype)[:, None], x.shape),
             tl.broadcast_to(lower[:, None], x.shape), tl.broadcast_to(upper[:, None], x.shape)],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return (v + MAGIC) - tl.expand_dims(z + MAGIC, 1)
