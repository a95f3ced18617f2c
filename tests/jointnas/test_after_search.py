"""Pruning, distillation, export and reload, report."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from jointnas import exporting
from jointnas.config import FinetuneConfig
from jointnas.distillation import bake, distil, distillation_loss, learning_rate, original_logits, trainable
from jointnas.metrics import read_metrics
from jointnas.results import html_table, text_table
from jointnas.verbs.report import report
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import extract
from jointnas_kernels.space import Choice
from tests.jointnas import tiny

JOINT = Choice(64, 4, 16, 192, 2, (4, 8, 4), (8, 16, 8))
PLAIN = Choice(64, 4, 32, 192, 2)


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory):
    return tiny.search(tiny.config(tmp_path_factory.mktemp("joint") / "run"))[0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory):
    return tiny.search(tiny.config(tmp_path_factory.mktemp("plain") / "run", tiny.NO_BITS))[0]


def case(request: pytest.FixtureRequest, name: str):
    return request.getfixturevalue(name), JOINT if name == "joint" else PLAIN


@pytest.mark.parametrize("name", ["joint", "plain"])
def test_training_starts_at_the_extracted_model(request: pytest.FixtureRequest, name: str) -> None:
    """Live quantizers on merged weights, the same baked in, and `extract` are one function."""
    run, choice = case(request, name)
    ids = run.streams.held_out[:32][None]
    student = trainable(run.supernet, choice).eval()
    want = extract(run.supernet, choice)(ids).logits
    # the LoRA product of sliced matrices rounds differently, and a rounded weight or activation may change its level
    tolerance = 1e-4 if name == "plain" else 5e-3
    got = student(ids).logits
    assert torch.allclose(got, want, atol=tolerance)
    assert torch.allclose(bake(student)(ids).logits, got, atol=1e-5)


@pytest.mark.parametrize("name", ["joint", "plain"])
def test_export_reloads_exactly(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> None:
    run, choice = case(request, name)
    student = trainable(run.supernet, choice)
    distil(student, original_logits(run.supernet), run.streams.all, FinetuneConfig(steps=2), batch_size=2, seq_len=16)
    model = bake(student)
    rank = run.supernet.block_rank
    folder = exporting.export_model(model, tmp_path / "model", choice, rank, base="tiny", licence="mit")
    ids = run.streams.held_out[:32][None]
    again = exporting.reload(folder)
    assert torch.equal(again(ids).logits, model(ids).logits)
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    assert ("activation bits" in card) == (name == "joint")
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(JointNASError, match="no exported model"):
        exporting.reload(tmp_path)


def test_training_keeps_weights_on_the_grid(joint) -> None:
    """After quantization-aware training, each group of a 4-bit weight has at most 16 values."""
    student = trainable(joint.supernet, JOINT)
    distil(student, original_logits(joint.supernet), joint.streams.all, FinetuneConfig(steps=3, lr=1e-2), batch_size=2,
           seq_len=16)  # fmt: skip
    model = bake(student)
    kept = sorted(joint.supernet.block_rank[:2])
    for layer, b in zip(model.model.layers, kept, strict=True):
        weight = layer.mlp.up_proj.weight.view(-1, 64)
        most = max(len(row.unique()) for row in weight)
        assert most <= 2 ** JOINT.weight_bits[b]  # type: ignore[index]


def test_distillation_loss(plain) -> None:
    """KL to itself is 0 and leaves (1 - kd) CE; a padded vocabulary or batch does not change the scale."""
    model = tiny.model()
    ids = plain.streams.held_out[:64].view(2, 32)
    loss, parts = distillation_loss(model, lambda x: model(x).logits, ids, FinetuneConfig(kd=0.7, temperature=2.0))
    assert parts["kl"].item() == pytest.approx(0, abs=1e-6)
    assert loss.item() == pytest.approx(0.3 * parts["ce"].item(), rel=1e-5)
    assert parts["ce"].item() == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
    other = tiny.model()
    with torch.no_grad():
        other.lm_head.weight.add_(0.05 * torch.randn_like(other.lm_head.weight))
    twice = torch.cat((ids, ids))
    one, two = (
        distillation_loss(other, lambda x: model(x).logits, x, FinetuneConfig())[0].item() for x in (ids, twice)
    )
    assert one == pytest.approx(two, rel=1e-5)


def test_distillation_learns(plain) -> None:
    student = trainable(plain.supernet, PLAIN)
    teacher = original_logits(plain.supernet)
    ids = plain.streams.weight[:512].view(16, 32)
    config = FinetuneConfig(steps=30, lr=3e-3, kd=0.5)
    before = distillation_loss(student, teacher, ids, config)[0].item()
    distil(student, teacher, plain.streams.weight, config, batch_size=8, seq_len=32)
    assert distillation_loss(student, teacher, ids, config)[0].item() < before - 0.05


def test_gradient_checkpointing_changes_nothing_and_bf16_little(plain) -> None:
    teacher = original_logits(plain.supernet)

    def trained(**options: bool) -> torch.nn.Module:
        config = FinetuneConfig(steps=4, **options)
        student = trainable(plain.supernet, PLAIN)
        return distil(student, teacher, plain.streams.weight, config, batch_size=2, seq_len=16)

    usual, again, low = trained(), trained(gradient_checkpointing=True), trained(bf16=True)
    assert not again.is_gradient_checkpointing
    assert all(torch.equal(p, q) for p, q in zip(usual.parameters(), again.parameters(), strict=True))
    apart = [(p - q).abs().max().item() for p, q in zip(usual.parameters(), low.parameters(), strict=True)]
    assert 0 < max(apart) < 4 * 2 * FinetuneConfig().lr  # AdamW moves a weight by at most about lr per step


def test_finetuning_resumes_exactly(plain, tmp_path: Path) -> None:
    config = FinetuneConfig(steps=8, save_every=3, log_every=1)
    teacher = original_logits(plain.supernet)

    def run(folder: Path, steps: FinetuneConfig, resume: bool = False) -> torch.nn.Module:
        student = trainable(plain.supernet, PLAIN)
        return distil(
            student, teacher, plain.streams.all, steps, batch_size=2, seq_len=16, folder=folder, resume=resume
        )

    whole = run(tmp_path / "a", config)
    run(tmp_path / "b", config)
    again = run(tmp_path / "b", config, resume=True)  # continues from step 6
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    rows = [{**r} for r in read_metrics(tmp_path / "a")]
    assert rows == read_metrics(tmp_path / "b")


def test_learning_rate() -> None:
    config = FinetuneConfig(steps=100, warmup=0.1)
    values = [learning_rate(config, s) for s in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert max(values) == pytest.approx(1.0)
    assert values[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))


def test_report(joint) -> None:
    path = report(str(joint.folder))
    page = path.read_text()
    assert page.count("data:image/png;base64,") >= 3
    assert "http" not in page.replace("http-equiv", "")  # nothing is loaded from elsewhere
    assert {p.name for p in (joint.folder / "plots").iterdir()} >= {"probabilities.png", "curves.png", "bits.png"}


def test_tables() -> None:
    rows = [
        {"name": "original", "params": 1000, "bytes": 2e6, "measured_ms": 1.0, "predicted_ms": 1.1, "perplexity": 9.0,
         "context": 256, "tasks": {"a": {"acc": 0.5, "acc_stderr": 0.05, "acc_norm": 0.6, "shots": 5, "items": 100}}},
        {"name": "<found>", "params": 10, "bytes": 1e6, "measured_ms": None, "predicted_ms": 0.5, "perplexity": 11.0,
         "context": 256, "tasks": {"a": {"acc": 0.25, "acc_stderr": 0.04, "shots": 5, "items": 100}}},
    ]  # fmt: skip
    lines = text_table(rows).splitlines()
    models, tasks = lines[: lines.index("")], lines[lines.index("") + 1 :]
    assert len({len(line) for line in models}) == len({len(line) for line in tasks}) == 1
    assert "perplexity (256 tokens)" in models[0]
    assert "".join(tasks[-1].split()) == "a510050.0±5.060.025.0±4.0–"
    assert len(text_table([{**row, "tasks": {}} for row in rows]).splitlines()) == 4
    assert "&lt;found&gt;" in html_table(rows)
