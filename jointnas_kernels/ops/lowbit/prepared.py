"""Packed weights laid out once for the CPU kernels, and the product with them.

    weight = lowbit_pack(packed, scale, w_bits=4, group_size=128)      # once
    y = lowbit_matmul(x, weight, a_bits=8)                             # = lowbit_linear(x, packed, scale, 4, 8, 128)

The layout is one int32 tensor ``data [ceil(O/64), G, meta + words, 64]``: a block of 64 output rows, adjacent lanes
of vectors, is one stream in the order in which the kernels read it. Per group: ``meta`` vectors, then the
group's words of ops/pack.py (32/bits inputs each), word by word. Meta of a row and group is its scale and the sum S of
its levels q, which pays for the activations' zero point:

    bf16 scales: one vector,  bits of the scale << 16 | (S & 0xffff)
    fp32 scales: two vectors, bits of the scale, then S

S fits 16 bits as long as a group holds at most 2^(16-bits) inputs; larger groups are stored as several with the same
scale. Rows beyond O have scale 0. ``planes``: the words of 32 inputs are bit-planes instead (word i holds bit i of each
q + 2^(bits-1), lowest input first), for the popcount kernel of W <= 4 times A <= 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jointnas_kernels.ops.core import cpu_calls as cpu
from jointnas_kernels.ops.core.dispatch import check, custom_op
from jointnas_kernels.ops.lowbit.linear import reference
from jointnas_kernels.ops.lowbit.pack import check_bits, pack_weight
from jointnas_kernels.ops.quant.spec import PACKED_ACT_BITS, PACKED_WEIGHT_BITS

NAME = "lowbit_pack"


@dataclass(frozen=True)
class PreparedWeight:
    """Weights in the layout above. ``data`` is all a module has to store; the rest are its constants."""

    data: Tensor
    outputs: int
    inputs: int
    w_bits: int
    group_size: int
    planes: bool = False

    @property
    def nbytes(self) -> int:
        return self.data.numel() * 4

    def unpack(self) -> tuple[Tensor, Tensor]:
        """(packed, scale) as given to ``lowbit_pack``."""
        blocks, groups, height, lanes = self.data.shape
        words = self.inputs // groups * self.w_bits // 32
        meta = height - words
        rows = self.data.permute(0, 3, 1, 2).reshape(blocks * lanes, groups, height)[: self.outputs]
        bits = rows[:, :: groups * self.group_size // self.inputs, 0]
        if meta == 2:
            scale = bits.contiguous().view(torch.float32)
        else:
            scale = (bits >> 16).to(torch.int16).view(torch.bfloat16)
        packed = rows[:, :, meta:].reshape(self.outputs, -1)
        return _from_planes(packed, self.w_bits) if self.planes else packed, scale


def _from_planes(planes: Tensor, bits: int) -> Tensor:
    rows = planes.shape[0]
    u = planes.view(rows, -1, bits, 1) >> torch.arange(32, dtype=torch.int32) & 1
    u = (u << torch.arange(bits, dtype=torch.int32).view(-1, 1)).sum(2, dtype=torch.int32)
    return pack_weight((u - (1 << (bits - 1))).to(torch.int8).view(rows, -1), bits)


def lowbit_pack(packed: Tensor, scale: Tensor, w_bits: int, group_size: int, planes: bool = False) -> PreparedWeight:
    """Lay out packed int32 [O, I*w_bits/32] and scale [O, I/group_size] for ``lowbit_matmul``.

    ``planes`` chooses bit-planes, for W in (2, 4) times A in (2, 4). CPU only: on CUDA the counterpart is
    ``ops.lowbit_cuda.CudaWeight.build``.
    """
    check_bits(w_bits, (2, 4) if planes else PACKED_WEIGHT_BITS, f"{NAME}: w_bits")
    check(
        packed.device.type == "cpu" and scale.device.type == "cpu",
        NAME,
        f"lays weights out for the CPU, got tensors on {packed.device} and {scale.device}",
    )
    check(
        packed.dtype == torch.int32 and packed.dim() == 2,
        NAME,
        f"packed must be int32 [O, I*w_bits/32], got {packed.dtype} {tuple(packed.shape)}",
    )
    outputs, inputs = packed.shape[0], packed.shape[1] * 32 // w_bits
    word = 32 if planes else 32 // w_bits
    check(
        group_size > 0 and inputs % group_size == 0 and group_size % word == 0,
        NAME,
        f"group_size must divide the input size {inputs} and be a multiple of {word}, got {group_size}",
    )
    check(
        scale.shape == (outputs, inputs // group_size),
        NAME,
        f"scale must be {(outputs, inputs // group_size)}, got {tuple(scale.shape)}",
    )
    data = cpu.lowbit_pack(packed, scale.detach(), w_bits, group_size, planes)
    return PreparedWeight(data, outputs, inputs, w_bits, group_size, planes)


SCHEMA = (
    "(Tensor x, Tensor data, int outputs, int w_bits, int a_bits, int group_size, bool symmetric, bool planes)"
    " -> Tensor"
)


@custom_op("lowbit_matmul", SCHEMA)
def _lowbit_matmul(
    x: Tensor, data: Tensor, outputs: int, w_bits: int, a_bits: int, group_size: int, symmetric: bool, planes: bool
) -> Tensor:
    if x.dtype in cpu.DTYPES and x.numel():
        return cpu.lowbit_matmul(x, data, outputs, w_bits, a_bits, symmetric, planes)
    weight = PreparedWeight(data, outputs, x.shape[-1], w_bits, group_size, planes)
    return reference(x, *weight.unpack(), w_bits, a_bits, group_size, symmetric)


@_lowbit_matmul.register_fake
def _(
    x: Tensor, data: Tensor, outputs: int, w_bits: int, a_bits: int, group_size: int, symmetric: bool, planes: bool
) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


def lowbit_matmul(x: Tensor, weight: PreparedWeight, a_bits: int, symmetric: bool = False) -> Tensor:
    """y = x_hat @ (q * scale)^T, the function of ``lowbit_linear``. x [..., I] -> y [..., O] in x's dtype."""
    if a_bits not in PACKED_ACT_BITS or (weight.planes and a_bits > 4):
        check_bits(a_bits, (2, 4) if weight.planes else PACKED_ACT_BITS, "lowbit_matmul: a_bits")
    if x.shape[-1] != weight.inputs:
        check(False, "lowbit_matmul", f"the weight has {weight.inputs} inputs and x is {tuple(x.shape)}")
    return _lowbit_matmul(
        x, weight.data, weight.outputs, weight.w_bits, a_bits, weight.group_size, symmetric, weight.planes
    )
