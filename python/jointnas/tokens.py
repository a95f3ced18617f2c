"""Text as token files: tokenized once, piece by piece, and memory-mapped afterwards.

A file holds int32, one per token: its id, or -1 - id for a token that only gives context (a prompt's, or BOS), so that
one array says both what the model sees and what it learns. Files lie in a cache folder under a hash of everything they
depend on: sources (name, size, time of change), tokenizer, options. They are written beside and renamed into place when
whole; one that a killed process left is begun again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from jointnas.records import BLOCK, Document
from jointnas_kernels.errors import JointNASError

log = logging.getLogger(__name__)
VERSION = 1  # of the files, and of how records become text
SECONDS = 20.0  # between lines about a long tokenization


def bos_of(tokenizer: Any) -> int | None:
    """The id of the BOS token that the tokenizer puts before every text by default; None: it puts none.

    A token that is BOS and EOS in one is none: it separates the documents of a stream, and windows begin anywhere."""
    bos: int | None = tokenizer.bos_token_id
    if bos is None or bos == tokenizer.eos_token_id or list(tokenizer("x").input_ids[:1]) != [bos]:
        return None
    return bos


def cache_folder(configured: str | None) -> Path:
    """Where token files lie."""
    if configured is not None:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jointnas" / "tokens"


def tokenized(
    identity: Any, documents: Callable[[], Iterator[Document]], tokenizer: Any, folder: Path, *, source: str,
    vocabulary: int | None = None, limit: int | None = None,
) -> Tensor:  # fmt: skip
    """The tokens of a source, int32 [N], mapped from its file, which is written if it is not there.

    `identity` is what the source is now; `limit`: stop after so many tokens.

    Raises:
        JointNASError: no text, tokens that a model of `vocabulary` words does not know, a folder that is not writable.
    """
    name = hashlib.sha256(json.dumps([VERSION, identity, _identity(tokenizer), limit]).encode()).hexdigest()[:32]
    path, facts = folder / f"{name}.tokens", folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):  # a second process waits for the first one's file
            if not _whole(path, facts):
                _write(path, facts, documents(), tokenizer, source, vocabulary, limit)
    except OSError as error:
        raise JointNASError(f"data.cache: {folder} cannot be written ({error.strerror or error})") from None
    known = json.loads(facts.read_text())
    _check(known["largest"], vocabulary, source)
    if known["tokens"] == 0:
        raise JointNASError(f"data source {source!r} has no text")
    return torch.from_numpy(np.memmap(path, dtype=np.int32, mode="c"))  # "c": torch wants it writable, the file is not


def _whole(path: Path, facts: Path) -> bool:
    if not (facts.is_file() and path.is_file()):
        return False
    try:
        known = json.loads(facts.read_text())
        return isinstance(known["largest"], int) and path.stat().st_size == 4 * known["tokens"]
    except (ValueError, KeyError, TypeError):  # damaged: written anew
        return False


def _check(largest: int, vocabulary: int | None, source: str) -> None:
    if vocabulary is not None and largest >= vocabulary:
        raise JointNASError(
            f"data source {source!r}: the tokenizer gives the token id {largest}, but the model's vocabulary ends at "
            f"{vocabulary - 1}: they do not belong together"
        )


def _identity(tokenizer: Any) -> list[Any]:
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, bos_of(tokenizer)]
    return [hashlib.sha256(vocabulary.encode()).hexdigest(), tokenizer.chat_template, special]


def _write(
    path: Path, facts: Path, documents: Iterable[Document], tokenizer: Any, source: str, vocabulary: int | None,
    limit: int | None,
) -> None:  # fmt: skip
    bos, part = bos_of(tokenizer), path.with_suffix(".part")
    count, largest, said = 0, -1, time.monotonic()
    with part.open("wb") as file:
        for batch in _batches(documents):
            tokens = encode(batch, tokenizer, bos)[: None if limit is None else limit - count]
            tokens.tofile(file)
            count += len(tokens)
            largest = max(largest, int(np.where(tokens < 0, -1 - tokens, tokens).max(initial=-1)))
            _check(largest, vocabulary, source)
            if count == limit:
                break
            if time.monotonic() - said > SECONDS:
                said = time.monotonic()
                log.info("tokenizing %s: %s tokens so far", source, f"{count:,}")
    part.replace(path)
    part.write_text(json.dumps({"tokens": count, "largest": largest, "source": source}))
    part.replace(facts)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents of `BLOCK` characters or more together; of nothing longer than one of them."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BLOCK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(documents: list[Document], tokenizer: Any, bos: int | None) -> np.ndarray:
    """Documents behind each other as they are stored, int32 [N]: BOS (if there is one) and EOS around each."""
    partial = any(d.counted is not None for d in documents)
    if partial and not tokenizer.is_fast:
        raise JointNASError("records with answers need a fast tokenizer, which knows the characters of each token")
    texts = [d.text for d in documents]
    found = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=partial, verbose=False)
    eos = tokenizer.eos_token_id
    pieces: list[np.ndarray] = []
    for i, document in enumerate(documents):
        ids = np.asarray(found["input_ids"][i], dtype=np.int32)
        if document.counted is not None:
            begin, end = np.asarray(found["offset_mapping"][i], dtype=np.int64).reshape(-1, 2).T
            learned = np.zeros(len(ids), dtype=bool)
            for first, last in document.counted:  # a token of a lone space may be empty: it counts where it ends
                learned |= (begin >= first) & (end > first) & (end <= last)
            ids = np.where(learned, ids, -1 - ids)
        if document.begins and bos is not None:
            if len(ids) and ids[0] in (bos, -1 - bos):  # a chat template writes it itself
                ids = ids[1:]
            pieces.append(np.array([-1 - bos], dtype=np.int32))
        pieces.append(ids)
        if document.ends and eos is not None:
            pieces.append(np.array([eos], dtype=np.int32))
    return np.concatenate([np.empty(0, dtype=np.int32), *pieces]).astype(np.int32, copy=False)
