"""The methods that a joint search is compared with, one by one."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from jointnas.baselines import ilp, lonas, sandwich, subnet_selection
from jointnas.baselines.context import Context
from jointnas.baselines.exhaustive import count, numbered
from jointnas.baselines.ptq import quantized
from jointnas.baselines.random_choices import canonical, random
from jointnas.baselines.strata import candidates, strata, structures
from jointnas.baselines.tanglenas import mixture_of_prefixes, tanglenas
from jointnas.bilevel import optimise
from jointnas.compare_config import CompareOptions
from jointnas.data import Batch
from jointnas.losses import Losses, cross_entropy
from jointnas.metrics import read_metrics
from jointnas.objective import Infeasible
from jointnas.precision import Precision, precisions
from jointnas.preparation import prepare
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import extract
from jointnas_kernels.nn.choices import seeded
from jointnas_kernels.space import Choice, SearchSpace, count_params
from tests.jointnas import tiny
from tests.latency.tables import CONFIG, synthetic

W4A8 = Precision(4, 8)
SPACE = SearchSpace.from_dict(tiny.SPACE)


def context(out: Path, target: float | None = None, precision: Precision | None = W4A8, **sections: Any) -> Context:
    config = tiny.config(out / "unit", resume="auto", tensorboard=False, target_latency_ms=target, **sections)
    options = CompareOptions(strata=4, candidates=2, batches=2)
    table = synthetic(config.space.build())
    shared = out / "shared"
    return Context(config, options, tiny.model(), tiny.streams(), table, shared, out / "quantizers", precision)


def sharing(of: Context) -> Context:
    of.config = of.config.model_copy(update={"out": str(of.shared), "target_latency_ms": None})
    return of


# ---- precisions -----------------------------------------------------------------------------------------------------


def test_precisions() -> None:
    head = SearchSpace.from_dict({**tiny.SPACE, "head_bits": [4, 8, 16]})
    assert [str(p) for p in precisions(SPACE)] == ["W4A8", "W4A16", "W8A8", "W8A16"]
    assert Precision.parse("W4A8", SPACE) == W4A8
    assert str(Precision.parse("W8A8", head)) == "W8A8H8"
    assert str(Precision.parse("W4A8H16", head)) == "W4A8H16"
    assert W4A8.of(SPACE).size() == len(SPACE.structures())
    assert W4A8.on(SPACE.structures()[0], 3).weight_bits == (4, 4, 4)
    for text in ("W4", "W2A8", "W4A8H4", "fp8"):
        with pytest.raises(JointNASError, match=r"unknown precision .* Allowed: W4A8, W4A16, W8A8, W8A16\."):
            Precision.parse(text, SPACE)


# ---- a search without bits, and quantization after it ---------------------------------------------------------------


@pytest.mark.parametrize("head", [False, True])
def test_a_search_without_bits_sees_the_latency_of_what_is_deployed(tmp_path: Path, head: bool) -> None:
    space = {**tiny.SPACE, "head_bits": [4, 16]} if head else tiny.SPACE
    config = tiny.config(tmp_path, space, target_latency_ms=0.4)
    after = Precision(4, 8, 4 if head else None)
    run = prepare(config, tiny.model(), tiny.streams(), synthetic(config.space.build()), after=after)
    assert not any(run.space.sizes(key) for key in ("weight_bits", "act_bits", "head_bits"))
    found = run.bound.structures(run.supernet.arch.probs()).latency[run.space.allowed].flatten()
    for structure, ms in zip(run.space.structures(), found.tolist(), strict=True):
        assert ms == pytest.approx(run.bound.predict(run.as_deployed(structure)))
    choice = optimise(run).choice
    assert set(choice.weight_bits or ()) == {4}
    assert choice.head_bits == after.head
    assert run.bound.predict(choice) <= 0.4


def test_quantization_after_a_search(tmp_path: Path) -> None:
    """The weights that the search trained, on the grids that the table's kernels have."""
    run = context(tmp_path).run(after=W4A8)
    with torch.no_grad():
        for p in run.supernet.lora_parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=seeded(0)))
    plain = Choice(64, 2, 32, 192, 2)
    small, own = quantized(run, W4A8.on(plain, 3), tmp_path / "quantizers")
    ids = run.streams.held_out[:32][None]
    trained = extract(run.supernet, plain)
    assert own.blocks == 2
    # unquantized it is the trained model
    assert torch.allclose(small.original(ids).logits, trained(ids).logits, atol=1e-4)  # type: ignore[arg-type]
    model = extract(small, own)
    assert not torch.allclose(model(ids).logits, trained(ids).logits, atol=1e-3)
    layer = model.model.layers[0]
    assert layer.self_attn.o_proj.group_size == 16  # of the smallest head dim of the space, not of this one
    assert layer.mlp.up_proj.group_size == 64
    assert layer.mlp.up_proj.weight_bits == 4


