"""The rule that says how far from converged a run ended, on synthetic loss curves and after a run."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from jointnas import convergence
from jointnas.convergence import record, sentence, sentences, trend
from jointnas.pipeline import finish
from jointnas.verbs.report import report
from tests.jointnas import tiny


def noise(steps: int, size: float, seed: int = 0) -> np.ndarray:
    return size * np.random.default_rng(seed).standard_normal(steps)


def curve(kind: str, steps: int) -> list[float]:
    """Loss per step; falling: as a power law."""
    i = np.arange(steps)
    values = {
        "falling": 3 + 5 / np.sqrt(1 + i) + noise(steps, 0.02),
        "flat": 3 + 2 * np.exp(-i / 20) + noise(steps, 0.02),
        "rising": 3 + 2 * np.exp(-i / 20) + 0.002 * i + noise(steps, 0.02),
        "noisy": 3 + noise(steps, 2.0, 1),
        "diverged": np.where(i < steps - 5, 3.0, math.nan),
    }
    return values[kind].tolist()


@pytest.mark.parametrize("kind, steps", [
    ("falling", 40), ("falling", 200), ("flat", 400), ("flat", 4000), ("rising", 400), ("noisy", 40), ("noisy", 400),
    ("diverged", 400),
])  # fmt: skip
def test_verdicts(kind: str, steps: int) -> None:
    assert trend(curve(kind, steps)).verdict == kind


def test_little_is_told_from_few_steps() -> None:
    assert trend([]).verdict == trend([3.0] * 7).verdict == "short"
    assert trend([3.0] * 8).verdict == "flat"
    assert trend([3.0, math.inf]).verdict == "diverged"


def test_the_line_is_the_least_squares_line() -> None:
    losses = curve("falling", 200)
    got, last = trend(losses), np.array(losses[150:])
    (slope, _), covariance = np.polyfit(np.arange(50), last, 1, cov="unscaled")
    rest = np.polyval(np.polyfit(np.arange(50), last, 1), np.arange(50)) - last
    assert got.steps == 50
    assert got.change == pytest.approx(49 * slope)
    assert got.margin == pytest.approx(2 * 49 * math.sqrt(covariance[0, 0] * (rest**2).sum() / 48))
    assert got.mean == pytest.approx(last.mean())


def test_noise_is_rarely_taken_for_a_trend() -> None:
    """Of curves that do not move, one in twenty is beyond two standard errors; no more are called falling or rising."""
    wrong = [trend((1 + noise(160, 0.3, seed)).tolist()).verdict in ("falling", "rising") for seed in range(400)]
    assert sum(wrong) < 0.08 * len(wrong)


ADVICE = {
    "falling": "the loss is still falling: raise finetune.steps, or finetune.lr",
    "rising": "the loss rises: lower finetune.lr",
    "diverged": "the loss is not finite: lower finetune.lr",
    "noisy": "too much noise to see whether the loss still falls: raise finetune.steps, or finetune.batch_size",
}


@pytest.mark.parametrize("kind", [*ADVICE, "flat"])
def test_advice(kind: str, tmp_path: Path) -> None:
    row = {"phase": "finetune", "step": 400, "losses": curve(kind, 400)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    part = record(tmp_path, "finetune", steps=400, tokens=1000, trained=500, total=2000, perplexity=(20.0, 22.0))
    assert part["advice"] == ([ADVICE[kind]] if kind in ADVICE else [])
    assert (part["tokens_per_trained"], part["tokens_per_parameter"]) == (2.0, 0.5)
    assert json.loads((tmp_path / convergence.FILE).read_text())["finetune"]["advice"] == part["advice"]
    line = sentence(part)
    assert "perplexity 22.00 beside the original's 20.00 (1.10×)" in line
    assert ("Nothing says that more steps would help" in line) == (kind == "flat")
    far = record(tmp_path, "finetune", steps=400, tokens=1, trained=1, total=1, perplexity=(26.8, 1242.0))
    assert "perplexity is far above the original's: raise finetune.steps" in far["advice"][-1]
    assert "(46.34×)" in sentence(far)
    assert sentences(tmp_path) == [sentence(far)]


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_run_says_how_it_ended(train: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log, the JSON and the report, after a search and a distillation that were both far too short."""
    options = {"search": {"steps": 8, "log_every": 3}, "finetune": {"train": train}}
    with caplog.at_level(logging.INFO):
        run, found = tiny.search(tiny.config(tmp_path / "run", tiny.NO_BITS, **options))
        finish(run)
    recorded = json.loads((run.folder / convergence.FILE).read_text())
    search, finetune = recorded["search"], recorded["finetune"]
    assert (search["steps"], search["tokens"]) == (8, 8 * 2 * 16)
    assert search["trained"] == sum(p.numel() for p in run.supernet.lora_parameters())
    assert search["trend"]["steps"] == 8  # every step counts, not only those that were logged
    assert not search["decided"]
    assert "dimensions are undecided: raise search.steps or search.lr_arch" in search["advice"]
    assert finetune["tokens"] == 6 * 2 * 16
    assert finetune["total"] == found.params
    assert (finetune["trained"] == found.params) == (train == "full")
    assert finetune["trend"]["verdict"] == "short"
    assert finetune["perplexity"] > 1
    assert finetune["original_perplexity"] > 1
    lines = sentences(run.folder)
    assert all(line in caplog.text for line in lines)
    page = report(str(run.folder)).read_text()
    assert "<h2>Convergence</h2>" in page
    assert page.count("To do: ") == 2


def test_the_originals_perplexity_is_the_models(tmp_path: Path) -> None:
    from jointnas.distillation import Original
    from jointnas.evaluation import perplexity

    run = tiny.start(tiny.config(tmp_path / "run", tiny.NO_BITS))
    tokens, wrapped = run.streams.held_out, Original(run.supernet)
    got = perplexity(wrapped, tokens, context=32)
    torch.testing.assert_close(got, perplexity(tiny.model(), tokens, context=32), rtol=1e-4, atol=0.0)
