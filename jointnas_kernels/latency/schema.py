"""The table file: JSON lines, one measurement per line, so that a killed profile loses at most its last line.

    {"kind": "header", "format": "jointnas-latency", "version": 1, "device": {...}, "workload": {...}, ...}
    {"kind": "row", "op": "linear", "m": 128, "n": 256, "k": 256, "wbits": 4, "abits": 16, "group": 128,
     "backend": "torch-int4", "backend_version": "2.13.0", "status": "ok", "median": 0.031, "p10": ..., "p90": ...}
    {"kind": "calibration", "fixed": 0.05, "per_block": 0.11, ...}             optional
    {"kind": "end", "rows": 412, "sha256": "..."}                              absent while a profile is running

A row with "contended": true was measured while the machine was busy; one with "again": true takes an earlier row's
place (only in a file that is being written: a finished one has every row once). status `infeasible` (no backend can
run it, with the reason) and `rejected` (a backend failed, disagreed with the reference, or was too slow to measure its
energy or memory) rows carry no numbers; they keep a resumed profile from trying again, except what has become feasible.
Values are in the header's unit; energy or memory tables are the same file with another metric.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, TypeAdapter, ValidationError, model_validator

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency.spec import ModelDims, OpSpec, Workload

Metric = Literal["latency", "energy", "memory"]
INTERPOLATED = "interpolated"  # backend of rows that were not measured (`interpolation.py`)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Device(_Record):
    """Identity of the device; tables of different identities are never mixed."""

    type: Literal["cpu", "cuda"]
    name: str
    arch: str = Field(description="instruction set (CPU) or compute capability (GPU)")
    threads: int = Field(ge=0, description="CPU threads pinned while timing; 0 on a GPU")

    def __str__(self) -> str:
        return f"{self.type} {self.name!r} {self.arch}" + (f", {self.threads} thread(s)" if self.threads else "")


class Header(_Record):
    """What was measured, of which model, on which device and when."""

    kind: Literal["header"] = "header"
    format: Literal["jointnas-latency"] = "jointnas-latency"
    version: Literal[1] = 1
    metric: Metric = "latency"
    unit: str = "ms"
    device: Device
    workload: Workload
    model: ModelDims
    torch: str
    created: str
    reference: list[Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="ms of the reference kernels (`watch.py`) on the quiet machine"
    )
    load: float | None = Field(default=None, ge=0, description="load average when the profile began")
    runtime: Literal["torch", "step", "graph", "transformers"] | None = Field(
        default=None,
        description="what runs whole models: the step of a CPU, or of a GPU (graph); otherwise torch on a CPU, "
        "transformers on a GPU. That was said of a CPU, too, before prompts had a step, and torch of a GPU",
    )

    @model_validator(mode="after")
    def _model(self) -> Header:
        if min(self.model.layers, self.model.kv_heads, self.model.vocab) < 1:
            raise ValueError(f"sizes of the model must be positive, got {self.model}")
        return self

    def __str__(self) -> str:
        work = self.workload
        return f"{self.device}; {work.mode} {work.batch}×{work.seq} {work.dtype}"

    @property
    def stepped(self) -> bool:
        """Whether whole models run through the step of their device (jointnas_kernels/runtime)."""
        return self.runtime in ("step", "graph")

    @property
    def outdated(self) -> str:
        """Why models no longer run as they did when it was measured; empty if they do."""
        if self.device.type == "cuda":
            known = self.runtime in ("graph", "transformers")
            return "" if known else "was measured before models ran through the step on a GPU"
        since = ("transformers", "torch", "step") if self.workload.mode == "decode" else ("torch", "step")
        if self.workload.dtype == "float16" or self.runtime in since:
            return ""
        return "was measured before models ran through the step on a CPU"

    def differs_from(self, other: Header) -> str:
        """Which part of what identifies a table differs, with both values; empty if none does."""
        for name in ("metric", "device", "workload", "model", "runtime"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs and (name != "runtime" or self.stepped or other.stepped):
                return f"{name} ({mine!s}, not {theirs!s})"
        return ""


class Row(_Record):
    """One operation on one backend."""

    kind: Literal["row"] = "row"
    op: Literal["linear", "lm_head", "embedding", "norm", "add", "rope", "attention", "swiglu"]
    m: int = Field(ge=1)
    n: int = Field(ge=1)
    k: int = Field(ge=0)
    wbits: int = Field(ge=1, le=16)
    abits: int = Field(ge=1, le=16)
    group: int = Field(ge=0)
    backend: str = Field(min_length=1)
    backend_version: str = ""
    status: Literal["ok", "infeasible", "rejected"] = "ok"
    median: float | None = None
    p10: float | None = None
    p90: float | None = None
    samples: int = Field(default=0, ge=0)
    reason: str = ""
    contended: bool | None = Field(default=None, description="true: the machine was busy with something else")
    again: bool | None = Field(default=None, description="true: stands in for an earlier row of the same key")

    @model_validator(mode="after")
    def _numbers(self) -> Row:
        values = [v for v in (self.p10, self.median, self.p90) if v is not None]
        if self.status != "ok":
            if values:
                raise ValueError(f"a row with status {self.status!r} must not carry numbers")
            return self
        if len(values) < 3:
            raise ValueError("median, p10 and p90 are required when status is 'ok'")
        for name, v in zip(("p10", "median", "p90"), values, strict=True):
            if v <= 0:
                raise ValueError(f"{name} must be a positive finite number, got {v}")
        if values != sorted(values):
            raise ValueError(f"p10 <= median <= p90 does not hold: {values}")
        return self

    @property
    def spec(self) -> OpSpec:
        """What was measured."""
        return OpSpec(self.op, self.m, self.n, self.k, self.wbits, self.abits, self.group)

    @property
    def value(self) -> float | None:
        """What counts (`watch.Measured.value`); None unless `status` is "ok"."""
        return self.p10

    @property
    def bits(self) -> str:
        """Such as W4A16."""
        return f"W{self.wbits}A{self.abits}"


class Calibration(_Record):
    """measured ≈ fixed + per_block · blocks + Σ ops, fitted over whole models; `points`: (Σ ops, blocks, measured)."""

    kind: Literal["calibration"] = "calibration"
    fixed: float
    per_block: float
    mape_before: float = Field(ge=0)
    mape: float = Field(ge=0)
    points: list[Annotated[tuple[float, int, float], Strict(False)]] = Field(min_length=1)  # JSON has lists only
    contended: bool | None = Field(default=None, description="true: some of the models were measured on a busy machine")


class End(_Record):
    """The last line: how many rows there are, and the checksum of everything before it."""

    kind: Literal["end"] = "end"
    rows: int = Field(ge=0)
    sha256: str | None = None


Record = Header | Row | Calibration | End
_LINE: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])


def _dump(record: Record) -> bytes:
    return record.model_dump_json(exclude_none=True).encode() + b"\n"


def _parse(line: bytes, where: str) -> Record:
    try:
        return _LINE.validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    place, message = [str(part) for part in first["loc"]], first["msg"].removeprefix("Value error, ")
    if not place and first["type"] == "json_invalid":
        message = f"not valid JSON ({message.removeprefix('Invalid JSON: ')})"
    elif not place:
        got = first.get("ctx", {}).get("tag")
        message = f"'kind' must be one of header, row, calibration, end, got {got!r}"
    elif place == ["header", "format"]:
        message = f"format must be 'jointnas-latency', got {first['input']!r}"
    elif place == ["header", "version"]:
        message = f"version {first['input']!r} is not supported, this package reads 1"
    else:
        message = f"{place[0]} {'.'.join(place[1:])}{': ' if place[1:] else ''}{message}"
    raise JointNASError(f"latency table {where}: {message}")


@dataclass
class Contents:
    """A parsed file."""

    header: Header
    rows: list[Row] = field(default_factory=list)
    calibration: Calibration | None = None
    complete: bool = False
    replaced: int = 0  # rows of a busy machine that later ones stand in for
    valid_bytes: int = 0  # where a recovered file may be continued


def read(path: str | Path, recover: bool = False) -> Contents:
    """Parses and validates a table file; an error, with file and line, on the first thing that is wrong.

    With `recover`, for resuming and looking, a missing end line and a cut last line are accepted; nothing else is,
    because then the file is not the prefix of one that was being written."""
    path = Path(path)
    if not path.is_file():
        raise JointNASError(f"latency table {path} does not exist; make one with `jointnas profile --out {path}`")
    blob = path.read_bytes()
    contents: Contents | None = None
    seen: dict[tuple[OpSpec, str], int] = {}
    offset = 0
    lines = blob.split(b"\n")
    cut = lines.pop()  # what follows the last newline: empty in a whole file
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}"
        record = _parse(line, where)
        problem = ""
        if contents is None:
            if not isinstance(record, Header):
                raise JointNASError(f"latency table {where}: the first line must be the header, got {record.kind!r}")
            contents = Contents(record)
        elif contents.complete:
            problem = "text after the end line"
        elif isinstance(record, Row):
            earlier = seen.get((record.spec, record.backend))
            if earlier is None:
                seen[record.spec, record.backend] = len(contents.rows)
                contents.rows.append(record)
            elif record.again:
                contents.rows[earlier] = record
                contents.replaced += 1
            else:
                problem = f"second row for {record.spec} on {record.backend}"
        elif isinstance(record, Calibration):
            contents.calibration = record
        elif isinstance(record, End):
            count = len(contents.rows) + contents.replaced
            if record.rows != count:
                problem = f"the end line counts {record.rows} rows, the file has {count}"
            elif record.sha256 is not None and record.sha256 != hashlib.sha256(blob[:offset]).hexdigest():
                problem = "the checksum does not match, the file was changed after it was written"
            contents.complete = True
        else:
            problem = "second header"
        if problem:
            raise JointNASError(f"latency table {where}: {problem}")
        offset += len(line) + 1
        if not contents.complete:
            contents.valid_bytes = offset
    if contents is None:
        raise JointNASError(f"latency table {path} is {'truncated inside its header' if cut else 'empty'}")
    if not contents.complete:
        contents.calibration = None  # rows were written after it
    if not recover and (cut or not contents.complete):
        raise JointNASError(
            f"latency table {path} is truncated ({len(contents.rows)} whole rows, no end line); "
            "finish it with `jointnas profile --resume`"
        )
    return contents


class Writer:
    """Appends records; every line is on disk when `write` returns."""

    def __init__(self, path: Path, header: Header, contents: Contents | None = None) -> None:
        """Starts a file, or continues the one `contents` was recovered from (its cut last line is dropped)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "wb" if contents is None else "r+b")  # noqa: SIM115
        if contents is None:
            self.write(header)
        else:
            self._file.truncate(contents.valid_bytes)
            self._file.seek(contents.valid_bytes)

    def write(self, record: Record) -> None:
        """Appends a line."""
        self._file.write(_dump(record))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file, unfinished."""
        self._file.close()


def save(path: str | Path, header: Header, rows: list[Row], calibration: Calibration | None) -> None:
    """Writes a whole table atomically."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    records: list[Record] = [header, *rows, *([calibration] if calibration is not None else [])]
    body = b"".join(_dump(record) for record in records)
    with open(temporary, "wb") as f:
        f.write(body + _dump(End(rows=len(rows), sha256=hashlib.sha256(body).hexdigest())))
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
