"""Triton kernels of ``act_quant_mix``: one read and one write per tensor. The forward holds whole token rows in
registers and writes down each row's scales and zero points, so that the backward is free to work in column blocks.

Every operation of the quantizer is rounded to the storage type, as the reference (and compressed-tensors) does it; the
kernels get the same bits with fewer instructions:
  * bf16: RN_bf16(x · r) with any r within 2^-20 of 1/s equals RN_bf16(x / s), since a quotient of two 8-bit
    significands is never a 9-bit rounding boundary and never within 2^-17 (relatively) of one.
  * fp16: x · r + RN(x · t) with r + t = 1/s (two operations); fp32: Markstein's three.
  * half types: two quotients are rounded by one packed conversion (a single one runs at an eighth of the rate), and
    z, min and max act on the pair (``level_code``).
  * rint, - z: with M = 1.5 · 2^23, + M rounds and one subtraction of M + z undoes both.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core.dispatch import interpreting, no_grad_slot, rows

MAGIC = tl.constexpr(12582912.0)


def pair_code(half: str, *steps: str) -> tl.constexpr:
    """PTX on two fp32 values $2, $3: rounded to a pair p of halves, ``steps`` (on p), widened to $0, $1."""
    widen = {
        "bf16": "shl.b32 q, p, 16; mov.b32 $0, q; and.b32 q, p, 0xffff0000; mov.b32 $1, q;",
        "f16": "mov.b32 {h, k}, p; cvt.f32.f16 $0, h; cvt.f32.f16 $1, k;",
    }
    code = (".reg .b32 p, q; .reg .b16 h, k;", f"cvt.rn.{half}x2.f32 p, $3, $2;", *steps, widen[half])
    return tl.constexpr("{ " + " ".join(code) + " }")


def level_code(half: str, one: int) -> tl.constexpr:
    """The same, then clamp(RN(. + z)): $4 z, $6 the lower, $8 the upper bound, in both halves."""
    add = f"mov.b32 q, {one}; fma.rn.{half}x2 p, p, q, $4;"  # 1 · p + z: sm_80 has no packed bf16 addition
    return pair_code(half, add, f"max.{half}x2 p, p, $6;", f"min.{half}x2 p, p, $8;")


ROUND_BF16, ROUND_F16 = pair_code("bf16"), pair_code("f16")
LEVEL_BF16, LEVEL_F16 = level_code("bf16", 0x3F803F80), level_code("f16", 0x3C003C00)


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
def scale_and_zero(
    least, most, low: tl.constexpr, inverse: tl.constexpr, rest: tl.constexpr, eps: tl.constexpr, dtype: tl.constexpr,
    SYMMETRIC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """(s, z) [R] of rows with extremes least <= 0 <= most; inverse + rest = 1 / (number of steps)."""
    high: tl.constexpr = -low - 1.0
    span: tl.constexpr = (high - low) / 2 if SYMMETRIC else high - low
    unit = tl.maximum(-least, most) if SYMMETRIC else round_to(most - least, dtype)
    if EXACT:  # the interpreter has no fused multiply-add
        s = tl.div_rn(unit, unit * 0.0 + span)
    else:
        s = tl.fma(unit, inverse, unit * rest)  # = RN(unit / span): the divisor has at most 8 bits
    s = round_to(s, dtype)
    z = unit * 0.0
    if not SYMMETRIC:
        # A zero scale gives NaN or inf here; any z is right then, because every level of such a row equals z.
        if EXACT or dtype == tl.float32:
            bottom = tl.div_rn(least, s)
        else:
            r = 1.0 / s
            bottom = tl.fma(least, r, least * (tl.fma(-s, r, 1.0) * r))
        z = round_to(low - round_to(bottom, dtype), dtype)
        z = (tl.minimum(tl.maximum(z, low), high) + MAGIC) - MAGIC
    return tl.where(s == 0.0, eps, s), z


@triton.jit
def both_halves(value, dtype: tl.constexpr):
    """fp32 values that ``dtype`` holds exactly, as pairs in a 32-bit word."""
    word = value.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
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
        v = tl.minimum(tl.maximum(v, low), high)
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
            [v, tl.broadcast_to(both_halves(z, dtype)[:, None], x.shape),
             tl.broadcast_to(lower[:, None], x.shape), tl.broadcast_to(upper[:, None], x.shape)],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return (v + MAGIC) - tl.expand_dims(z + MAGIC, 1)


@triton.jit
def act_forward_kernel(
    x_ptr, mask_ptr, probs_ptr, out_ptr, levels_ptr, count, N, stride,
    Q: tl.constexpr, LOW: tl.constexpr, INVERSE: tl.constexpr, REST: tl.constexpr, eps: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SYMMETRIC: tl.constexpr, HAS_MASK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """ROWS tokens per program. LOW[q] = -2^(b-1), 0 for the identity (16 bits); levels [count, Q, 2] gets (s, z)."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.arange(0, BLOCK)
    ok = (row < count)[:, None] & (col < N)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride + col[None, :], mask=ok, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    if HAS_MASK:
        x = round_tile(x * tl.load(mask_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :], dtype, EXACT)
    least = tl.minimum(tl.min(x, axis=1), 0.0)
    most = tl.maximum(tl.max(x, axis=1), 0.0)
    mixed = tl.zeros([ROWS, BLOCK], tl.float32)
    for q in tl.static_range(Q):
        pi = tl.load(probs_ptr + q).to(tl.float32)
        if LOW[q] == 0.0:
            mixed = tl.fma(x, tl.full([ROWS, BLOCK], 1.0, tl.float32) * pi, mixed)
        else:
            s, z = scale_and_zero(least, most, LOW[q], INVERSE[q], REST[q], eps, dtype, SYMMETRIC, EXACT)
            tl.store(levels_ptr + (row * Q + q) * 2, s, mask=row < count)
            tl.store(levels_ptr + (row * Q + q) * 2 + 1, z, mask=row < count)
            level = token_levels(x, s, z, LOW[q], dtype, SYMMETRIC, EXACT)
            mixed = tl.fma(level, tl.broadcast_to((pi * s)[:, None], level.shape), mixed)
    tl.store(out_ptr + row[:, None] * N + col[None, :], mixed.to(dtype), mask=ok)


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
    grad_ptr, x_ptr, mask_ptr, probs_ptr, levels_ptr, dx_ptr, dprobs_ptr, dmask_ptr, count, N, grad_stride, stride,
    Q: tl.constexpr, LOW: tl.constexpr, INVERSE: tl.constexpr, REST: tl.constexpr, eps: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SYMMETRIC: tl.constexpr, HAS_MASK: tl.constexpr, EXACT: tl.constexpr,
    WANT_X: tl.constexpr, WANT_PROBS: tl.constexpr, WANT_MASK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns, ROWS tokens at a time: program (c, i) takes row tiles i, i + programs, ...

    Partial sums: dprobs_ptr [programs of the whole grid, Q] (Q <= 4), dmask_ptr [programs of axis 1, N].
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
        at = dprobs_ptr + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * Q
        tl.store(at, tl.sum(sum0))
        if Q > 1:
            tl.store(at + 1, tl.sum(sum1))
        if Q > 2:
            tl.store(at + 2, tl.sum(sum2))
        if Q > 3:
            tl.store(at + 3, tl.sum(sum3))
    if WANT_MASK:
        tl.store(dmask_ptr + tl.program_id(1) * N + col, tl.sum(dmask, axis=0) * total, mask=col_ok)


