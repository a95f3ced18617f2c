"""A busy machine is noticed, waited for within bounds, marked and reported. The machine is played: no real load."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jointnas_kernels.latency import LatencyTable, Workload, feasible_choices, measure_choices, profile
from jointnas_kernels.latency.measure import ENOUGH, calibrate
from jointnas_kernels.latency.profiler import better
from jointnas_kernels.latency.schema import Row, read
from jointnas_kernels.latency.timing import measure, private_cache_bytes, retain_memory
from jointnas_kernels.latency.watch import CALLS, Busy, Measured, Waiting, Watch, culprit, taken, warn_once
from jointnas_kernels.space import SearchSpace
from tests.latency.tables import CONFIG, calm, synthetic

SPACE = SearchSpace((64,), (2, 4), (16,), (64,), (1, 2, 3), (8,), (8, 16), group_size=64)


class Machine:
    """A clock that only runs when something does, and others' load: of every `period` seconds they take `busy` of a
    core that this process needs. `slow`: all takes so much longer, and nobody waits."""

    def __init__(self, busy: float = 0.0, until: float = math.inf, slow: float = 1.0, period: float = 0.006) -> None:
        self.now, self.waits, self.busy, self.until, self.slow, self.period = 0.0, 0.0, busy, until, slow, period
        self.slept: list[float] = []
        self.cores = 0.0  # that others take

    def run(self, seconds: float) -> float:
        """Runs for so long, waiting wherever the core is another's; what it took."""
        began, left = self.now, seconds * (self.slow if self.now < self.until else 1.0)
        if self.busy and self.now < self.until:
            free, at = self.period - self.busy, self.now % self.period
            first = max(self.busy - at, 0.0)  # until the core is ours
            room = min(free, self.period - at)  # how long it is then
            waits = first + (math.ceil((left - room) / free - 1e-6) * self.busy if left > room + 1e-9 else 0.0)
            self.waits += waits
            left += waits
        self.now += left
        return self.now - began

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def taken(self) -> float:
        self.now += 0.1
        return self.cores if self.now < self.until else 0.0

    def watch(self, baseline: tuple[float, ...] = (2e-4,), strict: bool = False) -> Watch:
        return Watch(
            [lambda: self.run(2e-4)], baseline, strict, clock=lambda: self.now, waited=lambda: self.waits,
            sleep=self.sleep, taken=self.taken,
        )  # fmt: skip

    def sample(self, seconds: float) -> Callable[[], float]:
        return lambda: self.run(seconds) * 1e3


def test_quiet_machine_is_measured_once() -> None:
    machine = Machine()
    found = machine.watch().collect(machine.sample(2e-3), 0.02, 9)
    assert found == pytest.approx((2.0, 2.0, 2.0, 10, False))
    assert machine.slept == []
    assert machine.now < 0.05


def test_samples_that_waited_are_dropped() -> None:
    """Half of the core is another's, in slices: short operations fit in between, and are measured as if alone."""
    machine = Machine(busy=0.003)
    watch = machine.watch(strict=True)
    found = watch.collect(machine.sample(1e-3), 0.02, 15)
    assert (found.p10, found.p90) == pytest.approx((1.0, 1.0))
    assert found.samples >= 15
    assert not found.contended
    assert machine.waits > 0


def test_busy_for_a_while_is_waited_for() -> None:
    machine = Machine(busy=0.003, until=0.5)
    found = machine.watch().collect(machine.sample(5e-3), 0.02, 9)  # longer than what others leave at a time
    assert found.p10 == pytest.approx(5.0)
    assert not found.contended
    assert machine.slept
    assert machine.now < 3


def test_a_slow_host_is_marked() -> None:
    """Nobody waits; only the reference shows it."""
    machine = Machine(slow=1.5)
    watch = machine.watch(strict=True)
    found = watch.collect(machine.sample(2e-3), 0.02, 9)
    assert found.p10 == pytest.approx(3.0)
    assert found.contended
    assert not watch.starved
    machine.until = machine.now
    machine.now += 2
    assert not watch.collect(machine.sample(2e-3), 0.02, 9).contended


