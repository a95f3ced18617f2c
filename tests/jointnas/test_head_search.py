"""A search over the head's bits, too: objective, repair, steps, resume, and the whole mission."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from jointnas import bilevel, checkpoint, cli
from jointnas.baselines.random_choices import random_choices
from jointnas.bilevel import optimise
from jointnas.metrics import read_metrics
from jointnas.objective import Feasibility, Limits, Objective, entropies
from jointnas.run_folder import found_choice
from jointnas_kernels import hf
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency import OpSpec
from jointnas_kernels.nn import PackedLinear
from jointnas_kernels.space import Choice, SearchSpace
from tests.jointnas import tiny
from tests.latency.tables import CONFIG, synthetic

VALUES = {**tiny.SPACE, "head_bits": [4, 8, 16]}
SMALL = SearchSpace((64, 128), (4,), (32,), (192,), (1, 3), (4, 8), None, 64, head_bits=(4, 8, 16))


def probs(space: SearchSpace, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    keys = [k for k in ("hidden", "heads", "head_dim", "intermediate", "blocks", "weight_bits", "act_bits", "head_bits")
            if space.sizes(k)]  # fmt: skip
    rows = {k: (space.depth,) if k in ("weight_bits", "act_bits") else () for k in keys}
    return {k: (2 * torch.randn(*rows[k], len(space.sizes(k)), generator=g)).softmax(-1) for k in keys}


def log_probability(space: SearchSpace, given: dict[str, torch.Tensor], choice: Choice) -> float:
    total = 0.0
    for key, p in given.items():
        value = getattr(choice, key)
        for row, one in zip(p.double().log().view(-1, p.shape[-1]), value if p.dim() == 2 else [value], strict=True):
            total += row[space.sizes(key).index(one)].item()
    return total


def test_repair_takes_the_most_probable_choice_that_is_fast_enough() -> None:
    """By enumeration, head included; also where no kernel takes a precision of the head at one width."""
    def some(spec: OpSpec) -> bool:
        return spec.op != "lm_head" or spec.wbits != 8 or spec.k != 64

    bound = synthetic(SMALL, some).bind(SMALL)
    whole = synthetic(SMALL).bind(SMALL)
    times = sorted(whole.predict(c) for c in SMALL)
    repaired = set()
    for seed in range(6):
        check, given = Feasibility(CONFIG, bound, Limits(latency_max=times[len(times) // 3])), probs(SMALL, seed)
        best = max((c for c in SMALL if not check.violations(c)), key=lambda c: log_probability(SMALL, given, c))
        found = check.repair(given)
        assert not check.violations(found)
        assert log_probability(SMALL, given, found) >= log_probability(SMALL, given, best) - 1e-9
        repaired.add(found.head_bits)
    assert len(repaired) > 1
    fastest = min(bound.predict(c) for c in SMALL if not check.violations(c))
    with pytest.raises(JointNASError, match=f"its fastest choice takes {fastest:.3f} ms"):
        Feasibility(CONFIG, bound, Limits(latency_max=fastest / 2)).repair(given)


def test_the_objective_is_the_mean_over_choices(tmp_path: Path) -> None:
    bound, given = synthetic(SMALL).bind(SMALL), probs(SMALL, 0)
    given = {k: v.double().requires_grad_() for k, v in given.items()}
    config = tiny.config(tmp_path, VALUES, search={"lambda_ramp": 0.0})
    total, parts = Objective(config, CONFIG, bound).regularizer(given, 1)
    want = sum(math.exp(log_probability(SMALL, given, c)) * bound.predict(c) for c in SMALL)
    assert parts["latency_ms"] == pytest.approx(want, rel=1e-5)
    (slope,) = torch.autograd.grad(total, given["head_bits"])
    assert slope[0] < slope[2] < slope[1]  # of the made-up costs: W8A16 is the worst
    found = entropies(given, SMALL, (0, 1, 2))
    assert 0 < found["head_bits"] < 1


def test_baselines() -> None:
    space = SearchSpace.from_dict(VALUES)
    bound = synthetic(space).bind(space)
    peers = random_choices(replace(space.full(), head_bits=4), bound, CONFIG, 6, width=0.5)
    assert len({peer.head_bits for peer in peers}) > 1


def test_an_arch_step_moves_the_heads_logits(tmp_path: Path) -> None:
    """A weight step does not; towards what is fast where latency is all that counts."""
    run = tiny.start(tiny.config(tmp_path, VALUES, search={"eta": 1e4}))
    logits = run.supernet.arch.logits["head_bits"]
    objective = bilevel.Objective(run.config, run.model_config, run.bound)
    batches = bilevel.Batches(run.streams.arch, 2, 16, 0)
    weights = torch.optim.SGD(run.supernet.lora_parameters(), lr=0.1)
    bilevel.weight_step(run, weights, batches, 0)
    assert torch.equal(logits, torch.zeros(3))
    bilevel.arch_step(run, objective, torch.optim.SGD(run.supernet.arch_parameters(), lr=0.1), batches, 0)
    assert logits[0] > logits[2] > logits[1]


@pytest.mark.slow
def test_resumed_is_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {name: tiny.config(tmp_path / name, VALUES, resume="auto") for name in ("whole", "killed")}
    torch.manual_seed(0)
    optimise(tiny.start(config["whole"]))
    step = bilevel.arch_step

    def killed(run: Any, objective: Any, optimizer: Any, batches: Any, at: int, *rest: Any) -> Any:
        if at == 7:
            raise KeyboardInterrupt
        return step(run, objective, optimizer, batches, at, *rest)

    monkeypatch.setattr(bilevel, "arch_step", killed)
    with pytest.raises(KeyboardInterrupt):
        optimise(tiny.start(config["killed"]))
    monkeypatch.setattr(bilevel, "arch_step", step)
    optimise(tiny.start(config["killed"]))
    whole, again = (checkpoint.load(tmp_path / n / "checkpoints" / "step-12")[0] for n in ("whole", "killed"))
    assert {"arch.head_bits", "head_quantizer.clip"} <= whole["supernet"].keys()
    assert not torch.equal(whole["supernet"]["arch.head_bits"], torch.zeros(3))
    assert (whole["supernet"]["head_quantizer.clip"] < 1).any()
    for name, group in whole.items():
        assert all(torch.equal(value, again[name][key]) for key, value in group.items()), name
    for row in read_metrics(tmp_path / "whole"):
        assert len(row["probs"]["head_bits"]) == 3
        assert "head_bits" in row["entropy"]
    assert found_choice(tmp_path / "killed").head_bits in (4, 8, 16)


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["decode", "prefill"])
def test_the_whole_mission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workload: str) -> None:
    """One quantized head is all there is to choose: profile, search, distil, export, reload, measure, report."""
    monkeypatch.setattr("jointnas.data.load", lambda *a, **k: tiny.streams())
    source, run, out = (tmp_path / n for n in ("model", "run", "out"))
    tiny.model().save_pretrained(source)
    space = {**tiny.SPACE, "head_bits": [4, 8] if workload == "decode" else [8]}
    assert cli.main([
        "search", "--model.source", str(source), "--out", str(run), "--latency.seq=8", f"--latency.workload={workload}",
        "--latency.seconds_per_operation=1e-4", "--latency.calibrate=2", "--search.steps=4", "--search.lr_arch=0.1",
        "--search.lora_rank=4", "--search.importance_batches=1", "--data.seq_len=16", "--data.batch_size=2",
        "--finetune.steps=2", "--eval.tokens=256", "--eval.tasks=[]", "--progress=false", "--quantizer.init=clip",
        *(f"--space.{k}={json.dumps(v)}" for k, v in space.items()),
    ]) == 0  # fmt: skip
    choice = found_choice(run)
    assert choice.quantizes_head
    original, found = json.loads((run / "eval.json").read_text())
    assert found["measured_ms"] > 0
    assert found["bytes"] < original["bytes"]
    assert cli.main(["export", "--run", str(run), "--out", str(out)]) == 0
    x = torch.randint(97, (1, 12))
    stock, packed = AutoModelForCausalLM.from_pretrained(out), hf.load(out)
    assert isinstance(packed.lm_head, PackedLinear)
    assert packed.lm_head.weight_bits == choice.head_bits
    with torch.no_grad():
        logits = stock(x).logits
        assert torch.equal(stock.lm_head(torch.eye(choice.hidden)).T, stock.get_input_embeddings().weight)
        assert (packed(x).logits - logits).abs().max() <= 0.05 * logits.abs().max()
    assert (run / "plots" / "bits.png").is_file()
