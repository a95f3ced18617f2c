"""What keeps a training step that went wrong from spoiling the run, and says so.

Not finite: a step whose loss or gradients are not finite, on any rank, is skipped on all; weights, logits and optimizer
states stay as they are. Several in a row end the run with a dump; the checkpoints before stay as they are.

Memory: a batch that does not fit is computed in parts, halved as often as it takes, whose gradients add up to those of
the whole, up to rounding: a loss is a mean over the predicted tokens of the batch.

Collapse: a search that decides everything in its first steps, or whose logits are not finite, ends at once.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from jointnas import parallel, sharding
from jointnas.data import IGNORE, Batch
from jointnas.run_folder import write_json
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import Supernet

log = logging.getLogger(__name__)
Losses = Callable[[Batch], dict[str, Tensor]]  # of a part of a batch, each a mean over its predicted tokens
Kind = Literal["weight", "arch", "finetune"]
RATES = {"weight": "search.lr_weight", "arch": "search.lr_arch", "finetune": "finetune.lr"}
MEMORY = re.compile(r"not enough memory|can't allocate memory|out of memory|ALLOC_FAILED", re.I)
NAMED = 8  # tensors that a dump names of each sort
UNDECIDED = 0.05  # normalised entropy below which a dimension counts as decided, whatever ends the search


class Guard:
    """Watches the steps of one kind.

    Args:
        kind: of the steps.
        most: so many skipped in a row end the run.
        folder: where the dump of such an end goes; None: nowhere.
        model: whose tensors a dump names.

    Attributes:
        skipped: steps so far that were skipped.
        rows: sequences of a batch that are computed at once; None: all.
    """

    def __init__(
        self, kind: Kind = "weight", most: int = 5, folder: Path | None = None, model: nn.Module | None = None
    ) -> None:  # fmt: skip
        self.kind, self.most, self.folder, self.model = kind, most, folder, model
        self.skipped = 0
        self.rows: int | None = None
        self._in_row: list[float] = []  # losses of the steps skipped since the last one that was not

    def gradients(self, batch: Batch, losses: Losses, clear: Callable[[], None]) -> dict[str, Tensor]:
        """Computes the gradients of `losses(batch)["loss"]`; the losses, without their graphs.

        Args:
            batch: int64 [B, T] each.
            losses: of a part of a batch; called for every part of one that does not fit as a whole.
            clear: sets the gradients there are to None.

        Raises:
            JointNASError: a single sequence does not fit into memory.
        """
        while True:
            try:
                return self._added_up(batch, losses, clear)
            except (RuntimeError, MemoryError) as error:
                if not is_memory(error) or sharding.sharding():  # the other ranks would wait for its blocks
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            rows = min(self.rows or len(batch.ids), len(batch.ids))  # here, where the failed step's tensors are gone
            clear()
            if isinstance(self.model, Supernet):
                self.model.release()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            if rows == 1:
                raise JointNASError(
                    f"a {self.kind} step on a single sequence of {batch.ids.shape[1]} tokens does not fit into memory "
                    f"({reason}); lower data.seq_len, or set gradient_checkpointing; what was saved is as it was"
                )
            self.rows = -(-rows // 2)
            log.warning("a %s step does not fit into memory: from now on %d sequences at once", self.kind, self.rows)

    def _added_up(self, batch: Batch, losses: Losses, clear: Callable[[], None]) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for part, share in parts(batch, self.rows):
            values = losses(part)
            values = values if share == 1 else {name: value * share for name, value in values.items()}
            if not total:
                clear()
            values["loss"].backward()
            for name, value in values.items():
                total[name] = total[name] + value.detach() if name in total else value.detach()
        return total

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], clip: float, at: int,
        loss: Tensor, batch: Batch, losses: Losses,
    ) -> bool:  # fmt: skip
        """Clips the norm of the gradients and makes the optimizer's step, if loss and norm are finite: False: they are
        not, and nothing was changed.

        Args:
            optimizer: of the parameters.
            parameters: whose gradients are judged and clipped.
            clip: largest norm.
            at: number of the step, which is its position in the data, too.
            loss: scalar, of `batch`.
            batch: for the dump.
            losses: as for `gradients`, for the dump.

        Raises:
            JointNASError: `most` steps in a row were not finite.
        """
        parameters = list(parameters)
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        total = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not parallel.any_rank(not (bool(loss.isfinite()) and bool(total.isfinite()))):
            self._in_row.clear()
            clip_grads_with_norm_(parameters, clip, norm)
            optimizer.step()
            return True
        self.skipped += 1
        self._in_row.append(loss.item())
        log.warning(
            "%s step %d is skipped: loss %g, norm of its gradients %g; %d in a row, %d end the run",
            self.kind, at, loss.item(), total.item(), len(self._in_row), self.most,
        )  # fmt: skip
        if len(self._in_row) >= self.most:
            self._stop(at, total.item(), batch, losses)
        return False

    def _stop(self, at: int, norm: float, batch: Batch, losses: Losses) -> None:
        found = {} if self.model is None else not_finite(self.model, lambda: losses(batch))
        first = next((f"{names[0]} ({sort})" for sort, names in found.items() if names), "no tensor of the model")
        where = "there is no folder for a dump"
        if self.folder is not None:
            path = self.folder / f"not-finite-{self.kind}-{at}.json"
            write_json(path, {
                "kind": self.kind, "step": at, "losses": [str(x) for x in self._in_row], "norm": str(norm),
                "not_finite": found,
                "batch": {"position": at, "ids": batch.ids.tolist(), "labels": batch.labels.tolist()},
            })  # fmt: skip
            where = f"{path} has losses, tensors and the batch"
        raise JointNASError(
            f"{len(self._in_row)} {self.kind} steps in a row, up to step {at}, had a loss or gradients that are not "
            f"finite (the last loss is {self._in_row[-1]:g}); the first tensor that is not: {first}; {where}. Nothing "
            "was changed by these steps, and what was saved is as it was: look at these batches of the data, or lower "
            f"{RATES[self.kind]} in a run of another --out; --resume auto goes on from the last checkpoint"
        )


def parts(batch: Batch, rows: int | None) -> Iterator[tuple[Batch, float]]:
    """A batch, int64 [B, T] each, as parts of so many sequences (None: whole), and the share of its predicted tokens
    that each has; those that have none are left out."""
    if rows is None or rows >= len(batch.ids):
        yield batch, 1
        return
    counts = (batch.labels[:, 1:] != IGNORE).sum(1)
    total = int(counts.sum())
    if total == 0:  # as the whole, which has none either
        yield Batch(batch.ids[:1], batch.labels[:1]), 1
    for start in range(0, len(batch.ids), rows):
        own = slice(start, start + rows)
        if count := int(counts[own].sum()):
            yield Batch(batch.ids[own], batch.labels[own]), count / total


def is_memory(error: BaseException) -> bool:
    """Whether an exception says that memory does not suffice, on any device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and MEMORY.search(str(error)) is not None
    )


