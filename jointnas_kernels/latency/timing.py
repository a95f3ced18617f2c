"""Timing of one operation: rotated buffers, many samples, low quantile.

CPU: the thread count is pinned; one sample is one call (or a few, until it lasts 20 µs). GPU: one CUDA graph of
at least ten calls, timed by events, so that launch overhead does not count; or those calls themselves, of models that
launch graphs, with all that the host does between them.

`runs` are the same operation on different copies of its weight; walking through them keeps the caches in the state
they have inside a model: all other weights were touched since this one was. `copies` says how many that takes.

Whoever measures for a table passes a `Watch`: it judges every sample, and repeats what others have disturbed.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from jointnas_kernels import _ext
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency.schema import Device
from jointnas_kernels.latency.watch import SAMPLES, Measured, Watch, summary

Run = Callable[[], object]
CALLS = 10  # of a sample on a GPU, or more
CPUINFO = Path("/proc/cpuinfo")


def describe(device: str | torch.device = "cpu", threads: int | None = None) -> Device:
    """The identity written into a table's header.

    Raises:
        JointNASError: there is no such device here, or it cannot be profiled.
    """
    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise JointNASError("device 'cuda' was asked for, but torch sees no CUDA device; use 'cpu'")
        major, minor = torch.cuda.get_device_capability(device)
        return Device(type="cuda", name=torch.cuda.get_device_name(device), arch=f"sm_{major}{minor}", threads=0)
    if device.type != "cpu":
        raise JointNASError(f"device {str(device)!r} cannot be profiled; allowed: cpu, cuda")
    arch = torch.backends.cpu.get_cpu_capability()
    return Device(type="cpu", name=cpu_name(), arch=arch, threads=threads or torch.get_num_threads())


def compiled() -> tuple[str, ...]:
    """Devices that the compiled extension was built for; none: it is not built."""
    if not _ext.available():
        return ()
    return ("cpu", "cuda") if _ext.load().has_cuda else ("cpu",)


def cpu_name() -> str:
    """The CPU's model with its family and model numbers, or an ARM core's implementer and part.

    On virtual machines the model's name can be "AMD EPYC" alone, for Zen 4 (family 25, model 17) and Zen 5 alike.
    """
    try:
        first = CPUINFO.read_text().strip().split("\n\n")[0]
    except OSError:
        first = ""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name = fields.get("model name") or platform.processor() or platform.machine()
    for keys in (("cpu family", "model"), ("CPU implementer", "CPU part")):
        if all(fields.get(key) for key in keys):
            numbers = ", ".join(f"{key.split()[-1]} {fields[key]}" for key in keys)
            return f"{name} ({numbers})"
    return name


def native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware: AVX512-BF16, AMX, or ARM's extension of that name.

    Without, torch widens every operand, and float32 is the faster dtype.
    """
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return False
    listed = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(listed.partition(":")[2].split())


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


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@functools.cache
def retain_memory() -> bool:
    """Keeps freed blocks in this process from now on; whether the C library could be told.

    By default glibc returns large ones to the kernel, sometimes (it depends on what lies at the top of the heap), and
    the next output of that size then costs a page fault per 4 KiB. Seen in one process with a 5.8M model, prefill of
    4 x 128 tokens: 31 ms without faults, 38 to 45 ms with them (512x768 silu: 0.05 and 0.52 ms). An operation and the
    model made of it can only be compared if neither depends on that.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 32 << 20) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))  # the largest it takes


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache (CPU: as sysfs reports it, 32 MiB where it does not)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(_cpu_caches()) or 32 * 2**20


def private_cache_bytes(device: torch.device) -> int:
    """Caches that only one core has (L2), of all threads; 0 on a GPU, whose blocks share theirs."""
    if device.type == "cuda":
        return 0
    return (sorted(_cpu_caches())[-2] or 2**20) * torch.get_num_threads()


@functools.cache
def _cpu_caches() -> list[int]:
    """Bytes of every cache of the first core, as sysfs reports them; zeros where it does not."""
    sizes = [0, 0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]] if text[-1:] in ("K", "M") else 0)
    return sizes


def copies(weight_bytes: int, model_bytes: int, device: torch.device, limit: int = 64, cache: int | None = None) -> int:
    """How many copies to rotate through: as many bytes as the whole model has, at most four times the last cache.

    Twice is not enough on a CPU: reads of 64 MB ran at 51 GB/s beside an L3 of 32 MB, of 232 MB at 41 GB/s.
    """
    footprint = min(model_bytes, 4 * (cache_bytes(device) if cache is None else cache))
    return max(1, min(limit, -(-footprint // max(1, weight_bytes))))


@torch.inference_mode()
def measure(
    runs: Sequence[Run], device: torch.device, seconds: float = 0.04, samples: int = 15,
    hopeless_ms: float = float("inf"), watch: Watch | None = None, captured: bool = True,
) -> Measured:
    """Milliseconds per call.

    Samples are taken until `seconds` have passed, but at least `samples` of them (CPU: fewer if that would take more
    than 20 times as long; only one, the second call, if that takes `hopeless_ms`). A `watch` judges them. `captured`:
    on a GPU as one graph.

    Raises:
        Busy: by the watch.
    """
    if device.type == "cuda":
        sample = graph_sample(runs, device) if captured else _cuda_sample(runs, device)
    else:
        retain_memory()
        runs[0]()
        start = time.perf_counter()
        runs[-1]()
        once = time.perf_counter() - start
        if once * 1e3 > hopeless_ms:
            return summary([once * 1e3])
        sample = _cpu_sample(runs, max(1, min(50, int(20e-6 / max(once, 1e-7)))))
        samples = max(3, min(samples, int(20 * seconds / max(once, 1e-7))))  # a slow call needs no 15 samples
    if watch is not None:
        return watch.collect(sample, seconds, samples)
    times, stop = list[float](), time.perf_counter() + seconds
    while len(times) < samples or (time.perf_counter() < stop and len(times) < SAMPLES):
        times.append(sample())
    return summary(times)


def _cpu_sample(runs: Sequence[Run], inner: int) -> Callable[[], float]:
    """Milliseconds per call, of a few calls."""
    forever = itertools.cycle(runs)

    def sample() -> float:
        batch = list(itertools.islice(forever, inner))
        start = time.perf_counter()
        for run in batch:
            run()
        return (time.perf_counter() - start) * 1e3 / inner

    return sample


def _cuda_sample(runs: Sequence[Run], device: torch.device) -> Callable[[], float]:
    """The same on a GPU, until the last of ten calls has ended."""
    forever = itertools.cycle(runs)
    for run in runs:
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)

    def sample() -> float:
        begin.record()
        for run in itertools.islice(forever, CALLS):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / CALLS

    return sample


def graph_sample(runs: Sequence[Run], device: torch.device, pool: Any = None) -> Callable[[], float]:
    """The same of a captured graph, of at least ten calls that walk through `runs`; its memory is that of other graphs
    of the same `pool`."""
    calls = max(CALLS, len(runs))
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # warm up off the capture: lazy initialisation, workspaces, JIT
        for run in runs:
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for i in range(calls):
            runs[i % len(runs)]()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    torch.cuda.synchronize(device)

    def sample() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / calls

    return sample
