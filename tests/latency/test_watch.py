"""A busy machine is noticed, waited for within bounds, marked and reported. The machine is played: no real load."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jointnas_kernels.latency import LatencyTable, Workload, feasible_choices, measure_choices, profile
from jointnas_kernels.latency.measure import ENOUGH, calibrate
from jointnas_kernels.latency.schema import Row, read
from jointnas_kernels.latency.timing import measure, private_cache_bytes, retain_memory
from jointnas_kernels.latency.watch import Measured, Watch, reference_kernels, waited_seconds, warn_once
from jointnas_kernels.space import SearchSpace
from tests.latency.tables import CONFIG, calm, synthetic

SPACE = SearchSpace((64,), (2, 4), (16,), (64,), (1, 2, 3), (8,), (8, 16), group_size=64)


class Machine:
    """A clock that only runs when something does, and a load (1: quiet) that may end at a given time."""

    def __init__(self, load: float = 1.0, until: float = float("inf"), hidden: bool = False) -> None:
        self.now, self.waited, self.load, self.until, self.hidden = 0.0, 0.0, load, until, hidden
        self.slept: list[float] = []

    def run(self, seconds: float) -> float:
        factor = self.load if self.now < self.until else 1.0
        self.now += seconds * factor
        self.waited += 0.0 if self.hidden else seconds * (factor - 1)
        return seconds * factor

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def watch(self, patience: float = 10.0, baseline: float = 1e-3) -> Watch:
        return Watch(
            lambda: (self.run(1e-3),), (baseline,), patience, lambda: self.now, lambda: self.waited, self.sleep
        )

    def operation(self) -> Measured:
        times = sorted(self.run(2e-3) * 1e3 for _ in range(9))
        return Measured(times[0], times[4], times[8], 9)


def test_quiet_machine_is_measured_once() -> None:
    machine = Machine()
    found = machine.watch().settle(machine.operation)
    assert found == pytest.approx((2.0, 2.0, 2.0, 9, False))
    assert machine.slept == []
    assert machine.now < 0.05


@pytest.mark.parametrize("hidden", [False, True], ids=["other-process", "slow-host"])
def test_busy_for_a_while_is_waited_for(hidden: bool) -> None:
    """Run-queue time shows other processes; only the reference shows a host that slows the whole machine down."""
    machine = Machine(load=3.0, until=1.0, hidden=hidden)
    found = machine.watch().settle(machine.operation)
    assert found.median == pytest.approx(2.0)
    assert not found.contended
    assert machine.slept
    assert machine.now < 2.5


def test_busy_for_ever_is_given_up_and_marked() -> None:
    machine = Machine(load=3.0)
    watch = machine.watch(patience=4.0)
    assert watch.settle(machine.operation).contended
    assert machine.now < 6.0
    before = machine.now
    assert watch.settle(machine.operation).contended  # patience is the whole profile's, not each operation's
    assert machine.now - before < 0.5


def test_the_least_disturbed_attempt_is_kept() -> None:
    machine = Machine(hidden=True)
    loads = iter([3.0, 1.5, 1.5, 2.5, 2.5, 2.5, 2.5])

    def attempt() -> Measured:
        machine.load = next(loads)
        return machine.operation()

    watch = machine.watch(patience=0.3)
    found = watch.settle(attempt)
    assert found.median == pytest.approx(3.0)  # 2 ms at load 1.5
    assert found.contended


def test_two_speeds_in_one_measurement_are_repeated() -> None:
    machine = Machine()
    attempts: list[int] = []

    def attempt() -> Measured:
        attempts.append(1)
        machine.run(0.01)
        return Measured(1.0, 2.0 if len(attempts) < 3 else 1.01, 3.0, 9)

    found = machine.watch().settle(attempt)
    assert len(attempts) == 3
    assert found.median == 1.01
    assert not found.contended


def test_baseline_of_a_busy_start_is_lowered() -> None:
    machine = Machine(load=2.0, until=0.05, hidden=True)
    watch = Watch(lambda: (machine.run(1e-3),), (), 5.0, lambda: machine.now, lambda: machine.waited, machine.sleep)
    assert watch.baseline == (2e-3,)
    machine.now = 1.0
    assert not watch.settle(machine.operation).contended
    assert watch.baseline == pytest.approx((1e-3,))
    assert watch.drift((2e-3,)) == pytest.approx(1.0)  # what was measured before is known to be slow now


def test_readings_of_this_machine() -> None:
    reading = reference_kernels(torch.device("cpu"))()
    assert len(reading) == 3
    assert all(0 < seconds < 10 for seconds in reading)
    before = waited_seconds()
    assert waited_seconds() >= before >= 0
    assert private_cache_bytes(torch.device("cpu")) > 0
    assert retain_memory() in (True, False)


def test_reference_is_read_between_long_samples() -> None:
    ticks: list[int] = []
    watch = Watch(lambda: (ticks.append(1) or 1e-3,), waited=lambda: 0.0)  # type: ignore[func-returns-value]
    started = len(ticks)
    measure([lambda: torch.randn(1_000_000)], torch.device("cpu"), seconds=0.1, watch=watch)
    assert len(ticks) - started >= 4


# ---- profiles -------------------------------------------------------------------------------------------------------


def run(path: Path, reference: Callable[[], float], **options: object) -> LatencyTable:
    watch = Watch(lambda: (reference(),), waited=lambda: 0.0, patience=0.0, sleep=lambda s: None)
    return profile(
        SPACE, CONFIG, path, workload=Workload(seq=8), threads=1, progress=False, seconds_per_operation=1e-4,
        watch=watch, **options,
    )  # type: ignore[arg-type]  # fmt: skip


def steps(*values: float) -> Callable[[], float]:
    """Readings one after another; the last one stays."""
    left = list(values)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def test_contended_profile_warns_once_says_what_to_do_and_resumes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "table.jsonl"
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        table = run(path, steps(*[1e-3] * 10, 2e-3))  # quiet only while the baseline is read
    warnings = [r.getMessage() for r in caplog.records]
    assert len(warnings) == 1
    assert f"{len({r.spec for r in table.rows})} of" in warnings[0]
    assert "stop other processes and run `jointnas profile --resume`" in warnings[0]
    assert {r.spec for r in table.rows if r.contended} == {r.spec for r in table.rows}
    assert table.caution in table.summary()

    caplog.clear()
    with caplog.at_level(logging.WARNING):
        LatencyTable.load(path).predict(SPACE.full(), SPACE)
        assert not caplog.records, "said before"
        warn_once.cache_clear()
        table = LatencyTable.load(path)
        table.predict(SPACE.full(), SPACE)
        table.predict(SPACE.full(), SPACE)
    assert [r.getMessage() for r in caplog.records] == [table.caution]

    again = run(path, lambda: 1e-3)
    assert [(r.spec, r.backend) for r in again.rows] == [(r.spec, r.backend) for r in table.rows]
    assert not any(r.contended or r.again for r in again.rows)
    assert not again.caution
    assert LatencyTable.load(path).rows == again.rows


def test_rows_of_a_machine_that_became_faster_are_measured_again(tmp_path: Path) -> None:
    """The first half of the profile ran on a slower machine than the second; nobody could know at the time."""
    path = tmp_path / "table.jsonl"
    table = run(path, steps(*[2e-3] * 40, 1e-3))
    assert table.header.reference == [1.0]
    assert sum(bool(r.contended) for r in table.rows) < len(table.rows) / 2
    assert not any(r.contended for r in run(path, lambda: 1e-3).rows)


def test_interrupted_second_pass_is_recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.jsonl"
    run(path, steps(*[1e-3] * 10, 2e-3))
    calls: list[int] = []
    from jointnas_kernels.latency import profiler

    original = profiler.time_operation

    def killed(*args: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(profiler, "time_operation", killed)
        with pytest.raises(KeyboardInterrupt):
            run(path, lambda: 1e-3)
    partial = read(path, recover=True)
    assert partial.replaced >= 2
    assert sum(not r.contended for r in partial.rows) >= 2
    again = run(path, lambda: 1e-3)
    assert len(again.rows) == len(partial.rows)
    assert not again.caution


def test_calibration_leaves_disturbed_models_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig

    from jointnas_kernels.latency import measure as module

    space = SearchSpace((64, 128), (2, 4), (32,), (64, 192), (1, 2, 3))
    table, seen = synthetic(space), []

    def fake(model: object, *_: object, **__: object) -> Measured:
        seen.append(model)
        slow = len(seen) % 7 == 2  # one model, every time
        return Measured(1.0, 100.0 if slow else 1.0, 1.0, 9, slow)

    monkeypatch.setattr(module, "measure_model", fake)
    config = LlamaConfig(**vars(CONFIG))
    fitted = calibrate(table, space, config, 7, watch=calm())
    assert fitted.calibration is not None
    assert len(seen) == 7 * module.TURNS
    assert len(fitted.calibration.points) == 6 >= ENOUGH
    assert fitted.calibration.contended is None


def test_a_slower_repetition_does_not_replace_a_row() -> None:
    """Unless it is the one that was not disturbed."""
    from jointnas_kernels.latency.profiler import slower

    def row(median: float, contended: bool) -> Row:
        times = {"p10": median, "median": median, "p90": median, "samples": 5, "contended": contended or None}
        return Row(op="norm", m=1, n=8, k=0, wbits=16, abits=16, group=0, backend="torch", backend_version="", **times)

    busy, quiet = row(2.0, True), row(2.0, False)
    assert slower(row(3.0, True), busy)
    assert not slower(row(1.5, True), busy)
    assert not slower(row(3.0, False), busy)
    assert not slower(row(3.0, True), quiet)


def test_whole_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow phase as long as all turns of one model costs several models a turn or two, which their
    lower quartile ignores."""
    from transformers import LlamaConfig

    from jointnas_kernels.latency import measure as module

    space = SearchSpace((64, 128), (2, 4), (32,), (64, 192), (1, 2, 3))
    table, models = synthetic(space), []

    def fake(model: object, *_: object, **__: object) -> Measured:
        models.append(model)
        slow = 3 <= len(models) < 3 + module.TURNS
        return Measured(1.0, 9.0 if slow else 1.0, 9.0 if slow else 1.0, 3, slow)

    monkeypatch.setattr(module, "measure_model", fake)
    config, choices = LlamaConfig(**vars(CONFIG)), feasible_choices(table, space, 4)
    found = measure_choices(table, space, config, choices, watch=calm())
    assert models == models[:4] * module.TURNS
    assert [(one.median, one.contended) for one in found] == [(1.0, False)] * 4
    assert found[2].p90 == 9.0
    assert found[2].samples == 3 * module.TURNS
    monkeypatch.setattr(module, "_free_bytes", lambda _: 0)  # room for one model at a time
    models.clear()
    assert len(measure_choices(table, space, config, choices, watch=calm())) == 4
    assert models[: module.TURNS] == models[:1] * module.TURNS


def test_result_tables_mark_what_was_measured_on_a_busy_machine() -> None:
    from jointnas.results import BUSY, html_table, text_table

    row = {"name": "found", "params": 1, "bytes": 2e6, "measured_ms": 1.0, "predicted_ms": 1.1, "perplexity": 9.0}
    quiet, busy = {**row, "tasks": {}}, {**row, "tasks": {}, "contended": True}
    assert "1.000 *" in text_table([quiet, busy])
    assert text_table([quiet, busy]).endswith(f"* {BUSY}")
    assert BUSY in html_table([busy])
    assert "*" not in text_table([quiet]) + html_table([quiet])
