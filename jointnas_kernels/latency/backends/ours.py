"""This package's `lowbit_linear`: every W{2,4,8} x A{2,4,8,16}, one backend per implementation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import jointnas_kernels
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency.backends.base import LinearWeight, Target
from jointnas_kernels.latency.spec import DENSE, OpSpec
from jointnas_kernels.ops.lowbit import cuda as lowbit_cuda
from jointnas_kernels.ops.lowbit.linear import lowbit_linear
from jointnas_kernels.ops.lowbit.pack import pack_weight
from jointnas_kernels.ops.lowbit.prepared import lowbit_matmul, lowbit_pack

BITS = (2, 4, 8)


class Ours:
    def __init__(self, implementation: str, device: str) -> None:
        self.implementation, self.device = implementation, device
        self.name = f"ours-{implementation}"

    def version(self) -> str:
        return jointnas_kernels.__version__

    def unsupported(self, spec: OpSpec, target: Target) -> str | None:
        if spec.op != "linear" or spec.wbits not in BITS or spec.abits not in (*BITS, DENSE):
            return "linears with W in (2, 4, 8) and A in (2, 4, 8, 16) only"
        if target.device.type != self.device:
            return f"runs on {self.device} only"
        if spec.k % spec.group:
            return f"k must be a multiple of the group, got {spec.k} and {spec.group}"
        try:  # one row of the smallest legal size tells whether the implementation is built and loads
            levels = torch.ones(8, spec.group, dtype=torch.int8, device=target.device)
            scale = torch.ones(8, 1, device=target.device, dtype=target.dtype)
            x = torch.ones(1, spec.group, device=target.device, dtype=target.dtype)
            lowbit_linear(
                x, pack_weight(levels, spec.wbits), scale, spec.wbits, spec.abits, spec.group,
                backend=self.implementation,
            )  # fmt: skip
        except JointNASError as error:
            return str(error)
        return None

    def prepare(self, spec: OpSpec, target: Target, weight: LinearWeight | None) -> Callable[[Tensor], Tensor]:
        assert weight is not None
        packed, scale = weight.words(), weight.quantized()[1].to(target.dtype)
        if self.implementation == "cuda":  # its own weight layout, made once as in a deployed model
            tiled = lowbit_cuda.CudaWeight.build(packed, scale, spec.wbits)
            return lambda x: lowbit_cuda.matmul(x, tiled, spec.abits)
        if self.implementation == "cpu":
            prepared = lowbit_pack(packed, scale, spec.wbits, spec.group)
            return lambda x: lowbit_matmul(x, prepared, spec.abits)
        return lambda x: lowbit_linear(
            x, packed, scale, spec.wbits, spec.abits, spec.group, backend=self.implementation
        )
