"""torch's low-bit linears: `_weight_int8pack_mm` and `_int_mm` for 8 bits, int4pack for 4.

The 8-bit calls know one scale per output row only. With smaller groups they run once per group and the results are
added, which is what a user of torch would have to write; the cost of that is theirs.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from jointnas_kernels.latency.backends.base import Call, LowBit, Target, Torch, Weight, stored
from jointnas_kernels.latency.spec import DENSE, OpSpec
from jointnas_kernels.ops.lowbit.pack import to_fields, unpack_weight
from jointnas_kernels.ops.quant.spec import quantize_tokens


class TorchInt8(Torch, LowBit):
    """W8A16 through `_weight_int8pack_mm` (CPU), W8A8 through `_int_mm`."""

    name = "torch-int8"
    wbits, abits = (8,), (8, DENSE)

    def unsupported(self, spec: OpSpec, target: Target) -> str | None:
        why = super().unsupported(spec, target)
        if why or target.device.type == "cpu":
            return why
        if spec.abits == DENSE:
            return "_weight_int8pack_mm runs on the CPU only"
        if spec.m <= 16 or spec.n % 8 or spec.group % 8:
            return f"_int_mm on CUDA needs more than 16 rows and sizes that are multiples of 8, got {spec}"
        return None

    def prepare(self, spec: OpSpec, target: Target, weight: Weight | None) -> Call:
        packed, scale = stored(weight)
        levels = unpack_weight(packed, 8, (spec.n, spec.k)).split(spec.group, 1)
        if spec.abits == DENSE:
            groups = [(q.contiguous(), s.contiguous()) for q, s in zip(levels, scale.unbind(1), strict=True)]

            def weight_only(x: Tensor) -> Tensor:
                parts = zip(x.split(spec.group, 1), groups, strict=True)
                products = (torch.ops.aten._weight_int8pack_mm(p.contiguous(), q, s) for p, (q, s) in parts)
                total: Tensor = reduce(Tensor.add_, products)
                return total

            return weight_only

        # sum_k s_x (q_x - z) q_w s_w = s_x s_w (q_x q_w - z sum_k q_w): the last sum is known beforehand
        integer = [
            (q.contiguous().t(), s.contiguous(), q.sum(1, dtype=torch.float32))
            for q, s in zip(levels, scale.float().unbind(1), strict=True)
        ]

        def both(x: Tensor) -> Tensor:
            levels, scale, zero = quantize_tokens(x, 8)
            total = torch.zeros(x.shape[0], spec.n, device=x.device)
            for part, (weight_t, weight_scale, sums) in zip(levels.split(spec.group, 1), integer, strict=True):
                y = torch._int_mm(part.contiguous(), weight_t).float()
                total.addcmul_(y.addcmul_(zero.float(), sums, value=-1), weight_scale)
            return (total * scale.float()).to(x.dtype)

        return both


class TorchInt4(Torch, LowBit):
    """W4A16 through torch's int4pack (groups of 32, 64, 128 or 256)."""

    name = "torch-int4"
    wbits, groups, whole_rows = (4,), (32, 64, 128, 256), False

    def unsupported(self, spec: OpSpec, target: Target) -> str | None:
        why, on_cuda = super().unsupported(spec, target), target.device.type == "cuda"
        if why is None and on_cuda and target.dtype != torch.bfloat16:
            return f"bfloat16 only on CUDA, got {target.workload.dtype}"
        if why is None and (spec.n % (8 if on_cuda else 16) or (on_cuda and spec.k % 128)):
            return f"n must be a multiple of 16 (on CUDA n of 8, k of 128), got {spec.n} and {spec.k}"
        return why

    def prepare(self, spec: OpSpec, target: Target, weight: Weight | None) -> Call:
        packed, scale = stored(weight)
        unsigned = to_fields(packed, 4)  # torch dequantizes (u - 8) * scale + zero
        pairs = torch.stack((scale.t(), torch.zeros_like(scale.t())), -1)  # [K/g, N, 2]
        if target.device.type == "cuda":
            nibbles = unsigned[:, ::2] << 4 | unsigned[:, 1::2]
            tiles = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
            return lambda x: torch.ops.aten._weight_int4pack_mm(x, tiles, spec.group, pairs)
        tiles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned.to(torch.int32), 1)
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, tiles, spec.group, pairs)


class TorchFp8(Torch, LowBit):
    """torch's fp8 product `_scaled_mm`: listed, so that `doctor` says why no table has it.

    A W8A8 choice is a model with integer levels; fp8 (e4m3) has a value for every integer up to 16 and for every 2nd,
    4th and 8th up to 32, 64 and 128. Rounding weights and activations to those changes the product by 3 % (tests), more
    than the check before a timing allows: an exported model would not run on the kernel that its latency came from.
    `jointnas bench gemm` times it on operands of its own.
    """

    name = "torch-fp8"
    wbits, abits = (8,), (8,)

    def unsupported(self, spec: OpSpec, target: Target) -> str | None:
        reason = "another function than integer W8A8: e4m3 holds 80 of the 256 levels of 8 bits"
        return super().unsupported(spec, target) or reason

    def prepare(self, spec: OpSpec, target: Target, weight: Weight | None) -> Call:
        raise NotImplementedError(self.unsupported(spec, target))
