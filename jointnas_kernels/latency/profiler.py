"""`profile`: time every operation of a space on this device into a table file.

Each line is on disk before the next measurement starts, so a killed profile resumes where it stopped. Every backend
that claims an operation is first checked against the dequantised reference; one that fails or disagrees gets a
`rejected` row with the reason and is not timed. An operation nobody can run gets an `infeasible` row. So whoever claims
an operation and has no row was not there when it was measured: `--resume` tries it, and times nobody else again.

On a CPU every operation is timed in several rounds, in different orders, of which the fastest counts: seen on a virtual
machine, without any other load, one and the same product took 1.3 us for some seconds and 2.1 for others. What others
disturbed in all of them is measured again after everything else, then by the next `--resume`. A machine so busy that
nothing can be measured ends the profile with an error (`watch.py`); what was measured in an unusual state of it is
marked, counted and warned about once.
"""

from __future__ import annotations

import datetime
import logging
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from jointnas_kernels.errors import JointNASError, writable
from jointnas_kernels.latency import backends as registry
from jointnas_kernels.latency.backends import step
from jointnas_kernels.latency.backends.base import (
    Call,
    Target,
    Weight,
    excuse,
    random_input,
    random_weight,
    verified,
)
from jointnas_kernels.latency.meters import SAMPLES, UNITS, WINDOW, WINDOWS, meter
from jointnas_kernels.latency.schema import INTERPOLATED, Calibration, Header, Metric, Row, Writer, read
from jointnas_kernels.latency.spec import DENSE, LINEARS, ModelDims, OpSpec, Workload, enumerate_ops, parts
from jointnas_kernels.latency.table import LatencyTable
from jointnas_kernels.latency.timing import copies, describe, measure, pinned_threads, private_cache_bytes
from jointnas_kernels.latency.watch import DRIFT, Reading, Watch, warn_once
from jointnas_kernels.progress import Progress
from jointnas_kernels.runtime import GraphStep
from jointnas_kernels.runtime.step import config_misfit
from jointnas_kernels.space import SearchSpace

log = logging.getLogger(__name__)
Rows = dict[tuple[OpSpec, str], Row]  # by operation and backend
ROUNDS = 3  # a CPU's time for an operation is taken in so many turns, between which it may change its state
DEAR = 1.0  # seconds of a turn that is the only one
CLOSE = 2.0  # times slower than the fastest backend: may still be the fastest
PATIENCE = 150  # measurements' time that may go into what was disturbed, at the end: 6 s of a profile with 0.04 s each
FEW_TOKENS = 64  # whose products take about as long as reading the weight
HOPELESS = 5  # times slower than another backend, which one sample tells well enough
LONGEST = 5.0  # seconds for one operation: more tells nothing, and there are hundreds
AGAIN = 0.3  # or that share of the profile's time, if it is more


