"""A linear that is stored and runs in packed low-bit integers (inference only).

It holds q and the scales, never the weight they stand for: O (I b / 8 + bytes of one scale per group). Where a backend
wants another layout, it is made once, here, and replaces the stored one.

Against the fake-quantized layer it was exported from, which multiplies RN(q s) by RN(s_x (a - z)) (RN: rounding to the
dtype), one output differs by at most

    (2 u + 2 (I + G) e) sum_k |x_k| |w_k| + 3 u (|y| + |bias|)

where u is the unit roundoff of the dtype, e that of fp32, G the number of groups: the kernels do not round q s and
s_x (a - z) (2 u, first order), both sides add I products in fp32 in their own order (I e each, G e for the scales), and
both round the result, the packed layer once more after the bias. The integers a and z are equal bit for bit. Through a
whole model nothing larger happens while activations have 16 bits; below, a value within that distance of the border
between two levels may take the other one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.core.dispatch import resolve, why_not
from jointnas_kernels.ops.lowbit.cuda import DTYPES as CUDA_DTYPES
from jointnas_kernels.ops.lowbit.cuda import CudaWeight, packed_matmul
from jointnas_kernels.ops.lowbit.linear import lowbit_linear
from jointnas_kernels.ops.lowbit.pack import TILE_INPUTS
from jointnas_kernels.ops.lowbit.prepared import PreparedWeight, lowbit_matmul, lowbit_pack

BACKENDS = ("auto", "reference", "triton", "cuda", "cpu")


class PackedLinear(nn.Module):
    """y = x_hat (q scale)^T + bias on packed weights.

    Args:
        packed: int32 [O, I bits / 32] (ops/pack.py).
        scale: [O, I / group], in the dtype of the activations.
        bias: [O] or None.
        weight_bits: 2, 4 or 8.
        act_bits: 2, 4, 8: activations are quantized dynamically per token; 16: they are not.
        act_symmetric: without zero point.
        backend: of `lowbit_linear`; "auto" chooses once, by the device of `packed`.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    locks: Tensor
    row_sum: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        weight_bits: int,
        act_bits: int = 16,
        act_symmetric: bool = False,
        backend: str | None = "auto",
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape[0], packed.shape[1] * 32 // weight_bits
        self.weight_bits, self.act_bits, self.act_symmetric = weight_bits, act_bits, act_symmetric
        self.group_size = self.in_features // scale.shape[1]
        self.backend = choose(backend, scale, weight_bits, self.group_size)
        if self.backend == "cuda":
            tiled = CudaWeight.build(packed, scale, weight_bits)
            packed, scale = tiled.weight, tiled.scale
            self.register_buffer("locks", tiled.locks, persistent=False)
            self.register_buffer("row_sum", tiled.row_sum, persistent=False)
        self.scale_bytes = scale.element_size()
        if self.backend == "cpu":  # one stream that holds the scales too
            packed, scale = lowbit_pack(packed, scale, weight_bits, self.group_size).data, scale.new_empty(0)
        self.register_buffer("weight_packed", packed)
        self.register_buffer("weight_scale", scale)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, W{self.weight_bits}"
            f"A{self.act_bits}, group={self.group_size}, backend={self.backend}"
        )

    @property
    def stored_bytes(self) -> int:
        """Bytes of packed integers and scales as they are stored."""
        values = self.out_features * self.in_features
        return values * self.weight_bits // 8 + values // self.group_size * self.scale_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of packed integers and scales as they are held, in the layout of the backend."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        if x.requires_grad and torch.is_grad_enabled():
            raise JointNASError("a packed linear has no gradients; use torch.no_grad(), or train before the export")
        packed, scale = self.weight_packed, self.weight_scale
        if x.shape[-1] != self.in_features or x.device != packed.device:
            raise JointNASError(
                f"a packed linear of {self.in_features} inputs on {packed.device} got {tuple(x.shape)} on {x.device}"
            )
        if not x.is_cpu and self.backend == "cpu":
            raise JointNASError(f"weights laid out for the CPU were moved to {x.device}; load the model there instead")
        if self.backend == "cuda":
            y = packed_matmul(
                x, packed, scale, self.locks, self.row_sum, self.weight_bits, self.act_bits, self.act_symmetric
            )
        elif self.backend == "cpu":
            weight = PreparedWeight(packed, self.out_features, self.in_features, self.weight_bits, self.group_size)
            y = lowbit_matmul(x, weight, self.act_bits, self.act_symmetric)
        else:
            y = lowbit_linear(
                x, packed, scale, self.weight_bits, self.act_bits, self.group_size, self.backend, self.act_symmetric
            )
        return y if self.bias is None else y + self.bias


def choose(backend: str | None, scale: Tensor, weight_bits: int, group_size: int) -> str:
    """The backend of a layer, for the life of the layer."""
    if backend not in (None, "auto"):
        return resolve("PackedLinear", backend, scale, BACKENDS[1:])
    if scale.is_cuda:
        fits = group_size == TILE_INPUTS and scale.dtype in CUDA_DTYPES
        return resolve("PackedLinear", "auto", scale, (*(("cuda",) if fits else ()), "triton"))
    reason = why_not("cpu", scale)
    if reason is None and group_size % (32 // weight_bits):
        reason = f"{weight_bits}-bit groups must be multiples of {32 // weight_bits} inputs and these have {group_size}"
    if reason is not None:
        raise JointNASError(f"PackedLinear: the CPU kernels cannot run: {reason}; backend='reference' can, slowly")
    return "cpu"
