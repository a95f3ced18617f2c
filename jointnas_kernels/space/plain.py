"""Names of the dimensions, and plain data of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

from jointnas_kernels import layout
from jointnas_kernels.errors import JointNASError, unknown

WIDTHS = layout.WIDTHS
STRUCTURE = (*WIDTHS, "blocks")
BITS = ("weight_bits", "act_bits")  # of every block
HeadBits = Literal[4, 8, 16]  # of the head's weight; 16: it is not quantized
HEAD_BITS: tuple[int, ...] = get_args(HeadBits)
DIMENSIONS = (*STRUCTURE, *BITS, "head_bits")
ATTENTION = WIDTHS[:3]  # hidden, heads, head_dim: what a model class may refuse together; it refuses others alone


class Data:
    """Dataclasses from and to plain data."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON and YAML."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def check_keys(cls, data: Mapping[str, Any], what: str, where: str, *base: str) -> None:
        """Raise unless all keys are fields, or `base`, and without that one none of the structure's is missing."""
        if not isinstance(data, Mapping):
            raise JointNASError(f"{where}: expected a {what} as a mapping of names to values, found {data!r:.80}.")
        names = [*(f.name for f in fields(cls)), *base]  # type: ignore[arg-type]
        for key in data:
            if key not in names:
                raise unknown(f"{what} key", key, names, where)
        missing = [n for n in STRUCTURE if n not in data]
        if missing and all(data.get(key) is None for key in base):
            raise JointNASError(f"{where}: missing {', '.join(missing)}.")


def named(dims: Sequence[str], sizes: Sequence[int]) -> str:
    """Sizes in words."""
    return ", ".join(f"{d} {size}" for d, size in zip(dims, sizes, strict=True))


def integer(value: Any, where: str) -> int:
    """The value, if it is one."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise JointNASError(f"{where}: expected an integer, found {value!r}.")
    return value


def sequence(value: Any, where: str) -> Sequence[Any]:
    """The value, if it is a list of something."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise JointNASError(f"{where}: expected a list of integers, found {value!r}.")
    return value


def ascending(value: Any, where: str) -> tuple[int, ...]:
    """The sizes of a dimension, if they are distinct and positive."""
    sizes = tuple(integer(v, where) for v in sequence(value, where))
    if not sizes:
        raise JointNASError(f"{where}: at least one choice is needed.")
    if min(sizes) < 1:
        raise JointNASError(f"{where}: {min(sizes)} is not positive.")
    if len(set(sizes)) < len(sizes):
        raise JointNASError(f"{where}: {list(sizes)} names a choice twice.")
    return tuple(sorted(sizes))


def read_yaml(path: str | Path, what: str) -> dict[str, Any]:
    """The mapping that a YAML file of this kind holds.

    Raises:
        JointNASError: no file, no YAML, no mapping, or a key that stands there twice (YAML takes the last).
    """
    import yaml  # here: only users of files need it

    path = Path(path).expanduser()
    if not path.is_file():
        wrong = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise JointNASError(f"{what} {str(path)!r} {wrong}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        found, nodes = yaml.safe_load(text), [yaml.compose(text, yaml.SafeLoader)]
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise JointNASError(f"{path}: not valid YAML ({' '.join(str(e).split())}).") from None
    except OSError as e:
        raise JointNASError(f"{what} {str(path)!r} cannot be read: {e.strerror}.") from None
    if not isinstance(found, dict):
        kind = "nothing" if found is None else type(found).__name__
        raise JointNASError(f"{path}: expected a mapping of names to values, found {kind}.")
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if lines.setdefault(key.value, line) != line:
                    raise JointNASError(f"{path}: {key.value} stands in line {lines[key.value]} and in line {line}.")
                nodes.append(value)
    return {str(key): value for key, value in found.items()}


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
