"""Tables of comparisons, from rows made by hand."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.campaigns import among_all, at_targets, best
from jointnas.campaign.page import Campaign
from jointnas.compare_config import CompareConfig
from jointnas.config import dump
from jointnas_kernels.space import SearchSpace
from tests.latency.tables import synthetic


def row(method: str, perplexity: float, ms: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    precision = more.get("precision")
    return {
        "method": method, "pipeline": method + (f"+{precision}" if precision else ""), "seed": seed, "status": "done",
        "predicted_ms": ms, "measured_ms": None, "tasks": {}, "unit": f"{method}/{ms}/{seed}", "target_ms": ms + 0.01,
        "ce": math.log(perplexity), "perplexity": perplexity, **more,
    }  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path) -> Campaign:
    made = [
        row("original", 20.0, 1.0, target_ms=None), row("joint", 30.0, 0.59), row("joint", 40.0, 0.49),
        row("no-bits", 33.0, 0.58, precision="W4A8"), row("no-bits", 31.0, 0.57, precision="W2A8"),
        row("no-bits", 36.0, 0.58, 1, precision="W2A8"), row("no-bits", 45.0, 0.48, precision="W2A8"),
        {"method": "ilp", "seed": 0, "status": "infeasible", "target_ms": 0.5, "unit": "ilp/0.5/0"},
        row("uniform", 29.0, 0.55, precision="W2A8", target_ms=None),
    ]  # fmt: skip
    (tmp_path / "config.yaml").write_text(dump(CompareConfig()))
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    synthetic(SearchSpace((64, 128), (2, 4), (16, 32), (64, 192), (1, 2, 3))).save(tmp_path / "latency.jsonl")
    return Campaign.load(tmp_path)


def test_the_best_within_a_latency(rows: Campaign) -> None:
    """A pipeline's seeds are averaged; a model for a lower target counts at a higher one, too."""
    assert rows.found["targets_ms"] == pytest.approx([0.6, 0.59, 0.58, 0.5, 0.49])
    assert best(rows, ["no-bits"], 0.6) == (pytest.approx(33.0), "no-bits+W4A8", 1)
    assert best(rows, ["no-bits"], 0.575) == (pytest.approx(31.0), "no-bits+W2A8", 1)
    assert best(rows, ["uniform", "ilp"], 0.6) == (pytest.approx(29.0), "uniform+W2A8", 1)
    assert best(rows, ["uniform", "ilp"], 0.5) is None


def test_a_line_per_target(rows: Campaign) -> None:
    lines = at_targets(rows).splitlines()
    assert lines[2] == (
        "| 0.600 ms (60% of 16 bit) | 30.0 (1 seed) | no-bits+W4A8 33.0 (1 seed): 0.91× | "
        "uniform+W2A8 29.0 (1 seed): 1.03× |"
    )
    assert lines[-1].startswith("| 0.500 ms (50% of 16 bit) | 40.0") or lines[-1].startswith("| 0.490 ms")
    assert "| – |" in lines[5]


def test_choices_among_all_models(tmp_path: Path) -> None:
    """Bits of a removed block make no other model; what the search's tokens cost is no fault of its choice."""

    def of(blocks: int, *bits: int) -> dict[str, Any]:
        return {"hidden": 64, "blocks": blocks, "weight_bits": list(bits), "act_bits": [8, 8], "head_bits": None}

    every = {(1, 2, 8): (50.0, 0.30), (1, 8, 8): (45.0, 0.40), (2, 2, 2): (32.0, 0.45), (2, 2, 8): (31.0, 0.5),
             (2, 8, 2): (30.0, 0.5), (2, 8, 8): (28.0, 0.6)}  # fmt: skip
    made = [row("original", 20.0, 1.0, target_ms=None, choice=of(2, 8, 8))]
    made += [
        row("exhaustive", perplexity, ms, target_ms=None, choice=of(*key)) for key, (perplexity, ms) in every.items()
    ]
    made += [row("joint", 46.0, 0.40, target_ms=0.4, choice=of(1, 8, 2)),
             row("joint", 33.0, 0.50, target_ms=0.5, choice=of(2, 2, 8))]  # fmt: skip
    (tmp_path / "config.yaml").write_text(dump(CompareConfig()))
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    synthetic(SearchSpace((64, 128), (2, 4), (16, 32), (64, 192), (1, 2, 3))).save(tmp_path / "latency.jsonl")
    _, _, *lines, _, sentence = among_all(Campaign.load(tmp_path)).splitlines()
    assert lines == ["| 0.400 ms | 46.0 | 45.0 | 45.0 | 1 of 2 |", "| 0.500 ms | 33.0 | 31.0 | 30.0 | 2 of 5 |"]
    x, y = 1.01 * 0.5, 1.01 * math.log(50.0)

    def area(first: float, second: float) -> float:
        return (x - 0.4) * (y - math.log(first)) + (x - 0.5) * (math.log(first) - math.log(second))

    shares = [area(46.0, 33.0) / area(45.0, 30.0), area(45.0, 31.0) / area(45.0, 30.0)]
    assert [f"{share:.3f}" for share in shares] == [w.rstrip(".") for w in re.findall(r"0\.\d{3}", sentence)]
