"""What the rows of a campaign say: fronts, hypervolumes, quality at fixed latency, speed-up at fixed quality.

A method's models are those of all its precisions and targets; per seed they have one front. A method of several
precisions is there once more per precision, as pipelines: each of these has had the budget that the reference has had,
the method several times as much. Between the points of a front quality is read off by straight lines. Intervals are
bootstrapped over seeds, and there are none of a single seed; differences and ratios are taken between models of the
same seed.

Over the targets: a front of the best quality within each target, at the target: a point per target at most. Among
all models a method of several precisions has more, and steps between more points enclose more area.

Fixed latencies are those of the reference's models for the targets, of the slowest seed: when measured, a model may be
a little slower than its target.

Quality is what is to be small: cross-entropy in nats per token, or the error, 1 - mean accuracy of the tasks. A model
whose quality is not finite is on no front.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jointnas.campaign.plan import ORIGINAL
from jointnas.results import hypervolume, pareto

RESAMPLES = 10_000
Row = Mapping[str, Any]
Point = tuple[float, float]  # ms, quality
Cloud = list[tuple[Row, Point]]
Fronts = dict[int, list[Point]]  # by seed


def latency_of(rows: Sequence[Row]) -> str:
    """The column that all models have: measured_ms, or else predicted_ms."""
    return "measured_ms" if all(row.get("measured_ms") is not None for row in rows) else "predicted_ms"


def error(row: Row) -> float | None:
    """1 - mean accuracy over the tasks of a row; None without tasks."""
    found = [task["acc"] for task in row["tasks"].values()]
    return 1 - statistics.mean(found) if found else None


KINDS: dict[str, Callable[[Row], float | None]] = {"cross_entropy": lambda row: row["ce"], "error": error}


def summary(rows: Sequence[Row], targets: Sequence[float], reference: str, confidence: float) -> dict[str, Any]:
    """Everything, by quality and method; `reference`: the method that all others are compared with."""
    done = [row for row in rows if row["status"] == "done"]
    column = latency_of(done)
    places = [
        max([row[column] for row in done if row["method"] == reference and row["target_ms"] == ms], default=ms)
        for ms in targets
    ]
    found: dict[str, Any] = {
        "reference": reference, "latency": column, "targets_ms": list(targets), "fixed_ms": places,
        "confidence": confidence,
        "models": len(done), "infeasible": sum(row["status"] == "infeasible" for row in rows),
    }  # fmt: skip
    for kind, quality in KINDS.items():
        values = [(row, quality(row)) for row in done]
        points = [(row, (float(row[column]), value)) for row, value in values if value is not None]
        points = [(row, point) for row, point in points if math.isfinite(point[1])]
        if points:
            found[kind] = _of_quality(points, _names(done), found)
    return found


def comparison(found: Mapping[str, Any], kind: str) -> tuple[list[str], list[list[str]]]:
    """(header, cells) of a summary's quality, a line per method and pipeline."""
    own = found["reference"]
    header = ["method", "hypervolume over the targets", f"{own} - it", "of all models", f"{own} - it"]
    header += [part for ms in found["fixed_ms"] for part in (f"{kind} at {ms:.4g} ms", f"{own} faster by")]
    cells = []
    for name, of in found[kind]["methods"].items():
        volumes = (of["over_targets"], of["of_all"])
        cells.append([name, *(shown(part[k]) for part in volumes for k in ("hypervolume", "reference_minus_it"))])
        for quality, speed in zip(of["at_latency"], of["at_quality"], strict=True):
            cells[-1] += [shown(quality["quality"]), shown(speed["speed_up"])]
    return header, cells


def shown(of: Mapping[str, Any]) -> str:
    """A mean and its interval."""
    if of["mean"] is None:
        return "–"
    return f"{of['mean']:.3f}" + ("" if of["low"] is None else f" [{of['low']:.3f}, {of['high']:.3f}]")


def _names(done: Sequence[Row]) -> dict[str, list[str]]:
    """What models of a pipeline count for, by pipeline: the method and, where that has several, the pipeline too. In
    the order of the rows, a method before its pipelines."""
    of: dict[str, dict[str, None]] = defaultdict(dict)
    for row in done:
        if row["method"] != ORIGINAL:
            of[row["method"]][row["pipeline"]] = None
    return {name: [method, name] if len(own) > 1 else [method] for method, own in of.items() for name in own}


