"""Triton kernels of ``act_quant_mix``: one read and one write per tensor. The forward holds whole token rows in
registers and writes down their extremes, so that the backward is free to work in column blocks.

Every operation of the quantizer is rounded to the storage type, as the reference (and compressed-tensors) does it; the
kernel gets the same bits with fewer instructions:
  * bf16: RN_bf16(x · r) with any r within 2^-20 of 1/s equals RN_bf16(x / s), since a quotient of two 8-bit
    significands is never a 9-bit rounding boundary and never within 2^-17 (relatively) of one.
  * fp16: x · r + RN(x · t) with r + t = 1/s (two operations); fp32: Markstein's three.
  * clamp, rint, - z: with M = 1.5 · 2^23, min and max act on v + M and one subtraction of M + z undoes both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops._dispatch import interpreting, no_grad_slot, rows

MAGIC = tl.constexpr(12582912.0)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 values rounded to ``dtype``."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def divide_rows(x, s, dtype: tl.constexpr, EXACT: tl.constexpr):
    """RN_dtype(x / s) for x [R, N] and s [R], both of ``dtype`` held in fp32."""
    s2 = s[:, None]
    if EXACT:  # the interpreter has no fused multiply-add
        y = tl.div_rn(x, tl.broadcast_to(s2, x.shape))
    elif dtype == tl.bfloat16:
        y = x * (1.0 / s2)
    elif dtype == tl.float16:
        r = 1.0 / s2
        y = tl.fma(x, r, x * (tl.fma(-s2, r, 1.0) * r))
    else:
        r = tl.div_rn(s2 * 0.0 + 1.0, s2)
        y = x * r
        y = tl.fma(tl.fma(-y, s2, x), r, y)
    return round_to(y, dtype)


@triton.jit
def token_levels(
    x, least, most, low: tl.constexpr, eps: tl.constexpr, dtype: tl.constexpr,
    SYMMETRIC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """(q - z [R, N], s [R]) of rows x with extremes least <= 0 <= most."""
    high: tl.constexpr = -low - 1.0
    span: tl.constexpr = high - low
    if SYMMETRIC:
        unit = tl.maximum(-least, most)
        s = round_to(tl.div_rn(unit, unit * 0.0 + span / 2), dtype)
        z = unit * 0.0
    else:
        unit = round_to(most - least, dtype)
        s = round_to(tl.div_rn(unit, unit * 0.0 + span), dtype)
        # A zero scale gives NaN or inf here; any z is right then, because every level of such a row equals z.
        z = round_to(low - round_to(tl.div_rn(least, s), dtype), dtype)
        z = (tl.minimum(tl.maximum(z, low), high) + MAGIC) - MAGIC
    s = tl.where(s == 0.0, eps, s)
    v = divide_rows(x, s, dtype, EXACT)
    if not SYMMETRIC:
        v = round_to(v + z[:, None], dtype)
    level = tl.minimum(tl.maximum(v + MAGIC, low + MAGIC), high + MAGIC)
    return level - tl.expand_dims(z + MAGIC, 1), s


@triton.jit
def act_forward_kernel(
    x_ptr, mask_ptr, probs_ptr, out_ptr, extremes_ptr, count, N, stride,
    Q: tl.constexpr, LOW: tl.constexpr, eps: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SYMMETRIC: tl.constexpr, HAS_MASK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """ROWS tokens per program; extremes [count, 2]. LOW[q] = -2^(b-1); 0 marks the identity (16 bits)."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.arange(0, BLOCK)
    ok = (row < count)[:, None] & (col < N)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride + col[None, :], mask=ok, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    if HAS_MASK:
        x = round_to(x * tl.load(mask_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :], dtype)
    least = tl.minimum(tl.min(x, axis=1), 0.0)
    most = tl.maximum(tl.max(x, axis=1), 0.0)
    tl.store(extremes_ptr + 2 * row, least, mask=row < count)
    tl.store(extremes_ptr + 2 * row + 1, most, mask=row < count)
    mixed = tl.zeros([ROWS, BLOCK], tl.float32)
    for q in tl.static_range(Q):
        pi = tl.load(probs_ptr + q).to(tl.float32)
        if LOW[q] == 0.0:
            mixed += pi * x
        else:
            level, s = token_levels(x, least, most, LOW[q], eps, dtype, SYMMETRIC, EXACT)
            mixed += level * (pi * s)[:, None]
    tl.store(out_ptr + row[:, None] * N + col[None, :], mixed.to(dtype), mask=ok)


