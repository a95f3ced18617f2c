"""Every choice of a small space, each fine-tuned with the whole budget: the truth that a search is measured by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jointnas.baselines.context import Context, Picked, given
from jointnas_kernels.space import Choice, SearchSpace, kept_blocks


def count(space: SearchSpace) -> int:
    """How many different models a space has: bits of removed blocks do not make another one."""
    return sum(_models(space, structure) for structure in space.structures())


def numbered(space: SearchSpace, block_rank: Sequence[int], number: int) -> Choice:
    """The model of this number, below `count`; removed blocks have the highest precision."""
    for structure in space.structures():
        if number < _models(space, structure):
            break
        number -= _models(space, structure)
    number, head = divmod(number, len(space.sizes("head_bits")) or 1)
    full, kept = space.full(), kept_blocks(block_rank, structure.blocks)
    bits: dict[str, Any] = {}
    for key in ("weight_bits", "act_bits"):
        sizes = space.sizes(key)
        if not sizes:
            continue
        values = list(getattr(full, key))
        for block in kept:
            number, place = divmod(number, len(sizes))
            values[block] = sizes[place]
        bits[key] = tuple(values)
    return replace(structure, **bits, head_bits=space.head_bits[head] if space.head_bits else None)


def exhaustive(context: Context) -> Picked:
    """The model of the unit's number, where the device can run it."""
    run = context.run()
    return given(run, numbered(run.space, run.supernet.block_rank, context.number))


def _models(space: SearchSpace, structure: Choice) -> int:
    per_block = (len(space.sizes("weight_bits")) or 1) * (len(space.sizes("act_bits")) or 1)
    return per_block**structure.blocks * (len(space.sizes("head_bits")) or 1)
