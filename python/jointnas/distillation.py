"""Pruning to one choice, and its fine-tuning by knowledge distillation from the original model.

    loss = kd · T² KL(teacher || student) + (1 - kd) · CE,   per token, T the temperature

Either all weights of the small model are trained, or (`train: lora`) the LoRA pairs of the search go on, on frozen
weights, which needs neither gradients nor optimizer states of the weights. Both go through the quantizers
(straight-through) where the choice has bits, and then the quantized weights are baked in.

What is trained is kept in fp32: parameters of lower precision are rounded from master copies after every step. AdamW
moves a weight by about lr, and half a bf16 unit below a weight of 1 is 2e-3: smaller steps would be lost.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from jointnas import checkpoint, parallel, sharding
from jointnas.config import FinetuneConfig
from jointnas.data import IGNORE, Batch, Batches
from jointnas.guards import Guard, finite
from jointnas.metrics import Metrics
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import Supernet, extract, shrink
from jointnas_kernels.layout import block_of
from jointnas_kernels.nn.linear import FakeQuantLinear, joined
from jointnas_kernels.nn.loss import distillation
from jointnas_kernels.ops.quant import grid
from jointnas_kernels.ops.quant.activations import act_quant_mix
from jointnas_kernels.ops.quant.weights import fake_quant_weight
from jointnas_kernels.progress import Progress
from jointnas_kernels.space import Choice

Teacher = Callable[[Tensor], Tensor]


class TrainableQuantLinear(nn.Linear):
    """y = Q_a(x) Q_w(W)^T with straight-through gradients; `baked` is what it becomes after training."""

    clip: Tensor | None
    one: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor | None, weight_bits: int | None, act_bits: int | None, group_size: int,
        clip: Tensor | None, act_symmetric: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        self.weight = nn.Parameter(weight)
        if bias is not None:
            self.bias = nn.Parameter(bias)
        self.weight_bits, self.act_bits, self.group_size = weight_bits, act_bits or 16, group_size
        self.act_symmetric = act_symmetric
        self.register_buffer("clip", clip)
        self.register_buffer("one", torch.ones(1, device=weight.device), persistent=False)

    def quantized(self) -> Tensor:
        """The weight [O, I] that is used, differentiable in the one that is trained."""
        if self.weight_bits is None:
            return self.weight
        return fake_quant_weight(self.weight, self.weight_bits, self.group_size, clip=self.clip)

    def forward(self, input: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        if self.act_bits < 16:
            input = act_quant_mix(input, (self.act_bits,), self.one, symmetric=self.act_symmetric)
        return F.linear(input, self.quantized(), self.bias)

    @torch.no_grad()
    def baked(self) -> FakeQuantLinear:
        """A plain linear on the quantized weight, which quantizes its input if that is searched."""
        bias = None if self.bias is None else self.bias.detach().clone()
        weight, of = self.weight.detach().clone(), None
        if self.weight_bits is not None:
            weight, of = grid.quantize(weight, self.weight_bits, self.group_size, clip=self.clip)
        return FakeQuantLinear(weight, bias, of, self.act_bits, self.act_symmetric)


class TiedQuantEmbedding(nn.Module):
    """An embedding [V, N] that is tied to a `TrainableQuantLinear` head: the rows of Q_w(W), with straight-through
    gradients; `baked` is what it becomes after training."""

    clip: Tensor | None

    def __init__(self, head: TrainableQuantLinear, padding_idx: int | None) -> None:
        super().__init__()
        assert head.weight_bits is not None
        self.weight, self.bits, self.group_size = head.weight, head.weight_bits, head.group_size
        self.padding_idx = padding_idx
        self.register_buffer("clip", head.clip)

    def forward(self, input: Tensor) -> Tensor:
        """ids [B, T] -> [B, T, N]."""
        rows = F.embedding(input, self.weight, self.padding_idx)
        clip = None if self.clip is None else self.clip[input.flatten()]
        return fake_quant_weight(rows.flatten(0, -2), self.bits, self.group_size, clip=clip).view_as(rows)

    @torch.no_grad()
    def baked(self) -> nn.Embedding:
        """A plain embedding of the quantized values."""
        values = fake_quant_weight(self.weight, self.bits, self.group_size, clip=self.clip)
        table = nn.Embedding(values.shape[0], values.shape[1], padding_idx=self.padding_idx, device="meta")
        table.weight = nn.Parameter(values)
        return table


def student_of(supernet: Supernet, choice: Choice, train: str = "full") -> nn.Module:
    """What is distilled: the choice as a plain model (`trainable`), or ("lora") as a supernet of its own size whose
    LoRA pairs, of the chosen precisions only, are trained. `bake` makes either the final model."""
    if train == "full":
        return trainable(supernet, choice)
    small = shrink(supernet, choice).mode("weight")
    small.arch.requires_grad_(False)
    assert small.choice is not None
    for i, block in enumerate(small.blocks):
        source: Any = block
        weight_bits, _ = small.choice.bits(i)
        for linear in source.linears.values() if weight_bits is not None else ():
            linear.keep(weight_bits)
    return small


@torch.no_grad()
def trainable(supernet: Supernet, choice: Choice) -> PreTrainedModel:
    """The choice as a plain model of its own size with LoRA merged, its quantizers alive in every linear."""
    model = extract(supernet, choice)
    blocks = choice.weight_bits is not None or choice.act_bits is not None
    if not blocks and not choice.quantizes_head:
        return model
    small = shrink(supernet, choice)
    assert small.choice is not None
    if choice.quantizes_head:
        _train_head(model, small)
    if not blocks:
        return model
    for i, (layer, block) in enumerate(zip(model.model.layers, small.blocks, strict=True)):
        source: Any = block
        weight_bits, act_bits = small.choice.bits(i)
        for path, members in block_of(model.config).modules.items():
            old = [source.linears[m.name] for m in members]
            p = old[0].index_of(weight_bits)
            ratios = [linear.clip_ratio() for linear in old]
            layer_new = TrainableQuantLinear(
                joined(linear.adapted(p) for linear in old), joined(linear.bias for linear in old), weight_bits,
                act_bits, old[0].group_size, joined(None if p is None or r is None else r[p] for r in ratios),
                source.mlp.act.symmetric,
            )  # fmt: skip
            layer.set_submodule(path, layer_new)
    return model


def _train_head(model: Any, small: Supernet) -> None:
    """Puts the head of a fixed supernet, its quantizer alive, into the plain model of the same size."""
    quantizer, choice = small.head_quantizer, small.choice
    assert quantizer is not None
    assert choice is not None
    assert choice.head_bits is not None
    weight, clip = small.head.detach(), quantizer.clip[quantizer.low.index(choice.head_bits)]
    model.lm_head = TrainableQuantLinear(weight, None, choice.head_bits, 16, quantizer.group_size, clip)
    if small.lm_head is None:
        old = model.get_input_embeddings()
        model.set_input_embeddings(TiedQuantEmbedding(model.lm_head, old.padding_idx))


def bake(student: nn.Module) -> PreTrainedModel:
    """The distilled student as a plain model on quantized weights; a plain student is changed in place."""
    if isinstance(student, Supernet):
        assert student.choice is not None
        return extract(student, student.choice)
    assert isinstance(student, PreTrainedModel)
    model = student
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (TrainableQuantLinear, TiedQuantEmbedding)):
                setattr(parent, name, child.baked())
    model.eval()
    return model


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What distillation trains of a model, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Trained:
    """The trained parameters of a model by name, and their fp32 masters: themselves where they have that precision."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = trained_parameters(model)
        self.masters = {
            name: p if p.dtype.itemsize >= 4 else nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }

    def collect(self) -> None:
        """Moves the gradients of rounded parameters to their masters."""
        for p, master in self._rounded():
            master.grad, p.grad = None if p.grad is None else p.grad.float(), None

    @torch.no_grad()
    def round(self) -> None:
        """Rounds the masters into the model."""
        for p, master in self._rounded():
            p.copy_(master)

    @torch.no_grad()
    def restore(self, masters: Mapping[str, Tensor], where: Path) -> None:
        """Puts saved masters in."""
        if masters.keys() != self.masters.keys():
            raise JointNASError(f"{where} was distilled with another finetune.train; remove its folder to start again")
        for name, master in self.masters.items():
            master.copy_(sharding.part(masters[name], master))
        self.round()

    def _rounded(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        return ((p, self.masters[name]) for name, p in self.parameters.items() if self.masters[name] is not p)


def distil(
    student: nn.Module, teacher: Teacher, tokens: Tensor, config: FinetuneConfig, *, batch_size: int,
    seq_len: int, seed: int = 0, folder: Path | None = None, resume: bool = False, progress: bool = True,
    tensorboard: bool = True, bos: int | None = None,
) -> nn.Module:  # fmt: skip
    """Trains the student (`student_of`) in place on a stream, integers [N] (`data.Streams`), and returns it, quantizers
    still alive (`bake` ends that).

    Metrics and checkpoints go to `folder`; None: nowhere."""
    batches = Batches(tokens, config.batch_size or batch_size, seq_len, seed * 4 + 3, bos)
    if not isinstance(student, Supernet):
        student.requires_grad_(True)
    student.train()
    own = sharding.sharded(student)
    device = next(own.parameters()).device
    trained = Trained(own)
    decayed = [p for p in trained.masters.values() if p.dim() > 1]
    others = [p for p in trained.masters.values() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.lr, betas=(0.9, 0.95), fused=True if device.type == "cuda" else None,
    )  # fmt: skip
    parallel.create_state(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(config, step))
    saved = folder / "checkpoints-finetune" if folder is not None else None
    guard = Guard("finetune", config.skip_most, folder, own)
    losses: list[float] = []  # since the last metrics
    start = 0
    newest = checkpoint.latest(saved) if saved is not None and resume else None
    if newest is not None:
        tensors, state = checkpoint.load(newest)
        trained.restore(tensors["trained"], newest)
        checkpoint.unpack_optimizer(optimizer, tensors["optimizer"], state["groups"])
        start = int(state["step"])
        losses, guard.skipped = state.get("losses", []), state.get("skipped", 0)
        schedule.load_state_dict({**schedule.state_dict(), "last_epoch": start, "_step_count": start + 1})
    metrics = Metrics(folder, "finetune", start, tensorboard) if folder is not None else None
    bar = Progress("finetune", config.steps, start, progress and parallel.is_main())
    parallel.wait()
    with checkpointing(own, config.gradient_checkpointing):
        for step in range(start, config.steps):
            batch, share = parallel.rows(batches, step, device)
            loss, parts = distillation_step(own, teacher, batch, config, trained, optimizer, guard, step, share)
            schedule.step()
            losses += finite({"loss": loss}).values()
            done = step + 1
            if metrics is not None and (done % config.log_every == 0 or done == config.steps):
                lr = schedule.get_last_lr()[0]
                metrics.write(done, **finite(parts), lr=lr, skipped=guard.skipped, losses=losses)
                losses = []
            if saved is not None and done % config.save_every == 0 and done < config.steps:
                optimizer_tensors, groups = checkpoint.pack_optimizer(optimizer)
                tensors = {"trained": dict(trained.masters), "optimizer": optimizer_tensors}
                more = {"groups": groups, "losses": losses, "skipped": guard.skipped}
                checkpoint.save(saved, done, tensors, more, keep=2)
            bar.step()
    bar.close()
    if metrics is not None:
        metrics.close()
    sharding.collect(own, student)
    return student.eval()


def distillation_step(
    student: nn.Module, teacher: Teacher, batch: Batch, config: FinetuneConfig, trained: Trained,
    optimizer: torch.optim.Optimizer, guard: Guard | None = None, step: int = 0, share: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Trains the student on one batch, or on this rank's share of one (`parallel.rows`); what `distillation_loss`
    returns of the whole batch, without its graph. The optimizer is of the trained parameters' masters. Where the loss
    or a gradient is not finite, nothing is changed."""
    guard = guard or Guard("finetune")

    def losses(part: Batch) -> dict[str, Tensor]:
        loss, found = distillation_loss(student, teacher, part.ids, config, part.labels)
        return {"loss": loss * share, **{name: value * share for name, value in found.items()}}

    found = guard.gradients(batch, losses, lambda: student.zero_grad(set_to_none=True))
    trained.collect()
    masters = trained.masters.values()
    parallel.add_gradients(masters)
    if guard.step(optimizer, masters, config.clip, step, found["loss"], batch, losses):
        trained.round()
    optimizer.zero_grad(set_to_none=True)  # the next forward pass needs the room
    found = {name: parallel.total(value) for name, value in found.items()}
    return found.pop("loss"), found


@contextlib.contextmanager
def checkpointing(student: nn.Module, on: bool) -> Iterator[None]:
    """Blocks are recomputed in the backward pass inside, if `on`."""
    if isinstance(student, Supernet):
        before, student.gradient_checkpointing = student.gradient_checkpointing, on
        yield
        student.gradient_checkpointing = before
        return
    assert isinstance(student, PreTrainedModel)
    if on:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    yield
    if on:
        student.gradient_checkpointing_disable()


def learning_rate(config: FinetuneConfig, step: int) -> float:
    """Factor on the learning rate: linear warm-up, then cosine to a tenth."""
    warmup = max(1, int(config.warmup * config.steps))
    if step < warmup:
        return (step + 1) / warmup
    part = (step - warmup) / max(1, config.steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, part)))


def distillation_loss(
    student: nn.Module, teacher: Teacher, ids: Tensor, config: FinetuneConfig, labels: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, its parts), averaged over the tokens that are predicted, of ids [B, T] all but the first; with labels,
    int64 [B, T], those whose label is not -100."""
    known = ids if labels is None else labels
    following = F.pad(known[:, 1:], (0, 1), value=IGNORE).flatten()  # what the token behind each one is
    halves = config.bf16 and not ids.is_meta  # meta has no autocast
    with torch.autocast(ids.device.type, torch.bfloat16) if halves else contextlib.nullcontext():
        options = {} if isinstance(student, Supernet) else {"use_cache": False}
        logits = student(input_ids=ids, **options).logits.flatten(0, 1)
    target = None
    if config.kd > 0:
        with torch.no_grad():
            target = teacher(ids).flatten(0, 1)
    loss, ce, kl = distillation(logits, target, following, config.kd, config.temperature)
    return loss, {"ce": ce} if target is None else {"ce": ce, "kl": kl}


def original_logits(supernet: Supernet) -> Teacher:
    """The original model as a teacher, from the supernet's own frozen weights."""

    def teacher(ids: Tensor) -> Tensor:
        logits = supernet.original(ids).logits
        assert logits is not None
        return logits

    return teacher


class Original(nn.Module):
    """The original model from the supernet's own frozen weights, to be evaluated like any other."""

    def __init__(self, supernet: Supernet) -> None:
        super().__init__()
        self.supernet, self.config = supernet, supernet.config
        self.train(supernet.training)

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits [B, T, V] of ids [B, T]."""
        return self.supernet.original(input_ids)
