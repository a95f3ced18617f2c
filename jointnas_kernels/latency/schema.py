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
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency.spec import OPS, OpSpec, Workload

FORMAT, VERSION = "jointnas-latency", 1
INTERPOLATED = "interpolated"  # backend of rows that were not measured (`compare.py`)


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


class WorkloadRecord(_Record):
    mode: Literal["prefill", "decode"]
    batch: int = Field(ge=1)
    seq: int = Field(ge=1)
    dtype: Literal["float32", "bfloat16", "float16"]

    def value(self) -> Workload:
        return Workload(self.mode, self.batch, self.seq, self.dtype)


class ModelRecord(_Record):
    layers: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    vocab: int = Field(ge=1)
    qk_norm: bool = False


class Header(_Record):
    kind: Literal["header"] = "header"
    format: Literal["jointnas-latency"] = "jointnas-latency"
    version: Literal[1] = 1
    metric: Literal["latency", "energy", "memory"] = "latency"
    unit: str = "ms"
    device: Device
    workload: WorkloadRecord
    model: ModelRecord
    torch: str
    created: str
    reference: list[Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="ms of the reference kernels (`watch.py`) on the quiet machine"
    )
    load: float | None = Field(default=None, ge=0, description="load average when the profile began")

    def differs_from(self, other: Header) -> str:
        """Which part of what identifies a table differs, with both values; empty if none does."""
        for name in ("metric", "device", "workload", "model"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} ({mine!s}, not {theirs!s})"
        return ""


class Row(_Record):
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
        values = (self.p10, self.median, self.p90)
        if self.status != "ok":
            if any(v is not None for v in values):
                raise ValueError(f"a row with status {self.status!r} must not carry numbers")
            return self
        if any(v is None for v in values):
            raise ValueError("median, p10 and p90 are required when status is 'ok'")
        for name, v in zip(("p10", "median", "p90"), values, strict=True):
            if v is not None and (v <= 0 or not math.isfinite(v)):
                raise ValueError(f"{name} must be a positive finite number, got {v}")
        if not values[0] <= values[1] <= values[2]:  # type: ignore[operator]
            raise ValueError(f"p10 <= median <= p90 does not hold: {values}")
        return self

    @property
    def spec(self) -> OpSpec:
        return OpSpec(self.op, self.m, self.n, self.k, self.wbits, self.abits, self.group)


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
    kind: Literal["end"] = "end"
    rows: int = Field(ge=0)
    sha256: str | None = None


assert set(OPS) == set(Row.model_fields["op"].annotation.__args__)  # type: ignore[union-attr]

_KINDS: dict[str, type[_Record]] = {"header": Header, "row": Row, "calibration": Calibration, "end": End}


def dump(record: BaseModel) -> str:
    return json.dumps(record.model_dump(exclude_none=True), separators=(",", ":"), ensure_ascii=True)


class Contents:
    """A parsed file."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.rows: list[Row] = []
        self.calibration: Calibration | None = None
        self.complete = False
        self.replaced = 0  # rows of a busy machine that later ones stand in for
        self.settled = 0  # rows before the last such replacement: whole, whatever is cut
        self.offsets: list[int] = []  # where the line of each row starts
        self.valid_bytes = 0  # where a recovered file may be continued

    def drop_tail(self, condition: Callable[[Row], bool]) -> None:
        """Forgets the last rows for which the condition holds (and what follows them)."""
        while len(self.rows) > self.settled and condition(self.rows[-1]):
            self.rows.pop()
            self.valid_bytes = self.offsets.pop()


def _record(line: bytes, where: str) -> _Record:
    try:
        data: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise JointNASError(f"latency table {where}: not valid JSON ({error})") from None
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise JointNASError(f"latency table {where}: 'kind' must be one of {', '.join(_KINDS)}, got {kind!r}")
    if kind == "header":
        if data.get("format") != FORMAT:
            raise JointNASError(f"latency table {where}: format must be {FORMAT!r}, got {data.get('format')!r}")
        if data.get("version") != VERSION:
            raise JointNASError(
                f"latency table {where}: version {data.get('version')!r} is not supported, this package reads {VERSION}"
            )
    try:
        return _KINDS[kind].model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(p) for p in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise JointNASError(f"latency table {where}: {kind} {field + ': ' if field else ''}{message}") from None


def read(path: str | Path, recover: bool = False) -> Contents:
    """Parses and validates a table file.

    recover: for resuming and looking. A missing end line and a cut last line are accepted; anything else that is wrong
    still is an error, because then the file is not the prefix of one that was being written.

    Raises:
        JointNASError: with file and line, on the first thing that is wrong.
    """
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
        record = _record(line, where)
        if contents is None:
            if not isinstance(record, Header):
                raise JointNASError(f"latency table {where}: the first line must be the header, got {record.kind!r}")  # type: ignore[attr-defined]
            contents = Contents(record)
        elif contents.complete:
            raise JointNASError(f"latency table {where}: text after the end line")
        elif isinstance(record, Row):
            earlier = seen.get((record.spec, record.backend))
            if earlier is not None and not record.again:
                raise JointNASError(f"latency table {where}: second row for {record.spec} on {record.backend}")
            if earlier is not None:
                contents.rows[earlier] = record
                contents.replaced += 1
                contents.settled = len(contents.rows)
            else:
                seen[record.spec, record.backend] = len(contents.rows)
                contents.rows.append(record)
                contents.offsets.append(offset)
        elif isinstance(record, Calibration):
            contents.calibration = record
        elif isinstance(record, End):
            count = len(contents.rows) + contents.replaced
            if record.rows != count:
                raise JointNASError(
                    f"latency table {where}: the end line counts {record.rows} rows, the file has {count}"
                )
            if record.sha256 is not None and record.sha256 != hashlib.sha256(blob[:offset]).hexdigest():
                raise JointNASError(
                    f"latency table {where}: the checksum does not match, the file was changed after it was written"
                )
            contents.complete = True
        else:
            raise JointNASError(f"latency table {where}: second header")
        offset += len(line) + 1
        if not contents.complete:
            contents.valid_bytes = offset
    if contents is None:
        raise JointNASError(f"latency table {path} is {'truncated inside its header' if cut else 'empty'}")
    if not contents.complete:
        contents.calibration = None  # rows were written after it
    if recover:
        return contents
    if cut or not contents.complete:
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
        self._rows = 0
        if contents is None:
            self._file = open(path, "w+b")  # noqa: SIM115
            self._hash = hashlib.sha256()
            self.write(header)
        else:
            self._file = open(path, "r+b")  # noqa: SIM115
            self._hash = hashlib.sha256(self._file.read(contents.valid_bytes))
            self._file.truncate(contents.valid_bytes)
            self._file.seek(contents.valid_bytes)
            self._rows = len(contents.rows) + contents.replaced

    def write(self, record: BaseModel) -> None:
        line = dump(record).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._hash.update(line)
        self._rows += isinstance(record, Row)

    def close(self) -> None:
        self._file.close()


def save(path: str | Path, header: Header, rows: list[Row], calibration: Calibration | None) -> None:
    """Writes a whole table atomically."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    records: list[BaseModel] = [header, *rows]
    if calibration is not None:
        records.append(calibration)
    body = "".join(dump(r) + "\n" for r in records).encode()
    end = dump(End(rows=len(rows), sha256=hashlib.sha256(body).hexdigest())).encode() + b"\n"
    with open(temporary, "wb") as f:
        f.write(body + end)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
