"""Tables without measurements: every operation costs a made-up, but sensible, number of milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from jointnas_kernels.latency import LatencyTable, OpSpec, Workload, describe, enumerate_ops
from jointnas_kernels.latency.schema import Header, Row
from jointnas_kernels.latency.spec import ModelDims
from jointnas_kernels.latency.watch import Watch
from jointnas_kernels.space import SearchSpace

CONFIG = SimpleNamespace(
    hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=192,
    num_hidden_layers=3, vocab_size=97, tie_word_embeddings=True,
)  # fmt: skip
SPACE = SearchSpace((64, 128), (2, 4), (16, 32), (64, 128, 192), (1, 2, 3), (2, 4, 8), (8, 16), group_size=64)


def cost(spec: OpSpec) -> float:
    """Grows with the size, shrinks with the bits; W8A16 is a bad kernel."""
    size = spec.m * spec.n * max(spec.k, 1) * 1e-7
    penalty = 3.0 if (spec.wbits, spec.abits) == (8, 16) else 1.0
    return 0.001 + size * (0.2 + spec.wbits / 16) * (0.5 + spec.abits / 32) * penalty


def calm() -> Watch:
    """A machine that nothing disturbs: tests measure, but not how fast."""
    return Watch([], waited=lambda: 0.0)


def everything(spec: OpSpec) -> bool:
    return True


def synthetic(
    space: SearchSpace = SPACE, feasible: Callable[[OpSpec], bool] = everything, workload: Workload | None = None,
    config: Any = CONFIG,
) -> LatencyTable:  # fmt: skip
    workload = workload or Workload(seq=16)
    header = Header(
        device=describe("cpu", 1),
        workload=workload,
        model=ModelDims.of(config),
        torch="test",
        created="2026-01-01T00:00:00+00:00",
        runtime="torch",
    )
    rows = []
    for spec in enumerate_ops(space, config, workload):
        if feasible(spec):
            times = {"p10": cost(spec), "median": cost(spec) * 1.1, "p90": cost(spec) * 1.2}
            rows.append(Row(**spec._asdict(), backend="fast", **times, samples=9))
        else:
            rows.append(Row(**spec._asdict(), backend="none", status="infeasible", reason="not on this device"))
    return LatencyTable(header, rows)
