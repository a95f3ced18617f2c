"""What comparisons of methods (`jointnas compare`) say, from their rows in results/campaigns/NAME.

A folder there has what a campaign goes on from (config.yaml, latency.jsonl, results.jsonl, variants.json), and may be
copied and continued: `jointnas compare --config COPY/config.yaml --out COPY --resume auto`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import PLOTS, table
from jointnas.campaign.page import Campaign, draw
from jointnas.campaign.plan import ORIGINAL
from jointnas.campaign.statistics import comparison
from jointnas.results import hypervolume
from jointnas.run_folder import TABLE
from jointnas_kernels.latency import LatencyTable

EXHAUSTIVE, BITS = "exhaustive", ("weight_bits", "act_bits")
SEQUENTIAL = ("no-bits", "subnet-selection", "lonas", "tanglenas")
Row = Mapping[str, Any]
Best = tuple[float, str, int]  # perplexity, pipeline, seeds


def campaigns(folder: Path) -> list[Campaign]:
    """All that are there."""
    return [Campaign.load(path.parent) for path in sorted(folder.glob("*/results.jsonl"))]


def best(of: Campaign, methods: Iterable[str], ms: float) -> Best | None:
    """The pipeline of these methods with the least geometric mean over its seeds of the perplexity of its best model
    within a latency; None: there is none."""
    found = []
    own = [row for row in of.done if row["method"] in methods and row["predicted_ms"] <= ms]
    for pipeline in dict.fromkeys(row["pipeline"] for row in own):
        by_seed: dict[int, float] = {}
        for row in own:
            if row["pipeline"] == pipeline:
                by_seed[row["seed"]] = min(row["ce"], by_seed.get(row["seed"], math.inf))
        found.append((math.exp(statistics.mean(by_seed.values())), pipeline, len(by_seed)))
    return min(found, default=None)


def at_targets(of: Campaign) -> str:
    """The reference beside the best of the sequential pipelines, and of everything else, at every target."""
    (original,) = (row for row in of.done if row["method"] == ORIGINAL)
    reference = of.found["reference"]
    others = {row["method"] for row in of.done} - {ORIGINAL, reference, *SEQUENTIAL}
    body = []
    for ms in of.found["targets_ms"]:
        ours = best(of, [reference], ms)
        if ours is None:
            continue
        cells = [f"{ms:.3f} ms ({ms / original['predicted_ms']:.0%} of 16 bit)", f"{ours[0]:.1f} ({seeds(ours[2])})"]
        for methods in (SEQUENTIAL, others):
            peer = best(of, methods, ms)
            cells.append("–" if peer is None else f"{beside(peer)}: {ours[0] / peer[0]:.2f}×")
        body.append(cells)
    return table(["at most", f"{reference}: perplexity", "best sequential pipeline", "best of the rest"], body)


def among_all(of: Campaign) -> str:
    """The reference's choices among all models of the space, where the method exhaustive trained them; or nothing. The
    last line says it in one sentence."""
    reference, models = of.found["reference"], [row for row in of.done if row["method"] == EXHAUSTIVE]
    ours = {row["target_ms"]: row for row in of.done if row["method"] == reference}
    if not models or not ours:
        return ""
    known = {_model(row, models): row["ce"] for row in models}
    body, fronts = [], list[list[tuple[float, float]]]([[], [], []])
    for ms, row in ours.items():
        within = sorted(other["ce"] for other in models if other["predicted_ms"] <= ms)
        losses = (row["ce"], known[_model(row, models)], within[0])
        for front, loss in zip(fronts, losses, strict=True):
            front.append((ms, loss))
        place = f"{within.index(losses[1]) + 1} of {len(within)}"
        body.append([f"{ms:.3f} ms", *(f"{math.exp(loss):.1f}" for loss in losses), place])
    corner = (1.01 * max(ours), of.found["cross_entropy"]["corner"][1])
    trained, chosen, all_models = (hypervolume(front, corner) for front in fronts)
    header = ["at most", f"{reference}: perplexity", "its choice, all tokens for training", "best of all", "place"]
    return (
        f"{table(header, body)}\n\nOver the targets {reference} has {trained / all_models:.3f} of the area that all "
        f"{len(models)} models have, and its choices, trained by as many tokens as these, {chosen / all_models:.3f}."
    )


def _model(row: Row, models: Sequence[Row]) -> tuple[Any, ...]:
    """What makes a row's choice another model than others: not the bits of removed blocks, which all models of its
    structure share."""
    size = {key: value for key, value in row["choice"].items() if key not in BITS}
    alike = [other["choice"] for other in models if other["choice"].items() >= size.items()]
    bits = [
        value
        for key in BITS
        for block, value in enumerate(row["choice"][key] or ())
        if len({other[key][block] for other in alike}) > 1
    ]
    return (*size.values(), *bits)


def beside(peer: Best) -> str:
    return f"{peer[1]} {peer[0]:.1f} ({seeds(peer[2])})"


def seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


def opening(of: Campaign) -> str:
    device, work = LatencyTable.load(of.folder / TABLE, device=None).header.device, of.config.latency
    (original,) = (row for row in of.done if row["method"] == ORIGINAL)
    return (
        f"{of.folder.name}, {work.workload} {work.batch} × {work.seq}, table of {device}; the original's "
        f"perplexity is {original['perplexity']:.1f} at {original['predicted_ms']:.3f} ms"
    )


def with_intervals(of: Campaign) -> str:
    return f"{at_targets(of)}\n\n{table(*comparison(of.found, 'cross_entropy'))}"


def picture(of: Campaign, folder: str) -> str:
    return f"![Latency and perplexity of the models of {of.folder.name}]({folder}/{of.folder.name}.png)"


def draw_all(folder: Path) -> None:
    """A plot of every comparison."""
    for of in campaigns(folder):
        draw(of, PLOTS / f"{of.folder.name}.png")


def pipelines(of: Campaign) -> list[str]:
    """Those that were run."""
    return list(dict.fromkeys(row["pipeline"] for row in of.done if row["method"] != ORIGINAL))


def headline(folder: Path) -> str:
    """What README shows: every comparison at its targets; not those of the search with its own variants."""
    parts = []
    for of in campaigns(folder):
        if of.config.compare.variants:
            continue
        if among := among_all(of):
            parts.append(f"**{opening(of)}**; every model of a small space was trained. {among.splitlines()[-1]}")
            continue
        parts.append(
            f"**{opening(of)}**; best model within each latency, of {', '.join(pipelines(of))}; ratio: "
            f"{of.found['reference']}'s perplexity over the peer's\n\n{at_targets(of)}\n\n{picture(of, 'docs/plots')}"
        )
    return "\n\n".join(["### Joint search against sequential pipelines, at one budget", *parts]) if parts else ""


def section(folder: Path) -> str:
    """All of them, with hypervolumes and intervals."""
    parts = []
    for of in campaigns(folder):
        column = of.found["latency"].replace("_ms", "")
        many = sum(row["method"] != ORIGINAL for row in of.done)
        parts.append(
            f"**{opening(of)}**; {many} models, {column} latency, intervals of {of.found['confidence']:.0%} over seeds"
            f"\n\n{among_all(of) or with_intervals(of)}\n\n{picture(of, 'plots')}"
        )
    return "\n\n".join(["## Comparisons of methods", *parts]) if parts else ""
