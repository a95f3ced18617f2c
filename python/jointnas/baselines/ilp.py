"""Bits by integer programming on the original architecture.

    min Σ_r Σ_o s[r, o] x[r, o]    so that    Σ_r Σ_o t[r, o] x[r, o] <= T,    Σ_o x[r, o] = 1,    x in {0, 1}

A row r is a block, or the head where its bits are searched. s[r, o]: how much the loss grows where it alone has the
bits o and everything else the most that there are; t[r, o]: latency of its linears at these bits, T what the target
leaves to them. Solved exactly, by HiGHS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jointnas.baselines.context import Context, Picked
from jointnas.losses import Losses
from jointnas.objective import Infeasible, Limits
from jointnas.run_folder import Run
from jointnas_kernels.errors import JointNASError

SENSITIVITIES = "sensitivities.json"
Option = tuple[int | None, int | None]  # weight and activation bits of a block
Table = Sequence[Sequence[float]]  # a number per row and option


def measure(context: Context) -> None:
    """The losses of all options of all rows, once for all targets."""
    sensitivities(context.run(), context)


def ilp(context: Context) -> Picked:
    """The bits of least summed sensitivity within the target."""
    run = context.run()
    values, tokens = sensitivities(run, context)
    costs, fixed = latencies(run)
    chosen = solve(values, costs, Limits.of(run.config, run.model_config).latency_max - fixed)
    if chosen is None:
        raise Infeasible(f"the original architecture does not reach {run.config.target_latency_ms:g} ms at any bits")
    blocks = [options(run)[o] for o in chosen[: run.space.depth]]
    weight, act = zip(*blocks, strict=True)
    full = run.space.full()
    choice = replace(
        full, weight_bits=weight if full.weight_bits else None, act_bits=act if full.act_bits else None,
        head_bits=run.space.head_bits[chosen[-1]] if run.space.head_bits else None,
    )  # fmt: skip
    about = {"summed_sensitivity": sum(row[o] for row, o in zip(values, chosen, strict=True))}
    return Picked(run, choice, evaluated=tokens, about=about)


def options(run: Run) -> list[Option]:
    """Of every block."""
    return [(w, a) for w in run.space.weight_bits or (None,) for a in run.space.act_bits or (None,)]


def sensitivities(run: Run, context: Context) -> tuple[list[list[float]], int]:
    """s [rows][options] in nats per token, and how many tokens went through the model for it."""
    losses, full = Losses(run, context.shared / SENSITIVITIES, context.options.batches), run.space.full()

    def at(bits: tuple[int, ...] | None, block: int, value: int | None) -> tuple[int, ...] | None:
        return None if bits is None or value is None else (*bits[:block], value, *bits[block + 1 :])

    rows = [
        [
            replace(full, weight_bits=at(full.weight_bits, b, w), act_bits=at(full.act_bits, b, a))
            for w, a in options(run)
        ]
        for b in range(run.space.depth)
    ]
    if run.space.head_bits:
        rows.append([replace(full, head_bits=bits) for bits in run.space.head_bits])
    least = losses.of(full)
    return [[losses.of(choice) - least for choice in row] for row in rows], losses.tokens


def latencies(run: Run) -> tuple[list[list[float]], float]:
    """t [rows][options], infinite where the device cannot run it, and what the rest of the model takes; in ms."""
    full = run.space.full()
    fixed, linear = run.bound.structure(full)
    rows = [linear.nan_to_num(math.inf).flatten().tolist()] * run.space.depth
    if not run.space.head_bits:
        return rows, fixed
    heads = [run.bound.structure(replace(full, head_bits=bits))[0] for bits in run.space.head_bits]
    return [*rows, [math.inf if math.isnan(ms) else ms for ms in heads]], 0.0


def solve(values: Table, costs: Table, room: float) -> list[int] | None:
    """One option of every row with the least sum of values and a sum of costs of at most `room`; None: there is none.
    Options of infinite cost are left out."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError:
        raise JointNASError("the method ilp needs the `scipy` package: pip install scipy") from None
    places = [(r, o) for r, row in enumerate(costs) for o, cost in enumerate(row) if math.isfinite(cost)]
    value, cost = (np.array([table[r][o] for r, o in places]) for table in (values, costs))
    one = np.array([[float(r == row) for r, _ in places] for row in range(len(values))])
    found = milp(
        value, integrality=np.ones(len(places)), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(cost[None], -math.inf, room)],
        options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    if found.x is None:
        return None
    chosen = dict(place for place, taken in zip(places, found.x, strict=True) if taken > 0.5)
    return [chosen[r] for r in range(len(values))]
