"""Files of plans: their schema, which is checked, and where they lie.

    {"format": "jointnas-tuned", "version": 1,
     "device": {"name": "NVIDIA H200", "capability": "9.0", "multiprocessors": 132},
     "kernels": "0123456789abcdef", "made": {"package": "0.1.0", "commit": "..", "torch": "..", ..},
     "rows": [{"w_bits": 4, "a_bits": 16, .., "least": 9, "tokens": 16, "kernel": "stream", "plan": [2, 2, 3, 1], ..}]}

Read without pydantic: operators look plans up, and are used where nothing but torch is installed.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jointnas_kernels.errors import JointNASError, unknown

FORMAT, VERSION = "jointnas-tuned", 1
KERNELS = ("stream", "stripe", "tile", "wgmma", "int8", "half", "bitplane", "dense")
DTYPES = ("float16", "bfloat16")
FOLDER_VARIABLE = "JOINTNAS_TUNED"
T = TypeVar("T")


class Shape(NamedTuple):
    """A weight [outputs, inputs] and the activations it multiplies, of 16 bits in `dtype`.

    a_bits: 16 or 8, which also stands for 4 and 2: kernels see int8 levels. Of bit-planes (`planes`) 2, 4 or 8.
    """

    w_bits: int
    a_bits: int
    outputs: int
    inputs: int
    dtype: str = "bfloat16"
    planes: bool = False

    def __str__(self) -> str:
        planes = " planes" if self.planes else ""
        return f"W{self.w_bits}A{self.a_bits}{planes} {self.outputs}x{self.inputs} {self.dtype}"


@dataclass(frozen=True)
class Device:
    """What plans were measured on."""

    name: str
    capability: str
    multiprocessors: int


@dataclass(frozen=True)
class Made:
    """With what, and when; empty where it is not known."""

    package: str
    commit: str
    torch: str
    cuda: str
    driver: str
    date: str


@dataclass(frozen=True)
class Row:
    """What was found for a shape, measured at `tokens` tokens; it holds from `least` to that many.

    kernel: the fastest; None: what the kernels decide by themselves. plan: token_tiles, warp_rows, splits and cluster
    of `ops.lowbit.cuda.Plan`; None for "dense". ms, usual_ms: milliseconds of a call with it, and without.
    """

    w_bits: int
    a_bits: int
    outputs: int
    inputs: int
    dtype: str
    planes: bool
    least: int
    tokens: int
    kernel: str | None
    plan: tuple[int, ...] | None
    ms: float
    usual_ms: float

    @property
    def shape(self) -> Shape:
        """Of the product."""
        return Shape(self.w_bits, self.a_bits, self.outputs, self.inputs, self.dtype, self.planes)


@dataclass(frozen=True)
class Tuned:
    """A file."""

    device: Device
    kernels: str
    made: Made
    rows: tuple[Row, ...] = ()


def file_name(device: str) -> str:
    """Of the file of the device of this name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def user_folder() -> Path:
    """Where a user's own files are."""
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "jointnas" / "tuned"


def read(path: Path) -> Tuned | None:
    """The file; None where there is none.

    Raises:
        JointNASError: it cannot be read, or is no such file.
    """
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise JointNASError(f"tuned plans {path} cannot be read: {error}") from None
    if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
        raise JointNASError(f"{path} is no file of tuned plans of version {VERSION}")
    rows = data.get("rows")
    if not isinstance(rows, list):
        raise JointNASError(f"{path}: rows must be a list")
    content = {k: v for k, v in data.items() if k not in ("format", "version")} | {"rows": ()}
    head = _record(Tuned, content, str(path))
    found = tuple(_row(row, f"{path}: row {i}") for i, row in enumerate(rows, 1))
    device, made = _record(Device, head.device, f"{path}: device"), _record(Made, head.made, f"{path}: made")
    return Tuned(device, head.kernels, made, found)


def write(path: Path, tuned: Tuned) -> None:
    """Replaces the file as a whole: whoever reads it, or comes after a cut, has the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "version": VERSION, **asdict(tuned)}
    rows = ",\n  ".join(json.dumps(row) for row in content.pop("rows"))  # a row a line, for whoever compares two files
    text = json.dumps(content, indent=1).removesuffix("\n}") + f',\n "rows": [\n  {rows}\n ]\n}}\n'
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _natural(value: Any) -> bool:
    return type(value) is int and value > 0


CHECKS: dict[str, Callable[[Any], bool]] = {  # by annotation
    "str": lambda v: isinstance(v, str),
    "bool": lambda v: isinstance(v, bool),
    "int": _natural,
    "float": lambda v: type(v) in (int, float) and math.isfinite(v) and v > 0,
    "str | None": lambda v: v is None or v in KERNELS,
    "tuple[int, ...] | None": lambda v: v is None or (isinstance(v, list) and len(v) == 4 and all(map(_natural, v))),
}


def _record(kind: type[T], value: Any, where: str) -> T:
    """A dataclass of plain values, all there, each of its type."""
    types = {field.name: str(field.type) for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(value, Mapping):
        raise JointNASError(f"{where} must be an object, got {value!r}")
    for key in value:
        if key not in types:
            raise unknown("key", key, types, where=where)
    for name, annotation in types.items():
        if name not in value:
            raise JointNASError(f"{where}: {name} is missing")
        if annotation in CHECKS and not CHECKS[annotation](value[name]):
            raise JointNASError(f"{where}: {name} cannot be {value[name]!r}")
    return kind(**value)


def _row(value: Any, where: str) -> Row:
    row = _record(Row, value, where)
    if row.dtype not in DTYPES:
        raise unknown("dtype", row.dtype, DTYPES, where=where)
    if row.least > row.tokens:
        raise JointNASError(f"{where}: least = {row.least} is more than tokens = {row.tokens}")
    if (row.plan is not None) != (row.kernel not in (None, "dense")):
        raise JointNASError(f"{where}: kernel {row.kernel!r} cannot have plan {row.plan!r}")
    return Row(**{**vars(row), "plan": None if row.plan is None else tuple(row.plan)})