def profile(
    space: SearchSpace, config: Any, out: str | Path, *, workload: Workload | None = None, device: str = "cpu",
    threads: int | None = None, backends: Sequence[str] | None = None, resume: bool = True, progress: bool = True,
    seconds_per_operation: float = 0.04, seed: int = 0, watch: Watch | None = None, metric: Metric = "latency",
    strict: bool = True,
) -> LatencyTable:
    """Times all of `enumerate_ops(space, config, workload)` and returns the finished table.

    Args:
        space: the sizes and bits; what only structures need that the model's class refuses is not timed.
        config: of the model, for what the space does not say.
        out: the table file. One for the same device, model and workload is continued when `resume` is set: with what is
            missing, was disturbed, or can be run by a backend that was not there then. Anything else there is an error,
            never overwritten silently.
        workload: default: prefill of 128 tokens in float32.
        device: cpu or cuda.
        threads: CPU threads to pin; default: what torch uses now.
        backends: names to try; default: "step" where it decodes the model (backends/step.py), else all others.
        resume: continue what is in `out`.
        progress: show a bar.
        seconds_per_operation: time spent on each operation by each backend, up to 5.
        seed: of the weights and inputs.
        watch: what notices a busy machine; default: this machine's.
        metric: what is measured of every operation (`meters.py`).
        strict: stop where the machine is too busy to be measured; otherwise such rows are marked.

    Raises:
        JointNASError: the space does not fit the model, an unknown backend, another time, or a file that cannot be
            made or continued.
        Busy: `strict`, and something else takes the processors; the file can be continued.
    """
    if not 0 < seconds_per_operation <= LONGEST:
        allowed = f"allowed: above 0, to {LONGEST:g}"
        raise JointNASError(f"profile: seconds_per_operation is {seconds_per_operation}; {allowed}")
    workload, out, seconds = workload or Workload(), writable(out, "file"), seconds_per_operation
    space, _ = space.feasible(config)
    dims, here = ModelDims.of(config), describe(device, threads)
    target = Target(torch.device(device), workload, dims.kv_heads)
    names = _names(backends, config, target)
    meter(metric, target)  # an error before the file is made
    with pinned_threads(here.threads):
        watch = watch or Watch.on(target.device, strict=strict)
        rounds = ROUNDS if metric == "latency" and target.device.type == "cpu" else 1
        header = Header(
            metric=metric, unit=UNITS[metric], device=here, workload=workload, model=dims, torch=torch.__version__,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            runtime=_runtime(names, config, target),
            reference=_milliseconds(watch.baseline), load=round(os.getloadavg()[0], 2),
        )  # fmt: skip
        # operations on the same weight next to each other: it is made, quantized and packed once
        specs = sorted(enumerate_ops(space, config, workload), key=lambda s: (s.op, s.m, s.n, s.k, s.wbits, s.group))
        model_bytes = _weight_bytes(space, workload, dims, target)
        store = Weights(target, model_bytes, torch.Generator().manual_seed(seed))
        writer, header, rows, calibration = _open(out, header, resume)
        states: dict[tuple[OpSpec, str], Reading] = {}  # of the machine, when a row was measured
        cost: dict[OpSpec, float] = {}  # seconds of one round
        starved: set[OpSpec] = set()  # of too few undisturbed samples

        def due(spec: OpSpec) -> list[str]:
            """Backends that claim it and have no row, or a disturbed one. By operation, not by file: a killed resume
            leaves a new backend's rows for the first operations only."""
            asked = [name for name in names if (spec, name) not in rows or rows[spec, name].contended]
            return [name for name in asked if registry.get(name).unsupported(spec, target) is None]

        def run(spec: OpSpec, asked: Sequence[str], fastest: float = math.inf) -> None:
            watch.starved, started = False, time.perf_counter()
            share, samples = seconds / rounds, SAMPLES // rounds
            for row in time_operation(spec, target, asked, store, share, watch, metric, fastest, samples):
                before = rows.get((spec, row.backend))
                if before is not None and not better(row, before):
                    continue
                rows[spec, row.backend], states[spec, row.backend] = row, watch.reading
                writer.write(row if before is None else row.model_copy(update={"again": True}))
            clean = any((spec, name) in rows and not rows[spec, name].contended for name in asked)
            (starved.add if watch.starved and not clean else starved.discard)(spec)
            cost[spec] = time.perf_counter() - started

        def contenders(spec: OpSpec) -> list[str]:
            """Backends that may be the fastest."""
            known = {name: rows[spec, name].value for name in names if (spec, name) in rows}
            least = min((ms for ms in known.values() if ms is not None), default=0.0)
            return [name for name, ms in known.items() if ms is not None and ms <= CLOSE * least]

        began = time.perf_counter()
        done = {spec for spec, _ in rows}
        try:
            todo = [spec for spec in specs if spec not in done or due(spec)]
            if progress and todo:
                _announce(len(todo), sum(len(due(spec)) for spec in todo), seconds, metric)
            for spec in _with_progress(todo, f"profile {device}", progress):
                asked = due(spec) or names
                others = [rows[spec, name].value for name in names if name not in asked and (spec, name) in rows]
                run(spec, asked, min((ms for ms in others if ms is not None and metric == "latency"), default=math.inf))
            shuffled = random.Random(seed)
            for number in range(2, rounds + 1):  # what was slow among its neighbours need not be among others
                order = [spec for spec in todo if cost[spec] < DEAR]
                shuffled.shuffle(order)
                for spec in _with_progress(order, f"round {number} of {rounds}", progress):
                    run(spec, contenders(spec))
            # only now it is known which state of the machine lasts: what was timed in another is disturbed, too
            _mark(rows, [key for key, state in states.items() if state and watch.drift(state) > DRIFT])
            todo = [spec for spec in todo if due(spec)]
            shuffled.shuffle(todo)
            stop = time.perf_counter() + max(PATIENCE * seconds, AGAIN * (time.perf_counter() - began))
            for spec in _with_progress(todo, "disturbed, again", progress and bool(todo)):
                if time.perf_counter() < stop:
                    run(spec, [name for name in contenders(spec) if rows[spec, name].contended])
            while starved and watch.strict:  # until endurance is gone
                for spec in sorted(starved):
                    run(spec, contenders(spec))
        finally:
            writer.close()
    if states:  # otherwise the file's rows are still those of its own reference
        header = header.model_copy(update={"reference": _milliseconds(watch.baseline)})
    claimed = {spec for (spec, _), row in rows.items() if row.status != "infeasible"}  # some of them only now
    kept = [row for row in rows.values() if row.status != "infeasible" or row.spec not in claimed]
    table = LatencyTable(header, kept, None if states else calibration)
    table.save(out)
    if table.caution:
        warn_once(table.caution)
    return table


