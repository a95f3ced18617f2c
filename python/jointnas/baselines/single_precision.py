"""The whole model at one precision everywhere: quantization without a search."""

from __future__ import annotations

from jointnas.baselines.context import Context, Picked, given


def uniform(context: Context) -> Picked:
    """The original architecture at the precision."""
    run, precision = context.run(), context.precision
    assert precision is not None
    return given(run, precision.on(run.space.full(), run.space.depth))
