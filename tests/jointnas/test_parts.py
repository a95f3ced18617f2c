"""Checkpoints, data, objective and repair, one by one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from jointnas import checkpoint
from jointnas.baselines.random_choices import canonical, random_choices
from jointnas.initialise.clip import RATIOS, mse_clip
from jointnas.objective import Feasibility, Limits, Objective, entropies
from jointnas.results import hypervolume, pareto
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.quant.weights import fake_quant_weight
from jointnas_kernels.space import WIDTHS, Choice, SearchSpace, count_params
from tests.jointnas import tiny
from tests.latency.tables import CONFIG, SPACE, synthetic

# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tensors = {"a": {"x": torch.arange(6).view(2, 3).t()}, "b": {"y": torch.ones(2), "n": torch.tensor(3.0)}}
    return checkpoint.save(tmp_path, 7, tensors, {"note": [1, "two"]})


def test_checkpoint_round_trip(saved: Path) -> None:
    tensors, state = checkpoint.load(saved)
    assert torch.equal(tensors["a"]["x"], torch.arange(6).view(2, 3).t())
    assert tensors["b"]["n"].shape == ()
    assert state == {"step": 7, "note": [1, "two"]}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "COMPLETE").unlink(), "no COMPLETE"),
        (lambda f: (f / "a.safetensors").unlink(), "a.safetensors is missing"),
        (lambda f: (f / "state.json").write_text("{}"), "state.json does not match the manifest"),
        (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json does not match COMPLETE"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json"),
    ],
    ids=["complete", "missing", "state", "manifest", "no-manifest"],
)
def test_damaged_checkpoint(saved: Path, damage, message: str) -> None:
    damage(saved)
    with pytest.raises(JointNASError, match=message):
        checkpoint.load(saved)
    assert checkpoint.latest(saved.parent) is None


def test_old_checkpoints_and_leftovers_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-3.123.tmp").mkdir()
    for step in (1, 2, 3, 10):
        checkpoint.save(tmp_path, step, {}, {}, keep=2)
    assert checkpoint.steps(tmp_path) == [3, 10]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-3"]


def test_optimizer_state_round_trip(tmp_path: Path) -> None:
    """A restored AdamW continues exactly, also with parameters that never had a gradient."""

    def make() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(3, 2)) for _ in range(3)]
        return parameters, torch.optim.AdamW(parameters, lr=0.1, betas=(0.9, 0.95))

    def step(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, k: int) -> None:
        for i, p in enumerate(parameters[:2]):
            p.grad = torch.full_like(p, k + i + 1.0)
        optimizer.step()

    first, optimizer = make()
    for k in range(3):
        step(first, optimizer, k)
    tensors, groups = checkpoint.pack_optimizer(optimizer)
    path = checkpoint.save(tmp_path, 3, {"o": tensors}, {"g": json.loads(json.dumps(groups))})
    loaded, state = checkpoint.load(path)
    second, again = make()
    with torch.no_grad():
        for p, q in zip(second, first, strict=True):
            p.copy_(q)
    checkpoint.unpack_optimizer(again, loaded["o"], state["g"])
    for k in range(3):
        step(first, optimizer, k)
        step(second, again, k)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


# ---- objective ------------------------------------------------------------------------------------------------------


def uniform(space: SearchSpace) -> dict[str, torch.Tensor]:
    probs = {k: torch.full((len(space.sizes(k)),), 1.0 / len(space.sizes(k))) for k in (*WIDTHS, "blocks")}
    for key in ("weight_bits", "act_bits"):
        if space.sizes(key):
            probs[key] = torch.full((space.depth, len(space.sizes(key))), 1.0 / len(space.sizes(key)))
    return probs


def test_penalty_is_the_relative_violation(tmp_path: Path) -> None:
    space = SearchSpace.from_dict({k: v for k, v in tiny.NO_BITS.items() if v != "none"})
    full = count_params(CONFIG, Choice(128, 4, 32, 192, 3))
    probs, bound = uniform(space), synthetic(space).bind(space)
    target = bound.expected(probs).latency.item() * 0.8
    excess = {
        "choices": sum(
            max(0.0, count_params(CONFIG, c) / (0.2 * full) - 1) + max(0.0, bound.predict(c) / target - 1)
            for c in space
        )
        / space.size(),
        "expectation": None,
    }
    for kind, want in excess.items():
        search = {"budget_max": 0.2, "lambda_budget": 20, "lambda_ramp": 0.5, "steps": 100, "penalty": kind}
        config = tiny.config(tmp_path, tiny.NO_BITS, search=search, target_latency_ms=target)
        objective = Objective(config, CONFIG, bound)
        total, parts = objective.regularizer(probs, step=25)
        assert parts["lambda"] == pytest.approx(10.0)  # half of the ramp to 20
        assert parts["params"] == pytest.approx(sum(count_params(CONFIG, c) for c in space) / space.size())
        outside = parts["params"] / (0.2 * full) - 1 + parts["latency_ms"] / target - 1
        assert parts["penalty"] == pytest.approx(outside if want is None else want)
        assert total.item() == pytest.approx(parts["latency_share"] + 10 * parts["penalty"])
        assert objective.penalty_weight(1000) == 20.0


def test_entropy_ignores_bits_of_removed_blocks() -> None:
    probs = uniform(SPACE)
    probs["blocks"] = torch.tensor([0.9, 0.05, 0.05])
    found = entropies(probs, SPACE, (2, 0, 1))
    assert found["hidden"] == pytest.approx(1.0)
    assert {k for k in found if k.startswith("weight_bits")} == {"weight_bits.2"}
    certain = {**probs, "heads": torch.tensor([0.0, 1.0])}
    assert entropies(certain, SPACE, (2, 0, 1))["heads"] == pytest.approx(0.0, abs=1e-9)


def test_the_entropy_term_decides_in_the_second_half(tmp_path: Path) -> None:
    """κ(t) Σ entropies, against its formula; its gradient makes the likelier size likelier."""
    space = SearchSpace.from_dict({k: v for k, v in tiny.SPACE.items() if v != "none"})
    probs = {k: v.clone() for k, v in uniform(space).items()}
    probs["heads"] = torch.tensor([0.4, 0.6], requires_grad=True)
    config = tiny.config(tmp_path, tiny.SPACE, search={"steps": 100, "entropy_weight": 2.0})
    objective = Objective(config, CONFIG, synthetic(space).bind(space))
    plain = tiny.config(tmp_path, tiny.SPACE, search={"steps": 100, "entropy_weight": 0})
    without_it = Objective(plain, CONFIG, objective.bound)
    assert [objective.entropy_weight(step) for step in (0, 50, 75, 100)] == [0, 0, 1, 2]
    total = sum(entropies(probs, space, (0, 1, 2)).values())
    for step, weight in ((50, 0.0), (75, 1.0), (100, 2.0)):
        with_it, without = objective.regularizer(probs, step)[0], without_it.regularizer(probs, step)[0]
        assert (with_it - without).item() == pytest.approx(weight * total, abs=1e-6)
    slope = [torch.autograd.grad(o.regularizer(probs, 100)[0], probs["heads"])[0] for o in (objective, without_it)]
    assert (slope[0] - slope[1])[0] > (slope[0] - slope[1])[1]


def log_probability(probs: dict[str, torch.Tensor], space: SearchSpace, choice: Choice) -> float:
    total = sum(probs[k][space.sizes(k).index(getattr(choice, k))].double().log() for k in (*WIDTHS, "blocks"))
    for key in ("weight_bits", "act_bits"):
        for b, bits in enumerate(getattr(choice, key) or ()):
            total = total + probs[key][b, space.sizes(key).index(bits)].double().log()
    return float(total)


@pytest.mark.parametrize("seed", range(5))
def test_repair_is_the_most_probable_feasible_choice(seed: int) -> None:
    space = SearchSpace((64, 128), (2, 4), (16, 32), (64, 128, 192), (1, 2, 3))
    bound = synthetic(space).bind(space, (1, 2, 0))
    torch.manual_seed(seed)
    probs = {k: (2 * torch.randn_like(v)).softmax(-1) for k, v in uniform(space).items()}
    sizes = sorted(count_params(CONFIG, c) for c in space)
    times = sorted(bound.predict(c) for c in space)
    limits = Limits(sizes[5], sizes[60], times[40])
    check = Feasibility(CONFIG, bound, limits)
    best = max((c for c in space if not check.violations(c)), key=lambda c: log_probability(probs, space, c))
    assert check.repair(probs) == best


BITS = SearchSpace((128,), (4,), (32,), (64, 192), (1, 2, 3), (2, 4, 8), (8, 16), group_size=64)


def random_bits(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {k: (2 * torch.randn_like(v)).softmax(-1) for k, v in uniform(BITS).items()}


@pytest.mark.parametrize("seed", range(3))
def test_repair_of_bits(seed: int) -> None:
    """Feasible, and the best of all choices but for the rounding of the latency to 4000 units."""
    bound = synthetic(BITS).bind(BITS, (1, 2, 0))
    probs = random_bits(seed)
    limit = sorted(bound.predict(c) for c in BITS)[150]
    check = Feasibility(CONFIG, bound, Limits(latency_max=limit))
    found = check.repair(probs)
    assert not check.violations(found)
    best = max((c for c in BITS if not check.violations(c)), key=lambda c: log_probability(probs, BITS, c))
    assert log_probability(probs, BITS, found) >= log_probability(probs, BITS, best) - 0.05


def test_repair_avoids_infeasible_bits() -> None:
    table = synthetic(BITS, feasible=lambda s: (s.wbits, s.abits) not in ((2, 16), (4, 8)))
    check = Feasibility(CONFIG, table.bind(BITS), Limits())
    for seed in range(10):
        assert not check.violations(check.repair(random_bits(seed)))


# ---- baselines and quantizers ---------------------------------------------------------------------------------------


def test_random_choices_cost_the_same_and_differ() -> None:
    bound = synthetic().bind(SPACE, (2, 0, 1))
    found = Choice(128, 4, 32, 128, 2, (4, 8, 4), (8, 8, 8))
    peers = random_choices(found, bound, CONFIG, 8, seed=3)
    assert len({canonical(p, bound) for p in peers}) == 8
    assert canonical(found, bound) not in peers
    for peer in peers:
        assert count_params(CONFIG, peer) == pytest.approx(count_params(CONFIG, found), rel=0.1)
        assert bound.predict(peer) == pytest.approx(bound.predict(found), rel=0.1)
    assert peers == random_choices(found, bound, CONFIG, 8, seed=3)
    with pytest.raises(JointNASError, match="only 0 of 2 random choices"):
        random_choices(found, bound, CONFIG, 2, width=1e-9, tries=50)


def test_bits_of_removed_blocks_do_not_make_another_choice() -> None:
    bound = synthetic().bind(SPACE, (2, 0, 1))
    one, two = (Choice(128, 4, 32, 128, 1, (a, a, 4), (8, 8, 8)) for a in (2, 8))
    assert canonical(one, bound) == canonical(two, bound)
    assert bound.predict(one) == bound.predict(two)


def test_pareto_and_hypervolume() -> None:
    points = [(1.0, 5.0), (2.0, 3.0), (3.0, 4.0), (4.0, 1.0), (2.0, 3.5)]
    assert pareto(points) == [0, 1, 3]
    assert hypervolume(points, (5.0, 6.0)) == pytest.approx(1 * 1 + 2 * 3 + 1 * 5)
    assert hypervolume([(9.0, 9.0)], (5.0, 6.0)) == 0


def test_mse_clip_is_the_best_ratio_of_the_grid() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        ratio = mse_clip(weight, bits, 64)

        def error(clip: torch.Tensor, bits: int = bits) -> torch.Tensor:
            return (fake_quant_weight(weight, bits, 64, clip=clip) - weight).view(8, 2, 64).square().sum(-1)

        every = torch.stack([error(torch.full_like(ratio, r)) for r in RATIOS])
        assert torch.allclose(error(ratio), every.amin(0))
    gain = error(mse_clip(weight, 2, 64), 2).sum() / error(torch.ones(8, 2), 2).sum()
    assert gain < 0.7  # of the error without clipping, for Gaussian weights at 2 bits
    assert math.isfinite(gain)