def endless(watch: Watch, sample: Callable[[], float]) -> None:
    for _ in range(1000):
        assert watch.collect(sample, 0.02, 9).contended
        assert watch.starved


def test_a_taken_core_is_refused_in_bounded_time() -> None:
    machine = Machine(busy=0.003)
    watch = machine.watch(strict=True)
    with pytest.raises(Busy, match=r"since \d\d:\d\d:\d\d something else has had the processors .* --resume"):
        endless(watch, machine.sample(5e-3))
    assert 20 < machine.now < 25
    watch, before = machine.watch(), machine.now  # of whoever cannot stop
    for _ in range(100):
        assert watch.collect(machine.sample(5e-3), 0.02, 9).contended
    assert machine.now - before < 60


def test_no_core_left_is_refused_although_some_samples_did_not_wait() -> None:
    """They are slower than on a quiet machine: caches are cold, and sleeping threads wake up late."""
    machine = Machine(busy=0.003)
    machine.cores = float(os.cpu_count() or 1)
    watch = machine.watch(strict=True)
    with pytest.raises(Busy):
        endless(watch, machine.sample(1e-3))
    assert machine.now < 25


def test_undisturbed_work_earns_endurance() -> None:
    machine = Machine()
    watch = machine.watch()
    for _ in range(10):
        watch.collect(machine.sample(1e-3), 1.0, 9)
    assert watch.endurance == pytest.approx(20 + 3)


def test_the_best_state_that_lasts_is_the_baseline() -> None:
    """Neither that of a busy start, nor one that was there for a moment."""
    machine = Machine(slow=2.0)
    watch = machine.watch(baseline=())
    assert watch.baseline == pytest.approx((4e-4,))
    for slow, count in ((0.5, 2), (1.0, 20)):
        machine.slow = slow
        machine.now += 2.0
        for _ in range(count):
            watch.collect(machine.sample(1e-3), 0.02, 9)
    assert watch.baseline == pytest.approx((2e-4,))
    assert watch.drift((4e-4,)) == pytest.approx(1.0)  # what was measured before is known to be slow now
    assert watch.drift((1e-4,)) == pytest.approx(0.5)  # or fast: the table would not fit together
    assert machine.watch(baseline=(3e-4,)).baseline == (3e-4,), "a table's own stays"
    assert watch.drift((math.inf,)) == math.inf
    watch.baseline = (math.inf,)  # nothing could be read at all
    assert watch.drift((math.inf,)) == math.inf


def test_readings_of_this_machine() -> None:
    watch = Watch.on(torch.device("cpu"))
    assert len(watch.state()) == 3
    assert all(seconds > 0 for seconds in watch.state())
    waiting = Waiting()
    before = waiting()
    thread = threading.Thread(target=time.sleep, args=(0.05,))
    thread.start()
    waiting.renew()
    thread.join()
    assert 0 <= before <= waiting()
    assert 0 <= taken(0.02) <= (os.cpu_count() or 1)
    assert private_cache_bytes(torch.device("cpu")) > 0
    assert retain_memory() in (True, False)


def test_the_culprit_is_named() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            names = {culprit(0.3) for _ in range(3)}
        finally:
            other.kill()
    assert all("process" in name and "of a core" in name for name in names)


def test_reference_is_read_between_long_samples() -> None:
    reads: list[int] = []
    watch = Watch([lambda: reads.append(1)], waited=lambda: 0.0)
    started = len(reads)
    measure([lambda: torch.randn(1_000_000)], torch.device("cpu"), seconds=0.1, watch=watch)
    assert len(reads) - started >= 4 * CALLS


