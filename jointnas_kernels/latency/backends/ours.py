"""This package's low-bit product: every W{2,4,8} x A{2,4,8,16}, one backend per implementation."""

from __future__ import annotations

import torch

import jointnas_kernels
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency.backends.base import Call, LowBit, Target, Weight
from jointnas_kernels.latency.spec import DENSE, OpSpec
from jointnas_kernels.ops.lowbit.linear import lowbit_matmul
from jointnas_kernels.ops.lowbit.weight import LowbitWeight


class Ours(LowBit):
    """`lowbit_matmul` by one implementation, "cpu", "cuda" or "triton", on one kind of device."""

    abits = (2, 4, 8, DENSE)

    def __init__(self, implementation: str, device: str) -> None:
        self.implementation, self.device = implementation, device
        self.name = f"ours-{implementation}"
        self.layout = "storage" if implementation == "triton" else implementation

    def version(self) -> str:
        return jointnas_kernels.__version__

    def unsupported(self, spec: OpSpec, target: Target) -> str | None:
        """The same, and whether the implementation is built and loads: one row of the smallest legal size tells."""
        why = super().unsupported(spec, target)
        if why is not None:
            return why
        try:
            levels = torch.ones(8, spec.group, dtype=torch.int8, device=target.device)
            scale = torch.ones(8, 1, device=target.device, dtype=target.dtype)
            weight = LowbitWeight.pack(levels, scale, spec.wbits, spec.group, layout="storage")
            self.prepare(spec, target, weight)(scale[:1].expand(1, spec.group))
        except JointNASError as error:
            return str(error)
        return None

    def prepare(self, spec: OpSpec, target: Target, weight: Weight | None) -> Call:
        """Lays the weight out once, as in a deployed model."""
        assert isinstance(weight, LowbitWeight)
        laid_out = weight.laid_out(self.layout)
        return lambda x: lowbit_matmul(x, laid_out, spec.abits, backend=self.implementation)