# ---- strata and losses ----------------------------------------------------------------------------------------------


def test_strata_are_equal_ranges_of_parameters() -> None:
    sizes = {choice: float(count_params(CONFIG, choice)) for choice in SPACE.structures()}
    groups = strata(sizes, 5)
    low, high = min(sizes.values()), max(sizes.values())
    width = (high - low) / 5
    assert sorted(map(str, itertools.chain(*groups))) == sorted(map(str, sizes))
    for group in groups:
        places = {min(4, math.floor((sizes[c] - low) / width)) for c in group}
        assert len(places) == 1
    drawn = candidates(groups, 3, seed=1)
    assert drawn == candidates(groups, 3, seed=1)
    assert drawn != candidates(groups, 3, seed=2)
    for some, of in zip(drawn, groups, strict=True):
        assert len(set(some)) == min(3, len(of))
        assert set(some) <= set(of)
    assert strata({SPACE.structures()[0]: 7.0}, 3) == [[SPACE.structures()[0]]]


def test_structures_within_the_limits(tmp_path: Path) -> None:
    """Those of which every choice at the precision obeys them."""
    given = context(tmp_path, target=0.3, search={"budget_max": 0.6})
    run, limit = given.run(), 0.6 * count_params(CONFIG, SPACE.full())
    sizes = structures(run, W4A8)
    want = {
        c: count_params(CONFIG, c)
        for c in SPACE.structures()
        if count_params(CONFIG, c) <= limit and run.bound.predict(W4A8.on(c, 3)) <= 0.3
    }
    assert sizes == want
    assert 0 < len(want) < len(SPACE.structures())
    given.config = given.config.model_copy(update={"target_latency_ms": 0.045})
    with pytest.raises(Infeasible, match="at W8A16"):
        structures(given.run(), Precision(8, 16))


def test_losses_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = context(tmp_path).run()
    choices = [W4A8.on(c, 3) for c in SPACE.structures()[:3]]
    losses = Losses(run, tmp_path / "l.json", 2)
    values = [losses.of(c) for c in choices]
    assert losses.best(choices) == choices[values.index(min(values))]
    assert losses.tokens == 3 * 2 * 2 * 16
    monkeypatch.setattr("jointnas.losses.cross_entropy", None)
    assert [Losses(run, tmp_path / "l.json", 2).of(c) for c in choices] == values


# ---- sandwich training ----------------------------------------------------------------------------------------------


def test_sandwich_training_lowers_the_losses_of_sub_networks(tmp_path: Path) -> None:
    given = sharing(context(tmp_path, search={"steps": 120, "lr_weight": 1e-2}))
    run = given.run(after=W4A8)
    some = [SPACE.structures()[0], SPACE.structures()[20], run.space.full()]
    before = [Losses(run, tmp_path / "before.json", 4).of(c) for c in some]
    steps = sandwich.sandwich(run, SPACE.structures()[0], lambda _: (some[1], None)) // (4 * 32)
    assert steps == 60
    after = [Losses(run, tmp_path / "after.json", 4).of(c) for c in some]
    assert all(a < b - 0.05 for a, b in zip(after, before, strict=True)), (before, after)
    assert read_metrics(run.folder)[-1]["step"] == steps


