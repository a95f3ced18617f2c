"""Quality of a causal language model: perplexity on held-out text and multiple-choice accuracy by lm-eval.

`perplexity` is exp of the mean negative log-likelihood per token over non-overlapping windows. A window's first token
is predicted from nothing and not counted; with BOS it is BOS. `accuracy` asks the questions of `tasks.load_tasks`
through lm-eval.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jointnas.data import IGNORE, windows
from jointnas.tasks import Tasks, quiet
from jointnas_kernels.errors import JointNASError


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


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks, *, limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Accuracy per task, `{"gloss": {"acc": …, "acc_stderr": …, "acc_norm": …, "acc_norm_stderr": …, "shots": …,
    "items": …}, …}`, as lm-eval computes it, and the `mean` of "acc" and "acc_norm" over the tasks that have them.

    `limit` takes the first items of each task; `batch_size` None: what about 1 GB of logits allow."""
    from lm_eval.evaluator import evaluate  # optional, and slow to import
    from lm_eval.models.huggingface import HFLM

    longest = int(model.config.max_position_embeddings)
    if batch_size is None:
        tokens = min(longest, 2 * len(tokenizer(tasks.longest).input_ids))  # the first prompt is an example
        batch_size = max(1, min(64, 2**28 // (tokens * int(model.config.vocab_size))))
    for task in tasks.tasks.values():
        task.set_fewshot_seed(seed=1234)  # lm-eval's own: the same examples for every model
    with quiet(), evaluating(model):
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=longest)
        report = evaluate(
            lm=lm, task_dict={"tasks": tasks.tasks, "groups": tasks.groups, "group_map": {}}, limit=limit,
            bootstrap_iters=1000, log_samples=False,
        )  # fmt: skip
    results: dict[str, dict[str, float]] = {}
    for name, key in tasks.rows.items():
        row = {k.split(",")[0]: v for k, v in report["results"][key].items() if "," in k}
        items = sum(int(report["n-samples"][member]["effective"]) for member in tasks.members(name))
        numbers = {k: float(v) for k, v in row.items() if isinstance(v, (int, float))}
        results[name] = {**numbers, "shots": tasks.shots[name], "items": items}
    mean: dict[str, float] = {}
    for metric in ("acc", "acc_norm"):
        values = [row[metric] for row in results.values() if metric in row]
        mean |= {metric: sum(values) / len(values)} if values else {}
    return {**results, "mean": mean} if results else {}
