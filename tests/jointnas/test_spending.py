"""The choice that a search under a target ends with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jointnas.losses import Losses
from jointnas.objective import Feasibility, Limits
from jointnas.precision import Precision
from jointnas.preparation import prepare
from jointnas.spending import after, fit, spend, steps
from jointnas_kernels.space import Choice, SearchSpace, kept_blocks
from tests.jointnas import tiny
from tests.latency.tables import synthetic


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
    start = Choice(64, 2, 16, 64, 2, (4, 4, 4), (8, 8, 8))
    found = spend(run, check, start, losses)
    assert not check.violations(found)
    assert losses.of(found) <= losses.of(start)
    rest = [after(found, step) for step in steps(run.space, found, run.supernet.block_rank)]
    assert all(check.violations(c) or losses.of(c) >= losses.of(found) for c in rest)
    if target == 9.0:
        assert losses.of(found) == losses.of(run.space.full())


def test_bits_change_places(tmp_path: Path) -> None:
    """Where there is no room for a step up, bits go where they are worth most: to the last block, here."""
    space = {**tiny.SPACE, "hidden": [128], "heads": [4], "head_dim": [32], "intermediate": [192], "blocks": [3],
             "act_bits": [8]}  # fmt: skip
    config = tiny.config(tmp_path, space=space, target_latency_ms=1.0)
    run = prepare(config, tiny.model(), tiny.streams(), synthetic(config.space.build()))
    losses, start = Made(run), replace(run.space.full(), weight_bits=(8, 4, 4))
    limit = run.bound.predict(start) * (1 + 1e-6)
    found = spend(run, Feasibility(run.model_config, run.bound, Limits(latency_max=limit)), start, losses)
    assert found.weight_bits == (4, 4, 8)
    assert run.bound.predict(found) <= limit
    assert replace(found, weight_bits=start.weight_bits) == start


def test_sizes_change_places(tmp_path: Path) -> None:
    """Where there is no room for a step up, a block more is paid for by a narrower MLP; the bits are left alone."""
    space = {**tiny.SPACE, "hidden": [128], "heads": [4], "head_dim": [32], "weight_bits": [8], "act_bits": [8]}
    config = tiny.config(tmp_path, space=space, target_latency_ms=1.0)
    run = prepare(config, tiny.model(), tiny.streams(), synthetic(config.space.build()))
    full, losses = run.space.full(), Made(run)
    wide = replace(full, intermediate=192, blocks=2)
    deep = replace(full, intermediate=run.space.intermediate[0], blocks=3)
    assert losses.of(deep) < losses.of(wide)
    limit = max(run.bound.predict(deep), run.bound.predict(wide)) * (1 + 1e-6)
    check = Feasibility(run.model_config, run.bound, Limits(latency_max=limit))
    assert spend(run, check, wide, losses) == deep
    assert spend(run, check, deep, losses) == deep


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.15, 0.2, 0.3, 0.5])
def test_steps_down_reach_the_target(tmp_path: Path, target: float) -> None:
    """No more than needed; the one of least loss where one is enough."""
    config = tiny.config(tmp_path, target_latency_ms=target)
    run = prepare(config, tiny.model(), tiny.streams(), synthetic(config.space.build()))
    check, losses = Feasibility(run.model_config, run.bound, Limits(latency_max=target)), Made(run)
    full = run.space.full()
    found = fit(run, check, full, losses)
    assert found is not None
    assert not check.violations(found)
    last = [after(found, step) for step in steps(run.space, found, run.supernet.block_rank)]
    assert any(check.violations(choice) for choice in last), "one step less would not do"
    down = [after(full, step) for step in steps(run.space, full, run.supernet.block_rank, up=False)]
    for limit in sorted(map(run.bound.predict, down)):
        check = Feasibility(run.model_config, run.bound, Limits(latency_max=limit))
        enough = [choice for choice in down if not check.violations(choice)]
        assert fit(run, check, full, losses) == min(enough, key=losses.of)


@pytest.mark.slow
def test_other_limits_are_not_met_by_steps_down(tmp_path: Path) -> None:
    config = tiny.config(tmp_path, target_latency_ms=0.3)
    run = prepare(config, tiny.model(), tiny.streams(), synthetic(config.space.build()))
    full, losses = run.space.full(), Made(run)
    for limits in (Limits(params_max=10, latency_max=0.3), Limits(latency_max=1e-6)):
        assert fit(run, Feasibility(run.model_config, run.bound, limits), full, losses) is None


@pytest.mark.slow
def test_the_search_ends_with_it(tmp_path: Path) -> None:
    """Without a target nothing changes; a search without bits spends on sizes."""
    run, found = tiny.search(tiny.config(tmp_path / "aimed", target_latency_ms=0.4))
    check = Feasibility(run.model_config, run.bound, Limits(latency_max=0.4))
    losses = Losses(run, tmp_path / "losses.json", run.config.search.gap_batches)
    assert found.predicted_ms <= 0.4
    assert found.evaluated > 0
    fitted = fit(run, check, found.argmax, losses)
    assert fitted is not None
    assert losses.of(found.choice) <= losses.of(fitted)
    _, free = tiny.search(tiny.config(tmp_path / "free"))
    assert free.choice == free.argmax
    assert free.evaluated == 0
    config = tiny.config(tmp_path / "after", target_latency_ms=0.4)
    run = prepare(config, tiny.model(), tiny.streams(), synthetic(config.space.build()), after=Precision(4, 8))
    check = Feasibility(run.model_config, run.bound, Limits(latency_max=0.4))
    start = run.as_deployed(run.space.structures()[0])
    found = spend(run, check, start, Made(run))
    assert set(found.weight_bits or ()) == {4}
    assert run.bound.predict(found) > 1.5 * run.bound.predict(start)