def test_sandwich_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(name: str) -> dict[str, torch.Tensor]:
        given = sharing(context(tmp_path / name))
        lonas.train(given)
        return sandwich.trained(given)[0].supernet.search_state()

    def killed(*_: Any) -> None:
        if len(list((tmp_path / "killed" / "shared" / "checkpoints").glob("step-*"))) > 1:
            raise KeyboardInterrupt

    whole, step = trained("whole"), sandwich.Progress.step
    monkeypatch.setattr(sandwich.Progress, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        trained("killed")
    monkeypatch.setattr(sandwich.Progress, "step", step)
    again = trained("killed")
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


def test_elastic_ranks(tmp_path: Path) -> None:
    """A pair of the first directions is what slicing it gives, forward and backward; other gradients stay."""
    run = context(tmp_path).run(after=W4A8)
    supernet = run.supernet.mode("weight").fix(run.space.full())
    linear: Any = supernet.blocks[1].mlp.up_proj
    with torch.no_grad():
        for p in supernet.lora_parameters():
            p.normal_(generator=seeded(0), std=0.1)
    batch = Batch(run.streams.weight[:16][None], run.streams.weight[:16][None])
    held = linear.lora_b.detach().clone()

    def gradients() -> tuple[torch.Tensor, torch.Tensor]:
        supernet.zero_grad()
        cross_entropy(supernet, batch).backward()
        return linear.lora_a.grad.clone(), linear.lora_b.grad.clone()

    whole = gradients()
    with torch.no_grad():
        values = {id(m): m.lora_b.clone() for m in supernet.modules() if hasattr(m, "lora_b")}
        for m in supernet.modules():
            if hasattr(m, "lora_b"):
                m.lora_b[:, 2:] = 0
    a, b = gradients()
    with torch.no_grad():
        for m in supernet.modules():
            if hasattr(m, "lora_b"):
                m.lora_b.copy_(values[id(m)])
    supernet.zero_grad()
    cross_entropy(supernet, batch).backward()
    with sandwich.first_directions(supernet, 2):
        cross_entropy(supernet, batch).backward()
    assert torch.equal(linear.lora_b, held)
    assert torch.allclose(linear.lora_b.grad[:, :2], whole[1][:, :2] + b[:, :2])
    assert torch.allclose(linear.lora_b.grad[:, 2:], whole[1][:, 2:])
    assert torch.allclose(linear.lora_a.grad, whole[0] + a)
    assert not a[2:].any()


def test_subnet_selection_takes_of_its_grid_what_is_fast_enough(tmp_path: Path) -> None:
    subnet_selection.train(sharing(context(tmp_path)))
    found = [subnet_selection.subnet_selection(context(tmp_path, target)) for target in (0.5, 0.1)]
    _, facts = sandwich.trained(context(tmp_path))
    grid = [Choice.from_dict(entry) for entry in facts["grid"]]
    for picked, target in zip(found, (0.5, 0.1), strict=True):
        assert picked.choice in [W4A8.on(c, 3) for c in grid]
        assert picked.run.bound.predict(picked.choice) <= target
    assert found[0].about["compared"] > found[1].about["compared"] >= 1
    assert grid[0] == min(grid, key=lambda c: count_params(CONFIG, c))


# ---- TangleNAS ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["weight", "arch"])
def test_mixture_of_prefixes(tmp_path: Path, mode: str) -> None:
    """Against its definition; with one certain depth, the cross-entropy of that many first blocks."""
    run = context(tmp_path).run(after=W4A8, depth="last", capture=False)
    supernet = run.supernet.mode(mode)
    assert supernet.block_rank == (0, 1, 2)
    with torch.no_grad():
        supernet.arch.logits["blocks"].copy_(torch.tensor([0.3, -0.5, 1.0]))
    supernet.draw(seeded(1))
    ids = run.streams.weight[:32].view(2, 16)
    loss = mixture_of_prefixes(supernet, Batch(ids, ids))
    sample = supernet.sample
    assert sample is not None
    x, step = supernet.embed(ids, sample)
    mixed: Any = 0
    for beta, block, one in zip([0.3, -0.5, 1.0], supernet.blocks, sample.blocks, strict=True):
        x = block(x, step, one._replace(gate=None))
        mixed = mixed + math.exp(beta) / sum(map(math.exp, (0.3, -0.5, 1.0))) * x
    _, states = supernet.norm(mixed, sample.masks, step.sizes)
    logits = F.linear(states, supernet.head)[:, :-1].flatten(0, 1)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, ids[:, 1:].flatten()).item(), rel=1e-5)
    loss.backward()
    assert (supernet.arch.logits["blocks"].grad is not None) == (mode == "arch")
    with torch.no_grad():
        supernet.arch.logits["blocks"].copy_(torch.tensor([0.0, 99.0, 0.0]))
    full = {k: v[..., -1:].expand_as(v) * 0 for k, v in supernet.arch.probs().items()}
    for key, value in full.items():
        value = value.clone()
        value[..., -1] = 1
        full[key] = value
    supernet.use(full)
    one = mixture_of_prefixes(supernet, Batch(ids, ids)).item()
    model = extract(supernet, Choice(128, 4, 32, 192, 2))
    assert one == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-4)


