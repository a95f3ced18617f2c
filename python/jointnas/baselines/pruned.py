"""Pruning in one shot, as Minitron does (arXiv 2407.14679): channels, heads and blocks in order of the magnitude of
their activations, one size per dimension for the whole model. Of candidates of K parameter strata (`compare.strata`)
that are fast enough at the precision, the one of least loss before any training."""

from __future__ import annotations

from jointnas.baselines.context import Context, Picked
from jointnas.baselines.strata import groups_of
from jointnas.losses import Losses


def pruned(context: Context) -> Picked:
    """The best candidate at the precision, its quantizers initialised."""
    run, precision = context.run(), context.precision
    assert precision is not None
    groups = groups_of(run, context.options, precision)
    found = [precision.on(choice, run.space.depth) for group in groups for choice in group]
    losses = Losses(run, run.folder / "losses.json", context.options.batches)
    return Picked(run, losses.best(found), evaluated=losses.tokens, about={"compared": len(found)})
