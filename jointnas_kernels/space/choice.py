"""One point of a search space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jointnas_kernels import layout
from jointnas_kernels.errors import JointNASError, unknown

WIDTHS = layout.WIDTHS
STRUCTURE = (*WIDTHS, "blocks")
BITS = ("weight_bits", "act_bits")


class Data:
    """Dataclasses from and to plain data."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON and YAML."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def check_keys(cls, data: Mapping[str, Any], what: str, where: str, *base: str) -> None:
        """Raise unless all keys are fields, or `base`, and without that one none of the structure's is missing."""
        names = [*(f.name for f in fields(cls)), *base]  # type: ignore[arg-type]
        for key in data:
            if key not in names:
                raise unknown(f"{what} key", key, names, where)
        missing = [n for n in STRUCTURE if n not in data]
        if missing and all(data.get(key) is None for key in base):
            raise JointNASError(f"{where}: missing {', '.join(missing)}.")


@dataclass(frozen=True)
class Choice(Data):
    """One point of a space. `blocks` says how many blocks stay (by importance); bits are indexed by original block."""

    hidden: int
    heads: int
    head_dim: int
    intermediate: int
    blocks: int
    weight_bits: tuple[int, ...] | None = None
    act_bits: tuple[int, ...] | None = None

    @property
    def widths(self) -> dict[str, int]:
        """The sizes that all blocks share."""
        return {k: getattr(self, k) for k in WIDTHS}

    def named(self, dims: Sequence[str] = STRUCTURE) -> str:
        """Sizes in words."""
        return named(dims, [getattr(self, d) for d in dims])

    def bits(self, block: int) -> tuple[int | None, int]:
        """(weight bits, None: not quantized; activation bits) of an original block."""
        weight, act = self.weight_bits, self.act_bits
        return None if weight is None else weight[block], 16 if act is None else act[block]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "choice") -> Choice:
        """Inverse of `to_dict`.

        Raises:
            JointNASError: missing or unknown keys, or other values than integers.
        """
        cls.check_keys(data, "choice", where)
        values: dict[str, Any] = {n: integer(data[n], f"{where}: {n}") for n in STRUCTURE}
        for key in BITS:
            bits = data.get(key)
            if bits is not None:
                values[key] = tuple(integer(b, f"{where}: {key}") for b in sequence(bits, f"{where}: {key}"))
        return cls(**values)


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


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
