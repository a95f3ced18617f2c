"""torch's fp8 product `_scaled_mm`: listed, so that `doctor` says why no table has it.

A W8A8 choice is a model with integer levels; fp8 (e4m3) has a value for every integer up to 16 and for every 2nd, 4th
and 8th up to 32, 64 and 128. Rounding weights and activations to those changes the product by 3 % (tests), more than
the check before a timing allows: an exported model would not run on the kernel that its latency came from.
`jointnas bench gemm` times it on operands of its own.
"""

from __future__ import annotations

from jointnas_kernels.latency.backends.base import Call, Target, Torch, Weight
from jointnas_kernels.latency.spec import OpSpec

REASON = "another function than integer W8A8: e4m3 holds 80 of the 256 levels of 8 bits"


class TorchFp8(Torch):
    name = "torch-fp8"

    def unsupported(self, spec: OpSpec, target: Target) -> str | None:
        if spec.op != "linear" or (spec.wbits, spec.abits) != (8, 8):
            return "W8A8 linears only"
        return REASON

    def prepare(self, spec: OpSpec, target: Target, weight: Weight | None) -> Call:
        raise NotImplementedError(REASON)
