"""What a profiler's trace says of one step: every launch in order, what it waited for, and the least it could take.

Read from the Chrome trace of torch.profiler, the only form that has grids and blocks. Without a GPU operators that no
other one calls stand in for launches.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

STEP = "the measured step"
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
SIZES = {
    "float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "int": 4, "long int": 8, "long": 8, "short": 2,
    "signed char": 1, "unsigned char": 1, "bool": 1,
}  # fmt: skip
# operators whose result has the shape to which their inputs are broadcast
ELEMENTWISE = {
    f"aten::{name}" for name in ("add", "sub", "mul", "div", "neg", "silu", "exp", "sqrt", "rsqrt", "pow", "cos", "sin")
}
Event = dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """Times in seconds; ``gap`` is how long the device did nothing before it."""

    name: str
    op: str  # operator that launched it
    grid: tuple[int, ...]
    block: tuple[int, ...]
    start: float  # since the first launch
    seconds: float
    gap: float
    late: bool  # the host asked for it after the device had run dry
    flops: float = 0.0
    bytes: float = 0.0  # that it must read and write

    def floor(self, rates: Mapping[str, float]) -> float:
        """Seconds that its operations and bytes take at these rates (FLOP/s, B/s); 0 if they are not known."""
        if not rates:
            return 0.0
        return max(self.flops / rates["flops"], self.bytes / rates["bytes"])


@dataclass(frozen=True)
class Kernel:
    """All launches of one name in a step."""

    name: str
    launches: int
    seconds: float
    floor: float  # seconds; 0 unless it is known of every launch

    @staticmethod
    def of(name: str, own: Sequence[Launch], rates: Mapping[str, float]) -> Kernel:
        floors = [launch.floor(rates) for launch in own]
        return Kernel(name, len(own), sum(x.seconds for x in own), sum(floors) if all(floors) else 0.0)


def profiled(step: Callable[[], Any], device: str) -> list[Event]:
    """Trace events of a step, after one whose events are not looked at: a profiler's first launches take longer."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []

    def whole() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    with torch.profiler.profile(activities=kinds, record_shapes=True) as prof:
        whole()
        with torch.profiler.record_function(STEP):
            whole()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(file))
        return list(json.loads(file.read_text())["traceEvents"])


def launches(events: Iterable[Event]) -> list[Launch]:
    """Those of the measured step, in the order in which they ran."""
    whole = [e for e in events if e.get("ph") == "X" and "dur" in e]
    begin = min(e["ts"] for e in whole if e["name"] == STEP and e["cat"] == "user_annotation")
    own = [e for e in whole if e["ts"] >= begin]
    ops = {e["args"]["External id"]: e for e in own if e["cat"] == "cpu_op" and "External id" in e.get("args", {})}
    calls = {e["args"]["correlation"]: e["ts"] for e in own if e["cat"] in CALLS and "correlation" in e.get("args", {})}
    found = sorted((e for e in own if e["cat"] in DEVICE), key=lambda e: e["ts"])
    found = found or outermost([e for e in own if e["cat"] == "cpu_op"])
    longest: dict[int, float] = defaultdict(
        float
    )  # of the launches of an operator, which is the one that does the work
    for e in found:
        longest[operator(e)] = max(longest[operator(e)], e["dur"])
    result, dry = [], found[0]["ts"] if found else 0.0
    for e in found:
        args, op = e.get("args", {}), ops.get(operator(e), {})
        flops, nbytes = work(op) if e["dur"] == longest[operator(e)] else (0.0, 0.0)
        name = short(e["name"]) if e["cat"] == "kernel" else e["name"]
        times = ((e["ts"] - found[0]["ts"]) / 1e6, e["dur"] / 1e6, max(0.0, e["ts"] - dry) / 1e6)
        late = calls.get(args.get("correlation"), -math.inf) > dry
        grid, block = tuple(args.get("grid", ())), tuple(args.get("block", ()))
        nbytes = float(args.get("bytes", nbytes))  # of copies
        result.append(Launch(name, op.get("name", ""), grid, block, *times, late, flops, nbytes))
        dry = max(dry, e["ts"] + e["dur"])
    return result


def operator(event: Event) -> int:
    return int(event.get("args", {}).get("External id", -1))


def outermost(ops: Sequence[Event]) -> list[Event]:
    """Operators that no other one calls, in order; nodes of autograd call operators, and are none."""
    found: list[Event] = []
    end: dict[int, float] = defaultdict(float)  # of the last one, by thread
    for op in sorted(ops, key=lambda e: (e["ts"], -e["dur"])):
        if "::" in op["name"] and "autograd::" not in op["name"] and op["ts"] >= end[op["tid"]]:
            end[op["tid"]] = op["ts"] + op["dur"]
            found.append(op)
    return found


