"""`profile`: time every operation of a space on this device into a table file.

Each line is on disk before the next measurement starts, so a killed profile resumes where it stopped. Every backend
that claims an operation is first checked against the dequantised reference; one that fails or disagrees gets a
`rejected` row with the reason and is not timed. An operation nobody can run gets an `infeasible` row.
"""

from __future__ import annotations

import datetime
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency import backends as registry
from jointnas_kernels.latency.backends.base import LinearWeight, Target, failure, random_input, random_weight
from jointnas_kernels.latency.schema import Header, ModelRecord, Row, WorkloadRecord, Writer, read
from jointnas_kernels.latency.spec import DENSE, ModelDims, OpSpec, Workload, enumerate_ops
from jointnas_kernels.latency.table import LatencyTable
from jointnas_kernels.latency.timing import copies, describe, measure, pinned_threads


def profile(
    space: Any,
    config: Any,
    out: str | Path,
    *,
    workload: Workload | None = None,
    device: str = "cpu",
    threads: int | None = None,
    backends: Sequence[str] | None = None,
    resume: bool = True,
    progress: bool = True,
    seconds: float = 0.04,
    seed: int = 0,
) -> LatencyTable:
    """Times all of `enumerate_ops(space, config, workload)` and returns the finished table.

    Args:
        out: the table file. An unfinished or smaller one for the same device, model and workload is continued when
            `resume` is set; anything else there is an error, never overwritten silently.
        threads: CPU threads to pin; default: what torch uses now.
        backends: names to try; default: all registered ones.
        seconds: time spent on each (operation, backend).
    """
    workload = workload or Workload()
    space.validate(config)
    names = list(registry.names() if backends is None else backends)
    for name in names:
        registry.get(name)
    out = Path(out)
    dims = ModelDims.of(config)
    header = Header(
        device=describe(device, threads),
        workload=WorkloadRecord(
            mode=workload.mode,
            batch=workload.batch,
            seq=workload.seq,
            dtype=workload.dtype,  # type: ignore[arg-type]
        ),
        model=ModelRecord(**vars(dims)),
        torch=torch.__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    specs = enumerate_ops(space, config, workload)
    writer, done = _open(out, header, resume)
    generator = torch.Generator().manual_seed(seed)
    target = Target(torch.device(device), workload, dims.kv_heads)
    model_bytes = _weight_bytes(space, dims, target)
    todo = [spec for spec in specs if spec not in done]
    pace = 0.1 if sys.stderr.isatty() else 15.0  # seconds between updates of the bar
    try:
        with pinned_threads(header.device.threads):
            for spec in tqdm(todo, desc=f"profile {device}", unit="op", disable=not progress, mininterval=pace):
                for row in time_operation(spec, target, names, model_bytes, generator, seconds):
                    writer.write(row)
        writer.finish()
    finally:
        writer.close()
    return LatencyTable.load(out, device=None)


def _open(out: Path, header: Header, resume: bool) -> tuple[Writer, set[OpSpec]]:
    """The writer and what is measured already. A spec whose rows may have been cut short is measured again."""
    if not out.exists() or out.stat().st_size == 0:
        return Writer(out, header), set()
    if not resume:
        raise JointNASError(f"{out} exists; pass resume (--resume) to continue it, or remove it first")
    contents = read(out, recover=True)
    difference = contents.header.differs_from(header)
    if difference:
        raise JointNASError(f"{out} cannot be continued: it was measured for another {difference}")
    if not contents.complete and contents.rows:  # the last spec may lack a backend: drop its rows
        last = contents.rows[-1].spec
        contents.drop_tail(lambda row: row.spec == last)
    return Writer(out, contents.header, contents), {row.spec for row in contents.rows}


def _weight_bytes(space: Any, dims: ModelDims, target: Target) -> int:
    """Weights of the largest model of the space: how much is touched between two uses of one weight."""
    h, q = max(space.hidden), max(space.heads) * max(space.head_dim)
    kv, i = dims.kv_heads * max(space.head_dim), max(space.intermediate)
    per_block = 2 * h * q + 2 * h * kv + 3 * h * i
    return (per_block * max(space.blocks) + dims.vocab * h) * target.dtype.itemsize


def time_operation(
    spec: OpSpec, target: Target, names: Sequence[str], model_bytes: int, generator: torch.Generator, seconds: float
) -> list[Row]:
    """One row per backend that claims `spec`, or one `infeasible` row."""
    linear = spec.op in ("linear", "lm_head")
    weight = random_weight(spec, target, generator) if linear else None
    # the input stays the same in all calls: a layer's input was just written by the layer before
    x = random_input(spec, target, generator) if linear else torch.empty(0)
    rows: list[Row] = []
    reasons: list[str] = []
    for name in names:
        backend = registry.get(name)
        reason = backend.unsupported(spec, target)
        if reason is not None:
            reasons.append(f"{name}: {reason}")
            continue
        if weight is not None:  # the other parts are torch's own operations, their own reference
            reason = failure(backend, spec, target, x, weight)
        identity: dict[str, Any] = {**spec._asdict(), "backend": name, "backend_version": backend.version()}
        if reason is not None:
            rows.append(Row(**identity, status="rejected", reason=reason))
            continue
        best = min((r.median for r in rows if r.median is not None), default=math.inf)
        with torch.inference_mode():
            first = backend.prepare(spec, target, weight)
            result = measure([partial(first, x)], target.device, 0.0, samples=1, hopeless_ms=10 * best)
            if result[1] <= 10 * best:  # otherwise one sample is enough, and packing all copies too expensive
                calls = [first, *(backend.prepare(spec, target, w) for w in _copies(spec, target, weight, model_bytes))]
                result = measure([partial(call, x) for call in calls], target.device, seconds)
        p10, median, p90, samples = result
        rows.append(Row(**identity, median=median, p10=p10, p90=p90, samples=samples))
    if not rows:
        rows.append(Row(**spec._asdict(), backend="none", status="infeasible", reason="; ".join(reasons)))
    return rows


def _copies(spec: OpSpec, target: Target, weight: LinearWeight | None, model_bytes: int) -> list[LinearWeight | None]:
    """The weight at all other addresses that the timing rotates through."""
    if weight is None:
        return []
    bits = spec.wbits if spec.wbits < DENSE else 8 * target.dtype.itemsize
    count = copies(spec.n * spec.k * bits // 8, model_bytes, target.device)
    clone = lambda t: None if t is None else t.clone()  # noqa: E731
    return [
        LinearWeight(clone(weight.dense), clone(weight.levels), clone(weight.scale), weight.bits, weight.group)
        for _ in range(count - 1)
    ]
