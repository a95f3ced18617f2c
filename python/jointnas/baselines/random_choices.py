"""Random choices that cost what the found one costs, or as much as a target allows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jointnas.baselines.context import Context, Picked
from jointnas.objective import Feasibility, Infeasible, Limits
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency.bound import Bound
from jointnas_kernels.nn.choices import seeded
from jointnas_kernels.space import Choice, count_params, kept_blocks

RANDOM = 7  # lane of random numbers
SHARE = 0.9  # of the target that a random choice uses at least
TRIES = 200_000


def random_choices(
    found: Choice, bound: Bound, model_config: Any, count: int, seed: int = 0, width: float = 0.1, tries: int = TRIES
) -> list[Choice]:
    """Random choices with the latency and parameters of `found`, each within ± `width` of it, all different.

    Choices are drawn uniformly from the space and kept if they fit. Bits of blocks that a choice removes do not make it
    another one."""
    generator = seeded(seed, RANDOM)
    params, latency = count_params(model_config, found), bound.predict(found)
    kept: dict[Choice, None] = {}
    own = canonical(found, bound)
    for _ in range(tries):
        choice = canonical(bound.space.sample(generator), bound)
        if choice == own or choice in kept or abs(count_params(model_config, choice) / params - 1) > width:
            continue
        try:
            if abs(bound.predict(choice) / latency - 1) > width:
                continue
        except JointNASError:  # infeasible bits
            continue
        kept[choice] = None
        if len(kept) == count:
            return list(kept)
    raise JointNASError(
        f"only {len(kept)} of {count} random choices have the parameters and latency of the found model within "
        f"{width:.0%}; widen the band or the space"
    )


def canonical(choice: Choice, bound: Bound) -> Choice:
    """The same model with the highest precision written for removed blocks."""
    kept = set(kept_blocks(bound.rank, choice.blocks))

    def highest(bits: tuple[int, ...] | None, sizes: tuple[int, ...]) -> tuple[int, ...] | None:
        return None if bits is None else tuple(b if i in kept else sizes[-1] for i, b in enumerate(bits))

    return replace(
        choice,
        weight_bits=highest(choice.weight_bits, bound.space.sizes("weight_bits")),
        act_bits=highest(choice.act_bits, bound.space.sizes("act_bits")),
    )


def random(context: Context) -> Picked:
    """A random choice, the unit's number its seed, that uses nearly all of the target."""
    run = context.run()
    limits, generator = Limits.of(run.config, run.model_config), seeded(run.config.seed, RANDOM, context.number)
    check = Feasibility(run.model_config, run.bound, limits)
    for _ in range(TRIES):
        choice = canonical(run.space.sample(generator), run.bound)
        if not check.violations(choice) and run.bound.predict(choice) >= SHARE * limits.latency_max:
            return Picked(run, choice)
    raise Infeasible(f"none of {TRIES:,} random choices takes {SHARE:.0%} to 100 % of {limits.latency_max:g} ms")
