"""What happens to one choice of a run's supernet: cut out, distilled, exported, evaluated, measured."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from jointnas import convergence, evaluation, loading, parallel, sharding
from jointnas.config import EvalConfig, ModelConfig, RunConfig
from jointnas.data import without
from jointnas.distillation import Original, bake, distil, original_logits, student_of, trained_parameters
from jointnas.exporting import export_model, reload
from jointnas.objective import original_params
from jointnas.results import Row
from jointnas.run_folder import Run, final_folder, found_choice, write_json
from jointnas.tasks import Tasks, load_tasks
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency import LatencyTable, Workload, deploy, describe, measure_model
from jointnas_kernels.latency.watch import Measured
from jointnas_kernels.runtime import attach
from jointnas_kernels.space import Choice, SearchSpace, count_params, model_bytes

log = logging.getLogger(__name__)


def distilled(run: Run, choice: Choice, *, seed: int | None = None) -> PreTrainedModel:
    """The choice, cut out of the run's supernet and fine-tuned on all data; nothing of the training is kept."""
    return bake(_trained(run, choice, seed=run.config.seed if seed is None else seed))


def _trained(run: Run, choice: Choice, seed: int, folder: Path | None = None, resume: bool = False) -> nn.Module:
    config = run.config
    with sharding.whole(run.supernet):
        student = student_of(run.supernet, choice, config.finetune.train)
    return distil(
        student, original_logits(run.supernet), run.streams.all, config.finetune, batch_size=config.data.batch_size,
        seq_len=config.data.seq_len, seed=seed, folder=folder, resume=resume, progress=config.progress,
        tensorboard=config.tensorboard, bos=run.streams.bos,
    )  # fmt: skip


def finish(run: Run) -> tuple[PreTrainedModel, Path]:
    """The found choice of a run, distilled, and exported to the run's `final/`, replacing what is there."""
    config, choice = run.config, found_choice(run.folder)
    student = _trained(run, choice, config.seed, run.folder, config.resume == "auto")
    trained = sum(p.numel() for p in trained_parameters(student).values())
    model = bake(student)
    params = count_params(run.model_config, choice)
    original, found = (
        quality(of, config.model, run.streams.held_out, config.eval, Tasks(), run.streams.bos)
        for of in (Original(run.supernet), model)
    )
    perplexities = (original["perplexity"], found["perplexity"])
    tokens = config.finetune.steps * (config.finetune.batch_size or config.data.batch_size) * config.data.seq_len
    part = convergence.record(
        run.folder, "finetune", steps=config.finetune.steps, tokens=tokens, trained=trained, total=params,
        perplexity=perplexities,
    )  # fmt: skip
    log.log(logging.WARNING if part["advice"] else logging.INFO, "%s", convergence.sentence(part))
    windows = f"windows of {found['context']} tokens" + ", the first BOS" * (run.streams.bos is not None)
    facts = {
        "parameters": f"{params:,} ({params / original_params(run.model_config):.1%} of the original)",
        "predicted latency": f"{run.bound.predict(choice):.3f} ms ({run.table.header.device})",
        "held-out perplexity": f"{perplexities[1]:.3f} (original {perplexities[0]:.3f}; {windows})",
    }
    if caveat := loading.caveat(config.model):
        facts["note"] = caveat
    final, rank = run.folder / "final", run.supernet.block_rank
    if parallel.is_main():
        export_model(model, final, choice, rank, facts=facts, **loading.origin(config.model))
    return model, final


def ready_tasks(config: RunConfig) -> Tasks:
    """The tasks of a run; what would keep its models from being asked is found before anything expensive."""
    tasks = load_tasks(config.eval)
    if tasks.tasks:
        loading.model_config(config.model)
        if not loading.has_tokenizer(config.model):
            raise JointNASError(
                f"model {config.model.source!r} has no tokenizer; a model without tokenizer needs eval.tasks = []"
            )
        loading.load_tokenizer(config.model)
    return tasks


def reloaded(run: Run) -> PreTrainedModel:
    """The finished model of a run through stock transformers, on the run's device."""
    model = run.config.model
    return reload(final_folder(run.folder), model.device, getattr(torch, model.dtype))


def evaluate_found(run: Run, tasks: Tasks | None = None) -> list[dict[str, Any]]:
    """Rows of the original and the finished model of a run, written to its `eval.json`."""
    tasks = ready_tasks(run.config) if tasks is None else tasks
    found = reloaded(run)
    rows = [
        asdict(evaluated("original", loading.load_model(run.config.model), None, run, tasks)),
        asdict(evaluated("found", found, found_choice(run.folder), run, tasks)),
    ]
    write_json(run.folder / "eval.json", rows)
    return rows


