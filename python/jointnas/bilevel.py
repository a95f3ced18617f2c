"""The joint search: first-order bilevel optimisation of LoRA weights and architecture on one supernet.

Every step is one weight step (CE on the weight data, architecture drawn, LoRA trained) and one architecture step (CE on
the architecture data + objective, LoRA frozen, logits trained). It ends when every dimension is decided, or at the hard
cap. Then the most probable choice is checked against the hard limits. Where it takes longer than a target latency, the
steps down that cost least bring it there, and what it leaves of the target is spent (`spending`); where it breaks
another limit, the most probable one that satisfies all is taken.

All randomness of a step is a function of (seed, step), so a killed run resumes bit-identically on the CPU.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from jointnas import convergence, parallel, sharding
from jointnas.data import Batch, Batches
from jointnas.guards import Guard, check_logits, finite
from jointnas.guards import Losses as Parts
from jointnas.losses import Loss, Losses, cross_entropy
from jointnas.metrics import Metrics
from jointnas.objective import Feasibility, Objective, entropies, original_params, stopping_entropy
from jointnas.run_folder import Found, Run, restore, save, write_json, write_start
from jointnas.spending import fit, spend
from jointnas_kernels.nn.choices import seeded
from jointnas_kernels.progress import Progress
from jointnas_kernels.space import count_params

log = logging.getLogger(__name__)
WEIGHT, ARCH, GAP = range(3)  # lanes of random numbers


def optimise(run: Run, loss: Loss = cross_entropy) -> Found:
    """Runs, or resumes, the bilevel loop. Checkpoints and metrics go to the run's folder.

    loss: of a supernet with a drawn sample or a fixed choice on a batch"""
    config, options, supernet = run.config, run.config.search, run.supernet
    objective = Objective(config, run.model_config, run.bound)
    weight_optimizer = torch.optim.AdamW(
        supernet.lora_parameters(), lr=options.lr_weight, betas=(0.9, 0.95), weight_decay=0.0,
        fused=True if supernet.device.type == "cuda" else None,
    )  # fmt: skip
    arch_optimizer = torch.optim.Adam(supernet.arch_parameters(), lr=options.lr_arch, betas=(0.5, 0.999))
    optimizers = {"weight_optimizer": weight_optimizer, "arch_optimizer": arch_optimizer}
    for optimizer in optimizers.values():
        parallel.create_state(optimizer)
    guards = [Guard(kind, options.skip_most, run.folder, supernet) for kind in ("weight", "arch")]
    step, seconds, converged, pending = restore(run, optimizers)
    curve: list[float] = pending.get("losses", [])  # of the weight steps since the last metrics
    for guard, skipped in zip(guards, pending.get("skipped", ()), strict=False):
        guard.skipped = skipped
    lanes = [
        Batches(stream, config.data.batch_size, config.data.seq_len, config.seed * 4 + lane, run.streams.bos)
        for lane, stream in ((WEIGHT, run.streams.weight), (ARCH, run.streams.arch), (GAP, run.streams.arch))
    ]
    write_start(run)
    capture(run)
    parallel.wait()
    metrics = Metrics(run.folder, "search", step, config.tensorboard)
    progress = Progress("search", options.steps, step, config.progress and parallel.is_main())
    began = time.monotonic() - seconds
    while step < options.steps and not converged:
        losses = {"ce_weight": weight_step(run, weight_optimizer, lanes[WEIGHT], step, loss, guards[WEIGHT])}
        curve += finite(losses).values()
        logs: dict[str, Any] = {}
        if step >= options.weight_warmup:
            losses["ce_arch"], logs = arch_step(run, objective, arch_optimizer, lanes[ARCH], step, loss, guards[ARCH])
        step += 1
        probs = supernet.arch.probs()
        entropy = entropies(probs, run.space, supernet.block_rank)
        largest = max(entropy.values(), default=0.0)
        check_logits(probs, entropy, step, options.steps, options.entropy_stop, options.collapse)
        stopping = stopping_entropy(entropy, options.entropy_stop_on)
        converged = step >= options.min_steps and stopping < options.entropy_stop
        last = converged or step == options.steps
        shown: dict[str, float | str] = {}
        if step % options.log_every == 0 or last:
            row = finite(losses) | logs | {"entropy": entropy, "entropy_max": largest}
            row["skipped"] = dict(zip(("weight", "arch"), (guard.skipped for guard in guards), strict=True))
            if step % options.gap_every == 0 or last:
                row |= gap(run, lanes[GAP], loss)
            row["probs"] = {k: p.detach().tolist() for k, p in probs.items()}
            row["losses"], curve = curve, []
            row["seconds"] = time.monotonic() - began
            metrics.write(step, **row)
            shown = {"step": f"{step} of {options.steps}", "ce": losses["ce_weight"].item(), "entropy": largest}
            shown["ms"] = logs.get("latency_ms", 0.0)
        progress.step(**shown)
        if step % options.save_every == 0 or last:
            pending = {"losses": curve, "skipped": [guard.skipped for guard in guards]}
            save(run, optimizers, step, time.monotonic() - began, converged, pending)
    progress.close()
    metrics.close()
    supernet.release()
    supernet.zero_grad(set_to_none=True)  # distillation needs the room
    return _finish(run, objective, step, converged, time.monotonic() - began)


def capture(run: Run) -> None:
    """CUDA graphs for both kinds of steps, whose batches all have one shape; on other devices nothing."""
    config, supernet = run.config, run.supernet
    wanted = config.search.capture and not config.search.gradient_checkpointing  # the two exclude each other
    supernet.repeats.after = None  # now or never
    if not wanted or supernet.device.type != "cuda" or sharding.sharding():
        return
    try:
        supernet.capture(config.data.batch_size, config.data.seq_len)
    except torch.OutOfMemoryError:
        log.warning("CUDA graphs do not fit into the device's memory: steps run without them, and slower")


def weight_step(
    run: Run, optimizer: torch.optim.Optimizer, batches: Batches, step: int, loss: Loss = cross_entropy,
    guard: Guard | None = None,
) -> Tensor:  # fmt: skip
    """Trains LoRA on one batch; the loss. Where it or a gradient is not finite, nothing is changed."""
    supernet = run.supernet.mode("weight").relax()
    _agree(run, step, WEIGHT)
    batch, share = parallel.rows(batches, step, supernet.device)

    def losses(part: Batch) -> dict[str, Tensor]:
        supernet.draw(seeded(run.config.seed, step, WEIGHT))  # good for one forward pass
        return {"loss": loss(supernet, part) * share}

    parameters, clip = supernet.lora_parameters(), run.config.search.clip_weight
    return update(optimizer, parameters, clip, batch, losses, guard or Guard("weight"), step)["loss"]


def arch_step(
    run: Run, objective: Objective, optimizer: torch.optim.Optimizer, batches: Batches, step: int,
    loss: Loss = cross_entropy, guard: Guard | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """Trains the architecture on one batch; the loss and the parts of the objective. Where the loss or a gradient is
    not finite, nothing is changed."""
    supernet = run.supernet.mode("arch").relax()
    _agree(run, step, ARCH)
    batch, share = parallel.rows(batches, step, supernet.device)
    logs: dict[str, float] = {}

    def losses(part: Batch) -> dict[str, Tensor]:
        supernet.draw(seeded(run.config.seed, step, ARCH))  # good for one forward pass
        ce = loss(supernet, part) * share
        regularizer, found = objective.regularizer(supernet.arch.probs(), step)
        logs.update(found)
        regularizer = regularizer.to(ce.device, ce.dtype) / parallel.world()  # every rank has all of it
        return {"loss": ce + regularizer, "ce": ce}

    parameters, clip = supernet.arch_parameters(), run.config.search.clip_arch
    return update(optimizer, parameters, clip, batch, losses, guard or Guard("arch"), step)["ce"], logs


def _agree(run: Run, step: int, lane: int) -> None:
    """Compares what ranks draw for a step, once: one that computes its rows in parts draws more often than others."""
    if parallel.world() > 1:
        sample = run.supernet.draw(seeded(run.config.seed, step, lane))
        parallel.agree(sample.alphas, f"the architecture drawn for {('weight', 'architecture')[lane]} step {step}")


def update(
    optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], clip: float, batch: Batch, losses: Parts,
    guard: Guard, step: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """One step of an optimizer on a batch, or this rank's rows of it, under a guard, the norm of the gradients clipped;
    the losses of the whole batch."""
    found = guard.gradients(batch, losses, lambda: optimizer.zero_grad(set_to_none=True))
    parallel.add_gradients(parameters)
    guard.step(optimizer, parameters, clip, step, found["loss"], batch, losses)
    optimizer.zero_grad(set_to_none=True)  # the next forward pass needs the room
    return {name: parallel.total(value) for name, value in found.items()}


@torch.no_grad()
def gap(run: Run, batches: Batches, loss: Loss = cross_entropy) -> dict[str, float]:
    """Discretisation gap: CE of the most probable choice minus relaxed CE, on the same batches every time. The relaxed
    loss flatters undecided widths, so it is the gap that tells how much the search's own numbers can be trusted."""
    supernet = run.supernet
    relaxed = discrete = 0.0
    count = run.config.search.gap_batches
    for i in range(count):
        batch, part = parallel.rows(batches, i, supernet.device)
        supernet.relax().draw(seeded(run.config.seed, i, GAP))
        relaxed += parallel.total(loss(supernet, batch) * part).item() / count
        supernet.fix(supernet.argmax())
        discrete += parallel.total(loss(supernet, batch) * part).item() / count
    supernet.relax()
    return {"ce_relaxed": relaxed, "ce_argmax": discrete, "gap": discrete - relaxed}


