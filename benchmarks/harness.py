"""The one benchmark harness: timing, peak memory, a correctness gate, measured ceilings, raw rows.

Timing
    ``time_rotated``      one kernel: on CUDA, calls captured in a graph (no launch gaps), cycling over input sets that
                          exceed twice the L2 together, so that every call reads cold memory; replays timed with events.
    ``time_interleaved``  several contenders in one run, round by round A B C A B C …, so that drifting clocks or load
                          hit all alike; CUDA events around each call, ``perf_counter`` on the CPU.
Memory
    CUDA: ``max_memory_allocated`` over one call minus what was allocated before it.
    CPU: peak resident memory of the process (VmHWM, reset through /proc/self/clear_refs) over one call minus what was
    resident before it, after the C library returned its free pages. It counts everything, scratch of C++ code too.
Rows
    one JSON object per measurement: topic, name, params, median, p10, p90, n, unit, extra, and the environment
    (device, driver, torch, triton, python, commit, date). A row is written only after the caller's check passed, and at
    once. With ``--resume`` what has a row of the same name and parameters in ``--out`` is not measured again.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import importlib.util
import math
import os
import platform
import re
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import append, pick, read, same, slug
from jointnas_kernels.errors import writable
from jointnas_kernels.latency.timing import cache_bytes, cpu_name
from jointnas_kernels.progress import Progress
from jointnas_kernels.testing import relative_error

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    p10: float
    p90: float
    n: int

    @staticmethod
    def of(samples: Sequence[float]) -> Timing:
        ordered = sorted(samples)
        pick = lambda q: ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]  # noqa: E731
        return Timing(statistics.median(ordered), pick(0.1), pick(0.9), len(ordered))


# --- environment and rows ---------------------------------------------------------------------------------------------


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else ""


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's with its core count: timings of 2 and of 64 cores are not comparable."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_name()} {os.cpu_count()} cores"


def environment(device: str, commit: str | None = None) -> dict[str, str]:
    """What a reader needs to judge or repeat a row; ``commit`` overrides git, for trees without history."""
    triton = importlib.util.find_spec("triton")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = _first_line(query) if device == "cuda" else ""
    return {
        "device": device_name(device),
        "driver": driver or f"{platform.system()} {platform.release()}",
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if triton else "",
        "python": platform.python_version(),
        "commit": commit or _first_line(["git", "rev-parse", "--short", "HEAD"]) or "unknown",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


@dataclass
class Recorder:
    """Appends rows of one topic to ``folder/<topic>.jsonl`` (default: benchmarks/results/<device>) and prints them.

    A ``folder`` that is named like a file, ``*.jsonl``, is one, of all topics. With ``resume`` its rows are known:
    `has` finds them, so that they need not be measured again, and they are not written twice.
    """

    topic: str
    device: str
    folder: Path | str | None = None
    commit: str | None = None
    resume: bool = False
    env: dict[str, str] = field(init=False)
    rows: list[dict[str, Any]] = field(init=False, default_factory=list)
    file: Path = field(init=False)

    def __post_init__(self) -> None:
        self.env = environment(self.device, self.commit)
        self.file = rows_file(self.folder or RESULTS / slug(self.env["device"]), self.topic)
        self.known = [r for r in read(self.file) if r["topic"] == self.topic and "name" in r] if self.resume else []

    @classmethod
    def of(cls, topic: str, args: argparse.Namespace) -> Recorder:
        """Writes where the options of `arguments` say."""
        return cls(topic, args.device, args.out, args.commit, args.resume)

    def has(self, name: str, **params: Any) -> bool:
        """Whether a row of this name, with these parameters among its own, was there before (only with ``resume``)."""
        found = bool(pick(self.known, name, **params))
        if found:
            print(f"{self.topic:9s} {name:28s} {' '.join(f'{k}={v}' for k, v in params.items())}  is there", flush=True)
        return found

    def row(
        self, name: str, value: Timing | float, unit: str = "s", extra: Mapping[str, Any] | None = None, **params: Any
    ) -> None:
        """One measurement; ``params`` identify it (with ``name``), ``extra`` holds numbers derived from it."""
        timing = value if isinstance(value, Timing) else Timing(value, value, value, 1)
        row = {"topic": self.topic, "name": name, "params": params, "median": timing.median, "p10": timing.p10}
        row |= {"p90": timing.p90, "n": timing.n, "unit": unit, "extra": dict(extra or {}), **self.env}
        self.rows.append(row)
        if self.known and same(row) in map(same, self.known):
            return
        append(self.file, row)
        shown = " ".join(f"{k}={v}" for k, v in params.items())
        more = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in (extra or {}).items())
        print(f"{self.topic:9s} {name:28s} {shown}  {_human(timing.median, unit)}  {more}", flush=True)


def rows_file(out: Path | str, topic: str) -> Path:
    """The file that rows of a topic are appended to; see `Recorder`."""
    path = Path(out)
    return writable(path, "file") if path.suffix == ".jsonl" else writable(path) / f"{topic}.jsonl"


def _human(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1e6:.2f} µs" if value < 1e-3 else f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"
    if unit == "B":
        return f"{value / 1e9:.3f} GB"
    return f"{value:.4g} {unit}"


# --- what every benchmark script has ----------------------------------------------------------------------------------


def guarded(what: str, call: Callable[[], None]) -> None:
    """One failing topic must not cost the others their device time; its traceback is printed."""
    try:
        call()
    except Exception:
        print(f"FAILED {what}", flush=True)
        traceback.print_exc()


def arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options every benchmark has."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--out", help="folder, or file.jsonl, for the rows (default: benchmarks/results/<device>)")
    parser.add_argument("--resume", action="store_true", help="leave out what has its row in --out already")
    parser.add_argument("--commit", default=None, help="recorded when the tree has no git history")
    parser.add_argument("--tiny", action="store_true", help="smallest shapes: only whether everything runs")
    return parser


# --- correctness gate -------------------------------------------------------------------------------------------------


class WrongResult(AssertionError):
    """A contender computes something else than its reference: it is not timed."""


def gate(name: str, pairs: Mapping[str, tuple[Tensor, Tensor]], tol: float) -> float:
    """Largest relative norm error of {what: (out, reference)}; raises WrongResult above ``tol``."""
    worst = 0.0
    for what, (out, ref) in pairs.items():
        error = relative_error(out, ref)
        if not error <= tol:
            raise WrongResult(f"{name}: {what} is off by {error:.3g} (allowed {tol:.3g})")
        worst = max(worst, error)
    return worst


# --- time -------------------------------------------------------------------------------------------------------------


def time_interleaved(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1, device: str = "cpu", budget: float = 1e9,
    what: str = "", done: Callable[[str, Timing], None] | None = None, least: int = 2,
) -> dict[str, Timing]:  # fmt: skip
    """Time each contender once per round: ``rounds`` of them, or as many (at least ``least``) as fit into ``budget``
    seconds, by the first one. ``what`` announces and shows that, ``done`` gets each result as soon as it is final."""
    for call in contenders.values():
        for _ in range(warmup):
            call()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    times: dict[str, Timing] = {}
    bar: Progress | None = None
    number = 0
    started = time.perf_counter()
    while number < rounds:
        number += 1
        for name, call in contenders.items():
            samples[name].append(_once(call, device))
            if bar is not None:
                bar.step(samples[name][0], now=name)
            if number == rounds:
                times[name] = Timing.of(samples[name])
                if done is not None:
                    done(name, times[name])
        if number == 1:
            round_takes = time.perf_counter() - started
            rounds = max(1, min(rounds, max(least, int(budget / max(round_takes, 1e-9)))))
            if what and rounds > 1:
                left = datetime.timedelta(seconds=math.ceil((rounds - 1) * round_takes))
                print(f"{what}: {len(contenders)} contenders, {rounds - 1} more rounds, {left} (h:mm:ss)", flush=True)
                bar = Progress(what, (rounds - 1) * sum(s[0] for s in samples.values()))
    for name in [name for name in contenders if name not in times]:  # only the first round fitted
        times[name] = Timing.of(samples[name])
        if done is not None:
            done(name, times[name])
    if bar is not None:
        bar.close()
    return {name: times[name] for name in contenders}


def _once(call: Callable[[], Any], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def rotation(make: Callable[[], Any], nbytes: int, device: str, most: int = 256) -> list[Any]:
    """Input sets whose total size exceeds twice the last-level cache; ``nbytes`` is the traffic of one set."""
    cache = cache_bytes(torch.device(device))
    return [make() for _ in range(max(2, min(most, -(-2 * cache // max(1, nbytes)) + 1)))]


def time_rotated(
    call: Callable[[Any], Any], sets: Sequence[Any], device: str, replays: int = 20, calls: int = 10
) -> Timing:
    """Seconds per ``call(input_set)``. CUDA: one graph of at least ``calls`` calls cycling over ``sets``, replayed."""
    for item in sets if device == "cpu" else sets[:2]:
        call(item)  # on a CPU all of them: the allocator's first touch of every page costs more than a small op
    count = -(-calls // len(sets)) * len(sets)  # whole cycles: a replay starts on the set that was evicted longest ago
    if device != "cuda":
        return Timing.of([_once(partial(call, sets[i % len(sets)]), device) for i in range(count)])
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture wants a warm side stream: lazy handles and workspaces are made here
        for item in sets[:2]:
            call(item)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(sets[i % len(sets)])
    for _ in range(3):
        graph.replay()
    samples = [_once(graph.replay, device) / count for _ in range(replays)]
    del graph
    return Timing.of(samples)


def graphed(step: Callable[[], Any], warmup: int = 3) -> Callable[[], None]:
    """``step`` captured once in a CUDA graph: what it costs without the host's launch time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


