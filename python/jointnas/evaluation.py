"""Quality of a causal language model: perplexity on held-out text and multiple-choice accuracy by lm-eval.

`perplexity` is exp of the mean negative log-likelihood per token over non-overlapping windows. A window's first token
is predicted from nothing and not counted; with BOS it is BOS. `accuracy` runs the embedded tasks through lm-eval's own
`simple_evaluate` (0-shot, `acc` and `acc_norm`), offline; any other lm-eval task name works, too.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jointnas import assets
from jointnas.data import IGNORE, windows
from jointnas_kernels.errors import JointNASError, unknown

TASKS = ("continuation", "word", "order", "gloss")
CHANCE = 0.25  # every embedded task has four choices


@torch.no_grad()
def perplexity(
    model: nn.Module, tokens: Tensor, *, bos: int | None = None, context: int = 256, batch_size: int = 16,
    max_tokens: int | None = None,
) -> float:  # fmt: skip
    """Perplexity of a model on a token stream, integers [N] (`data.Streams`), without its last incomplete window.

    Windows are of `context` tokens, the first of them BOS if there is one. Tokens that only give context do not count.

    Raises:
        JointNASError: there is no whole window, or nothing in it that counts.
    """
    own = context - (bos is not None)  # tokens of the stream in a window
    count = min(len(tokens), max_tokens or len(tokens)) // max(1, own)
    if count == 0 or context < 2:
        raise JointNASError(f"perplexity needs at least one window of {max(2, context)} tokens, got {len(tokens)}")
    device = next(model.parameters()).device
    total, counted = 0.0, 0
    with evaluating(model):
        for i in range(0, count, batch_size):
            starts = torch.arange(i, min(i + batch_size, count)) * own
            ids, labels = windows(tokens, starts, context, bos).to(device)
            logits = model(input_ids=ids).logits[:, :-1].float()  # [B, T-1, V]
            total += float(F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"))
            counted += int((labels[:, 1:] != IGNORE).sum())
    if counted == 0:
        raise JointNASError(f"perplexity: none of {len(tokens)} tokens counts, all of them only give context")
    return math.exp(total / counted)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, then as it was."""
    before = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the log lines and progress bars of lm-eval and datasets; exceptions pass."""
    # their bars cannot be switched off after import
    with contextlib.ExitStack() as after, contextlib.redirect_stderr(io.StringIO()):
        for name in ("lm_eval", "lm-eval", "datasets"):
            logger = logging.getLogger(name)
            after.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


def _task_config(name: str, cache: str) -> dict[str, Any]:
    """The embedded task's YAML with its data file's absolute path."""
    config: dict[str, Any] = yaml.safe_load((assets.task_dir() / f"{name}.yaml").read_text())
    files = config["dataset_kwargs"]["data_files"]
    paths = {split: str(assets.task_dir() / file) for split, file in files.items()}
    return {**config, "dataset_kwargs": {"data_files": paths, "cache_dir": cache}}


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str] = TASKS, *,
    limit: int | None = None, batch_size: int = 64,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Accuracy per task: `{"gloss": {"acc": …, "acc_norm": …, "acc_stderr": …, "items": …}, …, "mean": {"acc": …}}`.

    Names other than `TASKS` are looked up in lm-eval's catalogue; `limit` takes the first items, in random order."""
    from lm_eval.evaluator import simple_evaluate  # optional, and slow to import
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = {name: f"jointnas_{name}" if name in TASKS else name for name in tasks}  # as lm-eval has them
    with _quiet(), tempfile.TemporaryDirectory() as cache, evaluating(model):
        manager = TaskManager(include_defaults=not set(tasks) <= set(TASKS))
        for name in tasks:
            if name not in TASKS and name not in manager.all_tasks:
                raise unknown("task", name, [*TASKS, *manager.all_tasks])
        longest = int(model.config.max_position_embeddings)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=longest)
        report = simple_evaluate(
            lm, tasks=[_task_config(name, cache) if name in TASKS else name for name in tasks], limit=limit,
            bootstrap_iters=0, task_manager=manager, log_samples=False, verbosity="ERROR",
        )  # fmt: skip
    results: dict[str, dict[str, float]] = {}
    for name, full in names.items():
        row = {key.split(",")[0]: value for key, value in report["results"][full].items()}
        found = {key: float(row[key]) for key in ("acc", "acc_norm") if key in row}
        items = float(report["n-samples"][full]["effective"])
        acc = found.get("acc", math.nan)
        results[name] = {**found, "acc_stderr": math.sqrt(acc * (1 - acc) / max(1.0, items - 1)), "items": items}
    scores = [row["acc"] for row in results.values() if "acc" in row]
    results["mean"] = {"acc": sum(scores) / len(scores)} if scores else {}
    return results
