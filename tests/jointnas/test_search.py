"""The bilevel loop: resuming after SIGKILL is bit-identical, limits hold, everything is logged."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from jointnas import checkpoint
from jointnas.distillation import bake, distil, original_logits, student_of
from jointnas.initialise import initialise
from jointnas.metrics import read_metrics
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.space import Choice, count_params
from tests.jointnas import tiny

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
# of logits: a merged weight is rounded otherwise than W + s·BA in the supernet, by the processor, and one that
# stands between two levels, as those on an 8-bit base grid may, gets the other one
MERGED = 5e-3


def run_in_process(out: Path, kill_at: int | None = None) -> None:
    """Runs the tiny search; with `kill_at`, SIGKILLs it as soon as that checkpoint is there."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.jointnas.tiny", str(out), str(STEPS)], cwd=ROOT, env=environment
    )
    try:
        if kill_at is None:
            assert process.wait(300) == 0
            return
        deadline = time.monotonic() + 300
        while not [s for s in checkpoint.steps(out / "checkpoints") if s >= kill_at]:
            assert process.poll() is None, "finished before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()


@pytest.mark.slow
def test_killed_and_resumed_ends_bit_identical(tmp_path: Path) -> None:
    run_in_process(tmp_path / "whole")
    run_in_process(tmp_path / "killed", kill_at=6)
    assert max(checkpoint.steps(tmp_path / "killed" / "checkpoints")) < STEPS
    run_in_process(tmp_path / "killed")
    folders = [tmp_path / name / "checkpoints" / f"step-{STEPS}" for name in ("whole", "killed")]
    (tensors, state), (tensors_again, state_again) = (checkpoint.load(f) for f in folders)
    for name, group in tensors.items():
        assert group.keys() == tensors_again[name].keys()
        for key, value in group.items():
            assert torch.equal(value, tensors_again[name][key]), (name, key)
    assert {k: v for k, v in state.items() if k != "seconds"} == {
        k: v for k, v in state_again.items() if k != "seconds"
    }

    def rows(name: str) -> list[dict[str, object]]:
        return [{k: v for k, v in r.items() if k != "seconds"} for r in read_metrics(tmp_path / name)]

    assert rows("whole") == rows("killed")
    choices = [json.loads((tmp_path / n / "choice.json").read_text())["choice"] for n in ("whole", "killed")]
    assert choices[0] == choices[1]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("search") / "run"
    tiny.search(tiny.config(out))
    return out


def test_run_folder(searched: Path) -> None:
    names = {p.name for p in searched.iterdir()}
    assert {"config.yaml", "env.json", "metrics.jsonl", "choice.json", "checkpoints", "tensorboard"} <= names
    assert len(checkpoint.steps(searched / "checkpoints")) == 2
    assert not list(searched.rglob("*.pkl")) + list(searched.rglob("*.pt")) + list(searched.rglob("*.bin"))


def test_metrics(searched: Path) -> None:
    rows = read_metrics(searched)
    assert [r["step"] for r in rows] == [2, 4, 6, 8, 10, 12]
    for row in rows:
        for key in ("ce_weight", "ce_arch", "latency_ms", "params", "entropy_max", "lambda"):
            assert math.isfinite(row[key]), key
        assert set(row["probs"]) == {
            "hidden", "heads", "head_dim", "intermediate", "blocks", "weight_bits", "act_bits"
        }  # fmt: skip
        assert ("gap" in row) == (row["step"] % 4 == 0)
        if "gap" in row:
            assert row["gap"] == pytest.approx(row["ce_argmax"] - row["ce_relaxed"])


def test_never_overwrites(searched: Path) -> None:
    with pytest.raises(JointNASError, match="already holds a search; pass --resume auto"):
        tiny.search(tiny.config(searched))


def test_resuming_with_another_configuration(searched: Path) -> None:
    with pytest.raises(JointNASError, match=r"another configuration: search\.eta was 1\.0, is 2\.0"):
        tiny.search(tiny.config(searched, resume="auto", search={"eta": 2.0}))


def test_damaged_newest_checkpoint_is_skipped(searched: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(searched, copy)
    (copy / "checkpoints" / "step-12" / "COMPLETE").unlink()
    newest = checkpoint.latest(copy / "checkpoints")
    assert newest is not None
    assert newest.name == "step-10"


def test_converges_and_obeys_the_budget(tmp_path: Path) -> None:
    """A strong budget: the found model must be within it, whatever the argmax was."""
    run, found = tiny.search(
        tiny.config(tmp_path, tiny.NO_BITS, search={"steps": 60, "budget_max": 0.4, "eta": 5.0, "entropy_stop": 0.5})
    )
    assert found.params <= 0.4 * count_params(run.model_config, Choice(128, 4, 32, 192, 3))
    assert found.params == count_params(run.model_config, found.choice)
    assert found.predicted_ms == pytest.approx(run.bound.predict(found.choice))
    assert found.converged
    assert found.steps < 60


def test_hard_cap_warns_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, found = tiny.search(tiny.config(tmp_path, search={"steps": 2}, target_latency_ms=0.9))
    assert not found.converged
    assert "DID NOT CONVERGE" in caplog.text
    assert found.predicted_ms <= 0.9
    if found.repaired:
        assert "nearest feasible" in caplog.text


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"search": {"budget_max": 0.001}}, "no choice of the space satisfies the limits"),
        ({"target_latency_ms": 1e-6}, "its fastest choice takes"),
        ({"search": {"budget_min": 0.9, "budget_max": 0.5}}, "the budget is empty"),
    ],
    ids=["params", "latency", "empty"],
)
def test_impossible_limits_fail_before_the_search(tmp_path: Path, sections: dict, message: str) -> None:
    with pytest.raises(JointNASError, match=message):
        tiny.start(tiny.config(tmp_path, **sections))
    assert not (tmp_path / "checkpoints").exists()