def work(op: Event) -> tuple[float, float]:
    """(floating-point operations, bytes read and written at least) of an operator, where its shapes say it, or 0."""
    args = op.get("args", {})
    given = list(zip(args.get("Input Dims", ()), args.get("Input type", ()), strict=False))
    tensors = [(dims, SIZES[kind]) for dims, kind in given if kind in SIZES and all(isinstance(d, int) for d in dims)]
    product = {"aten::mm": 2, "aten::bmm": 3, "aten::addmm": 2}.get(op.get("name", ""))
    if product is not None and len(tensors) >= 2:
        (left, size), (right, _) = [t for t in tensors if len(t[0]) == product][-2:]
        batch, (m, k), n = math.prod(left[:-2]), left[-2:], right[-1]
        read = sum(math.prod(dims) * size for dims, size in tensors)
        return 2.0 * batch * m * n * k, float(read + batch * m * n * size)
    if op.get("name") in ELEMENTWISE and tensors:
        shape = torch.broadcast_shapes(*(dims for dims, _ in tensors))
        read = sum(math.prod(dims) * size for dims, size in tensors if dims)
        return 0.0, float(read + math.prod(shape) * max(size for dims, size in tensors if len(dims) == len(shape)))
    if op.get("name") == "aten::copy_" and len(tensors) == 2:
        return 0.0, float(sum(math.prod(dims) * size for dims, size in tensors))
    return 0.0, 0.0


def short(name: str, most: int = 72) -> str:
    """A kernel's name without return type, namespaces and parameters."""
    name = re.sub(r"^void |\(anonymous namespace\)::|\b\w+::", "", name).replace("|", "¦")
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    return name if len(name) <= most else name[: most - 1] + "…"


# --- summaries --------------------------------------------------------------------------------------------------------


def by_kernel(found: Sequence[Launch], rates: Mapping[str, float]) -> list[Kernel]:
    """What took longest first."""
    groups: dict[str, list[Launch]] = defaultdict(list)
    for launch in found:
        groups[launch.name].append(launch)
    return sorted((Kernel.of(name, own, rates) for name, own in groups.items()), key=lambda k: -k.seconds)


def span(found: Sequence[Launch]) -> float:
    """Seconds from the begin of the first launch to the end of the last one."""
    return max(x.start + x.seconds for x in found)


def busy(found: Sequence[Launch]) -> float:
    """Seconds in which at least one of them ran."""
    return span(found) - sum(x.gap for x in found)


def host_bound(found: Sequence[Launch]) -> float:
    """Seconds in which the device had nothing to do because the host had not launched anything yet."""
    return sum(x.gap for x in found if x.late)


def listing(found: Sequence[Launch], rates: Mapping[str, float]) -> str:
    """All launches in order, as text."""
    micro = lambda seconds: f"{seconds * 1e6:9.1f}"  # noqa: E731
    dims = lambda sizes: "×".join(map(str, sizes)) or "–"  # noqa: E731
    lines = [
        f"{'#':>5} {'at, µs':>9} {'gap':>9}  {'time':>9} {'floor':>9} {'grid':>14} {'block':>9}  kernel [operator]"
    ]
    for number, x in enumerate(found):
        floor = micro(x.floor(rates)) if x.floor(rates) else f"{'–':>9}"
        times = f"{micro(x.start)} {micro(x.gap)}{'*' if x.late and x.gap else ' '} {micro(x.seconds)} {floor}"
        lines.append(f"{number:5d} {times} {dims(x.grid):>14} {dims(x.block):>9}  {x.name} [{x.op}]")
    return "\n".join([*lines, "* the device waited for the host"])


def totals(kernels: Sequence[Kernel], most: int = 25) -> str:
    """Time by kernel, as text."""
    total = sum(k.seconds for k in kernels)
    lines = [f"{'launches':>8} {'time, µs':>10} {'share':>6} {'floor, µs':>10}  kernel"]
    for k in kernels[:most]:
        floor = f"{k.floor * 1e6:10.1f}" if k.floor else f"{'–':>10}"
        lines.append(f"{k.launches:8d} {k.seconds * 1e6:10.1f} {k.seconds / total:6.1%} {floor}  {k.name}")
    rest = kernels[most:]
    if rest:
        time = sum(k.seconds for k in rest)
        count = sum(k.launches for k in rest)
        lines.append(f"{count:8d} {time * 1e6:10.1f} {time / total:6.1%} {'':>10}  {len(rest)} others")
    return "\n".join(lines)