# --- memory -----------------------------------------------------------------------------------------------------------


def _status_kib(key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None, f"no {key} in /proc/self/status"
    return int(match[1])


def free(device: str) -> None:
    """Give back what dead objects held, so that the next contender starts clean."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def peak_memory(call: Callable[[], Any], device: str) -> int:
    """Bytes that one ``call`` needs at its peak beyond what was held before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    call()
    return max(0, _status_kib("VmHWM") - before) * 1024


# --- measured ceilings ------------------------------------------------------------------------------------------------


def copy_bandwidth(device: str) -> Timing:
    """Bytes per second (read + written) of a copy far larger than any cache."""
    count = (2 << 30) if device == "cuda" else (256 << 20)
    source = torch.empty(count // 4, device=device).normal_()
    target = torch.empty_like(source)
    rounds = 10 if device == "cuda" else 7
    times = time_interleaved({"copy": lambda: target.copy_(source)}, rounds, warmup=2, device=device)["copy"]
    return Timing(2 * count / times.median, 2 * count / times.p90, 2 * count / times.p10, times.n)


def read_bandwidth(device: str, passes: int = 5) -> float:
    """Bytes per second of the fastest way to read more memory than caches hold once, with torch's threads: reductions
    and a matrix times a vector. Which one is fastest depends on the machine, and each is slowed down by others at
    times, so the best of several passes counts."""
    numbers = torch.ones(2048, (2 << 30 if device == "cuda" else 256 << 20) // 4 // 2048, device=device)
    vector = torch.ones(numbers.shape[1], device=device)
    calls: list[Callable[[], Any]] = [numbers.sum, numbers.amax, lambda: numbers @ vector]
    times = [_once(call, device) for call in calls * (passes + 1)]
    return numbers.numel() * 4 / min(times[len(calls) :])


def gemm_rate(device: str, dtype: torch.dtype, m: int, n: int, k: int) -> Timing:
    """Floating-point operations per second of torch.matmul [m,k] x [k,n] on random data (zeros run faster)."""
    a = torch.randn(m, k, device=device).to(dtype)
    b = torch.randn(n, k, device=device).to(dtype)
    rounds, warmup = (15, 3) if device == "cuda" else (5, 1)
    t = time_interleaved({"gemm": lambda: a @ b.t()}, rounds, warmup, device)["gemm"]
    flop = 2.0 * m * n * k
    return Timing(flop / t.median, flop / t.p90, flop / t.p10, t.n)


def ceilings(recorder: Recorder) -> dict[str, float]:
    """Record and return {"copy": B/s, "bf16": FLOP/s, "fp32": FLOP/s (CPU only)} of this machine."""
    device = recorder.device
    found = {"copy": copy_bandwidth(device)}  # measured by every process: rows refer to it
    recorder.row("copy", found["copy"], "B/s")
    size = 8192 if device == "cuda" else 2048
    dtypes = {"bf16": torch.bfloat16} | ({} if device == "cuda" else {"fp32": torch.float32})
    for label, dtype in dtypes.items():
        found[label] = gemm_rate(device, dtype, size, size, size)
        recorder.row(f"gemm_{label}", found[label], "FLOP/s", m=size, n=size, k=size)
    return {name: timing.median for name, timing in found.items()}
