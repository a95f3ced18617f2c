"""Structures of a space by their number of parameters.

Most structures of a space are small: of those drawn uniformly hardly any has the size that is wanted. So the range of
parameters is cut into K equal strata, and each gives as many candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from jointnas.compare_config import CompareOptions
from jointnas.objective import Infeasible, Limits
from jointnas.precision import Precision
from jointnas.run_folder import Run
from jointnas_kernels.nn.choices import seeded
from jointnas_kernels.space import Choice, structure_params

CANDIDATES = 11  # lane of random numbers


def structures(run: Run, precision: Precision | None = None) -> dict[Choice, float]:
    """Structures, without bits, that satisfy the limits of a run at a precision, and their parameters; None: at that of
    what it deploys. Without a target latency does not count.

    Raises:
        Infeasible: there are none.
    """
    space = run.deployed if precision is None else precision.of(run.space)
    limits = Limits.of(run.config, run.model_config)
    params = structure_params(run.model_config, space)
    fits = (params >= limits.params_min) & (params <= limits.params_max)
    if limits.latency_max < math.inf:
        bound = run.table.bind(space, run.supernet.block_rank)
        found = bound.structures({"blocks": torch.ones(len(space.blocks))})
        fits &= (found.latency <= limits.latency_max) & (found.infeasible <= 0)
    sizes, fit = (of[space.allowed].flatten().tolist() for of in (params, fits))
    kept = {choice: size for choice, size, ok in zip(space.structures(), sizes, fit, strict=True) if ok}
    if not kept:
        at = precision or run.after
        raise Infeasible(f"no structure of the space satisfies the limits{'' if at is None else f' at {at}'}")
    return kept


def strata(sizes: dict[Choice, float], count: int) -> list[list[Choice]]:
    """Structures in `count` equal ranges of parameters, smallest first; empty ones are left out."""
    low, high = min(sizes.values()), max(sizes.values())
    found: list[list[Choice]] = [[] for _ in range(count)]
    for choice, size in sizes.items():
        place = 0 if high == low else int((size - low) / (high - low) * count)
        found[min(place, count - 1)].append(choice)
    return [stratum for stratum in found if stratum]


def groups_of(run: Run, options: CompareOptions, precision: Precision | None = None) -> list[list[Choice]]:
    """The candidates of all strata of the structures that satisfy the limits."""
    return candidates(strata(structures(run, precision), options.strata), options.candidates, run.config.seed)


def candidates(groups: Sequence[Sequence[Choice]], count: int, seed: int) -> list[list[Choice]]:
    """At most `count` random ones of each stratum."""
    return [
        [group[i] for i in torch.randperm(len(group), generator=seeded(seed, CANDIDATES, number))[:count].tolist()]
        for number, group in enumerate(groups)
    ]
