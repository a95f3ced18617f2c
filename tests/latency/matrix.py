"""Every (W, A, group) on odd shapes, for every backend: in this process, the interpreter, and the host emulation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from jointnas_kernels.latency import Backend, OpSpec, Target, Workload
from jointnas_kernels.latency.backends.base import failure, random_input, random_weight

W, A = (2, 4, 8), (2, 4, 8, 16)
TOKENS = (1, 3, 17, 63)
OUTPUTS = (40, 63, 129, 48)  # the last for formats that demand multiples of 16
INPUTS = {32: 96, 64: 192, 128: 384, 160: 160}  # by group; the last is a whole row


def cases(tokens: int = len(TOKENS), outputs: int = len(OUTPUTS)) -> Iterator[OpSpec]:
    """Each (W, A, group) with that many of TOKENS and OUTPUTS, which take turns."""
    combinations = [(w, a, shape) for w in W for a in A for shape in INPUTS.items()]
    for i, (w, a, (group, k)) in enumerate(combinations):
        for j in range(tokens * outputs):
            m = TOKENS[(i + i // 4 + j // outputs) % len(TOKENS)]
            n = OUTPUTS[(i + i // 16 + j // outputs + j) % len(OUTPUTS)]
            yield OpSpec("linear", m, n, k, w, a, group)


def check(backend: Backend, dtype: str, specs: Iterable[OpSpec], claims: Callable[[OpSpec], bool]) -> None:
    """The backend claims exactly these operations on the CPU, and computes the reference for each."""
    generator = torch.Generator().manual_seed(0)
    for spec in specs:
        target = Target(torch.device("cpu"), Workload("prefill", 1, spec.m, dtype), 2)
        reason = backend.unsupported(spec, target)
        assert (reason is None) == claims(spec), (spec, reason)
        if reason is None:
            weight, x = random_weight(spec, target, generator), random_input(spec, target, generator)
            assert failure(backend, spec, target, x, weight) is None, spec
