"""Structures that the stock config class refuses, through preparation, objective, repair, baselines and tables."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from jointnas import loading
from jointnas.baselines.random_choices import random_choices
from jointnas.bilevel import optimise
from jointnas.config import ModelConfig, SpaceConfig
from jointnas.objective import Feasibility, Limits, Objective
from jointnas.preparation import measure_table, prepare
from jointnas.run_folder import read_json
from jointnas.verbs import table as verbs
from jointnas.verbs.report import report
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import extract
from jointnas_kernels.hf.families import build as build_model
from jointnas_kernels.latency import LatencyTable, profile
from jointnas_kernels.latency.schema import Calibration
from jointnas_kernels.space import BITS, STRUCTURE, Choice, SearchSpace, count_params
from tests.jointnas import tiny
from tests.latency.tables import calm, synthetic

CONFIG = LlamaConfig(
    vocab_size=97, hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=16, intermediate_size=64,
    num_hidden_layers=2, tie_word_embeddings=True, max_position_embeddings=64, pad_token_id=None,
)  # fmt: skip
VALUES: dict[str, Any] = {  # 32 and 64 are no multiples of 6
    "hidden": [32, 64, 96], "heads": [2, 4, 6], "head_dim": [16], "intermediate": [32, 64], "blocks": [1, 2],
    "weight_bits": [4, 8], "act_bits": [8, 16], "group_size": 16,
}  # fmt: skip
SPACE, LINES = SearchSpace.from_dict(VALUES).feasible(CONFIG)


def probs(seed: int, space: SearchSpace = SPACE) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    shapes = {k: (space.depth,) * (k in BITS) + (len(space.sizes(k)),) for k in (*STRUCTURE, *BITS)}
    return {k: (2 * torch.randn(shape)).softmax(-1) for k, shape in shapes.items()}


def log_probability(given: dict[str, torch.Tensor], choice: Any) -> float:
    total = 0.0
    for key in (*STRUCTURE, *BITS):
        value = getattr(choice, key)
        rows = given[key].double().log().view(-1, len(SPACE.sizes(key)))  # of one row, but for bits
        for row, one in zip(rows, value if key in BITS else [value], strict=True):
            total += row[SPACE.sizes(key).index(one)].item()
    return total


def test_the_objective_is_the_mean_over_feasible_choices(tmp_path: Path) -> None:
    bound, given = synthetic(SPACE, config=CONFIG).bind(SPACE), probs(0)
    search = {
        "budget_max": 0.5, "lambda_budget": 20, "lambda_ramp": 0.0, "mu_infeasible": 3.0, "entropy_weight": 0,
    }  # fmt: skip
    config = tiny.config(tmp_path, VALUES, search=search)
    total, parts = Objective(config, CONFIG, bound).regularizer(given, 1)
    limit = 0.5 * count_params(CONFIG, SPACE.full())
    mass = latency = params = over = 0.0
    for choice in SPACE:
        p = 2.718281828459045 ** log_probability(given, choice)
        mass += p
        latency += p * bound.predict(choice)
        params += p * count_params(CONFIG, choice)
        over += p * max(0.0, count_params(CONFIG, choice) / limit - 1)
    assert parts["infeasible"] == pytest.approx(1 - mass, rel=1e-5)
    assert parts["latency_ms"] == pytest.approx(latency / mass, rel=1e-5)
    assert parts["params"] == pytest.approx(params / mass, rel=1e-5)
    assert parts["penalty"] == pytest.approx(over / mass, rel=1e-5)
    want = latency / mass / bound.original() + 20 * over / mass + 3 * (1 - mass)
    assert total.item() == pytest.approx(want, rel=1e-5)


def test_repair_takes_the_most_probable_feasible_choice() -> None:
    bound = synthetic(SPACE, config=CONFIG).bind(SPACE)
    sizes = sorted(count_params(CONFIG, c) for c in SPACE.structures())
    for seed in range(4):
        check, given = Feasibility(CONFIG, bound, Limits(sizes[3], sizes[-6])), probs(seed)
        best = max((c for c in SPACE if not check.violations(c)), key=lambda c: log_probability(given, c))
        assert check.repair(given) == best
    wrong = Choice(64, 6, 16, 64, 2, (4, 4), (8, 8))
    assert "hidden 64, heads 6, head_dim 16 are infeasible together" in check.violations(wrong)[-1]
    with pytest.raises(JointNASError, match=f"spans {sizes[0]:,} to {sizes[-1]:,} parameters and its fastest"):
        Feasibility(CONFIG, bound, Limits(params_max=1)).repair(given)


def test_baselines_are_feasible() -> None:
    bound = synthetic(SPACE, config=CONFIG).bind(SPACE)
    found = SPACE.nearest(SPACE.full())
    peers = random_choices(found, bound, CONFIG, 8, width=0.5)
    assert all(SPACE.allows(peer) for peer in peers)


def test_a_search_names_them_once_and_ends_feasible(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model: Any = build_model(CONFIG).eval()
    values = {**VALUES, "hidden": [33, *VALUES["hidden"]], "weight_bits": "none"}
    config = tiny.config(tmp_path / "run", values, search={"steps": 4, "lr_arch": 0.5})
    unquantized, _ = config.space.build().feasible(CONFIG)
    with caplog.at_level(logging.WARNING):
        run = prepare(config, model, tiny.streams(), synthetic(unquantized, config=CONFIG))
        found = optimise(run)
    removed = [r.getMessage() for r in caplog.records if r.getMessage().startswith("search space: removed")]
    assert [line.removeprefix("search space: removed ") for line in removed] == run.removed
    assert [line.split()[3:5] for line in removed] == [["hidden", "33:"], ["2", "of"]]
    assert run.space == run.supernet.space == unquantized
    assert run.space.allows(found.choice)
    assert run.space.allows(found.argmax)
    extract(run.supernet, found.choice)
    environment = read_json(run.folder / "env.json")
    assert environment["removed"] == run.removed
    assert SearchSpace.from_dict(environment["space"]) == run.space
    assert report(str(run.folder)).is_file()


def test_an_empty_space_is_an_error_before_anything_is_measured(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(loading, "model_config", lambda _: CONFIG)
    monkeypatch.setattr(loading, "load_model", lambda _: pytest.fail("loaded"))
    values = {**VALUES, "hidden": [64], "heads": [6]}
    with pytest.raises(JointNASError, match=r"no hidden, heads.* feasible.*Heads that fit hidden 64: 2, 4\."):
        prepare(tiny.config(tmp_path, values))
    with pytest.raises(JointNASError, match="Heads that fit hidden 64: 2, 4"):
        verbs.measure(str(tmp_path / "table.jsonl"), SpaceConfig(**values), ModelConfig())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("busy", ["stop", "mark"])
def test_a_table_that_misses_whole_models(busy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By 60 % is no table: everything is measured anew by the next call; or used, with a mark."""
    out, table = tmp_path / "table.jsonl", synthetic(SPACE, config=CONFIG)
    config = loading.resolve(tiny.config(tmp_path, VALUES, latency={"calibrate": 3, "busy": busy}))
    monkeypatch.setattr("jointnas.preparation.profile", lambda *a, **k: table)

    def calibrated(*mapes: float) -> None:
        made = []
        for mape in mapes:
            points = [(1.0, 2, 1.0 + mape), (2.0, 3, 2.0 * (1 + mape))]
            fitted = Calibration(fixed=0.0, per_block=0.0, mape_before=mape, mape=mape, points=points)
            made.append(LatencyTable(table.header, table.rows, fitted))
        monkeypatch.setattr("jointnas.preparation.calibrate", lambda *a, **k: made.pop(0))

    calibrated(0.7, 0.6)
    if busy == "stop":
        with pytest.raises(JointNASError, match=r"miss whole models by 60% .*allowed: 25%.* measured anew"):
            measure_table(config, SPACE, CONFIG, out)
        saved = LatencyTable.load(out, None)
        assert saved.calibration is None
    else:
        saved = measure_table(config, SPACE, CONFIG, out)
        assert saved.calibration is not None
        assert saved.calibration.contended
        assert "and its whole models" in saved.caution
    assert all(row.contended for row in saved.rows if row.status == "ok")
    calibrated(0.6, 0.2)  # once is no reason to stop
    saved = measure_table(config, SPACE, CONFIG, tmp_path / "good.jsonl")
    assert not saved.caution
    assert saved.tolerance == pytest.approx(2 * (1 - 1 / 1.2))
    assert synthetic().tolerance == math.inf


