"""Timing of one operation: rotated buffers, many samples, median with p10 and p90.

CPU: the thread count is pinned; one sample is one call (or a few, until it lasts 20 µs). GPU: one CUDA graph of
at least ten calls, timed by events, so that launch overhead does not count.

`runs` are the same operation on different copies of its weight; walking through them keeps the caches in the state
they have inside a model: all other weights were touched since this one was. `copies` says how many that takes.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency.schema import Device

Run = Callable[[], object]


def describe(device: str | torch.device = "cpu", threads: int | None = None) -> Device:
    """The identity written into a table's header."""
    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise JointNASError("device 'cuda' was asked for, but torch sees no CUDA device; use 'cpu'")
        major, minor = torch.cuda.get_device_capability(device)
        return Device(type="cuda", name=torch.cuda.get_device_name(device), arch=f"sm_{major}{minor}", threads=0)
    if device.type != "cpu":
        raise JointNASError(f"device {str(device)!r} cannot be profiled; allowed: cpu, cuda")
    return Device(
        type="cpu",
        name=_cpu_name(),
        arch=torch.backends.cpu.get_cpu_capability(),
        threads=threads or torch.get_num_threads(),
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@contextmanager
def pinned_threads(threads: int) -> Iterator[None]:
    """Runs the body with this many intra-op threads (0: leave as it is)."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache (CPU: as sysfs reports it, 32 MiB where it does not)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]] if text[-1:] in ("K", "M") else 0)
    return max(sizes) or 32 * 2**20


def copies(weight_bytes: int, model_bytes: int, device: torch.device, limit: int = 64) -> int:
    """How many weight copies to rotate through: as many bytes as the whole model has, at most twice the cache."""
    footprint = min(model_bytes, 2 * cache_bytes(device))
    return max(1, min(limit, -(-footprint // max(1, weight_bytes))))


@torch.inference_mode()
def measure(
    runs: Sequence[Run],
    device: torch.device,
    seconds: float = 0.04,
    samples: int = 15,
    maximum: int = 2000,
    hopeless_ms: float = float("inf"),
) -> tuple[float, float, float, int]:
    """(p10, median, p90) milliseconds per call and the number of samples.

    Samples are taken until `seconds` have passed, but at least `samples` of them (CPU: fewer if that would take more
    than 20 times as long; only one, the second call, if that takes `hopeless_ms`)."""
    if device.type == "cuda":
        return _measure_cuda(runs, device, seconds, samples, maximum)
    runs[0]()
    start = time.perf_counter()
    runs[-1]()
    once = time.perf_counter() - start
    if once * 1e3 > hopeless_ms:
        return _summary([once], 1e3)
    inner = max(1, min(50, int(20e-6 / max(once, 1e-7))))
    samples = max(3, min(samples, int(20 * seconds / max(once, 1e-7))))  # a slow call needs no 15 samples
    times: list[float] = []
    position, stop = 0, time.perf_counter() + seconds
    while len(times) < samples or (time.perf_counter() < stop and len(times) < maximum):
        batch = [runs[(position + i) % len(runs)] for i in range(inner)]
        position += inner
        start = time.perf_counter()
        for run in batch:
            run()
        times.append((time.perf_counter() - start) / inner)
    return _summary(times, 1e3)


def _measure_cuda(
    runs: Sequence[Run], device: torch.device, seconds: float, samples: int, maximum: int
) -> tuple[float, float, float, int]:
    calls = max(10, len(runs))
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # warm up off the capture: lazy initialisation, workspaces, JIT
        for run in runs:
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            runs[i % len(runs)]()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    torch.cuda.synchronize(device)
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < samples or (time.perf_counter() < stop and len(times) < maximum):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return _summary(times, 1.0)


def _summary(times: list[float], scale: float) -> tuple[float, float, float, int]:
    ordered = sorted(times)
    pick = lambda q: max(ordered[min(len(ordered) - 1, int(q * len(ordered)))] * scale, 1e-9)  # noqa: E731
    return pick(0.1), pick(0.5), pick(0.9), len(ordered)
