"""`eval`: what a model is worth, or the original and the found model of a run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from jointnas import assets, exporting, loading, pipeline
from jointnas.config import DataConfig, EvalConfig, ModelConfig, build
from jointnas.objective import original_params
from jointnas.preparation import open_run
from jointnas.results import Row, text_table
from jointnas.run_folder import new, read_config, write_json
from jointnas.tasks import load_tasks
from jointnas_kernels.errors import JointNASError, writable


def evaluate(
    source: str, data: str | None = None, tasks: list[str] | str | None = None, shots: int | None = None,
    task_files: str | None = None, task_limit: int | None = None, tokens: int | None = None,
    context: int | None = None, device: str | None = None, dtype: str | None = None, revision: str | None = None,
    out: str | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measures the quality of a model; of a run, size, latency and quality of its original and its found model.

    Args:
        source: run folder of a search, model folder (plain or quantized), hub name, or 'embedded'.
        data: text for the perplexity, as `data.source` of a configuration, used whole; 'embedded' (default): the
            held-out part of the embedded text. A run has its own.
        tasks: embedded (default), paper (the paper's seven), names of lm-eval's, several with commas; [] for none.
        shots: few-shot examples; default: the paper's, or the task's own.
        task_files: folder with the tasks' data (`jointnas.tasks`); default: from the hub.
        task_limit: questions per task; default: all.
        tokens: how many tokens of the text; default 65536.
        context: tokens per window of the perplexity; default 256.
        device: where a model runs; a run has its own.
        dtype: in which precision; a run has its own.
        revision: of a hub name.
        out: new JSON file for the rows.

    Returns:
        One row per model (`results.Row`); those of a run are also written to its eval.json.

    Raises:
        JointNASError: neither a run nor a model, a run without finished model, bad tasks or data, `out` exists.
    """
    target = None if out is None else new(out, "file")
    options = {
        "tasks": tasks.split(",") if isinstance(tasks, str) else tasks, "shots": shots, "task_files": task_files,
        "task_limit": task_limit, "tokens": tokens, "context": context,
    }  # fmt: skip
    given = {k: v for k, v in options.items() if v is not None}
    if (Path(source) / "config.yaml").is_file():
        own = {"data": data, "device": device, "dtype": dtype, "revision": revision}
        for name, value in own.items():
            if value is not None:
                raise JointNASError(f"{source} is a run: its {name} is that of its config.yaml; leave --{name} out")
        writable(source, what="run")
        rows = _run(source, given)
    else:
        folder = Path(source).expanduser()
        if source and folder.is_dir() and not [*folder.glob("config.json"), *folder.glob("*.gguf")]:
            raise JointNASError(f"{source} is neither a run folder (config.yaml) nor a model folder (config.json)")
        where = {"source": source, "device": device, "dtype": dtype, "revision": revision}
        model = build(ModelConfig, {k: v for k, v in where.items() if v is not None}, "jointnas eval")
        rows = [_model(loading.resolve_model(model), data or "embedded", build(EvalConfig, given, "jointnas eval"))]
    if target is not None:
        write_json(target, rows)
    return rows


def _run(folder: str, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Both models of a run, with other evaluation settings where they are given."""
    options = build(EvalConfig, {**read_config(Path(folder)).eval.model_dump(), **given}, "jointnas eval")
    tasks = load_tasks(options)
    run = open_run(folder, searched=False)
    run.config = run.config.model_copy(update={"eval": options})
    return pipeline.evaluate_found(run, tasks)


def _model(config: ModelConfig, data: str, options: EvalConfig) -> dict[str, Any]:
    """The row of one model."""
    config = loading.located(config)
    folder = Path(config.source)
    shape = loading.model_config(config)
    loading.check_lengths(shape, eval_context=options.context)
    tasks, (tokens, bos) = load_tasks(options), text_tokens(data, config)
    if folder.is_dir() and "quantization_config" in json.loads((folder / "config.json").read_text()):
        model = exporting.reload(folder, config.device, getattr(torch, config.dtype))
    else:
        model = loading.load_model(config)
    measures = pipeline.quality(model, config, tokens, options, tasks, bos)
    weights = assets.model_dir() if config.source == "embedded" else folder
    files = [weights] if weights.is_file() else list(weights.glob("*.safetensors"))
    size = sum(f.stat().st_size for f in files) or sum(p.numel() * p.element_size() for p in model.parameters())
    return asdict(Row(folder.name, original_params(shape), size, None, None, **measures, caveat=loading.caveat(config)))


def text_tokens(data: str, model: ModelConfig) -> tuple[torch.Tensor, int | None]:
    """Text as tokens of a model, integers [N], and their BOS: all of a source, or the held-out embedded text."""
    whole = DataConfig(source=data, batch_size=1, seq_len=2, held_out_fraction=0.4)  # for short texts, too
    streams = loading.load_streams(whole, model, 0)
    held_out = streams.held_out
    return held_out if data == "embedded" else torch.cat((streams.all, held_out)), streams.bos


text = text_table
