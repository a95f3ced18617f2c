"""Training of a supernet so that its sub-networks are good as they are: the sandwich rule with distillation in place.

Each step trains LoRA by the mean of four losses on one batch: cross-entropy of the largest network, and the divergence
of the smallest and of two others from the largest one's predictions.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jointnas import budget, checkpoint
from jointnas.baselines.context import Context
from jointnas.bilevel import WEIGHT
from jointnas.data import IGNORE, Batches
from jointnas.metrics import Metrics
from jointnas.run_folder import Run, read_json, restore, save
from jointnas_kernels.hf import Supernet
from jointnas_kernels.nn.choices import seeded
from jointnas_kernels.nn.linear import SupernetLinear
from jointnas_kernels.progress import Progress
from jointnas_kernels.space import Choice

NETWORKS = 4  # a step trains
SANDWICH = 13  # lane of random numbers
GRID = "grid.json"
# a network of a step, and the rank of its LoRA; None: the whole one
Draw = Callable[[torch.Generator], tuple[Choice, int | None]]


def sandwich(run: Run, smallest: Choice, draw: Draw) -> int:
    """Trains, or goes on to train, the LoRA pairs of a run without bits; the tokens of it: as many as of a search.

    Checkpoints and metrics go to the run's folder."""
    config, options, supernet = run.config, run.config.search, run.supernet
    steps = budget.bilevel(config, options.steps) // (NETWORKS * budget.batch(config))
    parameters = supernet.lora_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=options.lr_weight, betas=(0.9, 0.95), weight_decay=0.0)
    optimizers = {"weight_optimizer": optimizer}
    step, seconds, *_ = restore(run, optimizers)
    lane = config.seed * 4 + WEIGHT
    batches = Batches(run.streams.weight, config.data.batch_size, config.data.seq_len, lane, run.streams.bos)
    metrics = Metrics(run.folder, "sandwich", step, config.tensorboard)
    bar = Progress("sandwich", steps, step, config.progress)
    began, largest = time.monotonic() - seconds, run.space.full()
    supernet.mode("weight").train()
    while step < steps:
        generator = seeded(config.seed, step, SANDWICH)
        batch = batches.at(step, supernet.device)
        optimizer.zero_grad(set_to_none=True)
        logits = _logits(supernet, largest, batch.ids)
        learned = batch.labels[:, 1:].flatten() != IGNORE
        loss = F.cross_entropy(logits, batch.labels[:, 1:].flatten(), ignore_index=IGNORE)
        (loss / NETWORKS).backward()
        target = logits.detach()[learned].log_softmax(-1)
        divergences = []
        for choice, rank in [(smallest, None), *(draw(generator) for _ in range(NETWORKS - 2))]:
            with first_directions(supernet, rank):
                own = _logits(supernet, choice, batch.ids)[learned].log_softmax(-1)
                divergence = F.kl_div(own, target, log_target=True, reduction="batchmean")
                (divergence / NETWORKS).backward()
            divergences.append(divergence.detach())
        torch.nn.utils.clip_grad_norm_(parameters, options.clip_weight)
        optimizer.step()
        step += 1
        last = step == steps
        if step % options.log_every == 0 or last:
            values = torch.stack([loss.detach(), *divergences]).tolist()
            metrics.write(step, ce=values[0], kl_smallest=values[1], kl=sum(values[2:]) / len(values[2:]))
        if step % options.save_every == 0 or last:
            save(run, optimizers, step, time.monotonic() - began, last)
        bar.step()
    bar.close()
    metrics.close()
    supernet.relax().eval()
    return steps * NETWORKS * budget.batch(config)


def trained(context: Context) -> tuple[Run, dict[str, Any]]:
    """A run with the supernet that the method trained for all its targets, and what it wrote to GRID."""
    run = context.run(after=context.precision)
    newest = checkpoint.latest(context.shared / "checkpoints")
    assert newest is not None
    run.supernet.load_search_state(checkpoint.load(newest)[0]["supernet"])
    return run, read_json(context.shared / GRID)


def _logits(supernet: Supernet, choice: Choice, ids: Tensor) -> Tensor:
    """[B (T - 1), V] fp32, of all tokens but the last."""
    found = supernet.fix(choice)(ids).logits
    return found[:, :-1].flatten(0, 1).float()


@contextlib.contextmanager
def first_directions(supernet: Supernet, rank: int | None) -> Iterator[None]:
    """LoRA pairs of the first `rank` directions alone, forward and backward; None: of all."""
    if rank is None:
        yield
        return
    pairs = [m.lora_b for m in supernet.blocks.modules() if isinstance(m, SupernetLinear)]
    held = [b.detach()[..., rank:].clone() for b in pairs]
    before = [None if b.grad is None else b.grad[..., rank:].clone() for b in pairs]
    with torch.no_grad():
        for b in pairs:
            b[..., rank:] = 0  # A then gets no gradient there either
    try:
        yield
    finally:
        with torch.no_grad():
            for b, values, grad in zip(pairs, held, before, strict=True):
                b[..., rank:] = values
                if b.grad is not None:
                    b.grad[..., rank:] = 0 if grad is None else grad
