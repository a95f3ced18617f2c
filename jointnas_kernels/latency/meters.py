"""What a table can hold besides time, in the same rows: energy and memory of every operation.

energy   mJ per call, from the device's own counter: NVML (GPU), RAPL package domains (CPU; Linux shows them to root
         only, unless /sys/class/powercap is made readable). Counters tick every 1 to 100 ms, so calls are repeated for
         half a second per sample. The idle power of the device is part of it, as it is part of the bill.
memory   bytes: the operation's weights, packed, plus what one call allocates at its peak (output and temporaries). The
         sum over a model is an upper bound of its peak, since temporaries of different operations share memory.
"""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import torch

from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.latency.backends.base import Target
from jointnas_kernels.latency.schema import Metric
from jointnas_kernels.latency.spec import DENSE, LINEARS, OpSpec
from jointnas_kernels.latency.timing import Run, measure
from jointnas_kernels.latency.watch import Measured, Watch, synchronize

UNITS: dict[Metric, str] = {"latency": "ms", "energy": "mJ", "memory": "B"}
SAMPLES = 15  # of a latency, at least
WINDOW, WINDOWS = 0.5, 3  # seconds of one energy sample, and how many
POWERCAP = Path("/sys/class/powercap")
# (operation, its calls on different copies of the weight, seconds, watch) -> value per call
Meter = Callable[[OpSpec, Sequence[Run], float, Watch | None], Measured]


def meter(metric: Metric, target: Target, powercap: Path = POWERCAP, samples: int = SAMPLES) -> Meter:
    """How to measure one metric on this device, latency with at least so many samples; an error where it has no counter
    that this process may read."""
    if metric not in UNITS:
        raise unknown("metric", metric, UNITS)
    if metric == "latency":
        return lambda spec, runs, seconds, watch: measure(runs, target.device, seconds, samples, watch=watch)
    if metric == "memory":
        return lambda spec, runs, seconds, watch: _memory(spec, runs[0], target)
    counter = _nvml(target.device) if target.device.type == "cuda" else _rapl(powercap)
    return lambda spec, runs, seconds, watch: _energy(runs, counter, target.device)


@torch.inference_mode()
def _energy(
    runs: Sequence[Run], counter: Callable[[], float], device: torch.device, window: float = WINDOW
) -> Measured:
    values, forever = [], cycle(runs)
    next(forever)()  # warm
    for _ in range(WINDOWS):
        synchronize(device)
        calls, before, stop = 0, counter(), time.perf_counter() + window
        while time.perf_counter() < stop:
            for _ in range(10):
                next(forever)()
            calls += 10
            synchronize(device)
        values.append(max((counter() - before) * 1e3 / calls, 1e-9))
    values.sort()
    return Measured(values[0], values[len(values) // 2], values[-1], len(values))


def _rapl(folder: Path) -> Callable[[], float]:
    """Joules of all packages; their counters wrap around."""
    why = ""
    packages = sorted(p for p in folder.glob("*-rapl:*") if re.fullmatch(r"\w+-rapl:\d+", p.name))
    try:
        ranges = [int((p / "max_energy_range_uj").read_text()) for p in packages]
        last = [int((p / "energy_uj").read_text()) for p in packages]
    except (OSError, ValueError) as error:
        packages, why = [], f" ({type(error).__name__})"
    if not packages:
        raise JointNASError(
            f"the energy of this CPU cannot be measured: {folder} has no readable RAPL counter{why}; virtual machines "
            "have none, elsewhere root may read them. Use --metric latency or memory"
        )
    total = 0.0

    def read() -> float:
        nonlocal total
        for i, package in enumerate(packages):
            now = int((package / "energy_uj").read_text())
            total += ((now - last[i]) % (ranges[i] + 1)) * 1e-6
            last[i] = now
        return total

    return read


def _nvml(device: torch.device) -> Callable[[], float]:
    """Joules since the driver was loaded."""
    handle, energy = ctypes.c_void_p(), ctypes.c_ulonglong()
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        codes = [library.nvmlInit_v2(), library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle))]
        codes.append(library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(energy)))
    except (OSError, AttributeError) as error:
        raise JointNASError(f"the energy of this GPU cannot be measured: NVML is not usable ({error})") from None
    if any(codes):
        raise JointNASError(f"the energy of this GPU cannot be measured: NVML answers {codes}")

    def read() -> float:
        library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(energy))
        return energy.value * 1e-3

    return read


def weight_bytes(spec: OpSpec, target: Target) -> int:
    """Packed weights and their scales; 0 of what has no weight."""
    if spec.op not in LINEARS:
        return 0
    size = target.dtype.itemsize
    if spec.wbits == DENSE:
        return spec.n * spec.k * size
    return spec.n * spec.k * spec.wbits // 8 + spec.n * (spec.k // spec.group) * size


@torch.inference_mode()
def _memory(spec: OpSpec, run: Run, target: Target) -> Measured:
    run()  # what is allocated once, and stays
    gc.collect(0)
    samples = sorted(_peak(run, target.device) for _ in range(3))
    value = float(max(1, weight_bytes(spec, target) + samples[1]))
    return Measured(value, value, value, len(samples))


def _peak(run: Run, device: torch.device) -> int:
    """Bytes beyond what is held before the call. CPU: pages that become resident, so C++ scratch counts, too."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM") - before
    del result
    return max(0, peak) * 1024


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise JointNASError(f"the memory of this process cannot be measured: no {key} in /proc/self/status")
    return int(found[1])