def test_tanglenas_keeps_the_first_blocks(tmp_path: Path) -> None:
    picked = tanglenas(context(tmp_path, target=0.3))
    assert picked.run.supernet.block_rank == (0, 1, 2)
    assert picked.run.bound.predict(picked.choice) <= 0.3
    assert picked.tokens == 2 * 12 * 32


# ---- bits by integer programming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_ilp_is_optimal(seed: int) -> None:
    """Against all 3^5 solutions, with options of infinite cost and more and less room."""
    generator = torch.Generator().manual_seed(seed)
    values, costs = (torch.rand(5, 3, generator=generator).tolist() for _ in range(2))
    costs[1][2] = math.inf
    room = [1.2, 1.8, 2.5, 9.0][seed % 4]
    every = [
        (sum(values[r][o] for r, o in enumerate(chosen)), chosen)
        for chosen in itertools.product(range(3), repeat=5)
        if sum(costs[r][o] for r, o in enumerate(chosen)) <= room
    ]
    found = ilp.solve(values, costs, room)
    if not every:
        assert found is None
        return
    assert found is not None
    assert tuple(found) == min(every)[1]
    assert ilp.solve(values, costs, 0.0) is None


@pytest.mark.parametrize("head", [False, True])
def test_ilp_of_measured_sensitivities(tmp_path: Path, head: bool) -> None:
    """The chosen bits have, of all bits of the full structure within the target, the least sum."""
    space = {**tiny.SPACE, "head_bits": [4, 16]} if head else tiny.SPACE
    config = tiny.config(tmp_path / "unit", space, target_latency_ms=0.5)
    given = context(tmp_path)
    given.config, given.table = config, synthetic(config.space.build())
    ilp.measure(given)
    picked = ilp.ilp(given)
    run = picked.run
    losses = Losses(run, given.shared / ilp.SENSITIVITIES, 2)
    known = len(losses.known)
    full = run.space.full()

    def summed(choice: Choice) -> float:
        rows = [
            replace(full, weight_bits=(*full.weight_bits[:b], choice.weight_bits[b], *full.weight_bits[b + 1 :]),
                    act_bits=(*full.act_bits[:b], choice.act_bits[b], *full.act_bits[b + 1 :]))
            for b in range(3)
        ]  # fmt: skip
        if head:
            rows.append(replace(full, head_bits=choice.head_bits))
        return sum(losses.of(row) - losses.of(full) for row in rows)

    structure = (full.hidden, full.heads, full.head_dim, full.intermediate, full.blocks)
    every = [
        c for c in run.space
        if (c.hidden, c.heads, c.head_dim, c.intermediate, c.blocks) == structure and run.bound.predict(c) <= 0.5
    ]  # fmt: skip
    assert summed(picked.choice) == pytest.approx(min(map(summed, every)))
    assert picked.about["summed_sensitivity"] == pytest.approx(summed(picked.choice))
    assert run.bound.predict(picked.choice) <= 0.5
    assert len(losses.known) == known, "all of them were measured before"


# ---- random and exhaustive ------------------------------------------------------------------------------------------


def test_random_choices_use_the_target(tmp_path: Path) -> None:
    given = context(tmp_path, target=0.3)
    found = []
    for given.number in range(3):
        picked = random(given)
        assert 0.27 <= picked.run.bound.predict(picked.choice) <= 0.3
        found.append(picked.choice)
    assert len(set(found)) == 3


def test_every_model_has_a_number() -> None:
    space = SearchSpace((64, 128), (4,), (32,), (64,), (1, 3), (4, 8), (8, 16), group_size=64, head_bits=(4, 16))
    bound = synthetic(space).bind(space, (2, 0, 1))
    every = {canonical(choice, bound) for choice in space}
    assert {numbered(space, (2, 0, 1), i) for i in range(count(space))} == every
    assert count(space) == len(every) == 2 * 2 * (4 + 4**3)


def test_bilevel_steps_take_another_loss(tmp_path: Path) -> None:
    seen: list[bool] = []

    def loss(supernet: Any, batch: Batch) -> torch.Tensor:
        seen.append(supernet.choice is not None)
        return cross_entropy(supernet, batch)

    optimise(context(tmp_path).run(after=W4A8), loss)
    assert sum(not fixed for fixed in seen) == 12 * 2 + 2 * 3  # both kinds of steps, and the gap's relaxed losses
    assert sum(seen) == 2 * 3
