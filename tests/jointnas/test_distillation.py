"""Distillation with LoRA alone, and of all weights in low precision: what is trained, resumed and exported exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from jointnas import checkpoint, exporting
from jointnas.config import FinetuneConfig
from jointnas.data import Streams
from jointnas.distillation import (
    Trained,
    bake,
    distil,
    distillation_loss,
    original_logits,
    student_of,
    trained_parameters,
)
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import Supernet, convert, extract
from jointnas_kernels.nn.linear import SupernetLinear
from jointnas_kernels.space import Choice, count_params
from tests.jointnas import tiny

JOINT = Choice(64, 4, 16, 192, 2, (4, 8, 4), (8, 16, 8))
PLAIN = Choice(64, 4, 32, 192, 2)
HEAD = Choice(64, 4, 32, 192, 2, head_bits=4)
CHOICES = {"joint": JOINT, "plain": PLAIN, "head": HEAD, "all": replace(JOINT, head_bits=8)}
SPACES = {"joint": tiny.SPACE, "plain": tiny.NO_BITS}
SPACES |= {"head": {**tiny.NO_BITS, "head_bits": [4, 16]}, "all": {**tiny.SPACE, "head_bits": [4, 8, 16]}}


def supernet(name: str, dtype: torch.dtype = torch.float32) -> Supernet:
    """As a search would leave it: LoRA pairs that are not 0."""
    space = tiny.config("nowhere", SPACES[name]).space.build()
    made = convert(tiny.model().to(dtype), space, lora_rank=4)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, linear in made.linears():
            linear.lora_b.copy_(0.05 * torch.randn(linear.lora_b.shape, generator=generator))
        if made.head_quantizer is not None:
            made.head_quantizer.clip.mul_(0.9)
    return made


def trained(
    source: Supernet, name: str, folder: Path | None = None, resume: bool = False, **options: object
) -> nn.Module:
    config = FinetuneConfig(**{"steps": 4, "log_every": 1, "save_every": 3, **options})
    student = student_of(source, CHOICES[name], config.train)
    return distil(
        student, original_logits(source), text().all, config, batch_size=2, seq_len=16, folder=folder, resume=resume,
        progress=False, tensorboard=False,
    )  # fmt: skip


def text() -> Streams:
    return tiny.streams(2048)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["joint", "plain"])
def test_lora_starts_at_the_extracted_model(name: str, dtype: torch.dtype) -> None:
    source = supernet(name, dtype)
    student = student_of(source, CHOICES[name], "lora").eval()
    ids = text().held_out[:32][None]
    want, got = extract(source, CHOICES[name])(ids).logits, bake(student)(ids).logits
    # s B A of sliced matrices rounds differently, and a rounded weight or activation may change its level
    near = {torch.float32: 5e-3 if name == "joint" else 1e-4, torch.bfloat16: 0.25}[dtype]
    assert (got - want).abs().max() < near
    assert bake(student).config.to_dict() == extract(source, CHOICES[name]).config.to_dict()


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("name", CHOICES)
def test_distilled_is_exported_is_reloaded(name: str, train: str, tmp_path: Path) -> None:
    source = supernet(name)
    student = trained(source, name, train=train, lr=1e-2)
    ids = text().held_out[:32][None]
    live = student(ids).logits
    model = bake(student)
    assert torch.allclose(model(ids).logits, live, atol=1e-4)
    folder = exporting.export_model(model, tmp_path / "model", CHOICES[name], source.block_rank)
    assert torch.equal(exporting.reload(folder)(ids).logits, model(ids).logits)
    if name in ("head", "all"):  # tied: still one matrix, of quantized values, and trained if all is
        head, embedding = model.lm_head, model.get_input_embeddings().weight
        assert head.weight_bits == CHOICES[name].head_bits
        assert torch.equal(head.weight, embedding)
        assert torch.equal(head.weight, extract(source, CHOICES[name]).lm_head.weight) == (train == "lora")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_quantized_head_is_trained_as_it_will_be(tied: bool) -> None:
    """Before the first step the student is the extracted model; gradients are those of two uses of one matrix."""
    model = tiny.model()
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.02)
    space = tiny.config("nowhere", SPACES["head"]).space.build()
    source, ids = convert(model, space, lora_rank=4), text().held_out[:24][None]
    student, want = student_of(source, HEAD), extract(source, HEAD)
    assert torch.equal(student(ids).logits, want(ids).logits)
    student(ids, labels=ids).loss.backward()
    want(ids, labels=ids).loss.backward()
    head, embedding = want.lm_head.weight.grad, want.get_input_embeddings().weight.grad
    torch.testing.assert_close(student.lm_head.weight.grad, head + embedding if tied else head)
    assert (student.get_input_embeddings().weight is student.lm_head.weight) == tied


@pytest.mark.parametrize("name", ["joint", "plain"])
def test_lora_trains_the_chosen_pairs_alone(name: str, tmp_path: Path) -> None:
    """Weights get no gradient, no optimizer state and no place in the checkpoint."""
    source = supernet(name)
    before = {k: v.clone() for k, v in source.state_dict().items()}
    student = trained(source, name, tmp_path, train="lora", lr=1e-2)
    assert isinstance(student, Supernet)
    linears = [m for m in student.modules() if isinstance(m, SupernetLinear)]
    count = sum(4 * (m.in_features + m.out_features) for m in linears)  # rank 4, one pair a linear
    assert sum(p.numel() for p in trained_parameters(student).values()) == count
    tensors, _ = checkpoint.load(tmp_path / "checkpoints-finetune" / "step-3")
    states = [v for k, v in tensors["optimizer"].items() if "exp_avg" in k]
    assert sum(v.numel() for v in states) == 2 * count
    assert sum(v.numel() for v in tensors["trained"].values()) == count
    assert all("lora" in key for key in tensors["trained"])
    start = student_of(source, CHOICES[name], "lora")
    moved = {k for (k, p), q in zip(student.named_parameters(), start.parameters(), strict=True) if not p.equal(q)}
    assert moved == set(tensors["trained"])
    assert all(torch.equal(v, before[k]) for k, v in source.state_dict().items())  # the supernet is as it was


def test_full_training_moves_every_weight_and_keeps_their_states(tmp_path: Path) -> None:
    source = supernet("plain")
    student = trained(source, "plain", tmp_path, train="full")
    count = count_params(source.config, PLAIN)
    assert sum(p.numel() for p in trained_parameters(student).values()) == count
    tensors, _ = checkpoint.load(tmp_path / "checkpoints-finetune" / "step-3")
    assert sum(v.numel() for k, v in tensors["optimizer"].items() if "exp_avg" in k) == 2 * count


def test_lora_learns() -> None:
    source = supernet("joint")
    teacher, ids = original_logits(source), text().weight[:512].view(16, 32)
    config = FinetuneConfig(train="lora")
    before = distillation_loss(student_of(source, JOINT, "lora"), teacher, ids, config)[0].item()
    student = trained(source, "joint", train="lora", steps=30, lr=1e-2, batch_size=8)
    assert distillation_loss(student, teacher, ids, config)[0].item() < before - 0.05


@pytest.mark.parametrize("name, train, dtype", [
    ("joint", "lora", torch.float32), ("joint", "full", torch.bfloat16), ("plain", "full", torch.bfloat16),
])  # fmt: skip
def test_resumes_exactly(name: str, train: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = supernet(name, dtype)
    whole = trained(source, name, train=train, lr=1e-3)
    trained(source, name, tmp_path, train=train, lr=1e-3)
    again = trained(source, name, tmp_path, True, train=train, lr=1e-3)  # from step 3
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_small_steps_of_bf16_weights_are_not_lost() -> None:
    """Each step is below half a unit of norm weights in [0.5, 1.5]; master weights add them up."""
    source = supernet("plain", torch.bfloat16)
    start = student_of(source, PLAIN)
    student = trained(source, "plain", steps=40, lr=2e-4, warmup=0.0)
    norms = [(p, q) for (k, p), q in zip(student.named_parameters(), start.parameters(), strict=True) if "norm" in k]
    moved = sum(int((p != q).sum()) for p, q in norms)
    assert moved > 0.1 * sum(p.numel() for p, _ in norms)
    assert all(p.dtype == torch.bfloat16 for p in student.parameters())
    optimizer = torch.optim.AdamW(start.parameters(), lr=2e-4)  # the same without masters: nothing moves
    before, ids = [q.detach().clone() for _, q in norms], text().weight[:32].view(2, 16)
    for _ in range(40):
        optimizer.zero_grad()
        distillation_loss(start, original_logits(source), ids, FinetuneConfig())[0].backward()
        optimizer.step()
    assert all(torch.equal(q, b) for (_, q), b in zip(norms, before, strict=True))


def test_masters_are_fp32_and_rounded_into_the_model() -> None:
    student = student_of(supernet("joint", torch.bfloat16), JOINT)
    state = Trained(student.requires_grad_(True))
    for name, p in state.parameters.items():
        master = state.masters[name]
        assert master.dtype == torch.float32
        master.data.add_(1e-3)
        p.grad = torch.ones_like(p)
    state.collect()
    state.round()
    for name, p in state.parameters.items():
        assert p.grad is None
        assert torch.equal(state.masters[name].grad, torch.ones(p.shape))  # type: ignore[arg-type]
        assert torch.equal(p, state.masters[name].to(torch.bfloat16))


def test_resuming_with_other_trained_parameters_is_an_error(tmp_path: Path) -> None:
    source = supernet("plain")
    trained(source, "plain", tmp_path, train="full")
    with pytest.raises(JointNASError, match=r"distilled with another finetune\.train"):
        trained(source, "plain", tmp_path, True, train="lora")


def test_gradient_checkpointing_of_lora_changes_nothing() -> None:
    source = supernet("joint")
    usual, again = (trained(source, "joint", train="lora", gradient_checkpointing=on) for on in (False, True))
    assert all(torch.equal(p, q) for p, q in zip(usual.parameters(), again.parameters(), strict=True))


def test_keeping_one_precision() -> None:
    _, linear = next(supernet("joint").linears())
    want = linear.merged(1)
    linear.keep(8)
    assert (linear.bits, linear.lora_a.shape[0]) == ((8,), 1)
    assert torch.equal(linear.merged(0), want)
    with pytest.raises(JointNASError, match="unknown precision '4'"):
        linear.keep(4)
