"""gemlite: W{2,4,8}A16 in Triton, autotuned for every shape when it is first used.

Ran on an H200 in the GEMM benchmark (W4A16, groups of 128, bf16, 16 to 4096 tokens; there is no row of one token); what
else is declared here follows version 0.6.0's source and has only run on stand-ins (tests). It takes unsigned levels
with a zero point.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jointnas_kernels.latency.backends.base import LinearWeight, Target, ThirdParty
from jointnas_kernels.latency.spec import OpSpec


class Gemlite(ThirdParty):
    name = package = distribution = "gemlite"
    wbits = (2, 4, 8)
    multiples = (32, 32)  # it checks k alone, but loads the scales of whole tiles of outputs

    def prepare(self, spec: OpSpec, target: Target, weight: LinearWeight | None) -> Callable[[Tensor], Tensor]:
        from gemlite.helper import A16Wn

        assert weight is not None
        levels, scale = weight.quantized()
        middle = 1 << (spec.wbits - 1)
        unsigned = (levels.to(torch.int16) + middle).to(torch.uint8)
        scale = scale.to(target.dtype)
        helper = A16Wn(device=str(target.device), dtype=target.dtype)
        return helper.from_weights(unsigned, scale, torch.full_like(scale, middle), spec.wbits, spec.group)