def _finish(run: Run, objective: Objective, step: int, converged: bool, seconds: float) -> Found:
    probs = run.supernet.arch.probs()
    entropy = entropies(probs, run.space, run.supernet.block_rank)
    part = convergence.record(
        run.folder, "search", steps=step, tokens=step * run.config.data.batch_size * run.config.data.seq_len,
        trained=sum(p.numel() for p in run.supernet.lora_parameters()), total=original_params(run.model_config),
        undecided={k: v for k, v in entropy.items() if v >= run.config.search.entropy_stop},
    )  # fmt: skip
    log.log(logging.WARNING if part["advice"] else logging.INFO, "%s", convergence.sentence(part))
    check = Feasibility(run.model_config, run.bound, objective.limits)
    argmax = run.as_deployed(run.supernet.argmax())
    violations = check.violations(argmax)
    choice = argmax
    evaluated = 0
    if objective.limits.latency_max < math.inf:
        losses = Losses(run, run.folder / f"losses-{step}.json", run.config.search.gap_batches)
        choice = fit(run, check, argmax, losses) or check.repair(probs)
        choice = spend(run, check, choice, losses)
        evaluated = losses.tokens
    elif violations:
        choice = check.repair(probs)
    if violations:
        log.warning("the most probable choice breaks the limits (%s); instead: %s", "; ".join(violations), choice)
    found = Found(
        choice, argmax, violations, converged, step, run.bound.predict(choice), count_params(run.model_config, choice),
        seconds, evaluated,
    )  # fmt: skip
    parallel.from_main(lambda: write_json(run.folder / "choice.json", asdict(found)))  # the others read it
    return found
