"""A backend that computes what a test wants it to."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from jointnas_kernels.latency import OpSpec, Target
from jointnas_kernels.latency.backends.base import Weight
from jointnas_kernels.ops import LowbitWeight


class Wrong:
    """A backend that computes something else."""

    name = "wrong"

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.how = how

    def version(self) -> str:
        return "1"

    def unsupported(self, spec: OpSpec, target: Target) -> str | None:
        return None if spec.op == "linear" and spec.wbits == 4 else "W4 only"

    def prepare(self, spec: OpSpec, target: Target, weight: Weight | None) -> Callable[[Tensor], Tensor]:
        assert isinstance(weight, LowbitWeight)
        dense = weight.dequantized(dtype=target.dtype)
        return lambda x: self.how(x, dense)


def explode(x: Tensor, dense: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available\nmore text")
