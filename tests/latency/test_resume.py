"""Resuming a profile: backends that were installed since, or are gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import Tensor

from jointnas_kernels.latency import (
    LatencyTable,
    OpSpec,
    Target,
    Workload,
    profile,
    profiler,
    register,
    unregister,
)
from jointnas_kernels.latency import backends as registry
from jointnas_kernels.latency.backends.base import Weight
from jointnas_kernels.latency.measure import fit
from jointnas_kernels.latency.schema import read
from jointnas_kernels.ops import LowbitWeight
from jointnas_kernels.ops.quant.spec import quantize_tokens
from jointnas_kernels.space import SearchSpace
from tests.latency.tables import CONFIG, calm
from tests.latency.wrong import Wrong, explode

FOUR = SearchSpace((64,), (4,), (32,), (64,), (1, 2, 3), (4,), (4, 8), group_size=64)
FOUR_CONFIG = SimpleNamespace(**{**vars(CONFIG), "intermediate_size": 64})


def resumed(path: Path, *names: str, metric: str = "latency") -> LatencyTable:
    return profile(
        FOUR, FOUR_CONFIG, path, workload=Workload(seq=4), threads=1, progress=False, seconds_per_operation=1e-4,
        backends=["torch", *names], watch=calm(), metric=metric,
    )  # type: ignore[arg-type]  # fmt: skip


class Right(Wrong):
    """W4A8 only; slower on request."""

    def __init__(self, name: str, seconds: float = 0.0) -> None:
        super().__init__(lambda x, w: x @ w.T)
        self.name, self.seconds = name, seconds

    def unsupported(self, spec: OpSpec, target: Target) -> str | None:
        return None if spec.op == "linear" and (spec.wbits, spec.abits) == (4, 8) else "W4A8 only"

    def prepare(self, spec: OpSpec, target: Target, weight: Weight | None) -> Callable[[Tensor], Tensor]:
        assert isinstance(weight, LowbitWeight)
        dense = weight.dequantized(dtype=target.dtype)

        def call(x: Tensor) -> Tensor:
            time.sleep(self.seconds)
            levels, scale, zero = quantize_tokens(x, 8)
            return (levels.to(x.dtype) - zero) * scale @ dense.T

        return call


@pytest.fixture
def install() -> Iterator[Callable[[Wrong], None]]:
    added: list[str] = []

    def install(backend: Wrong) -> None:
        register(backend)
        added.append(backend.name)

    yield install
    for name in added:
        unregister(name)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[OpSpec, list[str]]]:
    """What is measured: operations and the backends asked."""
    calls: list[tuple[OpSpec, list[str]]] = []
    original = profiler.time_operation

    def record(spec: OpSpec, target: Target, names: list[str], *rest: object) -> object:
        calls.append((spec, list(names)))
        return original(spec, target, names, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(profiler, "time_operation", record)
    return calls


def test_resuming_tries_a_new_backend_and_nobody_else(
    tmp_path: Path, install: Callable[[Wrong], None], timed: list[tuple[OpSpec, list[str]]]
) -> None:
    path = tmp_path / "t.jsonl"
    before = resumed(path)
    lacking = {r.spec for r in before.rows if r.status == "infeasible"}
    assert {(s.wbits, s.abits) for s in lacking} == {(4, 4), (4, 8)}
    LatencyTable(before.header, before.rows, fit([(1.0, 1, 2.0), (2.0, 2, 4.0)])).save(path)
    timed.clear()
    same = resumed(path)
    assert not timed
    assert same.calibration is not None
    assert (same.header, same.rows) == (before.header, before.rows)

    install(Right("late"))
    after = resumed(path, "late")
    assert timed == [(s, ["late"]) for s, _ in timed]
    assert {s for s, _ in timed} == {s for s in lacking if s.abits == 8}
    assert after.calibration is None
    assert [r for r in after.rows if r.backend != "late"] == [r for r in before.rows if (r.wbits, r.abits) != (4, 8)]
    assert all(r.status == "ok" for r in after.rows if r.abits == 8)
    assert "W4A8" not in after.summary()
    assert set(after.coverage(FOUR, FOUR_CONFIG).infeasible) == {"W4A4"}
    assert LatencyTable.load(path).rows == after.rows
    timed.clear()
    assert resumed(path, "late").rows == after.rows
    assert not timed


def test_a_new_backend_that_is_rejected(
    tmp_path: Path, install: Callable[[Wrong], None], timed: list[tuple[OpSpec, list[str]]]
) -> None:
    """As if it had been there from the start."""
    resumed(tmp_path / "t.jsonl")
    install(Wrong(explode))
    after = resumed(tmp_path / "t.jsonl", "wrong")
    fresh = resumed(tmp_path / "fresh.jsonl", "wrong")
    found = [{(r.spec, r.backend, r.status, r.reason) for r in table.rows} for table in (after, fresh)]
    assert found[0] == found[1]
    timed.clear()
    resumed(tmp_path / "t.jsonl", "wrong")
    assert not timed


def test_killed_while_trying_a_new_backend(
    tmp_path: Path, install: Callable[[Wrong], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one tries the rest: also of a backend that has rows already. A calibration of fewer rows is gone."""
    path = tmp_path / "t.jsonl"
    before = resumed(path)
    LatencyTable(before.header, before.rows, fit([(1.0, 1, 2.0), (2.0, 2, 4.0)])).save(path)
    install(Right("late"))
    original, left = profiler.time_operation, [1, 1]

    def killed(*args: object) -> object:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return original(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(profiler, "time_operation", killed)
        with pytest.raises(KeyboardInterrupt):
            resumed(path, "late")
    assert sum(r.backend == "late" for r in read(path, recover=True).rows) == 2
    after = resumed(path, "late")
    assert after.calibration is None
    eight = [r for r in after.rows if (r.wbits, r.abits) == (4, 8)]
    assert {r.backend for r in eight} == {"late"}
    assert {r.spec for r in eight} == {r.spec for r in before.rows if (r.wbits, r.abits) == (4, 8)}


def test_what_is_too_slow_for_another_metric_is_tried_once(
    tmp_path: Path, install: Callable[[Wrong], None], timed: list[tuple[OpSpec, list[str]]]
) -> None:
    path = tmp_path / "t.jsonl"
    install(Right("late"))
    install(Right("slow", 0.05))
    table = resumed(path, "late", "slow", metric="memory")
    slow = [r for r in table.rows if r.backend == "slow"]
    assert {(r.status, r.reason) for r in slow} == {("rejected", "over 5 times slower than another backend")}
    assert all(table.best(r.spec).backend == "late" for r in slow)  # type: ignore[union-attr]
    timed.clear()
    assert resumed(path, "late", "slow", metric="memory").rows == table.rows
    assert not timed


def test_a_slow_new_backend_is_timed_once(tmp_path: Path, install: Callable[[Wrong], None]) -> None:
    """As it is beside the others from the start: nothing thorough for what will not be used."""
    install(Right("late"))
    resumed(tmp_path / "t.jsonl", "late")
    install(Right("slow", 0.02))
    found = [r for r in resumed(tmp_path / "t.jsonl", "late", "slow").rows if r.backend == "slow"]
    assert found
    assert {r.samples for r in found} == {1}


def test_disturbed_rows_of_a_backend_that_is_gone_stay(tmp_path: Path, install: Callable[[Wrong], None]) -> None:
    path = tmp_path / "t.jsonl"
    install(Right("late"))
    before = resumed(path, "late")
    rows = [r.model_copy(update={"contended": True}) if r.backend == "late" else r for r in before.rows]
    LatencyTable(before.header, rows).save(path)
    registry.get("late").unsupported = lambda spec, target: "not installed"  # type: ignore[method-assign]
    assert resumed(path, "late").rows == rows
