"""The whole model at one precision everywhere: quantization without a search."""

from __future__ import annotations

from jointnas.baselines.context import Context, Picked
from jointnas.objective import Infeasible
from jointnas_kernels.errors import JointNASError


def uniform(context: Context) -> Picked:
    """The original architecture at the precision."""
    run, precision = context.run(), context.precision
    assert precision is not None
    choice = precision.on(run.space.full(), run.space.depth)
    try:
        run.bound.predict(choice)
    except JointNASError as error:
        raise Infeasible(str(error)) from None
    return Picked(run, choice)
