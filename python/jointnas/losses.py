"""Cross-entropies of supernets, and of single choices without any training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from jointnas import budget, parallel
from jointnas.data import Batch, Batches
from jointnas.run_folder import Run, read_json, write_json
from jointnas_kernels.hf import Supernet
from jointnas_kernels.space import Choice

Loss = Callable[[Supernet, Batch], Tensor]


def cross_entropy(supernet: Supernet, batch: Batch) -> Tensor:
    """Nats per token."""
    loss: Tensor | None = supernet(batch.ids, labels=batch.labels).loss
    assert loss is not None
    return loss


class Losses:
    """Cross-entropies, nats per token, of choices of a run's supernet as it is, on the same batches of the
    architecture's data. What is known stands in a file: a resumed search does not compute it again."""

    def __init__(self, run: Run, path: Path, batches: int) -> None:
        self.run, self.path, self.count = run, path, batches
        self.known: dict[str, float] = parallel.from_main(lambda: read_json(path)) or {}
        data = run.config.data
        seed = run.config.seed * 4 + 1  # windows as the architecture's of a search
        self._batches = Batches(run.streams.arch, data.batch_size, data.seq_len, seed, run.streams.bos)

    @property
    def tokens(self) -> int:
        """That went through the model."""
        return len(self.known) * self.count * budget.batch(self.run.config)

    @torch.no_grad()
    def of(self, choice: Choice) -> float:
        """Of a choice of the supernet's space."""
        key = json.dumps(choice.to_dict())
        if key not in self.known:
            supernet = self.run.supernet.fix(choice)
            found = 0.0
            for i in range(self.count):
                batch, part = parallel.rows(self._batches, i, supernet.device)
                found += parallel.total(cross_entropy(supernet, batch) * part).item()
            self.known[key] = found / self.count
            supernet.relax()
            write_json(self.path, self.known)
        return self.known[key]

    def of_deployed(self, choice: Choice) -> float:
        """Of a choice of what the run deploys; where that gets its bits after the search, without them."""
        if self.run.after is not None:
            choice = replace(choice, weight_bits=None, act_bits=None, head_bits=None)
        return self.of(choice)

    def best(self, choices: Iterable[Choice]) -> Choice:
        """The one of least loss."""
        return min(choices, key=self.of)
