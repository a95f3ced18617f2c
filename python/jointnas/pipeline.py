"""What happens to one choice of a run's supernet: cut out, distilled, exported, evaluated, measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from jointnas import evaluation, loading
from jointnas.distillation import bake, distil, original_logits, trainable
from jointnas.exporting import export_model, reload
from jointnas.objective import original_params
from jointnas.results import Row
from jointnas.run_folder import Run, final_folder, found_choice, write_json
from jointnas_kernels.latency import deploy, describe, measure_model
from jointnas_kernels.latency.watch import Measured
from jointnas_kernels.space import Choice, SearchSpace, count_params, model_bytes


def distilled(
    run: Run, choice: Choice, *, seed: int | None = None, folder: Path | None = None, resume: bool = False
) -> PreTrainedModel:
    """The choice, cut out of the run's supernet and fine-tuned on all data; without a folder nothing is kept."""
    config = run.config
    student = trainable(run.supernet, choice)
    distil(
        student, original_logits(run.supernet), run.streams.all, config.finetune, batch_size=config.data.batch_size,
        seq_len=config.data.seq_len, seed=config.seed if seed is None else seed, folder=folder, resume=resume,
        progress=config.progress, tensorboard=config.tensorboard,
    )  # fmt: skip
    return bake(student)


def finish(run: Run) -> tuple[PreTrainedModel, Path]:
    """The found choice of a run, distilled, and exported to the run's `final/`, replacing what is there."""
    config, choice = run.config, found_choice(run.folder)
    model = distilled(run, choice, folder=run.folder, resume=config.resume == "auto")
    params = count_params(run.model_config, choice)
    perplexity = quality(model, run, tasks=False)["perplexity"]
    facts = {
        "parameters": f"{params:,} ({params / original_params(run.model_config):.1%} of the original)",
        "predicted latency": f"{run.bound.predict(choice):.3f} ms ({run.table.header.device})",
        "held-out perplexity": f"{perplexity:.3f}",
    }
    if caveat := loading.caveat(config.model):
        facts["note"] = caveat
    final, rank = run.folder / "final", run.supernet.block_rank
    export_model(model, final, choice, rank, facts=facts, **loading.origin(config.model))
    return model, final


def reloaded(run: Run) -> PreTrainedModel:
    """The finished model of a run through stock transformers, on the run's device."""
    model = run.config.model
    return reload(final_folder(run.folder), model.device, getattr(torch, model.dtype))


def evaluate_found(run: Run) -> list[dict[str, Any]]:
    """Rows of the original and the finished model of a run, written to its `eval.json`."""
    found = reloaded(run)
    rows = [
        asdict(evaluated("original", loading.load_model(run.config.model), None, run)),
        asdict(evaluated("found", found, found_choice(run.folder), run)),
    ]
    write_json(run.folder / "eval.json", rows)
    return rows


def evaluated(name: str, model: PreTrainedModel, choice: Choice | None, run: Run) -> Row:
    """Size, latency and quality of one model; choice None: the original. The model is of no use afterwards."""
    measures = quality(model, run)
    if choice is None:
        space = SearchSpace.single(run.model_config)
        shape, predicted = space.full(), run.bound.original()
    else:
        space, shape, predicted = run.space, choice, run.bound.predict(choice)
    size = model_bytes(run.model_config, space, shape, run.supernet.block_rank)
    measured = measured_latency(model, choice, run)
    milliseconds, contended = (None, False) if measured is None else (measured.median, measured.contended)
    params = count_params(run.model_config, shape)
    return Row(
        name, params, size, predicted, milliseconds, **measures, contended=contended,
        caveat=loading.caveat(run.config.model),
    )  # fmt: skip


def measured_latency(model: nn.Module, choice: Choice | None, run: Run) -> Measured | None:
    """Milliseconds of the whole model with the table's kernels; None on another device than the table's.

    The model's linears are replaced: it is of no use afterwards."""
    table, device = run.table, run.table.header.device
    if describe(device.type if device.type == "cpu" or torch.cuda.is_available() else "cpu", device.threads) != device:
        return None
    nn.Module.to(model, device.type, getattr(torch, table.workload.dtype))
    if choice is not None:
        deploy(model, choice, run.space, table, run.supernet.block_rank)
    return measure_model(model, table.workload, threads=device.threads, watch=table.watch())


def quality(model: PreTrainedModel, run: Run, tasks: bool = True) -> dict[str, Any]:
    """Perplexity on the run's held-out text, and task accuracies where the embedded tasks fit the model."""
    options, held_out = run.config.eval, run.streams.held_out
    context = min(256, len(held_out) - 1)
    perplexity = evaluation.perplexity(model, held_out, context=context, max_tokens=options.tokens)
    accuracy: dict[str, float] = {}
    if tasks and options.tasks and run.config.model.source == "embedded":
        found = evaluation.accuracy(model, loading.load_tokenizer(run.config.model), limit=options.task_limit)
        accuracy = {name: values["acc"] for name, values in found.items()}
    return {"perplexity": perplexity if math.isfinite(perplexity) else math.inf, "tasks": accuracy}


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
    perplexity = evaluation.perplexity(model, run.streams.held_out, max_tokens=run.config.eval.tokens)
    params = count_params(run.model_config, choice)
    return Scored(choice, params, run.bound.predict(choice), math.log(perplexity), perplexity)
