"""The verbs that work on a run folder, in order: search, finetune (with export), evaluate, report."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jointnas import artifact, checkpoint, models, quality
from jointnas.bilevel import Found, Run, optimise, prepare
from jointnas.config import EvalConfig, RunConfig, load
from jointnas.data import Streams
from jointnas.distillation import bake, distil, original_logits, trainable
from jointnas.objective import original_choice, original_params
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import save_adapters
from jointnas_kernels.latency import LatencyTable, deploy, measure_model
from jointnas_kernels.latency.schema import Device
from jointnas_kernels.latency.timing import describe
from jointnas_kernels.latency.watch import Measured
from jointnas_kernels.space import Choice, SearchSpace, count_params, model_bytes


@dataclass(frozen=True)
class Row:
    """One line of a result table. Bytes: weights on disk, packed integers, everything else in 16 bit."""

    name: str
    params: int
    bytes: float
    predicted_ms: float | None
    measured_ms: float | None
    perplexity: float
    tasks: dict[str, float]  # accuracy by task, and their mean
    contended: bool = False  # measured_ms: while the machine was slower than when the latency table was made

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def search(config: RunConfig) -> Path:
    """The whole mission: search, prune, distil, export, evaluate, report. Returns the run's folder.

    With `resume: auto` everything that is already in the folder is kept."""
    run = prepare(config)
    found = _found(run.folder) if config.resume == "auto" else None
    if found is None:
        optimise(run)
    else:
        load_supernet(run)
    _finetune(run)
    evaluate(str(run.folder), rerun=False)
    from jointnas.reporting import report  # late: matplotlib

    report(str(run.folder))
    return run.folder


def finetune(run: str) -> Path:
    """Distils the found choice of a searched run folder and exports it to `final/`."""
    opened = open_run(run)
    return _finetune(opened, again=True)


def _finetune(run: Run, again: bool = False) -> Path:
    final = run.folder / "final"
    if final.is_dir() and not again:
        return final
    config = run.config
    choice = found_choice(run.folder)
    student = trainable(run.supernet, choice)
    distil(
        student, original_logits(run.supernet), run.streams.all, config.finetune, batch_size=config.data.batch_size,
        seq_len=config.data.seq_len, seed=config.seed, folder=run.folder, resume=config.resume == "auto",
        progress=config.progress, tensorboard=config.tensorboard,
    )  # fmt: skip
    return write_final(run, bake(student), choice, final)


def write_final(run: Run, model: Any, choice: Choice, folder: Path) -> Path:
    """Exports a fine-tuned model with what is known of it."""
    config = run.config
    params = count_params(run.model_config, choice)
    facts = {
        "parameters": f"{params:,} ({params / original_params(run.model_config):.1%} of the original)",
        "predicted latency": f"{run.bound.predict(choice):.3f} ms ({run.table.header.device})",
    }
    facts["held-out perplexity"] = (
        f"{quality_of(model, run.streams, config.eval, config, tasks=False)['perplexity']:.3f}"
    )
    tokenizer = models.load_tokenizer(config.model) if models.has_tokenizer(config.model) else None
    licence, notices = models.licence(config.model)
    return artifact.export(
        model, folder, choice, run.supernet.block_rank, tokenizer=tokenizer, facts=facts, base=config.model.source,
        licence=licence, notices=notices,
    )  # fmt: skip


def export(run: str, out: str, adapters: bool = False) -> Path:
    """Copies the finished model of a run folder to `out` (it is a plain transformers folder already).

    adapters: also writes OUT/adapters/NAME, the LoRA pairs that the search trained, as PEFT adapters of the original
        model: w2, w4, .. by weight precision, or `default`."""
    import shutil

    final = Path(run) / "final"
    if not final.is_dir():
        raise JointNASError(f"{run} has no finished model; run `jointnas finetune --run {run}` first")
    if Path(out).exists():
        raise JointNASError(f"{out} exists; choose another folder")
    supernet = open_run(run).supernet if adapters else None
    shutil.copytree(final, out)
    if supernet is not None:
        save_adapters(supernet, Path(out) / "adapters")
    return Path(out)


def evaluate(run: str, rerun: bool = True) -> list[Row]:
    """Original and found model of a run folder: size, latency, quality. Written to `eval.json`."""
    folder = Path(run)
    path = folder / "eval.json"
    if path.is_file() and not rerun:
        return [Row(**r) for r in json.loads(path.read_text())]
    opened = open_run(run, supernet=False)
    if not (folder / "final").is_dir():
        raise JointNASError(f"{run} has no finished model; run `jointnas finetune --run {run}` first")
    config, choice = opened.config, found_choice(folder)
    original = models.load_model(config.model)
    final = artifact.reload(folder / "final", config.model.device, getattr(torch, config.model.dtype))
    rows = [
        describe_model("original", original, None, opened),
        describe_model("found", final, choice, opened),
    ]
    path.write_text(json.dumps([r.to_dict() for r in rows], indent=1))
    return rows


def describe_model(name: str, model: Any, choice: Choice | None, run: Run) -> Row:
    """Measures one model. `choice` None: the original."""
    config = run.config
    measures = quality_of(model, run.streams, config.eval, config)
    rank = run.supernet.block_rank
    if choice is None:
        shape = original_choice(run.model_config)
        plain = SearchSpace((shape.hidden,), (shape.heads,), (shape.head_dim,), (shape.intermediate,), (shape.blocks,))
        size, predicted = model_bytes(run.model_config, plain, shape), run.bound.original()
    else:
        shape, predicted = choice, run.bound.predict(choice)
        size = model_bytes(run.model_config, run.space, choice, rank)
    measured = measured_latency(model, choice, run.space, run.table, rank)
    milliseconds, contended = (None, False) if measured is None else (measured.median, measured.contended)
    params = count_params(run.model_config, shape)
    return Row(name, params, size, predicted, milliseconds, **measures, contended=contended)


def measured_latency(
    model: Any, choice: Choice | None, space: SearchSpace, table: LatencyTable, rank: tuple[int, ...]
) -> Measured | None:
    """Milliseconds of the whole model with the table's kernels; None on another device than the table's.

    The model's linears are replaced: it is of no use afterwards."""
    device: Device = table.header.device
    if describe(device.type if device.type == "cpu" or torch.cuda.is_available() else "cpu", device.threads) != device:
        return None
    nn.Module.to(model, device.type, getattr(torch, table.workload.dtype))
    if choice is not None:
        deploy(model, choice, space, table, rank)
    return measure_model(model, table.workload, threads=device.threads, watch=table.watch())


