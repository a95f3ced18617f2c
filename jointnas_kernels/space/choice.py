"""One point of a search space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jointnas_kernels.space.plain import BITS, STRUCTURE, WIDTHS, Data, integer, named, sequence


@dataclass(frozen=True)
class Choice(Data):
    """One point of a space. `blocks` says how many blocks stay (by importance); bits are indexed by original block, but
    for the one number of the head."""

    hidden: int
    heads: int
    head_dim: int
    intermediate: int
    blocks: int
    weight_bits: tuple[int, ...] | None = None
    act_bits: tuple[int, ...] | None = None
    head_bits: int | None = None

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

    @property
    def quantizes_head(self) -> bool:
        """Whether the head's weight is quantized."""
        return self.head_bits is not None and self.head_bits < 16

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
        if data.get("head_bits") is not None:
            values["head_bits"] = integer(data["head_bits"], f"{where}: head_bits")
        return cls(**values)
