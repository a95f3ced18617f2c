"""What happens to one choice of a run's supernet: cut out, distilled, exported, evaluated, measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from jointnas import evaluation, loading
from jointnas.data import without
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
        progress=config.progress, tensorboard=config.tensorboard, bos=run.streams.bos,
    )  # fmt: skip
    return bake(student)


def finish(run: Run) -> tuple[PreTrainedModel, Path]:
    """The found choice of a run, distilled, and exported to the run's `final/`, replacing what is there."""
    config, choice = run.config, found_choice(run.folder)
    model = distilled(run, choice, folder=run.folder, resume=config.resume == "auto")
    params = count_params(run.model_config, choice)
    measures = quality(model, run, tasks=False)
    windows = f"windows of {measures['context']} tokens" + ", the first BOS" * (run.streams.bos is not None)
    facts = {
        "parameters": f"{params:,} ({params / original_params(run.model_config):.1%} of the original)",
        "predicted latency": f"{run.bound.predict(choice):.3f} ms ({run.table.header.device})",
        "held-out perplexity": f"{measures['perplexity']:.3f} ({windows})",
    }
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
    return Row(name, params, size, predicted, milliseconds, **measures, contended=contended)


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
    options, context = run.config.eval, eval_context(run)
    perplexities = {"perplexity": held_out_perplexity(model, run)}
    if run.streams.bos is not None:
        plain = without_bos(run)
        perplexities["perplexity_without_bos"] = evaluation.perplexity(model, plain, context=context)
    accuracy: dict[str, float] = {}
    if tasks and options.tasks and run.config.model.source == "embedded":
        found = evaluation.accuracy(model, loading.load_tokenizer(run.config.model), limit=options.task_limit)
        accuracy = {name: values["acc"] for name, values in found.items()}
    finite = {name: value if math.isfinite(value) else math.inf for name, value in perplexities.items()}
    return {**finite, "context": context, "tasks": accuracy}


def held_out_perplexity(model: nn.Module, run: Run) -> float:
    """Of a model of the run; windows begin with BOS where its tokenizer has one."""
    return evaluation.perplexity(
        model, run.streams.held_out, bos=run.streams.bos, context=eval_context(run), max_tokens=run.config.eval.tokens
    )


def eval_context(run: Run) -> int:
    """Tokens of a window that perplexity is measured on; fewer where there is not as much held-out text."""
    most = min(256, run.model_config.max_position_embeddings)
    return min(run.config.eval.context or most, len(run.streams.held_out) - 1, len(without_bos(run)))


def without_bos(run: Run) -> Tensor:
    """The held-out stream that is evaluated, without the BOS tokens in it."""
    tokens, bos = run.streams.held_out[: run.config.eval.tokens], run.streams.bos
    return tokens if bos is None else without(tokens, bos)


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
    perplexity = held_out_perplexity(model, run)
    params = count_params(run.model_config, choice)
    return Scored(choice, params, run.bound.predict(choice), math.log(perplexity), perplexity)
