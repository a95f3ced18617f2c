"""gemlite: W{2,4,8}A16 in Triton, autotuned for every shape when it is first used.

Ran on an H200 in the GEMM benchmark (W4A16, groups of 128, bf16, 16 to 4096 tokens; there is no row of one token); what
else is declared here follows version 0.6.0's source and has only run on stand-ins (tests). It takes unsigned levels
with a zero point.
"""

from __future__ import annotations

import torch

from jointnas_kernels.latency.backends.base import Call, Target, ThirdParty, Weight, stored
from jointnas_kernels.latency.spec import OpSpec
from jointnas_kernels.ops.lowbit.pack import to_fields


class Gemlite(ThirdParty):
    name = package = distribution = "gemlite"
    multiples = (32, 32)  # it checks k alone, but loads the scales of whole tiles of outputs

    def prepare(self, spec: OpSpec, target: Target, weight: Weight | None) -> Call:
        from gemlite.helper import A16Wn

        packed, scale = stored(weight)
        zero = torch.full_like(scale, 1 << (spec.wbits - 1))
        helper = A16Wn(device=str(target.device), dtype=target.dtype)
        layer: Call = helper.from_weights(to_fields(packed, spec.wbits), scale, zero, spec.wbits, spec.group)
        return layer
