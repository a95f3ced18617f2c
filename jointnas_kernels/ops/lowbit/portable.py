"""Portable Triton kernels of ``lowbit_linear``: every W{2,4,8} x A{2,4,8,16} and every group size.

Quantized activations are kept as a - z in fp16: |a - z| <= 255 and |q| <= 128 are exact there, and 512 products sum
exactly in fp32 (512 * 255 * 128 < 2^24), so the integer part is as exact as int8 arithmetic and needs no zero-point
correction. Weights enter the product as integers; the scale is applied per block of inputs that lies in one group.
Groups that no power of two >= 16 divides scale every weight in fp32 instead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core.backends import interpreting
from jointnas_kernels.ops.quant.kernels import larger, scale_and_zero, smaller, token_levels
from jointnas_kernels.ops.quant.spec import level_range


@triton.jit
def quantize_kernel(
    x_ptr, level_ptr, scale_ptr, K, stride, LOW: tl.constexpr, TINY: tl.constexpr, SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token per program: level = a - z (fp16 [K]) and its scale."""
    token = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    least = tl.zeros([1, BLOCK], tl.float32)
    most = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_ptr + token * stride + k, mask=k < K, other=0.0).to(tl.float32)
        least = smaller(least, x)
        most = larger(most, x)
    least, most = tl.reduce(least, 1, smaller), tl.reduce(most, 1, larger)
    s, z = scale_and_zero(least, most, LOW, 0.0, 0.0, TINY, dtype, SYMMETRIC, True)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_ptr + token * stride + k, mask=k < K, other=0.0).to(tl.float32)
        level = token_levels(x, s, z, LOW, dtype, SYMMETRIC, True)
        tl.store(level_ptr + token * K + k, level.to(tl.float16), mask=k < K)
    tl.store(scale_ptr + token + tl.arange(0, 1), s)


@triton.jit
def matmul_kernel(
    x_ptr, packed_ptr, scale_ptr, row_scale_ptr, y_ptr, M, N, K, x_stride, group,
    BITS: tl.constexpr, PER_GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[BM, BN] = x[BM, K] @ (q * scale)[BN, K]^T, times row_scale[BM] where given."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    per_word: tl.constexpr = 32 // BITS
    offset: tl.constexpr = 2 ** (BITS - 1)
    words = K // per_word
    groups = K // group
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        # [BK, BN] words, each read by the inputs it holds
        word = tl.load(packed_ptr + n[None, :] * words + (k // per_word)[:, None],
                       mask=(n < N)[None, :] & (k < K)[:, None], other=0)
        q = ((word >> ((k % per_word) * BITS)[:, None]) & (2 * offset - 1)) - offset
        if PER_GROUP:  # the block lies in one group
            s = tl.load(scale_ptr + n * groups + start // group, mask=n < N, other=0.0).to(tl.float32)
            acc += tl.dot(x, q.to(dtype), input_precision="ieee") * s[None, :]
        else:
            s = tl.load(scale_ptr + n[None, :] * groups + (k // group)[:, None],
                        mask=(n < N)[None, :] & (k < K)[:, None], other=0.0).to(tl.float32)
            acc += tl.dot(x.to(tl.float32), q.to(tl.float32) * s, input_precision="ieee")
    if row_scale_ptr is not None:
        acc *= tl.load(row_scale_ptr + m, mask=m < M, other=0.0)[:, None]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + m[:, None] * N + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside)


def blocks(tokens: int, group: int) -> tuple[int, int, int, bool]:
    """(BM, BN, BK, whole groups): the inputs of a block lie in one group wherever 16 divides the group."""
    bm = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    power = group & -group  # largest power of two that divides it
    if power < 16:
        return bm, 32, 32, False
    return bm, 64, min(power, 64 if bm == 64 else 128), True  # 64 x 64 x 128 would spill


def run(x: Tensor, packed: Tensor, scale: Tensor, w_bits: int, a_bits: int, group: int, symmetric: bool) -> Tensor:
    """y [M, O] for x [M, I]."""
    tokens, inputs = x.shape
    rows = packed.shape[0]
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    operand, row_scale = x, None
    with torch.cuda.device_of(x):
        if a_bits < 16:
            operand = torch.empty(tokens, inputs, dtype=torch.float16, device=x.device)
            row_scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
            quantize_kernel[(tokens,)](
                x, operand, row_scale, inputs, x.stride(0), LOW=float(level_range(a_bits)[0]),
                TINY=torch.finfo(x.dtype).eps, SYMMETRIC=symmetric, BLOCK=min(2048, triton.next_power_of_2(inputs)),
                num_warps=4,
            )  # fmt: skip
        bm, bn, bk, whole = blocks(tokens, group)
        matmul_kernel[(triton.cdiv(tokens, bm), triton.cdiv(rows, bn))](
            operand, packed, scale, row_scale, y, tokens, rows, inputs, operand.stride(0), group,
            BITS=w_bits, PER_GROUP=whole, BM=bm, BN=bn, BK=bk, num_warps=4, num_stages=1 if interpreting() else 3,
        )  # fmt: skip
    return y
