"""Guards of training: steps that are not finite, batches that do not fit, searches that decide too early."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jointnas import bilevel, checkpoint
from jointnas.bilevel import arch_step, optimise, weight_step
from jointnas.config import FinetuneConfig
from jointnas.data import IGNORE, Batch, Batches
from jointnas.distillation import Trained, distil, distillation_step, original_logits, student_of
from jointnas.guards import Guard, check_logits, is_memory, parts
from jointnas.losses import cross_entropy
from jointnas.metrics import read_metrics
from jointnas.objective import Objective
from jointnas.run_folder import Run
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.space import Choice
from tests.jointnas import tiny

CHOICE = Choice(64, 4, 16, 192, 2, (4, 8, 4), (8, 16, 8))
OOM = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory: you tried ..."),
    "cpu-mmap": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."),
    "python": MemoryError(),
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return tiny.start(tiny.config(tmp_path / "run", tensorboard=False, data={"batch_size": 4}))


class Fails:
    """A loss that raises for more sequences than fit."""

    def __init__(self, most: int, error: Exception) -> None:
        self.most, self.error, self.seen = most, error, list[int]()

    def __call__(self, supernet: Any, batch: Batch) -> Tensor:
        self.seen.append(len(batch.ids))
        if len(batch.ids) > self.most:
            raise self.error
        return cross_entropy(supernet, batch)


def batches(run: Run) -> Batches:
    return Batches(run.streams.weight, 4, 16, 0)


def state(run: Run) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.supernet.search_state().items()}


def gradients_of(found: list[Tensor], optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """A hook before an optimizer's step; behind it they are gone."""
    found += [p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


@pytest.mark.parametrize("name", OOM)
@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_batch_that_does_not_fit_gives_the_same_step(name: str, most: int, run: Run) -> None:
    """Gradients of both kinds of steps, of the halves and the quarters, with labels that are not learned."""
    ids = run.streams.weight[:64].view(4, 16).clone()
    labels = ids.clone()
    labels[0, 2:], labels[2] = IGNORE, IGNORE  # 1, 15, 0 and 15 predicted tokens
    source: Any = type("Source", (), {"at": lambda self, step, device: Batch(ids, labels)})()
    objective = Objective(run.config, run.model_config, run.bound)
    found: dict[str, list[Any]] = {"whole": [], "parts": []}
    for which in found:
        loss = cross_entropy if which == "whole" else Fails(most, OOM[name])
        guards = Guard("weight", model=run.supernet), Guard("arch", model=run.supernet)
        trained = run.supernet.lora_parameters(), run.supernet.arch_parameters()
        optimizers = [torch.optim.SGD(parameters, lr=0.0) for parameters in trained]
        own: list[Tensor] = []
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(partial(gradients_of, own))
        value = weight_step(run, optimizers[0], source, 0, loss, guards[0])
        ce, logs = arch_step(run, objective, optimizers[1], source, 0, loss, guards[1])
        found[which] += [value, ce, *own, *map(torch.tensor, logs.values())]
        assert {guard.skipped for guard in guards} == {0}
        if which == "parts":
            assert {guard.rows for guard in guards} == {2 if most > 1 else 1}
            assert isinstance(loss, Fails)
            assert loss.seen[:2] == [4, 2]
    assert len(found["whole"]) == len(found["parts"]) > 10
    for whole, part in zip(*found.values(), strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-7)


def test_a_whole_search_on_halves_ends_alike(tmp_path: Path) -> None:
    """And the halves are remembered: one failure for each kind of step."""
    ends = {}
    for name, loss in (("whole", cross_entropy), ("halves", Fails(1, OOM["cuda"]))):
        config = tiny.config(tmp_path / name, tensorboard=False, search={"steps": 4, "gap_batches": 1, "gap_every": 9})
        searched = tiny.start(config)
        bilevel_gap, bilevel.gap = bilevel.gap, lambda *_: {}  # it measures whole batches
        try:
            optimise(searched, loss)
        finally:
            bilevel.gap = bilevel_gap
        ends[name] = state(searched)
        if isinstance(loss, Fails):
            assert loss.seen == [2, 1, 1, 2, 1, 1, *[1] * 12]
    for key, value in ends["whole"].items():
        torch.testing.assert_close(ends["halves"][key], value, rtol=2e-3, atol=2e-3)


def test_one_sequence_that_does_not_fit_is_said(run: Run) -> None:
    before = state(run)
    optimizer = torch.optim.AdamW(run.supernet.lora_parameters())
    with pytest.raises(JointNASError, match=r"single sequence of 16 tokens does not fit into memory .*lower data\.seq"):
        weight_step(run, optimizer, batches(run), 0, Fails(0, OOM["cpu"]))
    assert all(torch.equal(before[k], v) for k, v in state(run).items())
    with pytest.raises(RuntimeError, match="shape"):  # any other error is what it is
        weight_step(run, optimizer, batches(run), 0, Fails(0, RuntimeError("shape mismatch")))
    assert not is_memory(ValueError("not enough memory"))


def test_parts_cover_what_is_predicted() -> None:
    ids = torch.arange(40).view(5, 8)
    labels = ids.clone()
    labels[1:4] = IGNORE
    found = list(parts(Batch(ids, labels), 2))
    assert [len(part.ids) for part, _ in found] == [2, 1]
    assert [share for _, share in found] == [0.5, 0.5]
    assert [share for _, share in parts(Batch(ids, torch.full_like(ids, IGNORE)), 2)] == [1]


@pytest.mark.parametrize("train", ["full", "lora"])
def test_distillation_on_halves(train: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    student = student_of(run.supernet, CHOICE, train).train()
    if train == "full":
        student.requires_grad_(True)
    trained, config = Trained(student), FinetuneConfig(kd=0.5, clip=1e9)
    optimizer, batch = torch.optim.SGD(trained.masters.values(), lr=0.0), batches(run).at(0)
    teacher = original_logits(run.supernet)
    gradients: list[Tensor] = []
    optimizer.register_step_pre_hook(partial(gradients_of, gradients))
    results = []
    for rows in (None, 1, 2):
        guard = Guard("finetune")
        guard.rows = rows
        loss, values = distillation_step(student, teacher, batch, config, trained, optimizer, guard)
        results.append([loss, *values.values(), *gradients])
        gradients.clear()
    for one in results[1:]:
        for got, want in zip(one, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


# ---- what is not finite ---------------------------------------------------------------------------------------------


def nan_at(*steps: int) -> Any:
    """A loss that is NaN in these calls."""
    count = iter(range(10**6))

    def loss(supernet: Any, batch: Batch) -> Tensor:
        value = cross_entropy(supernet, batch)
        return value * float("nan") if next(count) in steps else value

    return loss


def test_a_step_that_is_not_finite_changes_nothing(run: Run) -> None:
    objective = Objective(run.config, run.model_config, run.bound)
    weight = torch.optim.AdamW(run.supernet.lora_parameters(), lr=1e-2)
    arch = torch.optim.Adam(run.supernet.arch_parameters(), lr=0.1)
    guards = Guard("weight"), Guard("arch")

    def steps(at: int, loss: Any) -> None:
        weight_step(run, weight, batches(run), at, loss, guards[0])
        arch_step(run, objective, arch, batches(run), at, loss, guards[1])

    steps(0, cross_entropy)
    before, optimizers = state(run), [checkpoint.pack_optimizer(o)[0] for o in (weight, arch)]
    copies = [{k: v.clone() for k, v in tensors.items()} for tensors in optimizers]
    steps(1, nan_at(0, 1))
    assert [g.skipped for g in guards] == [1, 1]
    assert all(torch.equal(before[k], v) for k, v in state(run).items())
    for optimizer, copy in zip((weight, arch), copies, strict=True):
        now, _ = checkpoint.pack_optimizer(optimizer)
        assert all(torch.equal(copy[k], v) for k, v in now.items())
    steps(2, cross_entropy)
    assert any(not torch.equal(before[k], v) for k, v in state(run).items())


def test_skipped_steps_are_counted_and_survive_a_resume(tmp_path: Path) -> None:
    """Calls of the loss: weight and architecture steps take turns, with those of the gap behind the second row."""
    options = {"steps": 4, "gap_every": 99, "save_every": 3}
    config = tiny.config(tmp_path, resume="auto", tensorboard=False, search=options)
    optimise(tiny.start(config), nan_at(0, 3))
    rows = read_metrics(tmp_path)
    assert [r["skipped"] for r in rows] == [{"weight": 1, "arch": 1}] * 2
    assert [len(r["losses"]) for r in rows] == [1, 2]
    for name in ("step-4",):
        checkpoint_folder = tmp_path / "checkpoints" / name
        for file in checkpoint_folder.iterdir():
            file.unlink()
        checkpoint_folder.rmdir()
    optimise(tiny.start(config))
    again = read_metrics(tmp_path)
    assert again[-1]["skipped"] == {"weight": 1, "arch": 1}
    assert again[-1]["losses"] == rows[-1]["losses"]


def test_a_distillation_that_is_not_finite(run: Run, tmp_path: Path) -> None:
    student = student_of(run.supernet, CHOICE)
    with torch.no_grad():
        student.model.layers[1].mlp.down_proj.weight[3, 5] = float("inf")
    with pytest.raises(JointNASError, match=r"3 finetune steps in a row.*layers\.1\.mlp\.down_proj\.weight \(weight\)"):
        distil(
            student, original_logits(run.supernet), run.streams.all, FinetuneConfig(steps=9, skip_most=3), batch_size=2,
            seq_len=16, folder=tmp_path / "d", progress=False, tensorboard=False,
        )  # fmt: skip
    dump = json.loads((tmp_path / "d" / "not-finite-finetune-2.json").read_text())
    assert dump["not_finite"]["output"][0].startswith("model.layers.1.mlp")


# ---- searches that decide too early ---------------------------------------------------------------------------------


def test_a_search_that_decides_at_once_is_ended(tmp_path: Path) -> None:
    options = {"steps": 200, "alpha_init": 40.0, "entropy_stop": 0.3}
    with pytest.raises(JointNASError, match=r"after 1 of 200 steps .*dimension is decided .*search\.collapse = 0"):
        tiny.search(tiny.config(tmp_path, tiny.NO_BITS, search=options))
    assert not checkpoint.steps(tmp_path / "checkpoints")
    allowed = {**options, "collapse": 0.0}
    _, found = tiny.search(tiny.config(tmp_path / "allowed", tiny.NO_BITS, search=allowed))
    assert found.converged


def test_logits_that_are_not_finite(run: Run) -> None:
    probs = {"hidden": torch.tensor([float("nan"), 1.0])}
    with pytest.raises(JointNASError, match="after step 3 of the search the probabilities of hidden are not finite"):
        check_logits(probs, {"hidden": 1.0}, 3, 10, 0.3, 0.05)
    check_logits({"hidden": torch.tensor([0.5, 0.5])}, {}, 1, 100, 0.3, 0.05)  # nothing to decide
