"""The joint search: first-order bilevel optimisation of LoRA weights and architecture on one supernet.

Every step is one weight step (CE on the weight data, architecture drawn, LoRA trained) and one architecture step (CE on
the architecture data + objective, LoRA frozen, logits trained). It ends when every dimension is decided, or at the hard
cap. Then the most probable choice is checked against the hard limits and, if need be, replaced by the most probable one
that satisfies them.

All randomness of a step is a function of (seed, step), so a killed run resumes bit-identically on the CPU.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jointnas import checkpoint, models
from jointnas import data as data_module
from jointnas.config import RunConfig, dump
from jointnas.data import Batches, Streams, seeded
from jointnas.initialise import DATA_FREE, calibration_windows, initialise
from jointnas.logs import Metrics, Progress
from jointnas.objective import Feasibility, Limits, Objective, entropies, original_params
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import Importance, Supernet, convert, importance_scores
from jointnas_kernels.latency import LatencyTable, calibrate, profile
from jointnas_kernels.space import WIDTHS, Choice, SearchSpace, count_params

log = logging.getLogger(__name__)
WEIGHT, ARCH, GAP, CALIBRATION = range(4)  # lanes of random numbers


@dataclass
class Run:
    """Everything a search works with; `prepare` makes one."""

    config: RunConfig
    folder: Path
    supernet: Supernet
    streams: Streams
    table: LatencyTable
    space: SearchSpace  # without bits that the device cannot run
    removed: list[str]
    importance: Importance | None

    @property
    def model_config(self) -> Any:
        return self.supernet.config

    @property
    def bound(self) -> Any:
        return self.table.bind(self.space, self.supernet.block_rank)

    @property
    def objective(self) -> Objective:
        return Objective(self.config, self.model_config, self.bound)


@dataclass(frozen=True)
class Found:
    """What a search ends with."""

    choice: Choice
    argmax: Choice
    repaired: list[str]  # what the argmax violated; empty if it was taken as it is
    converged: bool
    steps: int
    predicted_ms: float
    params: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "choice": self.choice.to_dict(), "argmax": self.argmax.to_dict()}


def prepare(
    config: RunConfig,
    model: torch.nn.Module | None = None,
    streams: Streams | None = None,
    table: LatencyTable | None = None,
) -> Run:
    """Loads model, data and table as configured (or takes given ones), and converts the model to a supernet.

    The model is converted in place."""
    folder = Path(config.out)
    space = config.space.build()
    if model is None:
        model = models.load_model(config.model)
    space.validate(model.config)
    if streams is None:
        tokenizer = None if config.data.source == "embedded" else models.load_tokenizer(config.model)
        streams = data_module.load(config.data, tokenizer, config.seed)
    if table is None:
        table = load_table(config, space, model.config)
    restricted, removed = table.restrict(space)
    for line in removed:
        log.warning("search space: removed %s", line)
    check_limits(config, model.config, table, restricted)
    torch.manual_seed(config.seed)  # LoRA's A
    options = config.search
    importance = None
    if options.importance:
        batches = Batches(streams.weight, config.data.batch_size, config.data.seq_len, config.seed)
        importance = importance_scores(model, [batches.at(i) for i in range(options.importance_batches)])
    supernet = convert(
        model, restricted, lora_rank=options.lora_rank, lora_alpha=options.lora_alpha, importance=importance,
        relaxation=options.relaxation, alpha_init=options.alpha_init,
    )  # fmt: skip
    supernet.gradient_checkpointing = options.gradient_checkpointing
    initialise_quantizers(config, supernet, streams)
    return Run(config, folder, supernet, streams, table, restricted, removed, importance)


def initialise_quantizers(config: RunConfig, supernet: Supernet, streams: Streams) -> None:
    """As configured; methods that need data keep their blocks in the run's folder, so that they run once."""
    method, options = config.quantizer.init, config.quantizer.options
    if method in DATA_FREE:
        initialise(supernet, method, options=options, progress=False)
        return
    windows = calibration_windows(streams.weight, options, config.data.seq_len, config.seed)
    initialise(
        supernet, method, windows, options=options, folder=Path(config.out) / "quantizers", progress=config.progress,
        seed=config.seed,
    )  # fmt: skip


