"""The choice that a search under a target ends with: the best feasible one, not the most probable one, and with nothing
left of the target that would lower the loss.

The likeliest choices within the target are compared by their losses on the architecture's data, without training. From
the best one on, every step up in one place that the target leaves room for is tried alone: the weight or the activation
bits of one block, the bits of the head, a width, the number of blocks. Those that lower the loss are made, the largest
fall per millisecond first, as long as there is room; or the best one alone, where that is better. So again, until
nothing helps.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from jointnas.losses import Losses
from jointnas.objective import Feasibility
from jointnas.run_folder import Run
from jointnas_kernels.space import BITS, STRUCTURE, Choice, SearchSpace, kept_blocks

log = logging.getLogger(__name__)
ROUNDS = 4
LEAST = 1e-9  # ms that a step counts as at least: one may even be faster
Step = tuple[str, int | None, int]  # dimension, block (None: no bits of one), new size


def spend(run: Run, check: Feasibility, likeliest: Sequence[Choice], losses: Losses) -> Choice:
    """The best of feasible choices, and what the target leaves spent on it."""
    first = choice = min(likeliest, key=losses.of_deployed)
    for _ in range(ROUNDS):
        better = _round(run, check, choice, losses)
        if better is None:
            break
        choice = better
    log.info(
        "the best of %d choices has loss %.4f at %.3f ms; what it leaves of the target brings it to %.4f at %.3f ms",
        len(likeliest), losses.of_deployed(first), run.bound.predict(first), losses.of_deployed(choice),
        run.bound.predict(choice),
    )  # fmt: skip
    return choice


def _round(run: Run, check: Feasibility, choice: Choice, losses: Losses) -> Choice | None:
    """A better choice by steps up, None: there is none."""
    loss, ms = losses.of_deployed(choice), run.bound.predict(choice)
    helpful: list[tuple[float, Step]] = []
    for step in steps(run.deployed, choice, run.supernet.block_rank):
        one = after(choice, step)
        if check.violations(one):
            continue
        fall = loss - losses.of_deployed(one)
        if fall > 0:
            helpful.append((fall / max(run.bound.predict(one) - ms, LEAST), step))
    if not helpful:
        return None
    together = choice
    for _, step in sorted(helpful, key=lambda entry: -entry[0]):
        more = after(together, step)
        if not check.violations(more):
            together = more
    alone = min((after(choice, step) for _, step in helpful), key=losses.of_deployed)
    return min((together, alone), key=losses.of_deployed)


def steps(space: SearchSpace, choice: Choice, block_rank: Sequence[int]) -> Iterator[Step]:
    """To the next size of every dimension, of bits for each block that is kept."""
    for key in BITS:
        bits = getattr(choice, key)
        for block in kept_blocks(block_rank, choice.blocks) if bits else ():
            yield from ((key, block, size) for size in _next(space, key, bits[block]))
    for key in ("head_bits", *STRUCTURE):
        yield from ((key, None, size) for size in _next(space, key, getattr(choice, key)))


def after(choice: Choice, step: Step) -> Choice:
    """A choice with a step made."""
    key, block, size = step
    value: object = size
    if block is not None:
        bits = getattr(choice, key)
        value = (*bits[:block], size, *bits[block + 1 :])
    return replace(choice, **{key: value})  # type: ignore[arg-type]


def _next(space: SearchSpace, key: str, size: int | None) -> tuple[int, ...]:
    larger = tuple(s for s in space.sizes(key) if size is not None and s > size)
    return larger[:1]
