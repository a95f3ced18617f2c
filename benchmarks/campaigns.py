"""What comparisons of methods (`jointnas compare`) say, from their rows in results/campaigns/NAME.

A folder there has what a campaign goes on from (config.yaml, latency.jsonl, results.jsonl, variants.json), and may be
copied and continued with `jointnas compare --out COPY --resume auto`, on another machine, too.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import PLOTS, table
from jointnas.campaign.page import Campaign, draw
from jointnas.campaign.plan import ORIGINAL, reference_of
from jointnas.campaign.statistics import comparison, latency_of, summary
from jointnas.config import CompareConfig, build
from jointnas_kernels.latency import LatencyTable
from jointnas_kernels.space import read_yaml

SEQUENTIAL = ("no-bits", "subnet-selection", "lonas", "tanglenas")
Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """One campaign."""

    name: str
    config: CompareConfig
    device: str
    rows: list[Row]

    @classmethod
    def read(cls, folder: Path) -> Rows:
        config = build(CompareConfig, read_yaml(folder / "config.yaml", "configuration file"), where=str(folder))
        device = str(LatencyTable.load(folder / "latency.jsonl").header.device)
        lines = (folder / "results.jsonl").read_text().splitlines()
        return cls(folder.name, config, device, [json.loads(line) for line in lines])

    @property
    def done(self) -> list[Row]:
        return [row for row in self.rows if row["status"] == "done"]

    @property
    def reference(self) -> str:
        return reference_of(self.config.compare.methods)

    @property
    def targets(self) -> list[float]:
        return sorted({r["target_ms"] for r in self.rows if r["target_ms"] is not None}, reverse=True)

    def best(self, methods: Iterable[str], ms: float) -> tuple[float, str, int] | None:
        """(perplexity, pipeline, seeds): of the pipeline of these methods that has the least geometric mean over its
        seeds of the perplexity of its best model within a latency; None: there is none."""
        found = []
        own = [row for row in self.done if row["method"] in methods and row["predicted_ms"] <= ms]
        for pipeline in dict.fromkeys(row["pipeline"] for row in own):
            by_seed: dict[int, float] = {}
            for row in own:
                if row["pipeline"] == pipeline:
                    by_seed[row["seed"]] = min(row["ce"], by_seed.get(row["seed"], math.inf))
            found.append((math.exp(statistics.mean(by_seed.values())), pipeline, len(by_seed)))
        return min(found, default=None)


def campaigns(folder: Path) -> list[Rows]:
    """All that are there."""
    return [Rows.read(path.parent) for path in sorted(folder.glob("*/results.jsonl"))]


def at_targets(of: Rows) -> str:
    """The reference beside the best of the sequential pipelines, and of everything else, at every target."""
    (original,) = (row for row in of.done if row["method"] == ORIGINAL)
    others = {row["method"] for row in of.done} - {ORIGINAL, of.reference, *SEQUENTIAL}
    body = []
    for ms in of.targets:
        ours = of.best([of.reference], ms)
        if ours is None:
            continue
        cells = [f"{ms:.3f} ms ({ms / original['predicted_ms']:.0%} of 16 bit)", f"{ours[0]:.1f} ({seeds(ours[2])})"]
        for methods in (SEQUENTIAL, others):
            peer = of.best(methods, ms)
            cells.append("–" if peer is None else f"{beside(peer)}: {ours[0] / peer[0]:.2f}×")
        body.append(cells)
    head = ["at most", f"{of.reference}: perplexity", "best sequential pipeline", "best of the rest"]
    return table(head, body)


def beside(peer: tuple[float, str, int]) -> str:
    return f"{peer[1]} {peer[0]:.1f} ({seeds(peer[2])})"


def seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


def opening(of: Rows) -> str:
    workload = of.config.latency
    (original,) = (row for row in of.done if row["method"] == ORIGINAL)
    return (
        f"{of.name}, {workload.workload} {workload.batch} × {workload.seq}, table of {of.device}; the original's "
        f"perplexity is {original['perplexity']:.1f} at {original['predicted_ms']:.3f} ms"
    )


def picture(of: Rows, folder: str) -> str:
    return f"![Latency and perplexity of the models of {of.name}]({folder}/{of.name}.png)"


def draw_all(folder: Path) -> None:
    """A plot of every comparison."""
    for of in campaigns(folder):
        draw(Campaign.load(folder / of.name), PLOTS / f"{of.name}.png")


def headline(folder: Path) -> str:
    """What README shows: every comparison at its targets."""
    parts = [
        f"**{opening(of)}**; best model within each latency, ratio: {of.reference}'s perplexity over the peer's\n\n"
        f"{at_targets(of)}\n\n{picture(of, 'docs/plots')}"
        for of in campaigns(folder)
    ]
    return "\n\n".join(["### Joint search against sequential pipelines, at one budget", *parts]) if parts else ""


def section(folder: Path) -> str:
    """All of them, with hypervolumes and intervals."""
    parts = []
    for of in campaigns(folder):
        found = summary(of.rows, of.targets, of.reference, of.config.compare.confidence)
        column = latency_of(of.done).replace("_ms", "")
        many = sum(row["method"] != ORIGINAL for row in of.done)
        parts.append(
            f"**{opening(of)}**; {many} models, {column} latency, intervals of {found['confidence']:.0%} over "
            f"seeds\n\n{at_targets(of)}\n\n{table(*comparison(found, 'cross_entropy'))}\n\n{picture(of, 'plots')}"
        )
    return "\n\n".join(["## Comparisons of methods", *parts]) if parts else ""