def check_limits(config: RunConfig, model_config: Any, table: LatencyTable, space: SearchSpace) -> None:
    """Raises, before anything expensive, if no choice satisfies the limits."""
    uniform = {k: torch.full((len(space.sizes(k)),), 1 / len(space.sizes(k))) for k in (*WIDTHS, "blocks")}
    for key in ("weight_bits", "act_bits"):
        if space.sizes(key):
            uniform[key] = torch.full((space.depth, len(space.sizes(key))), 1 / len(space.sizes(key)))
    bound = table.bind(space)
    Feasibility(model_config, bound, Limits.of(config, model_config)).repair(uniform)


def load_table(config: RunConfig, space: SearchSpace, model_config: Any) -> LatencyTable:
    """The configured table, or the run's own, measured (and calibrated) if it is not there yet."""
    options = config.latency
    if options.table is not None:
        device = config.model.device.partition(":")[0]
        table = LatencyTable.load(options.table, None if options.force else device)
        missing = table.coverage(space, model_config).missing
        if missing:
            raise JointNASError(
                f"latency table {options.table} lacks {len(missing)} operations of the space, first {missing[0]}; "
                "measure them with `jointnas profile --resume`"
            )
        return table
    return measure_table(config, space, model_config, Path(config.out) / "latency.jsonl")


def measure_table(
    config: RunConfig, space: SearchSpace, model_config: Any, out: Path, renew: bool = False
) -> LatencyTable:
    """Profiles the device and calibrates the table; a finished one is taken as it is, unless it is to be renewed where
    a busy machine disturbed it or a backend was installed since."""
    options = config.latency
    if out.is_file() and not renew:
        try:
            table = LatencyTable.load(out, config.model.device.partition(":")[0])
            held = table.coverage(space, model_config)
            if not held.missing and not held.interpolated and (table.calibration or not options.calibrate):
                return table
        except JointNASError as error:
            log.info("%s; continuing its measurement", error)
    table = profile(
        space, model_config, out, workload=options.value(), device=config.model.device, threads=options.threads,
        backends=options.backends, progress=config.progress, seconds=options.seconds, seed=config.seed,
        metric=options.metric,
    )  # fmt: skip
    fitted = table.calibration is not None and not table.calibration.contended
    if options.calibrate and options.metric == "latency" and not fitted:
        restricted, _ = table.restrict(space)
        table = calibrate(table, restricted, model_config, options.calibrate, seed=config.seed)
        table.save(out)
    return table


# ---- the loop -------------------------------------------------------------------------------------------------------


def optimise(run: Run) -> Found:
    """Runs, or resumes, the bilevel loop. Checkpoints and metrics go to the run's folder."""
    config, options, supernet = run.config, run.config.search, run.supernet
    objective = run.objective
    weight_optimizer = torch.optim.AdamW(
        supernet.lora_parameters(), lr=options.lr_weight, betas=(0.9, 0.95), weight_decay=0.0,
        fused=True if supernet.device.type == "cuda" else None,
    )  # fmt: skip
    arch_optimizer = torch.optim.Adam(supernet.arch_parameters(), lr=options.lr_arch, betas=(0.5, 0.999))
    optimizers = {"weight_optimizer": weight_optimizer, "arch_optimizer": arch_optimizer}
    start, seconds, converged = _restore(run, optimizers)
    lanes = {
        lane: Batches(stream, config.data.batch_size, config.data.seq_len, config.seed * 4 + lane)
        for lane, stream in ((WEIGHT, run.streams.weight), (ARCH, run.streams.arch), (GAP, run.streams.arch))
    }
    _write_environment(run)
    capture(run)
    metrics = Metrics(run.folder, "search", start, config.tensorboard)
    progress = Progress("search", options.steps, start, config.progress)
    began = time.monotonic() - seconds
    step = start
    while step < options.steps and not converged:
        weight_loss = weight_step(run, weight_optimizer, lanes[WEIGHT], step)
        logs: dict[str, Any] = {}
        arch_loss: Tensor | None = None
        if step >= options.weight_warmup:
            arch_loss, logs = arch_step(run, objective, arch_optimizer, lanes[ARCH], step)
        step += 1
        probs = supernet.arch.probs()
        entropy = entropies(probs, run.space, supernet.block_rank)
        converged = step >= options.min_steps and max(entropy.values(), default=0.0) < options.entropy_stop
        last = converged or step == options.steps
        if step % options.log_every == 0 or last:
            row: dict[str, Any] = {"ce_weight": weight_loss.item(), **logs}
            if arch_loss is not None:
                row["ce_arch"] = arch_loss.item()
            row["entropy"], row["entropy_max"] = entropy, max(entropy.values(), default=0.0)
            if step % options.gap_every == 0 or last:
                row |= gap(run, lanes[GAP])
            row["probs"] = {k: p.detach().tolist() for k, p in probs.items()}
            row["seconds"] = time.monotonic() - began
            metrics.write(step, **row)
            progress.step(ce=row["ce_weight"], entropy=row["entropy_max"], ms=logs.get("latency_ms", 0.0))
        else:
            progress.step()
        if step % options.save_every == 0 or last:
            _save(run, optimizers, step, time.monotonic() - began, converged)
    progress.close()
    metrics.close()
    supernet.release()
    return _finish(run, objective, step, converged, time.monotonic() - began)


