"""A linear that is stored and runs in packed low-bit integers (inference only).

It holds q and the scales, never the weight they stand for: O (I b / 8 + bytes of one scale per group). Where a backend
wants another layout, it is made once, here, and replaces the stored one.

Against the fake-quantized layer it was exported from, which multiplies RN(q s) by RN(s_x (a - z)) (RN: rounding to the
dtype), one output differs by at most

    (2 u + 2 (I + G) e) sum_k |x_k| |w_k| + 2 (G + 2) e |s_x z| sum_k |w_k| + 3 u (|y| + |bias|)

where u is the unit roundoff of the dtype, e that of fp32, G the number of groups: the kernels do not round q s and
s_x (a - z) (2 u, first order), both sides add I products in fp32 in their own order (I e each, G e for the scales), and
both round the result, the packed layer once more after the bias. The CPU's kernels add up q a and z q over the groups
in two sums, each exact within a group, whose difference is taken at the end (the second term). The integers a and z are
equal bit for bit. Through a whole model nothing larger happens while activations have 16 bits; below, a value within
that distance of the border between two levels may take the other one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.core.backends import resolve
from jointnas_kernels.ops.lowbit import check
from jointnas_kernels.ops.lowbit.linear import lowbit_matmul
from jointnas_kernels.ops.lowbit.weight import LAYOUTS, LowbitWeight

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
    weight_packed: Tensor

    def __init__(
        self, packed: Tensor, scale: Tensor, bias: Tensor | None, weight_bits: int, act_bits: int = 16,
        act_symmetric: bool = False, backend: str | None = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        stored = LowbitWeight.stored(packed, scale, weight_bits, packed.shape[1] * 32 // weight_bits // scale.shape[1])
        self.backend = choose(backend, stored)
        weight = stored.laid_out(self.backend) if self.backend in LAYOUTS else stored
        check.prepare(weight)
        self._take(weight, bias, act_bits, act_symmetric)
        self.stored_bytes = sum(t.numel() * t.element_size() for t in stored.tensors)  # as a checkpoint stores it

    def _take(self, weight: LowbitWeight, bias: Tensor | None, act_bits: int, act_symmetric: bool) -> None:
        self.out_features, self.in_features, self.group_size = weight.outputs, weight.inputs, weight.group_size
        self.weight_bits, self.act_bits, self.act_symmetric = weight.w_bits, act_bits, act_symmetric
        self.layout, self.names = weight.layout, BUFFERS[: len(weight.tensors)]
        for name, tensor in zip(self.names, weight.tensors, strict=True):
            self.register_buffer(name, tensor, persistent=name in BUFFERS[:2])
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def weight(self) -> LowbitWeight:
        """The buffers, wherever they are now."""
        tensors = [getattr(self, name) for name in self.names]
        shape = self.out_features, self.in_features, self.weight_bits, self.group_size
        return LowbitWeight(tensors, self.layout, False, *shape)

    @property
    def nbytes(self) -> int:
        """Bytes of packed integers and scales as they are held, in the layout of the backend."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def extra_repr(self) -> str:
        """Sizes, bits, group and backend."""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, W{self.weight_bits}"
            f"A{self.act_bits}, group={self.group_size}, backend={self.backend}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O].

        Raises:
            JointNASError: x wants gradients, or does not fit the weight or its device.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise JointNASError("a packed linear has no gradients; use torch.no_grad(), or train before the export")
        weight = self.weight
        device = weight.tensors[0].device
        if x.shape[-1] != self.in_features or x.device != device:
            raise JointNASError(
                f"a packed linear of {self.in_features} inputs on {device} got {tuple(x.shape)} on {x.device}"
            )
        backend = self.backend if self.layout == "storage" else None
        y = lowbit_matmul(x, weight, self.act_bits, self.act_symmetric, backend)
        return y if self.bias is None else y + self.bias


def stack(linears: Sequence[nn.Module]) -> PackedLinear | None:
    """One linear with the rows of all; None where they are not all packed, or not alike, or in a layout that cannot be
    stacked. Integers are held once: those of the given linears become views of its.
    """
    packed = [m for m in linears if isinstance(m, PackedLinear)]
    kinds = {(m.backend, m.act_bits, m.act_symmetric, m.bias is None) for m in packed}
    weight = LowbitWeight.stack([m.weight for m in packed]) if len(packed) == len(linears) else None
    if weight is None or len(kinds) > 1:
        return None
    found = PackedLinear.__new__(PackedLinear)
    nn.Module.__init__(found)
    biases = [m.bias.detach() for m in packed if m.bias is not None]
    found.backend, found.stored_bytes = packed[0].backend, sum(m.stored_bytes for m in packed)
    found._take(weight, torch.cat(biases) if biases else None, packed[0].act_bits, packed[0].act_symmetric)
    sizes = [len(m.weight_packed) for m in packed]
    for module, own in zip(packed, weight.tensors[0].split(sizes), strict=True):
        module.weight_packed = own
    return found


class PackedEmbedding(nn.Module):
    """The rows of a packed head as an embedding that is tied to it: one matrix, held once, by the head.

    Args:
        head: of the model that the embedding is of, in a layout of which single rows can be read.
        dtype: of what it returns; each value is rounded once, as an export stores it.
    """

    def __init__(self, head: PackedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self._head, self.dtype = (head,), dtype  # no module of this one: it is the model's

    @property
    def head(self) -> PackedLinear:
        """The head."""
        return self._head[0]

    def forward(self, input: Tensor) -> Tensor:
        """ids [B, T] -> [B, T, I]."""
        rows = self.head.weight.dequantized(input.flatten(), torch.promote_types(self.dtype, torch.float32))
        return rows.to(self.dtype).view(*input.shape, -1)


def choose(backend: str | None, weight: LowbitWeight) -> str:
    """The backend of a layer, for the life of the layer."""
    scale = weight.tensors[1]
    if backend not in (None, "auto"):
        return resolve("PackedLinear", backend, scale, BACKENDS[1:])
    if scale.is_cuda:
        return "triton" if weight.misfit("cuda") else "cuda"
    if reason := weight.misfit("cpu"):
        raise JointNASError(f"PackedLinear: the CPU kernels cannot run: {reason}; backend='reference' can, slowly")
    return "cpu"
