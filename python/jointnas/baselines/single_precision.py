"""The whole model at one precision everywhere: quantization without a search."""

from __future__ import annotations

from dataclasses import replace

from jointnas.baselines.context import Context, Picked
from jointnas.objective import Infeasible
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency.bound import Bound
from jointnas_kernels.space import Choice


def single_precisions(bound: Bound, most: int = 3) -> list[tuple[str, Choice]]:
    """("W4A8", the full architecture at it), for the first few with A >= 8 that are faster than 16 bits."""
    space, full = bound.space, bound.space.full()
    found = []
    for w in space.sizes("weight_bits"):
        for a in (bits for bits in space.sizes("act_bits") if bits >= 8):
            choice = replace(full, weight_bits=(w,) * space.depth, act_bits=(a,) * space.depth)
            try:
                fast = bound.predict(choice) < bound.original()
            except JointNASError:  # infeasible bits
                continue
            if fast:
                found.append((f"W{w}A{a}", choice))
    return found[:most]


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