def _milliseconds(reading: Reading) -> list[float] | None:
    """For a header; None while the machine is too busy to be read."""
    return [seconds * 1e3 for seconds in reading] if all(map(math.isfinite, reading)) else None


def _names(asked: Sequence[str] | None, config: Any, target: Target) -> list[str]:
    """Of the backends to try. The step runs all of a model, other backends run linears of a transformers model."""
    if asked is None:
        return [step.NAME] if step.running(config, target) else [n for n in registry.names() if n != step.NAME]
    for name in asked:
        registry.get(name)
    if step.NAME in asked and len(set(asked)) > 1:
        raise JointNASError(f"backend {step.NAME!r} runs whole models; name it alone, or others without it")
    return list(dict.fromkeys(asked))


def _runtime(names: list[str], config: Any, target: Target) -> Literal["step", "torch", "graph", "transformers"]:
    """What runs whole models with these backends' linears."""
    if target.device.type == "cpu":
        return "step" if names == [step.NAME] else "torch"
    fits = target.workload.batch <= GraphStep.most and target.dtype in GraphStep.dtypes
    return "graph" if fits and config_misfit(config) is None else "transformers"


def _announce(operations: int, measurements: int, seconds: float, metric: Metric) -> None:
    """How long a profile takes at least; large operations take longer than they are given."""
    each = {"latency": seconds, "energy": WINDOW * WINDOWS, "memory": 0.0}[metric]
    if not each:
        return
    least = datetime.timedelta(seconds=math.ceil(measurements * each))
    log.info(
        "profile: %d operations, %d measurements of %g s or more: at least %s (h:mm:ss)", operations, measurements,
        each, least,
    )  # fmt: skip


def better(row: Row, before: Row) -> bool:
    """Whether it takes the other one's place: undisturbed, or faster. Nothing makes a machine faster than it is."""
    if row.value is None or before.value is None:
        return before.value is None or bool(before.contended)
    return (bool(row.contended), row.value) < (bool(before.contended), before.value)


def _mark(rows: Rows, keys: Sequence[tuple[OpSpec, str]]) -> None:
    for key in keys:
        if rows[key].status == "ok":
            rows[key] = rows[key].model_copy(update={"contended": True})


def _open(out: Path, header: Header, resume: bool) -> tuple[Writer, Header, Rows, Calibration | None]:
    """The writer; header, rows and calibration of the file."""
    if not out.exists() or out.stat().st_size == 0:
        return Writer(out, header), header, {}, None
    if not resume:
        raise JointNASError(f"{out} exists; pass resume (--resume) to continue it, or remove it first")
    contents = read(out, recover=True)
    difference = contents.header.differs_from(header)
    if difference:
        raise JointNASError(
            f"{out} cannot be continued: it was measured for another {difference}; choose another file or remove it"
        )
    rows = {(row.spec, row.backend): row for row in contents.rows if row.backend != INTERPOLATED}
    readings = zip(contents.header.reference or (), header.reference or (), strict=False)
    if any(old > (1 + DRIFT) * now for old, now in readings):  # the machine is faster than it was then
        _mark(rows, list(rows))
    return Writer(out, contents.header, contents), contents.header, rows, contents.calibration


def _weight_bytes(space: SearchSpace, workload: Workload, dims: ModelDims, target: Target) -> int:
    """Linears of the largest model of the space: how much is touched between two uses of one weight."""
    total, full = 0, space.full()
    for part in parts(workload, dims, space):
        spec = part.spec(*(getattr(full, d) for d in part.dims))
        if spec.op in LINEARS:
            total += spec.n * spec.k * part.count * (space.blocks[-1] if part.per_block else 1)
    return int(total * target.dtype.itemsize)


def _with_progress(specs: Sequence[OpSpec], what: str, enabled: bool) -> Iterator[OpSpec]:
    """The specs; the time that is left goes by size: of 8B shapes the last take 1000 times the first."""
    work = [0.05 + spec.n * max(spec.k, 1) * (1 + spec.m / 64) * 1e-7 for spec in specs]
    progress = Progress(what, sum(work), enabled=enabled)
    for done, (spec, share) in enumerate(zip(specs, work, strict=True), 1):
        yield spec
        progress.step(share, operations=f"{done} of {len(specs)}")
    progress.close()


