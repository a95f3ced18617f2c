"""lowbit_linear: y = x_hat @ (q * scale)^T with packed W{2,4,8} weights and A{2,4,8,16} activations.

    x [..., I] any float, packed int32 [O, I*w_bits/32] (ops/pack.py), scale [O, I/group_size]  ->  y [..., O] as x

x_hat is x quantized per token (ops/quant/spec.py; asymmetric unless ``symmetric``), with levels ``a``, scales ``s`` and
zero points ``z`` that match compressed-tensors bit for bit; x itself at 16 bits.
The product is then  y[m, n] = s[m] * sum_g scale[n, g] * (sum_{k in g} q[n, k] * (a[m, k] - z[m])): the inner sum is an
integer, exact in every backend; the outer one is fp32 (fp64 in the fp64 reference). Inference only: no gradients.

A runtime that multiplies the same weights again and again lays them out once: on the CPU ``lowbit_pack`` and
``lowbit_matmul`` (ops/lowbit_prepared.py), on CUDA ``lowbit_cuda.CudaWeight``. From the storage layout the CPU kernels
lay out each block on the way, which costs a second pass over the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jointnas_kernels.ops.core import cpu_calls as cpu
from jointnas_kernels.ops.core.dispatch import bad, check, compute_dtype, custom_op, resolve, rows
from jointnas_kernels.ops.lowbit.cuda import DTYPES, CudaWeight, matmul
from jointnas_kernels.ops.lowbit.pack import TILE_INPUTS, check_bits, unpack_weight
from jointnas_kernels.ops.quant.spec import PACKED_ACT_BITS, PACKED_WEIGHT_BITS, fake_quant_tokens

NAME = "lowbit_linear"


def dequantize(packed: Tensor, scale: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """q * scale as [O, I] in ``dtype``."""
    outputs, groups = scale.shape
    q = unpack_weight(packed, bits, (outputs, groups * group_size)).to(dtype)
    return (q.view(outputs, groups, group_size) * scale.to(dtype)[:, :, None]).view(outputs, -1)


def reference(x: Tensor, packed: Tensor, scale: Tensor, w_bits: int, a_bits: int, group_size: int,
              symmetric: bool) -> Tensor:
    w = dequantize(packed, scale, w_bits, group_size, compute_dtype(x))
    return (fake_quant_tokens(x, a_bits, symmetric) @ w.t()).to(x.dtype)


SCHEMA = (
    "(Tensor x, Tensor packed, Tensor scale, int w_bits, int a_bits, int group_size, bool symmetric, str? backend)"
    " -> Tensor"
)


@custom_op("lowbit_linear", SCHEMA)
def _lowbit_linear(x: Tensor, packed: Tensor, scale: Tensor, w_bits: int, a_bits: int, group_size: int,
                   symmetric: bool, backend: str | None) -> Tensor:
    # the CUDA kernels take one layout only; asked for by name they say so, chosen automatically they are passed over
    fits = group_size == TILE_INPUTS and x.dtype in DTYPES and scale.dtype == x.dtype
    first = ("cuda",) if fits or backend == "cuda" else ()
    # the CPU kernels need groups of whole words
    second = ("cpu",) if group_size % (32 // w_bits) == 0 or backend == "cpu" else ()
    chosen = resolve(NAME, backend, x, (*first, "triton", *second, "reference"))
    if chosen == "reference" or x.numel() == 0:
        return reference(x, packed, scale, w_bits, a_bits, group_size, symmetric)
    if chosen == "cpu":
        if group_size % (32 // w_bits):
            raise bad(NAME, f"backend 'cpu' needs a group_size multiple of {32 // w_bits} at {w_bits} bits; it is "
                            f"{group_size}")
        return cpu.lowbit_linear(x, packed, scale, w_bits, a_bits, group_size, symmetric)
    if chosen == "cuda":
        check(group_size == TILE_INPUTS, NAME, f"backend 'cuda' takes group_size {TILE_INPUTS}, got {group_size}")
        return matmul(x, CudaWeight.build(packed, scale, w_bits), a_bits, symmetric)
    from jointnas_kernels.ops.lowbit import portable as lowbit_triton

    y = lowbit_triton.run(rows(x), packed.contiguous(), scale.contiguous(), w_bits, a_bits, group_size, symmetric)
    return y.view(*x.shape[:-1], -1)


@_lowbit_linear.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, w_bits: int, a_bits: int, group_size: int, symmetric: bool,
      backend: str | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def lowbit_linear(x: Tensor, packed: Tensor, scale: Tensor, w_bits: int, a_bits: int, group_size: int,
                  backend: str | None = "auto", symmetric: bool = False) -> Tensor:
    """y = x_hat @ (q * scale)^T; see the module docstring."""
    check_bits(w_bits, PACKED_WEIGHT_BITS, f"{NAME}: w_bits")
    check_bits(a_bits, PACKED_ACT_BITS, f"{NAME}: a_bits")
    inputs = x.shape[-1]
    if packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[1] * 32 != inputs * w_bits:
        raise bad(NAME, f"x has {inputs} inputs, so {w_bits}-bit packed weights are int32 [O, {inputs * w_bits / 32:g}]"
                        f"; got {packed.dtype} {tuple(packed.shape)}")
    if group_size < 1 or inputs % group_size:
        raise bad(NAME, f"group_size must divide the input size {inputs}, got {group_size}")
    if scale.shape != (packed.shape[0], inputs // group_size):
        raise bad(NAME, f"scale must be {(packed.shape[0], inputs // group_size)}, got {tuple(scale.shape)}")
    if not x.device == packed.device == scale.device:
        raise bad(NAME, f"x, packed and scale must be on one device, got {x.device}, {packed.device}, {scale.device}")
    return _lowbit_linear(x, packed, scale, w_bits, a_bits, group_size, symmetric, backend)
