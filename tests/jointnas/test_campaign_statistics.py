"""What is said of a campaign's rows, against numbers found by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from jointnas.campaign.statistics import at, interval, summary


def row(
    pipeline: str, seed: int, ms: float, ce: float, acc: float | None = None, target: float | None = None
) -> dict[str, Any]:
    tasks = {} if acc is None else {"a": {"acc": acc}}
    return {
        "unit": f"{pipeline}/{seed}/{ms}", "method": pipeline.partition("+")[0], "pipeline": pipeline, "seed": seed,
        "status": "done", "target_ms": target, "predicted_ms": ms, "measured_ms": ms, "ce": ce, "tasks": tasks,
    }  # fmt: skip


def test_summary() -> None:
    """Against numbers found by hand: b is 0.5 nats worse, and takes twice as long for what a reaches at 2 ms."""
    rows = [row("original", 0, 9.0, 1.0)]
    for seed in (0, 1):
        rows += [row("a", seed, 1.0, 3.0), row("a", seed, 2.0, 2.0), row("a", seed, 3.0, 1.5)]
        rows += [row("b", seed, 2.0, 2.5), row("b", seed, 4.0, 2.0), row("b", seed, 3.0, 2.6)]
    found = summary(rows, [2.0, 1.0], "a", 0.9)
    methods = found["cross_entropy"]["methods"]
    assert found["latency"] == "measured_ms"
    assert "error" not in found
    assert methods["b"]["front"] == ["b/0/2.0", "b/0/4.0", "b/1/2.0", "b/1/4.0"]
    assert methods["b"]["at_latency"][0]["it_minus_reference"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "seeds": 2}
    twice = {"mean": 2.0, "low": 2.0, "high": 2.0, "seeds": 2}
    assert methods["b"]["at_quality"][0] == {"quality": 2.0, "speed_up": twice}
    assert methods["b"]["at_latency"][1]["quality"]["mean"] is None  # slower than the target
    assert methods["a"]["of_all"]["reference_minus_it"]["mean"] == 0
    x, y = 9.0 * 1.01, 3.0 * 1.01
    assert found["cross_entropy"]["corner"] == pytest.approx((x, y))
    area = (x - 1) * (y - 3) + (x - 2) * (3 - 2) + (x - 3) * (2 - 1.5)
    assert methods["a"]["of_all"]["hypervolume"]["mean"] == pytest.approx(area / ((x - 1.0) * (y - 1.0)))
    # over the targets: a reaches 3 within 1 ms and 2 within 2, b 2.5 within 2; its model at 3 ms counts nowhere
    x, whole = 2 * 1.01, (2 * 1.01 - 1) * (y - 1)
    over = {"a": ((x - 1) * (y - 3) + (x - 2) * (3 - 2)) / whole, "b": (x - 2) * (y - 2.5) / whole}
    for name, volume in over.items():
        assert methods[name]["over_targets"]["hypervolume"]["mean"] == pytest.approx(volume)
    assert methods["b"]["over_targets"]["reference_minus_it"]["mean"] == pytest.approx(over["a"] - over["b"])


def test_hypervolumes_that_there_are_not() -> None:
    """Without targets, within none of them, and where nobody errs."""
    rows = [row("a", 0, 1.0, 3.0, 1.0), row("b", 0, 2.0, 2.0, 1.0)]
    found = summary(rows, [], "a", 0.9)
    none = {"mean": None, "low": None, "high": None, "seeds": 0}
    assert found["cross_entropy"]["methods"]["a"]["over_targets"]["hypervolume"] == none
    assert found["error"]["methods"]["b"]["of_all"]["hypervolume"] == none
    found = summary(rows, [1.5], "a", 0.9)
    assert found["cross_entropy"]["methods"]["b"]["over_targets"]["hypervolume"] == none
    assert found["cross_entropy"]["methods"]["a"]["over_targets"]["hypervolume"]["mean"] > 0


def test_a_method_of_several_precisions_is_there_once_more_per_precision() -> None:
    """Together they have more models than the reference; each of them has as many."""
    rows = [row("original", 0, 9.0, 1.0), row("a", 0, 1.0, 3.0), row("a", 0, 2.0, 2.0), row("d+W4A8", 0, 2.0, 2.5)]
    rows += [row("b+W2A8", 0, 1.0, 3.0), row("c+W8A8", 0, 2.0, math.inf), row("b+W4A8", 0, 2.0, 2.5)]
    methods = summary(rows, [2.0], "a", 0.9)["cross_entropy"]["methods"]
    assert list(methods) == ["a", "d", "b", "b+W2A8", "b+W4A8"]
    assert methods["b"]["front"] == [*methods["b+W2A8"]["front"], *methods["b+W4A8"]["front"]]
    volumes = {name: of["of_all"]["hypervolume"]["mean"] for name, of in methods.items()}
    assert volumes["b"] > volumes["b+W4A8"] == volumes["d"] > volumes["b+W2A8"] > 0
    over = {name: of["over_targets"]["hypervolume"]["mean"] for name, of in methods.items()}
    assert over["a"] > over["b"] == over["b+W4A8"] == over["d"] > over["b+W2A8"]


def test_summary_of_accuracy_and_of_predictions() -> None:
    rows = [row("a", 0, 1.0, 3.0, 0.5), row("b", 0, 1.0, 3.0, 0.25)]
    rows[1]["measured_ms"] = None
    found = summary(rows, [1.0], "a", 0.9)
    assert found["latency"] == "predicted_ms"
    assert found["error"]["methods"]["b"]["at_latency"][0]["it_minus_reference"]["mean"] == 0.25


def test_a_quality_that_is_not_finite_is_on_no_front() -> None:
    """And moves no corner."""
    rows = [row("a", 0, 1.0, 3.0), row("b", 0, 1.5, 4.0)]
    broken = [row("a", 0, 2.0, math.inf), row("c", 0, 9.0, math.inf)]
    found, before = (summary(of, [1.0], "a", 0.9)["cross_entropy"] for of in (rows + broken, rows))
    assert found == before


def test_fixed_latencies_are_those_that_the_reference_has() -> None:
    """Both seeds' models for 1 ms take a little longer."""
    rows = [row("a", 0, 1.02, 3.0, target=1.0), row("a", 1, 1.05, 3.2, target=1.0), row("b", 0, 1.04, 4.0, target=1.0)]
    found = summary(rows, [1.0, 0.5], "a", 0.9)
    assert found["fixed_ms"] == [1.05, 0.5]
    methods = found["cross_entropy"]["methods"]
    assert methods["a"]["at_latency"][0]["quality"]["mean"] == pytest.approx(3.1)
    assert methods["b"]["at_latency"][0]["it_minus_reference"]["mean"] == pytest.approx(1.0)


def test_reading_a_front() -> None:
    front = [(1.0, 4.0), (3.0, 2.0)]
    assert at(front, 0.5) is None
    assert [at(front, x) for x in (1.0, 2.0, 3.0, 9.0)] == [4.0, 3.0, 2.0, 2.0]
    assert at([], 1.0) is None


def test_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, generator=generator).tolist()
    found = interval(values, 0.95)
    half = 1.96 * torch.tensor(values).std().item() / math.sqrt(50)
    assert found["mean"] - found["low"] == pytest.approx(half, rel=0.15)
    assert found["high"] - found["mean"] == pytest.approx(half, rel=0.15)
    assert interval([1.0], 0.95) == {"mean": 1.0, "low": None, "high": None, "seeds": 1}
    assert interval([], 0.95)["mean"] is None
