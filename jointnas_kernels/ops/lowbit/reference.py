"""The product of packed W{2,4,8} weights and A{2,4,8,16} activations: y = x_hat @ (q * scale)^T.

a_bits = 16: x_hat = x. Otherwise each token is quantized dynamically, asymmetric unless ``symmetric``, as
ops/quant/spec.py says for activations: x_hat = s * (a - z). Then

    y[m, n] = s[m] * sum_g scale[n, g] * (sum_{k in g} q[n, k] * (a[m, k] - z[m]))

where the inner sum is an integer, exact in every backend; the outer one is fp32 (fp64 in the fp64 reference).
"""

import torch
from torch import Tensor

from jointnas_kernels.ops.core.tensors import compute_dtype
from jointnas_kernels.ops.lowbit.pack import unpack_weight
from jointnas_kernels.ops.quant.spec import quantize_tokens


def dequantize(packed: Tensor, scale: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """q * scale as [O, I] in ``dtype``."""
    outputs, groups = scale.shape
    q = unpack_weight(packed, bits, (outputs, groups * group_size)).to(dtype)
    return (q.view(outputs, groups, group_size) * scale.to(dtype)[:, :, None]).view(outputs, -1)


def product(
    x: Tensor, packed: Tensor, scale: Tensor, w_bits: int, a_bits: int, group_size: int, symmetric: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y [..., O] in ``dtype``: x is quantized in its own, the rest is computed there."""
    if a_bits < 16:
        a, s, z = quantize_tokens(x, a_bits, symmetric)
        x = (a.to(dtype) - z.to(dtype)) * s.to(dtype)
    return x.to(dtype) @ dequantize(packed, scale, w_bits, group_size, dtype).t()


def reference(
    x: Tensor, packed: Tensor, scale: Tensor, w_bits: int, a_bits: int, group_size: int, symmetric: bool
) -> Tensor:
    """y [..., O] in x's dtype, rounded once."""
    return product(x, packed, scale, w_bits, a_bits, group_size, symmetric, compute_dtype(x.dtype)).to(x.dtype)