@triton.jit
def act_backward_kernel(
    grad_ptr, x_ptr, mask_ptr, probs_ptr, extremes_ptr, dx_ptr, dprobs_ptr, dmask_ptr, count, N, grad_stride, stride,
    Q: tl.constexpr, Q_PAD: tl.constexpr, LOW: tl.constexpr, eps: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, SYMMETRIC: tl.constexpr, HAS_MASK: tl.constexpr, EXACT: tl.constexpr,
    WANT_X: tl.constexpr, WANT_PROBS: tl.constexpr, WANT_MASK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns, ROWS tokens at a time: program (c, i) takes row tiles i, i + programs, ...

    Partial sums: dprobs_ptr [programs of the whole grid, Q], dmask_ptr [programs of axis 1, N].
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    col_ok = col < N
    total = 0.0
    for q in tl.static_range(Q):
        total += tl.load(probs_ptr + q).to(tl.float32)
    slot = tl.arange(0, Q_PAD)
    dprobs = tl.zeros([Q_PAD], tl.float32)
    dmask = tl.zeros([BLOCK], tl.float32)
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
                dmask += tl.sum(g * x, axis=0)
            if WANT_PROBS:
                if HAS_MASK:
                    x = round_to(x * weight[None, :], dtype)
                least = tl.load(extremes_ptr + 2 * row, mask=row < count, other=0.0)
                most = tl.load(extremes_ptr + 2 * row + 1, mask=row < count, other=0.0)
                for q in tl.static_range(Q):
                    if LOW[q] == 0.0:
                        inner = tl.sum(g * x)
                    else:
                        level, s = token_levels(x, least, most, LOW[q], eps, dtype, SYMMETRIC, EXACT)
                        inner = tl.sum(tl.sum(g * level, axis=1) * s)
                    dprobs += tl.where(slot == q, inner, 0.0)
    if WANT_PROBS:
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(dprobs_ptr + program * Q + slot, dprobs, mask=slot < Q)
    if WANT_MASK:
        tl.store(dmask_ptr + tl.program_id(1) * N + col, dmask * total, mask=col_ok)


# ---- launchers ----


def row_config(columns: int) -> dict[str, int]:
    """Rows per program and warps for rows of ``columns``: 16 to 32 elements per thread."""
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "ROWS": max(1, 1024 // block), "num_warps": min(16, max(4, block // 1024))}


def constants(x: Tensor, bits: Sequence[int], symmetric: bool, mask: Tensor | None) -> dict[str, object]:
    """Compile-time arguments both kernels share."""
    return {
        "Q": len(bits),
        "LOW": tuple(0.0 if b == 16 else float(-(2 ** (b - 1))) for b in bits),
        "eps": torch.finfo(x.dtype).eps,
        "SYMMETRIC": symmetric,
        "HAS_MASK": mask is not None,
        "EXACT": interpreting(),
    }


def backward_config(columns: int) -> dict[str, int]:
    """Columns and rows per tile (4096 elements) and warps."""
    block = min(512, triton.next_power_of_2(columns))
    return {"BLOCK": block, "ROWS": min(32, 4096 // block), "num_warps": 8}


def act_forward_triton(
    x: Tensor, probs: Tensor, mask: Tensor | None, bits: Sequence[int], symmetric: bool
) -> tuple[Tensor, Tensor]:
    """(y in the shape and dtype of x, contiguous; min(x, 0) and max(x, 0) of every row as fp32)."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat, config = rows(x), row_config(x.shape[-1])
    count, n = flat.shape
    extremes = torch.empty(count, 2, dtype=torch.float32, device=x.device)
    if out.numel():
        with torch.cuda.device_of(x):
            act_forward_kernel[(triton.cdiv(count, config["ROWS"]),)](
                flat, flat if mask is None else mask.contiguous(), probs.contiguous(), out, extremes, count, n,
                flat.stride(0), **constants(x, bits, symmetric, mask), **config,
            )  # fmt: skip
    return out, extremes


def act_backward_triton(
    grad: Tensor,
    x: Tensor,
    probs: Tensor,
    mask: Tensor | None,
    extremes: Tensor | None,
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
                flat if extremes is None else extremes, dx, dprobs, dmask,
                count, n, grad.stride(0), flat.stride(0), Q_PAD=triton.next_power_of_2(len(bits)),
                WANT_X=want_x, WANT_PROBS=want_probs, WANT_MASK=want_mask,
                **constants(x, bits, symmetric, mask), **config,
            )  # fmt: skip
    return (
        dx,
        dprobs.sum(0).to(probs.dtype) if want_probs else dprobs,
        dmask.sum(0).to(mask.dtype) if want_mask and mask is not None else dmask,
    )