def _of_quality(
    points: Sequence[tuple[Row, Point]], names: Mapping[str, Sequence[str]], facts: Mapping[str, Any]
) -> dict[str, Any]:
    places = [point for _, point in points]
    corner = tuple(max(p[i] for p in places) * 1.01 for i in (0, 1))
    best = tuple(min(p[i] for p in places) for i in (0, 1))
    clouds = _clouds(points, names)
    fronts = _fronts(clouds)
    own = fronts.get(facts["reference"], {})
    levels = [statistics.mean(known) if (known := _known(at(front, ms) for front in own.values())) else None
              for ms in facts["fixed_ms"]]  # fmt: skip
    confidence, methods = facts["confidence"], {}
    grid = _within(clouds, facts["targets_ms"])
    near = (min(facts["targets_ms"], default=0.0), best[1])
    far = (1.01 * max(facts["targets_ms"], default=0.0), corner[1])
    for name, front in fronts.items():
        both = sorted(own.keys() & front.keys())
        methods[name] = {
            "method": clouds[name][0][0]["method"],
            "over_targets": _volumes(grid.get(facts["reference"], {}), grid.get(name, {}), near, far, confidence),
            "of_all": _volumes(own, front, (best[0], best[1]), (corner[0], corner[1]), confidence),
            "at_latency": [_at_latency(own, front, both, ms, confidence) for ms in facts["fixed_ms"]],
            "at_quality": [_at_quality(own, front, both, level, confidence) for level in levels],
            "front": [row["unit"] for row, point in clouds[name] if point in front[row["seed"]]],
        }
    return {"corner": corner, "methods": methods}


def _volumes(own: Fronts, front: Fronts, near: Point, far: Point, confidence: float) -> dict[str, Any]:
    """Hypervolumes of fronts below `far`, as shares of the area between `near` and it, and how much larger the
    reference's are, of the same seeds."""
    area = math.prod(f - n for n, f in zip(near, far, strict=True))
    of_seeds = ({seed: hypervolume(p, far) / area for seed, p in of.items() if area > 0} for of in (front, own))
    volumes, others = of_seeds
    both = sorted(volumes.keys() & others.keys())
    return {
        "hypervolume": interval(list(volumes.values()), confidence),
        "reference_minus_it": interval([others[seed] - volumes[seed] for seed in both], confidence),
    }


def _clouds(points: Sequence[tuple[Row, Point]], names: Mapping[str, Sequence[str]]) -> dict[str, Cloud]:
    """The models of every name, in the names' order."""
    found: dict[str, Cloud] = {name: [] for both in names.values() for name in both}
    for row, point in points:
        for name in names.get(row["pipeline"], ()):
            found[name].append((row, point))
    return {name: cloud for name, cloud in found.items() if cloud}


def _within(clouds: Mapping[str, Cloud], targets: Sequence[float]) -> dict[str, Fronts]:
    """Of every name and seed the best quality of its models that are predicted to take no longer than each target."""
    found: dict[str, Fronts] = defaultdict(dict)
    for name, cloud in clouds.items():
        for ms in targets:
            best: dict[int, float] = {}
            for row, (_, quality) in cloud:
                if row["predicted_ms"] <= ms:
                    best[row["seed"]] = min(quality, best.get(row["seed"], math.inf))
            for seed, quality in best.items():
                found[name].setdefault(seed, []).append((ms, quality))
    return found


def _fronts(clouds: Mapping[str, Cloud]) -> dict[str, Fronts]:
    found: dict[str, Fronts] = {}
    for name, cloud in clouds.items():
        seeds: dict[int, list[Point]] = defaultdict(list)
        for row, point in cloud:
            seeds[row["seed"]].append(point)
        found[name] = {seed: [own[i] for i in pareto(own)] for seed, own in seeds.items()}
    return found


def _at_latency(own: Fronts, front: Fronts, both: Sequence[int], ms: float, confidence: float) -> dict[str, Any]:
    """Quality at a latency, and how much smaller the reference's is."""
    pairs = [(a, b) for seed in both if (a := at(own[seed], ms)) is not None and (b := at(front[seed], ms)) is not None]
    return {
        "ms": ms, "quality": interval(_known(at(of, ms) for of in front.values()), confidence),
        "it_minus_reference": interval([b - a for a, b in pairs], confidence),
    }  # fmt: skip


def _at_quality(
    own: Fronts, front: Fronts, both: Sequence[int], level: float | None, confidence: float
) -> dict[str, Any]:
    """How many times as long it takes as the reference, at a quality that the reference has at a target."""
    ratios = []
    for seed in both if level is not None else ():
        a, b = (at([(y, x) for x, y in reversed(of[seed])], level) for of in (own, front))
        if a is not None and b is not None:
            ratios.append(b / a)
    return {"quality": level, "speed_up": interval(ratios, confidence)}


def at(front: Sequence[Point], x: float | None) -> float | None:
    """y of a falling front at x, by straight lines; None left of its first point, the last y right of its last."""
    if x is None or not front or x < front[0][0]:
        return None
    return float(np.interp(x, [p[0] for p in front], [p[1] for p in front]))


def interval(values: Sequence[float], confidence: float) -> dict[str, Any]:
    """Mean of values by seed, and the bootstrapped interval of it: percentiles of the means of resampled values."""
    if not values:
        return {"mean": None, "low": None, "high": None, "seeds": 0}
    found: dict[str, Any] = {"mean": statistics.mean(values), "low": None, "high": None, "seeds": len(values)}
    if len(values) > 1:
        draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
        tail = 50 * (1 - confidence)
        low, high = np.percentile(np.asarray(values)[draws].mean(1), [tail, 100 - tail])
        found |= {"low": float(low), "high": float(high)}
    return found


def _known(values: Any) -> list[float]:
    return [value for value in values if value is not None]
