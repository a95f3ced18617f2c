"""The demo's target, and what it says in the end; the demo as a whole is `make demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jointnas.compare_config import CompareConfig
from jointnas.verbs import demo
from jointnas.verbs.demo import demo_config, named, sentence, single_precisions, with_target
from jointnas_kernels.space import Choice
from tests.jointnas import tiny
from tests.latency.tables import synthetic


def test_the_target_is_below_every_single_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = tiny.config(tmp_path).space.build()
    made, seen = synthetic(space), list[Any]()
    config = CompareConfig(out=str(tmp_path), space=tiny.config(tmp_path).space)
    monkeypatch.setattr(demo, "measure_table", lambda *given: seen.append(given[3]) or made)
    monkeypatch.setattr(demo.loading, "model_config", lambda _: tiny.model().config)
    aimed, table = with_target(config)
    bound = table.bind(table.restrict(space)[0])
    (target,) = aimed.compare.targets_ms
    assert bound.extremes()[0] < target < min(single_precisions(bound).values())
    assert config.compare.targets_ms == [], "what was given is left as it is"
    assert aimed.compare.precisions == [str(p) for p in single_precisions(bound)][:2]
    assert seen == [tmp_path / "latency.jsonl"]


def test_single_precisions_and_the_extremes(tmp_path: Path) -> None:
    """Against all choices of the space."""
    space = tiny.config(tmp_path).space.build()
    bound = synthetic(space).bind(space)
    found = single_precisions(bound)
    assert {p.weight for p in found} == set(space.sizes("weight_bits"))
    assert list(found.values()) == sorted(found.values())
    full = space.full()
    for precision, ms in found.items():
        assert ms == bound.predict(precision.on(full, space.depth))
    choices = [
        Choice(s.hidden, s.heads, s.head_dim, s.intermediate, s.blocks, (w,) * 3, (a,) * 3)
        for s in space.structures() for w in space.sizes("weight_bits") for a in space.sizes("act_bits")
    ]  # fmt: skip
    every = [bound.predict(choice) for choice in choices]
    assert bound.extremes() == pytest.approx((min(every), max(every)))


def row(method: str, perplexity: float, precision: str | None = None, ms: float = 0.3) -> dict[str, Any]:
    target = None if method in ("original", "uniform") else 0.3
    return {
        "method": method, "perplexity": perplexity, "precision": precision, "predicted_ms": ms, "target_ms": target,
        "status": "done",
    }  # fmt: skip


def test_one_sentence_says_who_won() -> None:
    rows = [row("original", 20.0, ms=0.5), row("uniform", 30.0, "W2A8", 0.35), row("uniform", 25.0, "W4A8", 0.4)]
    rows += [row("no-bits", 44.0, "W2A8"), row("no-bits", 50.0, "W4A8"), row("random", 80.0)]
    assert sentence([*rows, row("joint", 40.0)]) == (
        "At 0.300 ms a token, which no single precision of the whole model reaches (the fastest, W2A8, takes 0.350), "
        "joint wins: perplexity 40.0, sequential W2A8 44.0 (10% more); sequential W4A8 50.0, random 80.0. One seed."
    )
    assert "sequential W2A8 wins: perplexity 44.0, joint 55.0 (25% more)" in sentence([*rows, row("joint", 55.0)])
    lost = {**row("no-bits", 1.0), "status": "infeasible"}
    alone = sentence([*rows[:3], lost, row("joint", 40.0)])
    assert alone.endswith("only the joint search found a model: perplexity 40.0.")
    names = ["original", "original at W2A8", "original at W4A8", "sequential W2A8"]
    assert [r["name"] for r in named(rows[:4])] == names


def test_the_seed_is_the_campaigns(tmp_path: Path) -> None:
    config = demo_config(str(tmp_path), "cpu", 7, 2)
    assert (config.compare.seeds, config.compare.randoms) == ([7], 2)