def quality_of(
    model: Any, streams: Streams, options: EvalConfig, config: RunConfig, tasks: bool = True
) -> dict[str, Any]:
    """Perplexity on held-out text, and task accuracies where the embedded tasks fit the model."""
    context = min(256, len(streams.held_out) - 1)
    perplexity = quality.perplexity(model, streams.held_out, context=context, max_tokens=options.tokens)
    accuracy: dict[str, float] = {}
    if tasks and options.tasks and config.model.source == "embedded":
        tokenizer = models.load_tokenizer(config.model)
        report = quality.evaluate(model, tokenizer, limit=options.task_limit)
        accuracy = {name: values["acc"] for name, values in report.items()}
    return {"perplexity": perplexity if math.isfinite(perplexity) else float("inf"), "tasks": accuracy}


# ---- run folders ----------------------------------------------------------------------------------------------------


def open_run(run: str, supernet: bool = True) -> Run:
    """A searched run folder, with the supernet as the search left it."""
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise JointNASError(
            f"{run} is no run folder: it has no config.yaml; make one with `jointnas search --out {run}`"
        )
    config = load(folder / "config.yaml").model_copy(update={"out": str(folder)})
    found_choice(folder)
    opened = prepare(config)
    if supernet:
        load_supernet(opened)
    return opened


def load_supernet(run: Run) -> None:
    newest = checkpoint.latest(run.folder / "checkpoints")
    if newest is None:
        raise JointNASError(f"{run.folder} has no whole checkpoint; run the search again")
    run.supernet.load_search_state(checkpoint.load(newest)[0]["supernet"])


def _found(folder: Path) -> dict[str, Any] | None:
    path = folder / "choice.json"
    return json.loads(path.read_text()) if path.is_file() else None


def found_choice(folder: Path) -> Choice:
    found = _found(folder)
    if found is None:
        raise JointNASError(f"{folder} has no choice.json: its search has not finished; resume it with --resume auto")
    return Choice.from_dict(found["choice"], where=str(folder / "choice.json"))


__all__ = ["Found", "Row", "describe_model", "evaluate", "export", "finetune", "open_run", "search"]