def test_a_target_above_everything_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.start(tiny.config(tmp_path / "a", target_latency_ms=500.0))
    assert "target_latency_ms = 500 limits nothing: the largest choice takes " in caplog.text
    caplog.clear()
    tiny.start(tiny.config(tmp_path / "b", target_latency_ms=0.9))
    assert "limits nothing" not in caplog.text


def test_relaxations_and_warm_up(tmp_path: Path) -> None:
    for kind in ("reinmax", "gumbel"):
        run, found = tiny.search(
            tiny.config(
                tmp_path / kind, search={"steps": 3, "relaxation": kind, "bit_relaxation": kind, "weight_warmup": 2}
            )
        )
        assert run.supernet.arch.bit_relaxation == kind
        run.space.check(found.choice)


def test_the_mean_entropy_ends_a_search_earlier_than_the_largest(tmp_path: Path) -> None:
    steps = {}
    for on in ("max", "mean"):
        options = {"steps": 60, "budget_max": 0.4, "eta": 5.0, "entropy_stop": 0.6, "entropy_stop_on": on}
        _, found = tiny.search(tiny.config(tmp_path / on, tiny.NO_BITS, search=options))
        assert found.converged
        steps[on] = found.steps
        last = read_metrics(tmp_path / on)[-1]["entropy"]
        judged = {"max": max(last.values()), "mean": sum(last.values()) / len(last)}
        assert judged[on] < 0.6
        part = json.loads((tmp_path / on / "convergence.json").read_text())["search"]
        assert part["decided"] == (judged["max"] < 0.6)
    assert steps["mean"] < steps["max"]


def test_a_shared_pair_is_searched_resumed_and_distilled(tmp_path: Path) -> None:
    """The pair that all precisions share has one optimizer state; a search in two parts ends as one in one."""
    whole, _ = tiny.search(tiny.config(tmp_path / "whole", search={"steps": 4, "lora_pairs": "shared"}))
    config = tiny.config(tmp_path / "parts", resume="auto", search={"steps": 4, "lora_pairs": "shared"})
    tiny.search(config)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-4")
    resumed, found = tiny.search(config)
    _, linear = next(whole.supernet.linears())
    assert linear.lora_a.shape == (1, 4, linear.in_features)
    assert linear.lora_b.any()
    own, other = (run.supernet.search_state() for run in (whole, resumed))
    assert all(torch.equal(own[name], other[name]) for name in own)
    fixed = resumed.supernet.fix(found.choice)
    ids = resumed.streams.held_out[None, :16]
    for train in ("full", "lora"):
        student = student_of(resumed.supernet, found.choice, train)
        torch.testing.assert_close(bake(student)(ids).logits, fixed(ids).logits, rtol=0, atol=MERGED)


def test_a_shared_pair_is_not_learned_per_precision(tmp_path: Path) -> None:
    with pytest.raises(JointNASError, match=r"lora_pairs: shared does not go with quantizer\.init: reconstruct"):
        tiny.config(tmp_path, search={"lora_pairs": "shared"}, quantizer={"init": "reconstruct"})
    run = tiny.start(tiny.config(tmp_path, search={"lora_pairs": "shared"}))
    with pytest.raises(JointNASError, match=r"precisions share one\. Allowed: rtn, clip, omniquant"):
        initialise(run.supernet, "reconstruct", run.streams.weight[None, :16])


PACKED = {"model": {"base_bits": 8}, "finetune": {"gradient_checkpointing": True, "train": "lora"}}


def test_packed_base_weights_are_searched_resumed_and_distilled(tmp_path: Path) -> None:
    search = {"steps": 4, "gradient_checkpointing": True}
    whole, _ = tiny.search(tiny.config(tmp_path / "whole", search=search, **PACKED))
    config = tiny.config(tmp_path / "parts", resume="auto", search=search, **PACKED)
    tiny.search(config)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-4")
    resumed, found = tiny.search(config)
    own, other = (run.supernet.search_state() for run in (whole, resumed))
    assert all(torch.equal(own[name], other[name]) for name in own)
    for (_, mine), (_, its) in zip(whole.supernet.linears(), resumed.supernet.linears(), strict=True):
        assert mine.base_bits == its.base_bits == 8
        assert torch.equal(mine.weight, its.weight)
    fixed, ids = resumed.supernet.fix(found.choice), resumed.streams.held_out[None, :16]
    student = student_of(resumed.supernet, found.choice, "lora")
    distil(
        student, original_logits(resumed.supernet), resumed.streams.all, config.finetune, batch_size=2, seq_len=16,
    )  # fmt: skip
    assert bake(student)(ids).logits.isfinite().all()
    for train in ("full", "lora"):
        start = student_of(resumed.supernet, found.choice, train)
        torch.testing.assert_close(bake(start)(ids).logits, fixed(ids).logits, rtol=0, atol=MERGED)


@pytest.mark.parametrize(("sections", "message"), [
    ({}, r"set search\.gradient_checkpointing and finetune\.gradient_checkpointing"),
    ({"search": {"gradient_checkpointing": True}}, r"set finetune\.gradient_checkpointing"),
    (
        {"parallel": {"mode": "full"}, "search": {"gradient_checkpointing": True},
         "finetune": {"gradient_checkpointing": True}}, r"goes with parallel\.mode: replicate only",
    ),
    ({"model": {"base_bits": 4}}, r"model\.base_bits"),
])  # fmt: skip
def test_packed_base_weights_where_they_save_nothing(tmp_path: Path, sections: dict, message: str) -> None:
    with pytest.raises(JointNASError, match=message):
        tiny.config(tmp_path, **{"model": {"base_bits": 8}, **sections})