class Weights:
    """Random weights of the operations, made once for all that follow each other with the same one."""

    def __init__(self, target: Target, model_bytes: int, generator: torch.Generator) -> None:
        self.target, self.model_bytes, self.generator = target, model_bytes, generator
        self._key: tuple[int, ...] = ()
        self._weight: Weight = torch.empty(0)

    def of(self, spec: OpSpec) -> Weight:
        """The weight of an operation."""
        key = (spec.n, spec.k, spec.wbits, spec.group)
        if key != self._key:
            self._weight = torch.empty(0)  # the old one's memory first
            self._key, self._weight = key, random_weight(spec, self.target, self.generator)
        return self._weight


def time_operation(
    spec: OpSpec, target: Target, names: Sequence[str], store: Weights, seconds: float, watch: Watch | None = None,
    metric: Metric = "latency", fastest: float = math.inf, samples: int = SAMPLES,
) -> list[Row]:
    """One row per backend that claims `spec`, or one `infeasible` row. `fastest`: ms of the best that has a row;
    `samples`: of a latency, at least."""
    linear = spec.op in LINEARS
    weight = store.of(spec) if linear else None
    # the input stays the same in all calls: a layer's input was just written by the layer before
    x = random_input(spec, target, store.generator) if linear else torch.empty(0)
    measure_with = meter(metric, target, samples=samples)
    rows: list[Row] = []
    reasons: list[str] = []
    for name in names:
        backend = registry.get(name)
        reason = backend.unsupported(spec, target)
        if reason is not None:
            reasons.append(f"{name}: {reason}")
            continue
        if weight is not None:
            first, reason = verified(backend, spec, target, x, weight)
        else:  # the other parts are torch's own operations, their own reference
            first = backend.prepare(spec, target, None)
        identity: dict[str, Any] = {**spec._asdict(), "backend": name, "backend_version": backend.version()}
        if first is None or reason is not None:
            rows.append(Row(**identity, status="rejected", reason=reason or ""))
            continue
        try:
            with torch.inference_mode():
                each = getattr(first, "repeats", 1)
                limit = HOPELESS * fastest * each
                once = result = measure([partial(first, x)], target.device, 0.0, samples=3, hopeless_ms=limit)
                fastest = min(fastest, once.value / each)
                if once.value <= limit:  # otherwise one sample is enough, and packing all copies too expensive
                    calls, each = _calls(backend, spec, target, first, weight, store.model_bytes, metric)
                    result = measure_with(spec, [partial(call, x) for call in calls], seconds, watch)
                elif metric != "latency":
                    reason = f"over {HOPELESS} times slower than another backend"
                    rows.append(Row(**identity, status="rejected", reason=reason))
                    continue
                result = result._replace(p10=result.p10 / each, median=result.median / each, p90=result.p90 / each)
        except JointNASError:  # of the meter
            raise
        except Exception as error:  # what ran once need not run in a graph, or find memory for its copies
            if weight is None:
                raise
            rows.append(Row(**identity, status="rejected", reason=excuse(backend, error)))
            continue
        numbers = result._asdict()
        rows.append(Row(**identity, **numbers | {"contended": True if result.contended else None}))
    if not rows:
        rows.append(Row(**spec._asdict(), backend="none", status="infeasible", reason="; ".join(reasons)))
    return rows


def _calls(
    backend: Any, spec: OpSpec, target: Target, first: Call, weight: Weight | None, model_bytes: int, metric: Metric
) -> tuple[list[Call], int]:
    """Calls on as many copies of the weight as the timing rotates through, and how often each runs the operation."""
    if metric == "memory":
        return [first], 1
    together = getattr(backend, "together", None)
    copied = _copies(spec, target, weight, model_bytes) if together is None or weight is not None else []
    calls = [first, *(backend.prepare(spec, target, w) for w in copied)]
    if together is not None and weight is not None:
        calls = together(calls, spec, target)
    return calls, getattr(calls[0], "repeats", 1)


def _copies(spec: OpSpec, target: Target, weight: Weight | None, model_bytes: int) -> list[Weight | None]:
    """The weight at all other addresses that the timing rotates through; None: as many other inputs."""
    if spec.op == "embedding":  # one of up to gigabytes; its rows are far apart
        return []
    if weight is None:  # what a part reads was written some operations ago: on a CPU it has left the private caches
        size = spec.m * spec.n * (spec.k if spec.op in ("rope", "attention") else 1) * target.dtype.itemsize
        return [None] * (copies(size, model_bytes, target.device, 16, private_cache_bytes(target.device)) - 1)
    bits = spec.wbits if spec.wbits < DENSE else 8 * target.dtype.itemsize
    own = model_bytes * bits // (8 * target.dtype.itemsize)  # of a model with these bits: it may stay in a cache
    limit = 256 if spec.m <= FEW_TOKENS else 8  # more are read from memory once for so many tokens
    count = copies(spec.n * spec.k * bits // 8, own, target.device, limit)
    return [weight.clone() for _ in range(count - 1)]
