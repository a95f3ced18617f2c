"""The precisions of a plain model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.layout import Linear
from jointnas_kernels.space import Choice, SearchSpace, kept_blocks


@dataclass(frozen=True)
class Bits:
    """The precision of every block of a plain model, in the order they run."""

    weight: tuple[int, ...]
    act: tuple[int, ...]
    group_size: int
    o_proj_group: int
    act_symmetric: bool = False

    @classmethod
    def uniform(
        cls, config: Any, weight: int, act: int = 16, group_size: int = 128, act_symmetric: bool = False
    ) -> Bits:
        """One precision for all blocks of a model with this config."""
        space = single_space(config, weight, act, group_size)
        return cls.of(space.full(), space, act_symmetric=act_symmetric)

    @classmethod
    def of(
        cls, choice: Choice, space: SearchSpace, block_rank: Sequence[int] | None = None, act_symmetric: bool = False
    ) -> Bits:
        """Those of a choice, for the plain model it was extracted to; block_rank as the supernet had it."""
        space.check(choice)
        if choice.weight_bits is None:
            raise JointNASError("initialise: the choice has no weight bits: there is no weight quantizer to initialise")
        kept = kept_blocks(block_rank or range(space.depth), choice.blocks)
        act = choice.act_bits or (16,) * space.depth
        return cls(
            tuple(choice.weight_bits[b] for b in kept), tuple(act[b] for b in kept), space.group_size,
            space.o_proj_group, act_symmetric,
        )  # fmt: skip

    def groups(self, modules: Mapping[str, Sequence[Linear]]) -> dict[str, int]:
        """Quantization group of each module of a block."""
        return {
            path: self.o_proj_group if linears[0].cut_in_heads else self.group_size
            for path, linears in modules.items()
        }


def single_space(
    config: Any, weight: int, act: int = 16, group_size: int = 128, head: int | None = None
) -> SearchSpace:
    """The space whose only choice is the model itself at one precision; raises if that precision does not fit it."""
    space = SearchSpace.single(config, (weight,), (act,), group_size, None if head is None else (head,))
    space.validate(config)
    return space
