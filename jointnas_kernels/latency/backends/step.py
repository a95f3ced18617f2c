"""The decode step of a CPU (jointnas_kernels/runtime), and its prompts: every operation as a part of them.

Models run through it as a whole, so its parts are never mixed with other backends' operations: a table of a CPU has
this backend alone (`running`), as far as the step runs the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jointnas_kernels import _ext
from jointnas_kernels.latency.backends.base import Call, Target, Weight, stored
from jointnas_kernels.latency.backends.ours import Ours
from jointnas_kernels.latency.spec import DENSE, OpSpec, Workload
from jointnas_kernels.latency.timing import cache_bytes, copies
from jointnas_kernels.nn.packed import PackedLinear
from jointnas_kernels.ops.core import cpu
from jointnas_kernels.ops.lowbit.weight import LowbitWeight
from jointnas_kernels.runtime.decode import CHUNK, MOST
from jointnas_kernels.runtime.parts import Part
from jointnas_kernels.runtime.step import config_misfit

NAME = "step"
REPEATS, FEW = 64, 4  # of what takes less than a microsecond; of a prompt's parts


class Prompt:
    """A part for all chunks of a prompt, one after the other; `make(chunk, end)` is that of one."""

    def __init__(self, workload: Workload, make: Callable[[int, int], Part]) -> None:
        size = max(1, CHUNK // workload.batch)
        ends = [*range(size, workload.seq, size), workload.seq]
        self.parts = [make(end - start, end) for start, end in itertools.pairwise((0, *ends))]
        self.linears, self.repeats = self.parts[0].linears, self.parts[0].repeats

    def __call__(self, x: Tensor | None = None) -> Tensor:
        """As the parts: x and the result are rows of the chunks' tokens, chunk by chunk."""
        sizes = [part.batch * part.chunk for part in self.parts]
        rows = [None] * len(sizes) if x is None else x.expand(sum(sizes), -1).split(sizes)
        return torch.cat([part(one) for part, one in zip(self.parts, rows, strict=True)])


class Step(Ours):
    def __init__(self) -> None:
        super().__init__("cpu", "cpu")
        self.name = NAME

    def unsupported(self, spec: OpSpec, target: Target) -> str | None:
        if target.device.type != "cpu":
            return "runs on a CPU only"
        if target.workload.batch > MOST or target.dtype not in cpu.DTYPES:
            return f"up to {MOST} sequences in float32 or bfloat16 only"
        if spec.wbits == DENSE:
            return None if spec.abits == DENSE else "weights of 16 bits with activations of 16 bits only"
        return super().unsupported(spec, target)

    def prepare(self, spec: OpSpec, target: Target, weight: Weight | None) -> Call:
        work = target.workload
        if weight is not None:
            module = linear(weight, spec.abits)
            return self._products(target, [module], spec.op == "lm_head")
        tokens = work.batch * work.queries
        sizes: dict[str, Any] = {"repeats": REPEATS if work.mode == "decode" else FEW}
        if spec.op == "norm" and spec.m > tokens:  # one row for every head
            name, sizes = "head norm", sizes | {"heads": spec.m // tokens, "head_dim": spec.n}
        elif spec.op in ("rope", "attention"):
            name = "rotation" if spec.op == "rope" else spec.op
            sizes |= {"heads": spec.n, "kv_heads": target.kv_heads, "head_dim": spec.k}
        elif spec.op == "swiglu":
            name, sizes = spec.op, sizes | {"intermediate": spec.n}
        else:
            name, sizes = {"add": "residual"}.get(spec.op, spec.op), sizes | {"hidden": spec.n}
        if work.mode == "prefill":
            return Prompt(work, lambda n, end: Part(name, work.batch, target.dtype, **sizes, length=end, chunk=n))
        if spec.op == "attention":  # every block has a cache of its own, which leaves the processor's in between
            length = work.context
            read = 2 * work.batch * target.kv_heads * length * spec.k * target.dtype.itemsize
            sizes |= {"length": length, "repeats": copies(read, 4 * cache_bytes(target.device), target.device)}
        return Part(name, work.batch, target.dtype, **sizes)

    def together(self, calls: Sequence[Any], spec: OpSpec, target: Target) -> list[Call]:
        """Calls of equally many products each, with all of these calls' weights, or most: of a token's all in one."""
        linears, last = [module for call in calls for module in call.linears], spec.op == "lm_head"
        size = len(linears) if last or target.workload.mode == "decode" else min(FEW, len(linears))
        starts = range(0, len(linears) - size + 1, size)
        return [self._products(target, linears[start : start + size], last) for start in starts]

    def _products(self, target: Target, linears: Sequence[Any], last: bool) -> Call:
        """Of all tokens, or of the last of every sequence."""
        work, width = target.workload, linears[0].in_features

        def product(chunk: int, end: int) -> Part:
            return Part("product", work.batch, target.dtype, linears, hidden=width, chunk=chunk)

        return product(1, 1) if last or work.mode == "decode" else Prompt(work, product)


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
    """Whether a model of this config runs through the step there."""
    of_step = Step().unsupported(OpSpec("norm", target.workload.batch, 1, 0), target) is None
    return of_step and _ext.available() and config_misfit(config) is None
