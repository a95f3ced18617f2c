"""The choice that a search under a target ends with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jointnas.losses import Losses
from jointnas.objective import Feasibility, Infeasible, Limits
from jointnas.precision import Precision
from jointnas.preparation import prepare
from jointnas.spending import after, spend, steps
from jointnas_kernels.space import Choice, SearchSpace, kept_blocks
from tests.jointnas import tiny
from tests.jointnas.test_parts import log_probability, uniform
from tests.latency.tables import CONFIG, synthetic


@pytest.mark.parametrize("seed", range(4))
def test_the_likeliest_feasible_choices(seed: int) -> None:
    space = SearchSpace((64, 128), (2, 4), (16, 32), (64, 128, 192), (1, 2, 3))
    bound = synthetic(space).bind(space, (1, 2, 0))
    torch.manual_seed(seed)
    probs = {k: (2 * torch.randn_like(v)).softmax(-1) for k, v in uniform(space).items()}
    check = Feasibility(CONFIG, bound, Limits(latency_max=sorted(bound.predict(c) for c in space)[30]))
    found = check.likeliest(probs, 5)
    feasible = [c for c in space if not check.violations(c)]
    assert found == sorted(feasible, key=lambda c: -log_probability(probs, space, c))[:5]
    assert check.likeliest(probs, 1000) == sorted(feasible, key=lambda c: -log_probability(probs, space, c))
    with pytest.raises(Infeasible):
        Feasibility(CONFIG, bound, Limits(latency_max=1e-6)).likeliest(probs, 3)


def test_steps_go_to_the_next_size_of_kept_blocks() -> None:
    space = SearchSpace.from_dict({**tiny.SPACE, "head_bits": [4, 16]})
    choice = Choice(64, 4, 32, 64, 2, (4, 8, 4), (8, 16, 8), 4)
    found = set(steps(space, choice, (2, 1, 0)))
    assert found == {
        ("weight_bits", 2, 8), ("act_bits", 2, 16), ("head_bits", None, 16), ("hidden", None, 128),
        ("intermediate", None, 192), ("blocks", None, 3),
    }  # fmt: skip
    assert after(choice, ("weight_bits", 2, 8)) == replace(choice, weight_bits=(4, 8, 8))
    assert after(choice, ("hidden", None, 128)) == replace(choice, hidden=128)


class Made(Losses):
    """Losses by a formula: what bits and sizes are worth."""

    def __init__(self, run: Any) -> None:
        self.run, self.known = run, {}

    def of(self, choice: Choice) -> float:
        worth = choice.hidden / 128 + choice.intermediate / 192 + choice.blocks
        for b in kept_blocks(self.run.supernet.block_rank, choice.blocks):
            weight, act = choice.bits(b)
            worth += 0 if weight is None else (b + 1) * weight / 16 + act / 64
        return -worth


@pytest.mark.parametrize("target", [0.15, 0.3, 0.5, 9.0])
def test_nothing_that_would_help_is_left(tmp_path: Path, target: float) -> None:
    config = tiny.config(tmp_path, target_latency_ms=target)
    run = prepare(config, tiny.model(), tiny.streams(), synthetic(config.space.build()))
    check, losses = Feasibility(run.model_config, run.bound, Limits(latency_max=target)), Made(run)
    start = [Choice(64, 2, 16, 64, 2, (4, 4, 4), (8, 8, 8)), Choice(64, 2, 16, 64, 1, (8, 4, 4), (8, 8, 8))]
    found = spend(run, check, start, losses)
    assert not check.violations(found)
    assert losses.of(found) <= min(losses.of(c) for c in start)
    rest = [after(found, step) for step in steps(run.space, found, run.supernet.block_rank)]
    assert all(check.violations(c) or losses.of(c) >= losses.of(found) for c in rest)
    if target == 9.0:
        assert losses.of(found) == losses.of(run.space.full())


def test_the_search_ends_with_it(tmp_path: Path) -> None:
    """No worse than the likeliest choice; without a target nothing changes; a search without bits spends on sizes."""
    ends = {}
    for compared in (1, 4):
        search = {"compared": compared}
        run, found = tiny.search(tiny.config(tmp_path / str(compared), target_latency_ms=0.4, search=search))
        losses = Losses(run, tmp_path / f"{compared}.json", run.config.search.gap_batches)
        ends[compared] = losses.of(found.choice)
        assert found.predicted_ms <= 0.4
        assert (found.evaluated > 0) == (compared > 1)
    assert ends[4] <= ends[1]
    _, free = tiny.search(tiny.config(tmp_path / "free"))
    assert free.choice == free.argmax
    assert free.evaluated == 0
    config = tiny.config(tmp_path / "after", target_latency_ms=0.4)
    run = prepare(config, tiny.model(), tiny.streams(), synthetic(config.space.build()), after=Precision(4, 8))
    check = Feasibility(run.model_config, run.bound, Limits(latency_max=0.4))
    start = run.as_deployed(run.space.structures()[0])
    found = spend(run, check, [start], Made(run))
    assert set(found.weight_bits or ()) == {4}
    assert run.bound.predict(found) > 1.5 * run.bound.predict(start)
