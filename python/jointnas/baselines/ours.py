"""The joint search, and the same search without bits, to be quantized afterwards."""

from __future__ import annotations

from jointnas import budget
from jointnas.baselines.context import Context, Picked
from jointnas.bilevel import optimise
from jointnas.losses import Loss, cross_entropy
from jointnas.run_folder import Run


def joint(context: Context) -> Picked:
    """Architecture and bits together, under the target."""
    return searched(context.run())


def without_bits(context: Context) -> Picked:
    """The architecture alone, under the latency that it has at the precision it gets afterwards."""
    return searched(context.run(after=context.precision))


def searched(run: Run, loss: Loss = cross_entropy) -> Picked:
    """What the bilevel search of a run ends with."""
    found = optimise(run, loss)
    about = {"converged": found.converged, "steps": found.steps, "repaired": found.repaired}
    return Picked(run, found.choice, budget.bilevel(run.config, found.steps), found.evaluated, about)