def not_finite(model: nn.Module, forward: Callable[[], object]) -> dict[str, list[str]]:
    """The first tensors of a model that are not finite, by what they are: weights, what modules return (in the order in
    which a forward pass reaches them), gradients."""

    def bad(tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(tensor.detach().isfinite().all())

    tensors = [*model.named_parameters(), *model.named_buffers()]
    weights = [name for name, tensor in tensors if bad(tensor)]
    gradients = [name for name, tensor in tensors if bad(tensor.grad)]
    outputs: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            values = output if isinstance(output, (tuple, list)) else (output,)
            if any(map(bad, values)):
                outputs.append(name or type(module).__name__)

        return look

    hooks = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            forward()
    except (RuntimeError, MemoryError) as error:  # memory, above all; what else is known is worth saying
        log.info("what modules return cannot be told: %s", error)
    finally:
        for handle in hooks:
            handle.remove()
    return {"weight": weights[:NAMED], "output": outputs[:NAMED], "gradient": gradients[:NAMED]}


def check_logits(
    probs: Mapping[str, Tensor], entropy: Mapping[str, float], step: int, steps: int, stop: float, early: float
) -> None:
    """Raises if a search of so many steps went wrong by its step `step`.

    Args:
        probs: of all dimensions, floats.
        entropy: normalised, of the dimensions that are not decided beforehand.
        step: steps so far.
        steps: of the search.
        stop: entropy below which the search ends.
        early: share of the steps in which not everything may be decided.

    Raises:
        JointNASError: probabilities that are not finite, or every dimension decided too early.
    """
    for name, p in probs.items():
        if not bool(p.isfinite().all()):
            raise JointNASError(
                f"after step {step} of the search the probabilities of {name} are not finite; what was saved is as it "
                "was: lower search.lr_arch in a run of another --out"
            )
    if entropy and step < early * steps and max(entropy.values()) < max(stop, UNDECIDED):
        raise JointNASError(
            f"after {step} of {steps} steps of the search every dimension is decided (largest entropy "
            f"{max(entropy.values()):.3f}), before losses can have told choices apart; lower search.lr_arch or "
            f"search.alpha_init, or allow it with search.collapse = 0 (it is {early:g}: that share of the steps)"
        )


def finite(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Those of scalars that are finite."""
    plain = {name: value.item() for name, value in values.items()}
    return {name: value for name, value in plain.items() if math.isfinite(value)}
