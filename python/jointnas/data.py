"""Token streams, split into the part that trains weights, the part that trains the architecture, and held-out text.

A batch is a function of (stream, seed, step) alone: epoch e visits the stream's windows in a permutation drawn from
(seed, e). So the position in the data is the step number, and a resumed run sees the batches it would have seen.

Where the model's tokenizer puts BOS before a text, a window is BOS and the tokens behind it.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jointnas import assets, records
from jointnas.config import DataConfig
from jointnas.tokens import bos_of, cache_folder, tokenized
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.nn.choices import seeded

log = logging.getLogger(__name__)
ENDS = 1 << 16  # tokens of a stream's ends that tell it from others
IGNORE = -100  # label of a token that only gives context


class Batch(NamedTuple):
    """What a step needs, int64 [B, T] each: token ids, and the same as labels, -100 where a token is not learned."""

    ids: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """On a device."""
        return Batch(self.ids.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Streams:
    """Integers [N], an id per token, or -1 - id for one that only gives context (`decode`): `all` for training, from
    token `border` on that of the architecture, and `held_out`. `bos`: the token that begins a window. `unseen`: text of
    its own for the architecture, where the model was trained on `all`: what it knows by heart says little about which
    sizes it needs."""

    all: Tensor
    border: int
    held_out: Tensor
    bos: int | None = None
    unseen: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The part that trains weights, [border]."""
        return self.all[: self.border]

    @property
    def arch(self) -> Tensor:
        """The part that trains the architecture, [N - border], or what it has of its own."""
        return self.all[self.border :] if self.unseen is None else self.unseen

    def fingerprint(self) -> str:
        """Differs for other data: a hash of the lengths, and of the tokens at both ends."""
        digest = hashlib.sha256(f"{len(self.all)} {self.border} {self.bos}".encode())
        own = () if self.unseen is None else (self.unseen,)
        for part in (self.all[:ENDS], self.all[-ENDS:], *own):
            digest.update(part.to(torch.int64).numpy().tobytes())
        return digest.hexdigest()


def decode(stream: Tensor) -> Batch:
    """Ids and labels, int64, of any part of a stream."""
    stream = stream.long()
    context = stream < 0
    return Batch(torch.where(context, -1 - stream, stream), stream.masked_fill(context, IGNORE))


def without(stream: Tensor, token: int) -> Tensor:
    """A stream without one of its tokens."""
    return stream[decode(stream).ids != token]


def windows(stream: Tensor, starts: Tensor, length: int, bos: int | None = None) -> Batch:
    """[B, length] tokens from each start, int64 [B]; with `bos` one of them is BOS, which is not there twice."""
    own = length - (bos is not None)
    found = decode(stream[starts[:, None] + torch.arange(own)])
    if bos is None:
        return found
    begun = found.ids[:, :1] == bos  # a document begins here: one filler at the end, which nothing sees

    def joined(part: Tensor, value: int) -> Tensor:
        one = torch.full_like(part[:, :1], value)
        return torch.where(begun, torch.cat((part, one), 1), torch.cat((one, part), 1))

    return Batch(joined(found.ids, bos), joined(found.labels, IGNORE))


class Batches:
    """Batches [batch, length] of a stream by step number."""

    def __init__(self, stream: Tensor, batch: int, length: int, seed: int, bos: int | None = None) -> None:
        self._own = length - (bos is not None)  # tokens of the stream in a window
        self.windows = len(stream) // self._own
        if self.windows < batch:
            raise JointNASError(
                f"a stream of {len(stream)} tokens has {self.windows} windows of {self._own}, "
                f"too few for batches of {batch}"
            )
        self._stream, self._batch, self._length, self._seed, self._bos = stream, batch, length, seed, bos
        self._order = functools.lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(self.windows, generator=seeded(self._seed, epoch))

    def at(self, step: int, device: torch.device | str = "cpu") -> Batch:
        """The batch of a step."""
        per_epoch = self.windows // self._batch
        epoch, index = divmod(step, per_epoch)
        chosen = self._order(epoch)[index * self._batch : (index + 1) * self._batch]
        # the windows start elsewhere in every epoch, so that their borders do not stay the same
        offset = 0 if epoch == 0 else int(torch.randint(self._own, (1,), generator=seeded(self._seed, epoch, 1)))
        starts = (chosen * self._own + offset).clamp_max(len(self._stream) - self._own)
        return windows(self._stream, starts, self._length, self._bos).to(device)


def load(
    config: DataConfig, tokenizer: Any = None, seed: int = 0, *, model: str = "embedded", vocabulary: int | None = None
) -> Streams:
    """The streams a configuration describes, in tokens of the model of this source.

    Raises:
        JointNASError: a source that cannot be read, a model without tokenizer, or with a smaller vocabulary than that
            of its tokenizer, too little text.
    """
    if config.source == model == "embedded":  # ready as the model was trained on it
        return split(assets.train_tokens(seed), assets.held_out_tokens(), config, unseen=assets.valid_tokens())
    if tokenizer is None:
        raise JointNASError(
            f"model {model!r} has no tokenizer, so data source {config.source!r} cannot be put into its tokens: put "
            "the tokenizer's files (tokenizer.json, tokenizer_config.json) into the model's folder, or set "
            "model.source to a model that has them"
        )

    def tokens(identity: Any, documents: Any, limit: int | None = None) -> Tensor:
        return tokenized(
            identity, documents, tokenizer, cache_folder(config.cache), source=config.source, vocabulary=vocabulary,
            limit=limit,
        )  # fmt: skip

    if config.source == "embedded":
        log.info("data.source is 'embedded': the embedded text, in tokens of %s", model)
        corpus = assets.corpus_record()
        train = tokens([corpus, "train", seed], lambda: records.embedded("train", seed), config.max_tokens)
        held_out = tokens([corpus, "test"], lambda: records.embedded("test"))
    else:
        limit = None
        if config.max_tokens is not None:  # of a source of any size only so much is read
            limit = math.ceil(config.max_tokens / (1 - config.held_out_fraction)) + 2
        identity, documents = records.documents(config, tokenizer)
        train = tokens([identity, config.text_column], documents, limit)
        count = max(2, int(len(train) * config.held_out_fraction))
        train, held_out = train[:-count], train[-count:]
    return split(train, held_out, config, bos_of(tokenizer))


def split(
    tokens: Tensor, held_out: Tensor, config: DataConfig, bos: int | None = None, unseen: Tensor | None = None
) -> Streams:
    """Training tokens, integers [N], divided between weights and architecture, which has none of them where there is
    `unseen` [K]; `held_out` as it is, [M]."""
    tokens = tokens[: config.max_tokens]
    border = len(tokens) if unseen is not None else int(len(tokens) * (1 - config.arch_fraction))
    found = Streams(tokens, border, held_out, bos, unseen)
    least = config.batch_size * (config.seq_len - (bos is not None))
    if min(len(found.weight), len(found.arch)) < least:
        raise JointNASError(
            f"{len(found.weight)} and {len(found.arch)} training tokens, for weights and architecture, are too few: "
            f"both need at least one batch, {config.batch_size} x {config.seq_len} = {least} tokens"
        )
    if len(held_out) < 4 or not (decode(held_out[:ENDS]).labels[1:-1] != IGNORE).any():
        raise JointNASError(
            f"{len(held_out)} held-out tokens have nothing to evaluate; bring more data or raise data.held_out_fraction"
        )
    return found
