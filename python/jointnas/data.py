"""Token streams, split into the part that trains weights, the part that trains the architecture, and held-out text.

A batch is a function of (stream, seed, step) alone: epoch e visits the stream's windows in a permutation drawn from
(seed, e). So the position in the data is the step number, and a resumed run sees the batches it would have seen.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jointnas import assets
from jointnas.config import DataConfig
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.nn.choices import seeded


@dataclass(frozen=True)
class Streams:
    """Token ids, int64 [N] each. `all` = weight + arch part, for fine-tuning."""

    weight: Tensor
    arch: Tensor
    held_out: Tensor

    @property
    def all(self) -> Tensor:
        """Weight and architecture part, int64 [N]."""
        return torch.cat((self.weight, self.arch))


class Batches:
    """Batches [batch, length] of a stream by step number."""

    def __init__(self, stream: Tensor, batch: int, length: int, seed: int) -> None:
        self.windows = len(stream) // length
        if self.windows < batch:
            raise JointNASError(
                f"a stream of {len(stream)} tokens has {self.windows} windows of {length}, "
                f"too few for batches of {batch}"
            )
        self._stream, self._batch, self._length, self._seed = stream, batch, length, seed
        self._order = functools.lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(self.windows, generator=seeded(self._seed, epoch))

    def at(self, step: int, device: torch.device | str = "cpu") -> Tensor:
        """The batch of a step, int64 [batch, length]."""
        per_epoch = self.windows // self._batch
        epoch, index = divmod(step, per_epoch)
        chosen = self._order(epoch)[index * self._batch : (index + 1) * self._batch]
        # the windows start elsewhere in every epoch, so that their borders do not stay the same
        offset = 0 if epoch == 0 else int(torch.randint(self._length, (1,), generator=seeded(self._seed, epoch, 1)))
        starts = (chosen * self._length + offset).clamp_max(len(self._stream) - self._length)
        return self._stream[starts[:, None] + torch.arange(self._length)].to(device)


def load(config: DataConfig, tokenizer: Any = None, seed: int = 0) -> Streams:
    """The streams a configuration describes. `tokenizer` is needed for everything but the embedded text."""
    if config.source == "embedded":
        tokens, held_out = assets.train_tokens(seed), assets.held_out_tokens()
    else:
        if tokenizer is None:
            raise JointNASError(f"data source {config.source!r} needs the model's tokenizer")
        tokens = _tokenize(_documents(config), tokenizer)
        count = max(2, int(len(tokens) * config.held_out_fraction))
        tokens, held_out = tokens[:-count], tokens[-count:]
    if config.max_tokens is not None:
        tokens = tokens[: config.max_tokens]
    return split(tokens, held_out, config)


def split(tokens: Tensor, held_out: Tensor, config: DataConfig) -> Streams:
    """Training tokens, int64 [N], divided between weights and architecture."""
    border = int(len(tokens) * (1 - config.arch_fraction))
    least = config.batch_size * config.seq_len
    if min(border, len(tokens) - border) < least:
        raise JointNASError(
            f"{len(tokens)} training tokens are too few: both parts need at least one batch, "
            f"{config.batch_size} x {config.seq_len} = {least} tokens"
        )
    return Streams(tokens[:border], tokens[border:], held_out)


def _documents(config: DataConfig) -> list[str]:
    if config.source.startswith("hf:"):
        return _from_hub(config)
    path = Path(config.source)
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise JointNASError(f"data folder {str(path)!r} has no .txt files")
    elif path.is_file():
        files = [path]
    else:
        raise JointNASError(
            f"data source {config.source!r} does not exist; allowed: 'embedded', a text file, a folder of .txt files, "
            "'hf:NAME' for a Hugging Face data set"
        )
    try:
        return [f.read_text(encoding="utf-8") for f in files]
    except UnicodeDecodeError as error:
        raise JointNASError(f"data source {config.source!r} is not UTF-8 text ({error})") from None


def _from_hub(config: DataConfig) -> list[str]:
    try:
        import datasets
    except ImportError:
        raise JointNASError("data source 'hf:' needs the `datasets` package: pip install datasets") from None
    name, _, subset = config.source.removeprefix("hf:").partition("/config=")
    try:
        data = datasets.load_dataset(name, subset or None, split="train")
    except Exception as error:  # the hub's exceptions have no common base
        raise JointNASError(f"data set {name!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    if config.text_column not in data.column_names:
        raise JointNASError(
            f"data set {name!r} has no column {config.text_column!r}; it has {', '.join(data.column_names)}"
        )
    return list(data[config.text_column])


def _tokenize(documents: list[str], tokenizer: Any) -> Tensor:
    end = tokenizer.eos_token_id
    after = [] if end is None else [end]
    encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
    return torch.tensor([i for document in encoded for i in (*document, *after)], dtype=torch.int64)