def capture(run: Run) -> None:
    """CUDA graphs for both kinds of steps, whose batches all have one shape; on other devices nothing."""
    config, supernet = run.config, run.supernet
    wanted = config.search.capture and not config.search.gradient_checkpointing  # the two exclude each other
    if not wanted or supernet.device.type != "cuda":
        return
    try:
        supernet.capture(config.data.batch_size, config.data.seq_len)
    except torch.OutOfMemoryError:
        log.warning("CUDA graphs do not fit into the device's memory: steps run without them, and slower")


def weight_step(run: Run, optimizer: torch.optim.Optimizer, batches: Batches, step: int) -> Tensor:
    supernet = run.supernet.mode("weight").relax()
    supernet.draw(seeded(run.config.seed, step, WEIGHT))
    ids = batches.at(step, supernet.device)
    loss = supernet(ids, labels=ids).loss
    assert loss is not None
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(supernet.lora_parameters(), run.config.search.clip_weight)
    optimizer.step()
    return loss.detach()


def arch_step(
    run: Run, objective: Objective, optimizer: torch.optim.Optimizer, batches: Batches, step: int
) -> tuple[Tensor, dict[str, float]]:
    supernet = run.supernet.mode("arch").relax()
    supernet.draw(seeded(run.config.seed, step, ARCH))
    ids = batches.at(step, supernet.device)
    loss = supernet(ids, labels=ids).loss
    assert loss is not None
    regularizer, logs = objective.regularizer(supernet.arch.probs(), step)
    optimizer.zero_grad(set_to_none=True)
    (loss + regularizer.to(loss.device, loss.dtype)).backward()
    torch.nn.utils.clip_grad_norm_(supernet.arch_parameters(), run.config.search.clip_arch)
    optimizer.step()
    return loss.detach(), logs


@torch.no_grad()
def gap(run: Run, batches: Batches) -> dict[str, float]:
    """Discretisation gap: CE of the most probable choice minus relaxed CE, on the same batches every time. The relaxed
    loss flatters undecided widths, so it is the gap that tells how much the search's own numbers can be trusted."""
    supernet = run.supernet
    relaxed = discrete = 0.0
    count = run.config.search.gap_batches
    for i in range(count):
        ids = batches.at(i, supernet.device)
        supernet.relax().draw(seeded(run.config.seed, i, GAP))
        relaxed += _loss(supernet, ids) / count
        supernet.fix(supernet.argmax())
        discrete += _loss(supernet, ids) / count
    supernet.relax()
    return {"ce_relaxed": relaxed, "ce_argmax": discrete, "gap": discrete - relaxed}


def _loss(supernet: Supernet, ids: Tensor) -> float:
    loss = supernet(ids, labels=ids).loss
    assert loss is not None
    return loss.item()