# ---- profiles -------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation is measured once, with two readings."""
    monkeypatch.setattr("jointnas_kernels.latency.profiler.ROUNDS", 1)
    monkeypatch.setattr("jointnas_kernels.latency.watch.TICK", math.inf)


class Told(Watch):
    """Reads what it is told, and everything that it learns is the latest state."""

    def __init__(self, reference: Callable[[], float]) -> None:
        self.told = reference
        super().__init__([lambda: None], waited=lambda: 0.0, sleep=lambda s: None)

    def read(self) -> None:
        self._recent.clear()
        self._recent.append((0.0, (self.told(),)))


def run(path: Path, reference: Callable[[], float], **options: object) -> LatencyTable:
    watch = Told(reference)
    return profile(
        SPACE, CONFIG, path, workload=Workload(seq=8), threads=1, progress=False, seconds_per_operation=1e-4,
        watch=watch, **options,
    )  # type: ignore[arg-type]  # fmt: skip


def steps(*values: float) -> Callable[[], float]:
    """Readings one after another; the last one stays."""
    left = list(values)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


@pytest.mark.usefixtures("one_round")
def test_contended_profile_warns_once_says_what_to_do_and_resumes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "table.jsonl"
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        table = run(path, steps(*[1e-3] * 45, 2e-3))
    warnings = [r.getMessage() for r in caplog.records]
    assert len(warnings) == 1
    marked = sum(bool(table.best(spec).contended) for spec in table.specs)  # type: ignore[union-attr]
    assert 0 < marked < len(list(table.specs))
    assert f"{marked} of" in warnings[0]
    assert "stop other processes and run `jointnas profile --resume`" in warnings[0]
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


@pytest.mark.usefixtures("one_round")
def test_rows_of_a_machine_that_became_faster_are_measured_again(tmp_path: Path) -> None:
    """The first half of the profile ran on a slower machine than the second; nobody could know at the time."""
    path = tmp_path / "table.jsonl"
    table = run(path, steps(*[2e-3] * 30, 1e-3))
    assert table.header.reference == [1.0]
    assert sum(bool(r.contended) for r in table.rows) < len(table.rows) / 2
    assert not any(r.contended for r in run(path, lambda: 1e-3).rows)


@pytest.mark.usefixtures("one_round")
def test_interrupted_second_pass_is_recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.jsonl"
    run(path, steps(*[1e-3] * 30, 2e-3))
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


def test_undisturbed_and_faster_rows_replace_others() -> None:
    def row(median: float, contended: bool) -> Row:
        times = {"p10": median, "median": median, "p90": median, "samples": 5, "contended": contended or None}
        return Row(op="norm", m=1, n=8, k=0, wbits=16, abits=16, group=0, backend="torch", backend_version="", **times)

    busy, quiet = row(2.0, True), row(2.0, False)
    assert not better(row(3.0, True), busy)
    assert better(row(1.5, True), busy)
    assert better(row(3.0, False), busy)
    assert not better(row(1.0, True), quiet)
    assert better(row(1.0, False), quiet)


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
    from jointnas.results import APART, BUSY, html_table, text_table

    row = {"name": "found", "params": 1, "bytes": 2e6, "measured_ms": 1.0, "predicted_ms": 1.1, "perplexity": 9.0}
    quiet, busy = {**row, "tasks": {}}, {**row, "tasks": {}, "contended": True}
    assert "1.000 *" in text_table([quiet, busy])
    assert text_table([quiet, busy]).endswith(f"* {BUSY}")
    assert BUSY in html_table([busy])
    assert "*" not in text_table([quiet]) + html_table([quiet])
    apart = {**quiet, "apart": True}
    assert "1.000 *" in text_table([apart])
    assert text_table([apart]).endswith(f"* {APART}")
    assert "decode ms" not in text_table([quiet])
    assert "decode ms" in text_table([quiet, {**quiet, "decode_ms": 0.25}])
    assert "0.250" in text_table([quiet, {**quiet, "decode_ms": 0.25}])