@pytest.mark.slow
def test_profile_and_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What once was a traceback after minutes: random whole models, some of which no stock model could be."""
    out = tmp_path / "table.jsonl"
    small = {**VALUES, "hidden": [64, 96], "heads": [2, 6], "intermediate": [32]}
    small |= dict.fromkeys(BITS, "none")
    latency = {"seq": 4, "seconds_per_operation": 1e-4, "calibrate": 5, "busy": "mark", "threads": 1}
    latency["backends"] = ["torch"]
    config = tiny.config(tmp_path, small, latency=latency)
    monkeypatch.setattr(loading, "model_config", lambda _: CONFIG)
    config = loading.resolve(config)
    monkeypatch.setattr("jointnas.preparation.profile", lambda *a, **k: profile(*a, **k, watch=calm()))
    feasible, lines = config.space.build().feasible(CONFIG)
    table = measure_table(config, feasible, CONFIG, out)
    assert table.calibration is not None
    assert len(table.calibration.points) <= 5
    linears = {(s.n, s.k) for s in table.specs if s.op == "linear"}
    assert {(96, 96), (32, 64)} <= linears
    assert not {(96, 64), (64, 96)} & linears  # queries and output of 6 heads in 64 channels
    assert LatencyTable.load(out, None).coverage(feasible, CONFIG).missing == []
    monkeypatch.setattr(loading, "model_config", lambda _: CONFIG)
    shown = verbs.show(str(out), SpaceConfig(**small), ModelConfig())
    assert "0 not yet tried" in shown
    assert f"not in it: {lines[0]}" in shown
