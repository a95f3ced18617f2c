"""Nsight Compute: which counters are asked for, how it is called, and what its CSV says.

    ncu --csv --print-units base --metrics NAME,... COMMAND

prints lines of its own (==PROF==, ==WARNING==, ==ERROR==) and then one CSV line per kernel and metric. Clocks are left
as they are, so that times are those of any other run; caches are emptied before each kernel, which runs once per pass.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.launches import short

STALL = "smsp__average_warps_issue_stalled_"
STALLS = (
    "long_scoreboard", "short_scoreboard", "barrier", "wait", "math_pipe_throttle", "mio_throttle", "lg_throttle",
    "not_selected", "no_instruction", "branch_resolving", "gmma",
)  # fmt: skip
SECONDS, READ, WRITTEN = "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"
SHARES = {  # metric in percent: name in rows
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "dram_share",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_share",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor_share",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor_share",  # where there is no other
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_share",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
}
METRICS = (SECONDS, READ, WRITTEN, *SHARES, *(f"{STALL}{s}_per_issue_active.ratio" for s in STALLS))
# factors to base units; other units are base units themselves
UNITS = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "%": 1e-2,
         "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}  # fmt: skip


class NotPermitted(Exception):
    """Counters cannot be read here, and why."""


@dataclass
class Measured:
    """One kernel, with its metrics in seconds, bytes and shares of one."""

    kernel: str
    grid: str
    block: str
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.metrics[SECONDS]

    def extra(self) -> dict[str, Any]:
        """What a row holds besides the time; metrics that this GPU does not have are left out."""
        found: dict[str, Any] = {"grid": self.grid, "block": self.block}
        if READ in self.metrics and WRITTEN in self.metrics:
            found["dram_bytes"] = self.metrics[READ] + self.metrics[WRITTEN]
        for metric, name in SHARES.items():
            if metric in self.metrics:
                found.setdefault(name, self.metrics[metric])
        ratio = {s: self.metrics.get(f"{STALL}{s}_per_issue_active.ratio", 0.0) for s in STALLS}
        found["stalls"] = {s: value for s, value in ratio.items() if value > 0}
        return found


def find() -> str:
    """Its path.

    Raises:
        NotPermitted: it is not installed.
    """
    path = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    if not Path(path).exists():
        raise NotPermitted("Nsight Compute (ncu) is not installed")
    return path


def listed(program: str) -> str:
    """What it says that this GPU counts; nothing if that takes too long."""
    try:
        return subprocess.run([program, "--query-metrics"], capture_output=True, text=True, timeout=60).stdout
    except subprocess.TimeoutExpired:
        return ""


def available(text: str) -> list[str]:
    """Those of our metrics whose names `ncu --query-metrics` lists; all if it lists none."""
    names = set(re.findall(r"^\s*(\w+__\w+)", text, re.M))
    base = [m.split(".")[0] for m in METRICS]
    return [
        m for m, b in zip(METRICS, base, strict=True) if not names or {b, b.removesuffix("_per_issue_active")} & names
    ]


def run(ncu: str, command: Sequence[str], metrics: Collection[str], timeout: float, folder: Path) -> list[Measured]:
    """The kernels that a command launches between torch.cuda.profiler.start() and stop(), run in a folder.

    Raises:
        NotPermitted: counters cannot be read.
        RuntimeError: the command failed, or launched nothing.
    """
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "ncu.csv"
        options = ["--csv", "--print-units", "base", "--clock-control", "none", "--profile-from-start", "off"]
        call = [ncu, *options, "--target-processes", "all", "--metrics", ",".join(metrics), "--log-file", str(log)]
        done = subprocess.run([*call, *command], capture_output=True, text=True, timeout=timeout, cwd=folder)
        text = (log.read_text() if log.exists() else "") + "\n"
    found = parse(text)
    if not found or done.returncode:
        refuse(text + done.stdout + done.stderr)
        raise RuntimeError(f"ncu: exit {done.returncode}, {len(found)} kernels: {(text + done.stderr).strip()[-500:]}")
    return found


def refuse(text: str) -> None:
    """Raises:
    NotPermitted: the text says that counters cannot be read.
    """
    if "ERR_NVGPUCTRPERM" in text:
        raise NotPermitted("the driver lets only administrators read counters (ERR_NVGPUCTRPERM)")
    problem = re.search(r"==ERROR== (.*(?:profiler|not supported|[Dd]river|another tool).*)", text)
    if problem:
        raise NotPermitted(f"ncu: {problem[1].strip()}")


def parse(text: str) -> list[Measured]:
    """Kernels in the order in which they ran.

    Raises:
        NotPermitted: ncu says that counters cannot be read.
    """
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if head is None:
        refuse(text)
        return []
    kernels: dict[tuple[str, str], Measured] = {}
    for row in csv.DictReader(line for line in lines[head:] if line.startswith('"')):
        grid, block = (re.sub(r"[() ]", "", row[key]).replace(",", "×") for key in ("Grid Size", "Block Size"))
        kernel = kernels.setdefault((row["Process ID"], row["ID"]), Measured(short(row["Kernel Name"]), grid, block))
        try:
            value = float(row["Metric Value"].replace(",", ""))
        except ValueError:  # "n/a": this GPU does not have it
            continue
        kernel.metrics[row["Metric Name"]] = value * UNITS.get(row["Metric Unit"], 1.0)
    return [kernel for kernel in kernels.values() if SECONDS in kernel.metrics]
