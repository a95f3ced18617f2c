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
from jointnas_kernels.ops.core.backends import resolve
from jointnas_kernels.ops.lowbit.linear import lowbit_matmul
from jointnas_kernels.ops.lowbit.weight import LowbitWeight

BACKENDS = ("auto", "reference", "triton", "cuda", "cpu")
BUFFERS = ("weight_packed", "weight_scale", "row_sum", "locks")  # of a weight's tensors; the first two are stored


class PackedLinear(nn.Module):
    """y = x_hat (q scale)^T + bias on packed weights.

    Args:
        packed: int32 [O, I bits / 32] (ops/lowbit/pack.py).
        scale: [O, I / group], in the dtype of the activations.
        bias: [O] or None.
        weight_bits: 2, 4 or 8.
        act_bits: 2, 4, 8: activations are quantized dynamically per token; 16: they are not.
        act_symmetric: without zero point.
        backend: of `lowbit_linear`; "auto" chooses once, by the device of `packed`.

    Raises:
        JointNASError: tensors that do not fit together, or a backend that cannot run on them.
    """

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
        weight = LowbitWeight.stored(packed, scale, weight_bits, packed.shape[1] * 32 // weight_bits // scale.shape[1])
        self.backend = choose(backend, weight)
        weight = weight.laid_out(self.backend if self.backend in ("cuda", "cpu") else "storage")
        self.out_features, self.in_features, self.group_size = weight.outputs, weight.inputs, weight.group_size
        self.weight_bits, self.act_bits, self.act_symmetric = weight_bits, act_bits, act_symmetric
        self.layout, self.names, self.scale_bytes = weight.layout, BUFFERS[: len(weight.tensors)], scale.element_size()
        for name, tensor in zip(self.names, weight.tensors, strict=True):
            self.register_buffer(name, tensor, persistent=name in BUFFERS[:2])
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def weight(self) -> LowbitWeight:
        """The buffers, wherever they are now, as `lowbit_matmul` takes them."""
        return LowbitWeight(
            [getattr(self, name) for name in self.names], self.layout, False, self.out_features, self.in_features,
            self.weight_bits, self.group_size,
        )  # fmt: skip

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
        weight = self.weight
        first = weight.tensors[0]
        if x.shape[-1] != self.in_features or x.device != first.device:
            raise JointNASError(
                f"a packed linear of {self.in_features} inputs on {first.device} got {tuple(x.shape)} on {x.device}"
            )
        backend = self.backend if self.layout == "storage" else None
        y = lowbit_matmul(x, weight, self.act_bits, self.act_symmetric, backend)
        return y if self.bias is None else y + self.bias


def choose(backend: str | None, weight: LowbitWeight) -> str:
    """The backend of a layer, for the life of the layer."""
    if backend not in (None, "auto"):
        return resolve("PackedLinear", backend, weight.tensors[1], BACKENDS[1:])
    first, *others = ("cuda", "triton") if weight.tensors[1].is_cuda else ("cpu",)
    reason = weight.misfit(first)
    if reason is None or others:
        return first if reason is None else resolve("PackedLinear", None, weight.tensors[1], others)
    raise JointNASError(f"PackedLinear: the CPU kernels cannot run: {reason}; backend='reference' can, slowly")