# ---- launchers ----


def row_config(columns: int) -> dict[str, int]:
    """Rows per program and warps for rows of ``columns``: 16 to 32 elements per thread."""
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "ROWS": max(1, 1024 // block), "num_warps": min(16, max(4, block // 1024))}


@functools.cache
def constants(
    dtype: torch.dtype, bits: tuple[int, ...], symmetric: bool, has_mask: bool, exact: bool
) -> dict[str, object]:
    """Compile-time arguments both kernels share."""
    spans = [(2**b - 1) / (2 if symmetric else 1) for b in bits]
    inverse = [float(np.float32(1 / span)) for span in spans]
    return {
        "Q": len(bits),
        "LOW": tuple(0.0 if b == 16 else float(-(2 ** (b - 1))) for b in bits),
        "INVERSE": tuple(inverse),
        "REST": tuple(float(np.float32(1 / span - i)) for span, i in zip(spans, inverse, strict=True)),
        "eps": torch.finfo(dtype).eps,
        "SYMMETRIC": symmetric,
        "HAS_MASK": has_mask,
        "EXACT": exact,
    }


def backward_config(columns: int) -> dict[str, int]:
    """Columns and rows per tile (4096 elements) and warps."""
    block = min(512, triton.next_power_of_2(columns))
    return {"BLOCK": block, "ROWS": min(32, 4096 // block), "num_warps": 8}


def act_forward_triton(
    x: Tensor, probs: Tensor, mask: Tensor | None, bits: Sequence[int], symmetric: bool
) -> tuple[Tensor, Tensor]:
    """(y in the shape and dtype of x, contiguous; scale and zero point of every row and precision)."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat, config = rows(x), row_config(x.shape[-1])
    count, n = flat.shape
    levels = torch.empty(count, len(bits), 2, dtype=torch.float32, device=x.device)
    if out.numel():
        with torch.cuda.device_of(x):
            act_forward_kernel[(triton.cdiv(count, config["ROWS"]),)](
                flat, flat if mask is None else mask.contiguous(), probs.contiguous(), out, levels, count, n,
                flat.stride(0), **config,
                **constants(x.dtype, tuple(bits), symmetric, mask is not None, interpreting()),
            )  # fmt: skip
    return out, levels


def act_backward_triton(
    grad: Tensor,
    x: Tensor,
    probs: Tensor,
    mask: Tensor | None,
    levels: Tensor | None,
    bits: Sequence[int],
    symmetric: bool,
    want: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dprobs, dmask); an empty tensor for each one not wanted."""
    want_x, want_probs, want_mask = want[0], want[1], want[2] and mask is not None
    flat, grad, config = rows(x), rows(grad), backward_config(x.shape[-1])
    count, n = flat.shape
    blocks = triton.cdiv(n, config["BLOCK"])
    programs = max(1, min(triton.cdiv(count, config["ROWS"]), 528 // blocks))  # four per multiprocessor of an H200
    new = x.new_empty
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if want_x else no_grad_slot(x)
    dprobs = new(programs * blocks, len(bits), dtype=torch.float32) if want_probs else no_grad_slot(x)
    dmask = new(programs, n, dtype=torch.float32) if want_mask else no_grad_slot(x)
    if x.numel():
        with torch.cuda.device_of(x):
            act_backward_kernel[(blocks, programs)](
                grad, flat, flat if mask is None else mask.contiguous(), probs.contiguous(),
                flat if levels is None else levels, dx, dprobs, dmask, count, n, grad.stride(0), flat.stride(0),
                WANT_X=want_x, WANT_PROBS=want_probs, WANT_MASK=want_mask,
                **constants(x.dtype, tuple(bits), symmetric, mask is not None, interpreting()), **config,
            )  # fmt: skip
    return (
        dx,
        dprobs.sum(0).to(probs.dtype) if want_probs else dprobs,
        dmask.sum(0).to(mask.dtype) if want_mask and mask is not None else dmask,
    )
