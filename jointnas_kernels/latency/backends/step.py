"""The decode step of a CPU (jointnas_kernels/runtime): every operation as a part of it.

Models decode through the step as a whole, so its parts are never mixed with other backends' operations: a table of
decoding on a CPU has this backend alone (`running`), as far as the step runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from jointnas_kernels import _ext
from jointnas_kernels.latency.backends.base import Call, Target, Weight, stored
from jointnas_kernels.latency.backends.ours import Ours
from jointnas_kernels.latency.spec import DENSE, OpSpec
from jointnas_kernels.latency.timing import cache_bytes, copies
from jointnas_kernels.nn.packed import PackedLinear
from jointnas_kernels.ops.core import cpu
from jointnas_kernels.ops.lowbit.weight import LowbitWeight
from jointnas_kernels.runtime.decode import MOST, config_misfit
from jointnas_kernels.runtime.parts import Part

NAME = "step"
REPEATS = 64  # of what takes less than a microsecond


class Step(Ours):
    def __init__(self) -> None:
        super().__init__("cpu", "cpu")
        self.name = NAME

    def unsupported(self, spec: OpSpec, target: Target) -> str | None:
        work = target.workload
        if target.device.type != "cpu" or work.mode != "decode":
            return "decodes on a CPU only"
        if work.batch > MOST or target.dtype not in cpu.DTYPES:
            return f"up to {MOST} sequences in float32 or bfloat16 only"
        if spec.wbits == DENSE:
            return None if spec.abits == DENSE else "weights of 16 bits with activations of 16 bits only"
        return super().unsupported(spec, target)

    def prepare(self, spec: OpSpec, target: Target, weight: Weight | None) -> Call:
        if weight is not None:
            module = linear(weight, spec.abits)
            return Part("product", spec.m, target.dtype, [module], hidden=module.in_features)
        sizes: dict[str, Any] = {"repeats": REPEATS}
        if spec.op == "norm" and spec.m > target.workload.batch:  # one row for every head
            name, sizes = "head norm", sizes | {"heads": spec.m // target.workload.batch, "head_dim": spec.n}
        elif spec.op in ("rope", "attention"):
            name = "rotation" if spec.op == "rope" else spec.op
            sizes |= {"heads": spec.n, "kv_heads": target.kv_heads, "head_dim": spec.k}
        elif spec.op == "swiglu":
            name, sizes = spec.op, sizes | {"intermediate": spec.n}
        else:
            name, sizes = {"add": "residual"}.get(spec.op, spec.op), sizes | {"hidden": spec.n}
        if spec.op == "attention":  # every block has a cache of its own, which leaves the processor's in between
            length = target.workload.context
            read = 2 * target.workload.batch * target.kv_heads * length * spec.k * target.dtype.itemsize
            sizes |= {"length": length, "repeats": copies(read, 4 * cache_bytes(target.device), target.device)}
        return Part(name, target.workload.batch, target.dtype, **sizes)

    def together(self, calls: Sequence[Any]) -> Call:
        """Products with the weights of several calls in one."""
        linears = [module for call in calls for module in call.linears]
        return Part("product", calls[0].batch, calls[0].dtype, linears, hidden=calls[0].hidden)


def linear(weight: Weight, act_bits: int, bias: Tensor | None = None) -> nn.Linear | PackedLinear:
    """The module that a model which decodes through the step has."""
    if isinstance(weight, LowbitWeight):
        packed, scale = stored(weight)
        return PackedLinear(packed, scale, bias, weight.w_bits, act_bits, backend="cpu").requires_grad_(False)
    found = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, "meta")
    found.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        found.bias = nn.Parameter(bias, requires_grad=False)
    return found


def running(config: Any, target: Target) -> bool:
    """Whether a model of this config decodes through the step there."""
    of_step = Step().unsupported(OpSpec("norm", target.workload.batch, 1, 0), target) is None
    return of_step and _ext.available() and config_misfit(config) is None
