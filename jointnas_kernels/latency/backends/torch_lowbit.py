"""torch's low-bit linears: `_weight_int8pack_mm` and `_int_mm` for 8 bits, int4pack for 4.

The 8-bit calls know one scale per output row only. With smaller groups they run once per group and the results are
added, which is what a user of torch would have to write; the cost of that is theirs.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from jointnas_kernels.latency.backends.base import Call, Target, Torch, Weight, stored
from jointnas_kernels.latency.spec import DENSE, OpSpec
from jointnas_kernels.ops.lowbit.pack import to_fields, unpack_weight
from jointnas_kernels.ops.quant.spec import quantize_tokens


class TorchInt8(Torch):
    """W8A16 through `_weight_int8pack_mm` (CPU), W8A8 through `_int_mm`."""

    name = "torch-int8"

    def unsupported(self, spec: OpSpec, target: Target) -> str | None:
        if spec.op != "linear" or spec.wbits != 8 or spec.abits not in (8, DENSE):
            return "W8A8 and W8A16 linears only"
        if spec.abits == DENSE and target.device.type != "cpu":
            return "_weight_int8pack_mm runs on the CPU only"
        if spec.abits == 8 and target.device.type == "cuda":
            if spec.m <= 16:
                return f"_int_mm on CUDA needs more than 16 rows, got {spec.m}"
            if spec.n % 8 or spec.group % 8:
                return "_int_mm on CUDA needs sizes that are multiples of 8"
        return None

    def prepare(self, spec: OpSpec, target: Target, weight: Weight | None) -> Call:
        packed, scale = stored(weight)
        levels = unpack_weight(packed, 8, (spec.n, spec.k)).split(spec.group, 1)
        if spec.abits == DENSE:
            groups = [(q.contiguous(), s.contiguous()) for q, s in zip(levels, scale.unbind(1), strict=True)]

            def weight_only(x: Tensor) -> Tensor:
                parts = zip(x.split(spec.group, 1), groups, strict=True)
                return reduce(
                    Tensor.add_, (torch.ops.aten._weight_int8pack_mm(p.contiguous(), q, s) for p, (q, s) in parts)
                )

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


class TorchInt4(Torch):
    """W4A16 through torch's int4pack (groups of 32, 64, 128 or 256)."""

    name = "torch-int4"

    def unsupported(self, spec: OpSpec, target: Target) -> str | None:
        if spec.op != "linear" or spec.wbits != 4 or spec.abits != DENSE:
            return "W4A16 linears only"
        if spec.group not in (32, 64, 128, 256):
            return f"groups of 32, 64, 128 and 256 only, got {spec.group}"
        if target.device.type == "cuda":
            if target.dtype != torch.bfloat16:
                return f"bfloat16 only on CUDA, got {target.workload.dtype}"
            if spec.k % 128 or spec.n % 8:
                return "k must be a multiple of 128 and n of 8 on CUDA"
        elif spec.n % 16:
            return f"n must be a multiple of 16, got {spec.n}"
        return None

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