def evaluated(name: str, model: PreTrainedModel, choice: Choice | None, run: Run, tasks: Tasks) -> Row:
    """Size, latency and quality of one model; choice None: the original. The model is of no use afterwards."""
    measures = quality(model, run.config.model, run.streams.held_out, run.config.eval, tasks, run.streams.bos)
    if choice is None:
        space = SearchSpace.single(run.model_config)
        shape, predicted = space.full(), run.bound.original()
    else:
        space, shape, predicted = run.space, choice, run.bound.predict(choice)
    size = model_bytes(run.model_config, space, shape, run.supernet.block_rank)
    measured, decoded = measured_latency(model, choice, run)
    milliseconds, contended = (None, False) if measured is None else (measured.value, measured.contended)
    params = count_params(run.model_config, shape)
    apart = milliseconds is not None and abs(predicted / milliseconds - 1) > run.table.tolerance
    return Row(
        name, params, size, predicted, milliseconds, **measures, contended=contended, apart=apart,
        decode_ms=None if decoded is None else decoded.value, caveat=loading.caveat(run.config.model),
    )  # fmt: skip


def measured_latency(
    model: nn.Module, choice: Choice | None, run: Run
) -> tuple[Measured | None, Measured | None]:
    """Milliseconds of the whole model with the table's kernels, and of a token that it decodes behind as many as the
    table's workload has, for one sequence; None on another device than the table's. The latter only where it runs
    through the step, which has one layout for both.

    The model's linears are replaced: it is of no use afterwards."""
    table, device = run.table, run.table.header.device
    if not is_here(table):
        return None, None
    deployed(model, choice, run.space, table, run.supernet.block_rank)
    watch, work = table.watch(), table.workload
    found = measure_model(model, work, threads=device.threads, watch=watch)
    if not table.header.stepped:
        return found, None
    decode = Workload("decode", 1, work.seq, work.dtype)
    return found, found if work == decode else measure_model(model, decode, threads=device.threads, watch=watch)


def is_here(table: LatencyTable) -> bool:
    """Whether this machine has the table's device."""
    device = table.header.device
    kind = device.type if torch.cuda.is_available() else "cpu"
    return describe(kind, device.threads) == device


def deployed(
    model: nn.Module, choice: Choice | None, space: SearchSpace, table: LatencyTable, block_rank: Sequence[int]
) -> nn.Module:
    """The model on the table's device, in its dtype, with its kernels, ready to be measured; choice None: the original.
    In place: its weights are of no use afterwards."""
    nn.Module.to(model, table.header.device.type, getattr(torch, table.workload.dtype))
    if choice is not None:
        deploy(model, choice, space, table, block_rank)
    elif table.header.stepped:
        attach(model)
    return model


def quality(
    model: nn.Module, source: ModelConfig, tokens: Tensor, options: EvalConfig, tasks: Tasks, bos: int | None = None
) -> dict[str, Any]:
    """The quality part of a `Row`: perplexity on a stream, integers [N] (`data.Streams`), in the context asked for or
    the longest possible, with BOS where there is one also without it; and accuracies, where there are tasks."""
    context = _context(model, tokens, options, bos)
    found = {"perplexity": _perplexity(model, tokens, options, bos)}
    if bos is not None:
        plain = without(tokens[: options.tokens], bos)
        found["perplexity_without_bos"] = evaluation.perplexity(model, plain, context=context)
    accuracy: dict[str, dict[str, float]] = {}
    if tasks.tasks:
        assert isinstance(model, PreTrainedModel)
        accuracy = evaluation.accuracy(model, loading.load_tokenizer(source), tasks, limit=options.task_limit)
    finite = {name: value if math.isfinite(value) else math.inf for name, value in found.items()}
    return {**finite, "context": context, "tasks": accuracy}


def _perplexity(model: nn.Module, tokens: Tensor, options: EvalConfig, bos: int | None) -> float:
    context = _context(model, tokens, options, bos)
    return evaluation.perplexity(model, tokens, bos=bos, context=context, max_tokens=options.tokens)


def _context(model: nn.Module, tokens: Tensor, options: EvalConfig, bos: int | None) -> int:
    """Tokens of a window that perplexity is measured on; fewer where there is not as much text."""
    config: Any = model.config
    most, used = int(config.max_position_embeddings), tokens[: options.tokens]
    left = used if bos is None else without(used, bos)
    return min(options.context or 256, most, len(tokens) - 1, len(left))


# ---- comparisons at one seed ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """One fine-tuned choice. `ce` is the held-out cross-entropy in nats per token."""

    choice: Choice
    params: int
    predicted_ms: float
    ce: float
    perplexity: float


def score(run: Run, choice: Choice, seed: int) -> Scored:
    """Fine-tunes a choice from the run's supernet as it is, and measures its held-out cross-entropy."""
    model = distilled(run, choice, seed=seed)
    perplexity = _perplexity(model, run.streams.held_out, run.config.eval, run.streams.bos)
    params = count_params(run.model_config, choice)
    return Scored(choice, params, run.bound.predict(choice), math.log(perplexity), perplexity)
