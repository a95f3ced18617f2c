"""The choice that a search under a target ends with: within it, and nothing left of it that would lower the loss.

From the most probable choice on, as long as it takes longer than the target, every step down in one place is tried
alone: the weight or the activation bits of one block, the bits of the head, a width, the number of blocks. Of those
that are enough the one of least loss is made; where none is, those that raise the loss least per millisecond, and
again. (The most probable choice within the target can be far: where everything is decided, one block's bits are as
improbable as another architecture.)

Then every step up that the target leaves room for is tried alone. Those that lower the loss are made, the largest fall
per millisecond first, as long as there is room; or the best one alone, where that is better. Where none helps, bits
change places: one step down pays for one up elsewhere. Where that does not help either, sizes do, say a block more for
a narrower MLP. So again, until nothing helps.

Losses are those of the architecture's data, without training. They weigh low bits, which training through the
quantizers mends, too much against missing channels and blocks, which it does not. So sizes do not pay for bits here,
nor bits for sizes, other than where a step down is needed for the target.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from jointnas.losses import Losses
from jointnas.objective import Feasibility
from jointnas.run_folder import Run
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.space import BITS, STRUCTURE, Choice, SearchSpace, count_params, kept_blocks

log = logging.getLogger(__name__)
ROUNDS = 8
LEAST = 1e-9  # ms that a step up counts as at least: one may even be faster
Step = tuple[str, int | None, int]  # dimension, block (None: no bits of one), new size


def fit(run: Run, check: Feasibility, choice: Choice, losses: Losses) -> Choice | None:
    """A choice after as few steps down as bring it within the target, None: they do not, or it breaks another limit."""
    limits = check.limits
    if not limits.params_min <= count_params(run.model_config, choice) <= limits.params_max:
        return None
    while check.violations(choice):
        try:
            ms = run.bound.predict(choice)
        except JointNASError:  # infeasible bits
            return None
        loss = losses.of_deployed(choice)
        faster: list[tuple[float, Step]] = []
        enough: list[Choice] = []
        for step in steps(run.deployed, choice, run.supernet.block_rank, up=False):
            one = after(choice, step)
            try:
                saved = ms - run.bound.predict(one)
            except JointNASError:  # infeasible bits
                continue
            if saved > 0:
                faster.append(((losses.of_deployed(one) - loss) / saved, step))
                enough += [] if check.violations(one) else [one]
        if enough:
            return min(enough, key=losses.of_deployed)
        if not faster:
            return None
        for _, step in sorted(faster, key=lambda entry: entry[0]):
            more = after(choice, step)
            if not check.violations(more):
                break  # the last step is one of those that are enough
            choice = more
    return choice


def spend(run: Run, check: Feasibility, first: Choice, losses: Losses) -> Choice:
    """A feasible choice, and what the target leaves spent on it."""
    choice = first
    for _ in range(ROUNDS):
        better = next((found for way in WAYS if (found := way(run, check, choice, losses)) is not None), None)
        if better is None:
            break
        choice = better
    log.info(
        "loss %.4f at %.3f ms; what that leaves of the target brings it to %.4f at %.3f ms",
        losses.of_deployed(first), run.bound.predict(first), losses.of_deployed(choice), run.bound.predict(choice),
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


def _exchanged(run: Run, check: Feasibility, choice: Choice, losses: Losses) -> Choice | None:
    """A better choice by steps of bits down that pay for as many up, None: there is none. What steps do alone nearly
    adds up, so the pairs are made in that order, each place once; or the first alone, where that is better."""
    loss, rank = losses.of_deployed(choice), run.supernet.block_rank

    def changes(up: bool) -> list[tuple[float, Step]]:
        of_bits = [s for s in steps(run.deployed, choice, rank, up) if s[0] not in STRUCTURE]
        return [(losses.of_deployed(after(choice, s)) - loss, s) for s in of_bits if predictable(run, after(choice, s))]

    raised = [(change, step) for change, step in changes(up=True) if change < 0]
    lowered = changes(up=False) if raised else []
    pairs = sorted((up + down, low, high) for up, high in raised for down, low in lowered if low[:2] != high[:2])
    together, first, used = choice, None, set[tuple[str, int | None]]()
    for change, low, high in pairs:
        if change >= 0:
            break
        more = after(after(together, low), high)
        if used & {low[:2], high[:2]} or check.violations(more):
            continue
        together, first = more, first or more
        used |= {low[:2], high[:2]}
    best = min((together, first or choice), key=losses.of_deployed)
    return best if losses.of_deployed(best) < loss else None


def _resized(run: Run, check: Feasibility, choice: Choice, losses: Losses) -> Choice | None:
    """A better choice by one size up and another down, and what brings that within the target; None: there is none."""
    loss, rank = losses.of_deployed(choice), run.supernet.block_rank
    ups, downs = ([s for s in steps(run.deployed, choice, rank, up) if s[0] in STRUCTURE] for up in (True, False))
    pairs = [after(after(choice, low), high) for high in ups for low in downs if low[0] != high[0]]
    for one in sorted((one for one in pairs if losses.of_deployed(one) < loss), key=losses.of_deployed):
        found = fit(run, check, one, losses)
        if found is not None and losses.of_deployed(found) < loss:
            return found
    return None


WAYS = (_round, _exchanged, _resized)


def predictable(run: Run, choice: Choice) -> bool:
    """Whether the table knows all of its bits."""
    try:
        run.bound.predict(choice)
    except JointNASError:
        return False
    return True


def steps(space: SearchSpace, choice: Choice, block_rank: Sequence[int], up: bool = True) -> Iterator[Step]:
    """To the next size of every dimension, of bits for each block that is kept; or to the one before it."""
    for key in BITS:
        bits = getattr(choice, key)
        for block in kept_blocks(block_rank, choice.blocks) if bits else ():
            yield from ((key, block, size) for size in _next(space, key, bits[block], up))
    for key in ("head_bits", *STRUCTURE):
        yield from ((key, None, size) for size in _next(space, key, getattr(choice, key), up))


def after(choice: Choice, step: Step) -> Choice:
    """A choice with a step made."""
    key, block, size = step
    value: object = size
    if block is not None:
        bits = getattr(choice, key)
        value = (*bits[:block], size, *bits[block + 1 :])
    return replace(choice, **{key: value})  # type: ignore[arg-type]


def _next(space: SearchSpace, key: str, size: int | None, up: bool) -> tuple[int, ...]:
    if size is None:
        return ()
    larger, smaller = (tuple(s for s in space.sizes(key) if s > size), tuple(s for s in space.sizes(key) if s < size))
    return larger[:1] if up else smaller[-1:]