def _finish(run: Run, objective: Objective, step: int, converged: bool, seconds: float) -> Found:
    probs = run.supernet.arch.probs()
    if not converged:
        worst = entropies(probs, run.space, run.supernet.block_rank)
        names = sorted((k for k in worst if worst[k] >= run.config.search.entropy_stop), key=lambda k: -worst[k])
        if names:
            log.warning(
                "THE SEARCH DID NOT CONVERGE: %d steps, and these dimensions are undecided: %s. The most probable "
                "choice is taken; raise search.steps or search.lr_arch.",
                step, ", ".join(f"{k} (entropy {worst[k]:.2f})" for k in names[:8]),
            )  # fmt: skip
    check = Feasibility(run.model_config, run.bound, objective.limits)
    argmax = run.supernet.argmax()
    violations = check.violations(argmax)
    choice = argmax
    if violations:
        choice = check.repair(probs)
        log.warning(
            "the most probable choice breaks the limits (%s); nearest feasible: %s", "; ".join(violations), choice
        )
    found = Found(
        choice, argmax, violations, converged, step, run.bound.predict(choice), count_params(run.model_config, choice),
        seconds,
    )  # fmt: skip
    (run.folder / "choice.json").write_text(json.dumps(found.to_dict(), indent=1))
    return found


# ---- run folder -----------------------------------------------------------------------------------------------------


def _save(run: Run, optimizers: dict[str, Any], step: int, seconds: float, converged: bool) -> None:
    tensors: dict[str, dict[str, Tensor]] = {"supernet": run.supernet.search_state()}
    groups: dict[str, Any] = {}
    for name, optimizer in optimizers.items():
        tensors[name], groups[name] = checkpoint.pack_optimizer(optimizer)
    tensors["rng"] = {"cpu": torch.get_rng_state()}
    state = {
        "data_position": step,  # batches and draws are functions of (seed, step)
        "seed": run.config.seed,
        "converged": converged,
        "seconds": seconds,
        "optimizers": groups,
        "config": resumable(run.config),
        "block_rank": list(run.supernet.block_rank),
    }
    checkpoint.save(run.folder / "checkpoints", step, tensors, state, keep=run.config.search.keep_checkpoints)


def _restore(run: Run, optimizers: dict[str, Any]) -> tuple[int, float, bool]:
    """(step, seconds, converged) of the checkpoint that was loaded, or a fresh start."""
    folder = run.folder / "checkpoints"
    if run.config.resume == "never":
        if checkpoint.steps(folder):
            raise JointNASError(
                f"{run.folder} already holds a search; pass --resume auto to continue it, or another --out"
            )
        return 0, 0.0, False
    newest = checkpoint.latest(folder)
    if newest is None:
        return 0, 0.0, False
    tensors, state = checkpoint.load(newest)
    difference = _difference(state["config"], resumable(run.config))
    if difference:
        raise JointNASError(f"{newest} belongs to another configuration: {difference}")
    run.supernet.load_search_state(tensors["supernet"])
    for name, optimizer in optimizers.items():
        checkpoint.unpack_optimizer(optimizer, tensors[name], state["optimizers"][name])
    torch.set_rng_state(tensors["rng"]["cpu"])
    log.info("resumed from %s", newest)
    return int(state["step"]), float(state["seconds"]), bool(state["converged"])


def resumable(config: RunConfig) -> dict[str, Any]:
    """The part of a configuration that a resumed run must share."""
    plain = config.model_dump(mode="json")
    for key in ("out", "resume", "progress", "tensorboard", "finetune", "eval", "latency"):
        plain.pop(key)
    for key in ("log_every", "save_every", "keep_checkpoints", "capture"):
        plain["search"].pop(key)
    return copy.deepcopy(plain)


def _difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = _difference(a, b, f"{prefix}{key}.")
            if inner:
                return inner
        elif a != b:
            return f"{prefix}{key} was {a!r}, is {b!r}"
    return ""


def _write_environment(run: Run) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(dump(run.config))
    import transformers

    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(run.table.header.device),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "removed": run.removed,
        "space": run.space.to_dict(),
        "block_rank": list(run.supernet.block_rank),
        "original_params": original_params(run.model_config),
    }
    (run.folder / "env.json").write_text(json.dumps(environment, indent=1))
