"""Subnet selection (Sukthanker et al., "Large language model compression with neural architecture search", 2024).

Channels, heads and blocks in order of their importance. A grid of the smallest sub-network and, of each of K parameter
strata (`compare.strata`), the candidate of least loss is chosen before anything is trained; sandwich training sees the
largest, the smallest, and two of the grid. A target takes the trained one of least loss that is fast enough at the
precision it gets afterwards.
"""

from __future__ import annotations

import torch

from jointnas.baselines.context import Context, Picked
from jointnas.baselines.sandwich import GRID, sandwich, trained
from jointnas.baselines.strata import groups_of, structures
from jointnas.losses import Losses
from jointnas.objective import Infeasible
from jointnas.run_folder import write_json
from jointnas_kernels.space import Choice


def train(context: Context) -> None:
    """Chooses and trains the grid, once for all targets and precisions."""
    run = context.run(after=context.precision)
    sizes = structures(run)
    losses = Losses(run, run.folder / "losses.json", context.options.batches)
    smallest = min(sizes, key=sizes.__getitem__)
    grid = list(dict.fromkeys([smallest, *(losses.best(group) for group in groups_of(run, context.options))]))

    def draw(generator: torch.Generator) -> tuple[Choice, None]:
        return grid[int(torch.randint(len(grid), (1,), generator=generator))], None

    tokens = sandwich(run, smallest, draw)
    facts = {"grid": [choice.to_dict() for choice in grid], "tokens": tokens, "evaluated": losses.tokens}
    write_json(run.folder / GRID, facts)


def subnet_selection(context: Context) -> Picked:
    """The grid's best within the target."""
    run, facts = trained(context)
    feasible = structures(run)
    grid = [choice for entry in facts["grid"] if (choice := Choice.from_dict(entry)) in feasible]
    if not grid:
        raise Infeasible(f"none of the grid's {len(facts['grid'])} sub-networks satisfies the limits")
    losses = Losses(run, run.folder / "losses.json", context.options.batches)
    choice = run.as_deployed(losses.best(grid))
    return Picked(run, choice, facts["tokens"], facts["evaluated"] + losses.tokens, {"compared": len(grid)})
