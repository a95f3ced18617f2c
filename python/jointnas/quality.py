"""Quality of a causal language model: perplexity on held-out text and multiple-choice accuracy by lm-eval.

``perplexity`` is exp of the mean negative log-likelihood per token over non-overlapping windows (each window's first
token is predicted from nothing and not counted). ``evaluate`` runs the embedded tasks through lm-eval's own
``simple_evaluate`` (0-shot, ``acc`` and ``acc_norm``), offline; any other lm-eval task name works, too.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jointnas import assets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS = ("continuation", "word", "order", "gloss")
CHANCE = 0.25  # every embedded task has four choices


@torch.no_grad()
def perplexity(
    model: nn.Module, tokens: Tensor, *, context: int = 256, batch_size: int = 16, max_tokens: int | None = None
) -> float:
    """Perplexity of ``model`` on a token stream [N], of which the last incomplete window is left out."""
    count = min(len(tokens), max_tokens or len(tokens)) // context
    if count == 0:
        from jointnas_kernels.errors import JointNASError

        raise JointNASError(f"perplexity needs at least one window of {context} tokens, got {len(tokens)} tokens")
    windows = tokens[: count * context].view(count, context)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    for i in range(0, count, batch_size):
        ids = windows[i : i + batch_size].to(device)
        logits = model(input_ids=ids).logits[:, :-1].float()  # [B, T-1, V]
        total += float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    model.train(was_training)
    return math.exp(total / (count * (context - 1)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the log lines and progress bars of lm-eval and datasets; exceptions pass."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # their bars cannot be switched off after import
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _task_config(name: str, cache: str) -> dict[str, Any]:
    """The embedded task's YAML with its data file's absolute path."""
    import yaml

    config: dict[str, Any] = yaml.safe_load((assets.task_dir() / f"{name}.yaml").read_text())
    files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"] = {
        "data_files": {split: str(assets.task_dir() / file) for split, file in files.items()},
        "cache_dir": cache,
    }
    return config


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = TASKS,
    *,
    limit: int | None = None,
    batch_size: int = 64,
) -> dict[str, dict[str, float]]:
    """Accuracy per task: ``{"gloss": {"acc": …, "acc_norm": …, "acc_stderr": …, "items": …}, …, "mean": {"acc": …}}``.

    ``limit`` takes the first items of each task (they are in random order). Names other than ``TASKS`` are looked up
    in lm-eval's own catalogue.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from jointnas_kernels import errors

    foreign = [name for name in tasks if name not in TASKS]
    was_training = model.training
    model.eval()
    with _quiet(), tempfile.TemporaryDirectory() as cache:
        manager = TaskManager(include_defaults=bool(foreign))
        for name in foreign:
            if name not in manager.all_tasks:
                raise errors.unknown("task", name, [*TASKS, *manager.all_tasks])
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=_max_length(model))
        report = simple_evaluate(
            lm, tasks=[name if name in foreign else _task_config(name, cache) for name in tasks], limit=limit,
            bootstrap_iters=0, task_manager=manager, log_samples=False, verbosity="ERROR",
        )  # fmt: skip
    model.train(was_training)
    results: dict[str, dict[str, float]] = {}
    for name in tasks:
        row = report["results"][name if name in foreign else f"jointnas_{name}"]
        acc = {
            key.split(",")[0]: float(value) for key, value in row.items() if key.split(",")[0] in ("acc", "acc_norm")
        }
        items = float(report["n-samples"][name if name in foreign else f"jointnas_{name}"]["effective"])
        stderr = math.sqrt(acc["acc"] * (1 - acc["acc"]) / max(1.0, items - 1)) if "acc" in acc else math.nan
        results[name] = {**acc, "acc_stderr": stderr, "items": items}
    scores = [row["acc"] for row in results.values() if "acc" in row]
    results["mean"] = {"acc": sum(scores) / len(scores)} if scores else {}
    return results


def _max_length(model: PreTrainedModel) -> int:
    return int(model.config.max_position_embeddings)
