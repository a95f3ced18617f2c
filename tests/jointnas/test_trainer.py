"""Hugging Face Trainer and accelerate on a supernet: the steps of a search, resumed bit for bit.

``python -m tests.jointnas.test_trainer OUT`` trains and kills itself in the middle; with a rank in the environment, it
trains as one of several.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments

from jointnas import SearchCallback
from jointnas.bilevel import arch_step, weight_step
from jointnas.config import RunConfig, SpaceConfig
from jointnas.data import Batches
from jointnas.objective import Objective
from jointnas.run_folder import Run
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import Supernet, convert, extract
from tests.jointnas import tiny
from tests.latency.tables import synthetic

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8


def supernet(family: str = "llama", space: dict[str, Any] = tiny.SPACE) -> Supernet:
    torch.manual_seed(0)
    return convert(tiny.model(family), SpaceConfig(**space).build(), lora_rank=4)


def rows(count: int = 40, length: int = 12) -> list[dict[str, Any]]:
    """Of different lengths."""
    tokens = tiny.streams().weight
    texts = [tokens[i * length : (i + 1) * length - i % 4].tolist() for i in range(count)]
    return [{"input_ids": text, "labels": text} for text in texts]


def padded(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A collator with padding on the right, labels of -100 there, and a mask."""
    length = max(len(row["input_ids"]) for row in batch)

    def stack(key: str, value: int) -> Tensor:
        return torch.tensor([row[key] + [value] * (length - len(row[key])) for row in batch])

    ids = stack("input_ids", 0)
    mask = torch.tensor([[i < len(row["input_ids"]) for i in range(length)] for row in batch]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": stack("labels", -100)}


def trainer(
    folder: Path, net: Supernet | None = None, search: SearchCallback | None = None,
    callbacks: tuple[TrainerCallback, ...] = (), collator: Any = padded, data: Any = None, **options: Any,
) -> Trainer:  # fmt: skip
    values: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "learning_rate": 1e-3,
        "weight_decay": 0.1, "save_steps": 3, "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, "bf16": False, "seed": 5,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **{**values, **options})
    net, search = net or supernet(), search or SearchCallback(lr_arch=0.05)
    return Trainer(
        net, args, train_dataset=data or rows(), eval_dataset=rows(5), data_collator=collator,
        callbacks=[search, *callbacks], optimizer_cls_and_kwargs=search.optimizer_cls_and_kwargs(net, args),
    )


def history(made: Trainer) -> list[dict[str, Any]]:
    timed = ("runtime", "per_second", "total_flos")
    return [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in made.state.log_history[:STEPS]]


def assert_equal_states(own: torch.nn.Module, other: torch.nn.Module) -> None:
    mine, theirs = own.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


class Watch(TrainerCallback):
    """Which parameters an optimizer step changed, and what it trained."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, set[str]]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = {k: v.detach().clone() for k, v in kwargs["model"].named_parameters()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        net = kwargs["model"]
        changed = {k for k, v in net.named_parameters() if not torch.equal(v, self.before[k])}
        self.seen.append((net.current_mode, {k.split(".")[0] for k in changed}))


class Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def start(out: Path, **variables: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}:{ROOT / 'tests'}", **variables}
    return subprocess.Popen([sys.executable, "-m", "tests.jointnas.test_trainer", out], cwd=ROOT, env=environment)


ACCUMULATE = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "warmup_steps": 2}


@pytest.mark.slow
def test_killed_and_resumed_ends_bit_identical(tmp_path: Path) -> None:
    watch = Watch()
    whole = trainer(tmp_path / "whole", callbacks=(watch,), **ACCUMULATE)
    whole.train()
    kinds = [("weight", {"blocks"}), ("arch", {"arch"})] * (STEPS // 2)
    assert watch.seen[1:] == kinds[1:]
    assert watch.seen[0] == ("weight", set())  # the warm-up starts at a learning rate of 0
    killed = start(tmp_path / "killed")
    assert killed.wait(500) == -signal.SIGKILL
    assert [f.name for f in (tmp_path / "killed").iterdir()] == ["checkpoint-3"]
    resumed = trainer(tmp_path / "killed", **ACCUMULATE)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_states(whole.model, resumed.model)
    assert history(whole) == history(resumed)
    assert whole.model.argmax() == resumed.model.argmax()
    again = Supernet.from_pretrained(tmp_path / "killed" / "checkpoint-6")  # a checkpoint is a saved supernet
    assert again.order == resumed.model.order
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-6"))
    assert_equal_states(whole.model, resumed.model)


def objective(net: Supernet, config: RunConfig) -> Objective:
    return Objective(config, net.config, synthetic(net.space).bind(net.space, net.block_rank))


def test_steps_are_those_of_our_search(tmp_path: Path) -> None:
    """Bit for bit: draws, losses with the objective, updates."""
    limits = {"clip_weight": 1.0, "clip_arch": 1.0, "budget_max": 0.5}
    config = tiny.config(tmp_path, seed=5, search={"steps": STEPS, **limits})
    net = supernet()
    ids = Batches(tiny.streams().weight, 2, 16, 0)
    data = [{"input_ids": row, "labels": row} for step in range(STEPS) for row in ids.at(step).ids]
    made = trainer(
        tmp_path / "out", net, SearchCallback(lr_arch=0.05, objective=objective(net, config)), collator=None, data=data,
        lr_scheduler_type="constant", weight_decay=0.0, adam_beta2=0.95, max_grad_norm=1.0,
        train_sampling_strategy="sequential", optim="adamw_torch",
    )  # fmt: skip
    made.train()
    own = supernet()
    optimizers = {
        "weight": torch.optim.AdamW(own.lora_parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0),
        "arch": torch.optim.Adam(own.arch_parameters(), lr=0.05, betas=(0.5, 0.999)),
    }
    table = synthetic(own.space)
    run, terms = Run(config, tmp_path, own, tiny.streams(), table, own.space, []), objective(own, config)
    for step, row in enumerate(history(made)):
        if step % 2 == 0:
            loss = weight_step(run, optimizers["weight"], ids, step)
        else:
            added, _ = terms.regularizer(own.arch.probs(), step)
            ce, parts = arch_step(run, terms, optimizers["arch"], ids, step)
            loss = ce + added.detach().to(ce.dtype)
            assert {k: row[k] for k in parts} == parts
        assert row["loss"] == loss.item()
    for name, value in own.state_dict().items():
        if name != "_extra_state":
            assert torch.equal(net.state_dict()[name], value), name
    assert net.regularizer is None
    assert any(p > 0 for p in (row["penalty"] for row in history(made)[1::2]))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_evaluation_saving_and_reloading(tmp_path: Path, family: str) -> None:
    """Evaluation in between changes nothing, and is that of the most probable choice as a plain model."""
    net = supernet(family)
    use_cache = net.config.use_cache
    scores: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        scores.append(prediction.predictions)
        return {"tokens": float((prediction.label_ids != -100).sum())}

    made = trainer(
        tmp_path / "eval", net, eval_strategy="steps", eval_steps=2, label_names=["labels"], max_steps=4, save_steps=4
    )
    made.compute_metrics = metrics
    made.train()
    plain = trainer(tmp_path / "plain", supernet(family), max_steps=4, save_steps=4)
    plain.train()
    assert_equal_states(net, plain.model)
    assert net.config.use_cache == use_cache
    stock = extract(net, net.argmax())
    batches = [padded(rows(5)[:3]), padded(rows(5)[3:])]
    with torch.no_grad():
        losses = [stock(**b, use_cache=False).loss.item() for b in batches]
    tokens = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
    found = made.evaluate()
    assert found["eval_tokens"] == sum(len(row["labels"]) for row in rows(5))
    expected = (losses[0] * 3 + losses[1] * 2) / 5  # Trainer weighs batches by rows
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-4), tokens
    assert scores[-1].shape[:1] == (5,)
    net.save_pretrained(tmp_path / "saved")
    assert_equal_states(Supernet.from_pretrained(tmp_path / "saved"), net)
    assert_equal_states(Supernet.from_pretrained(tmp_path / "eval" / "checkpoint-4"), net)


def test_packed_batches(tmp_path: Path) -> None:
    """transformers' collator without padding: one row, position_ids, labels of -100 where a sequence begins."""
    made = trainer(tmp_path, collator=DataCollatorWithFlattening(), max_steps=2, save_strategy="no")
    made.train()
    net = supernet()
    net.mode("weight").seed = 5
    batch = DataCollatorWithFlattening()(rows()[:2])
    assert made.state.log_history[0]["loss"] > 0
    whole = net(batch["input_ids"], labels=batch["labels"], position_ids=batch["position_ids"], return_logits=True)
    net.step = 0
    first = len(rows()[0]["input_ids"])
    alone = net(batch["input_ids"][:, :first], return_logits=True).logits
    torch.testing.assert_close(whole.logits[:, :first], alone)


def test_without_a_callback(tmp_path: Path) -> None:
    """Weight steps only, one draw per forward pass; where they are is in the checkpoint."""

    def made(steps: int) -> Trainer:
        args = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
            disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        return Trainer(supernet(), args, train_dataset=rows(), data_collator=padded)

    first, whole = made(2), made(4)
    first.train()
    whole.train()
    resumed = made(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (resumed.model.step, resumed.model.current_mode) == (4, "weight")
    assert_equal_states(resumed.model, whole.model)
    before = supernet().state_dict()
    moved = {name for name, value in whole.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[2] for name in moved} == {"lora_a", "lora_b", "_extra_state"}


def test_kinds_of_steps() -> None:
    search = SearchCallback(arch_every=3, weight_warmup=4)
    assert [search.mode(step) for step in range(9)] == [
        "weight", "weight", "weight", "weight", "weight", "arch", "weight", "weight", "arch",
    ]  # fmt: skip


def test_wrong_use_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(JointNASError, match="arch_every is 1; it must be at least 2"):
        SearchCallback(arch_every=1)
    with pytest.raises(JointNASError, match="lr_arch is 0"):
        SearchCallback(lr_arch=0.0)
    with pytest.raises(JointNASError, match=r"label_smoothing_factor=0\.1 does not work with a supernet"):
        trainer(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(JointNASError, match="the model is a LlamaForCausalLM"):
        Trainer(tiny.model(), TrainingArguments(str(tmp_path), use_cpu=True), callbacks=[SearchCallback()])
    net = supernet()
    with pytest.raises(JointNASError, match="fixed to one choice; call relax"):
        trainer(tmp_path, net.fix(net.space.full())).train()
    other = supernet(space=tiny.NO_BITS)
    with pytest.raises(JointNASError, match="the objective is of another space"):
        trainer(tmp_path, net, SearchCallback(objective=objective(other, tiny.config(tmp_path))))


def accelerated(
    folder: Path, save_at: int | None = None, resume: bool = False, wrap: Callable[[Any], Any] | None = None
) -> tuple[Supernet, list[float]]:
    """A loop of one's own: two groups in one optimizer, a draw per forward pass."""
    set_seed(1)
    accelerator = Accelerator(cpu=True)
    net = supernet("phi3")
    net.seed = 7
    groups = [{"params": net.lora_parameters()}, {"params": net.arch_parameters(), "lr": 0.05, "betas": (0.5, 0.999)}]
    loader = torch.utils.data.DataLoader(rows(12), batch_size=2, collate_fn=padded)
    model, optimizer, loader = accelerator.prepare(net, torch.optim.AdamW(groups, lr=1e-3), loader)
    losses = []
    if resume:
        accelerator.load_state(folder)
        loader = accelerator.skip_first_batches(loader, net.step)
    for batch in loader:
        loss = model.train()(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        net.mode("arch" if net.step % 2 else "weight")
        if net.step == save_at:
            accelerator.save_state(folder)
    return net, losses


def test_accelerate(tmp_path: Path) -> None:
    whole, losses = accelerated(tmp_path, save_at=3)
    resumed, rest = accelerated(tmp_path, resume=True)
    assert len(losses) == 6
    assert losses[3:] == rest
    assert_equal_states(whole, resumed)


def shared(folder: Path, batch: int, **options: Any) -> Supernet:
    """Two rows a step, of which a rank takes `batch`."""
    net = supernet()
    terms = objective(net, tiny.config(folder, search={"budget_max": 0.5, "lambda_ramp": 0.0}))
    made = trainer(
        folder, net, SearchCallback(lr_arch=0.05, objective=terms), max_steps=4, per_device_train_batch_size=batch,
        save_strategy="no", train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    made.train()
    return net


@pytest.mark.slow
def test_ranks_draw_the_same_and_average_gradients(tmp_path: Path) -> None:
    """DistributedDataParallel: as one process with all rows, though the rows of a step differ in length."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [start(tmp_path, RANK=str(r), LOCAL_RANK=str(r), **where) for r in range(2)]
    alone = shared(tmp_path / "alone", 2)
    assert [rank.wait(500) for rank in ranks] == [0, 0]
    first, second = (Supernet.from_pretrained(tmp_path / str(rank)) for rank in range(2))
    assert_equal_states(first, second)
    before = supernet().state_dict()
    moved = 0
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first.state_dict()[name], value, rtol=1e-3, atol=1e-4)
        moved += int(not torch.equal(value, before[name]))
    assert moved > len(list(alone.linears()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        trained = shared(Path(sys.argv[1]) / "out", 1, ddp_backend="gloo")
        trained.save_pretrained(Path(sys.argv[1]) / os.environ["RANK"])
        torch.distributed.destroy_process_group()
        sys.exit()
    trainer(Path(sys.argv[1]), callbacks=(Kill(),), **ACCUMULATE).train()
