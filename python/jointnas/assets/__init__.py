"""The embedded small model: where its files are and how to read them.

    corpus/   text the model was trained on, one document per blank-line separated block
    model/    Hugging Face folder (config, bf16 safetensors, tokenizer): ``AutoModelForCausalLM.from_pretrained``
    tasks/    multiple-choice tasks built from the test split (lm-eval YAML + JSONL)

The split is a function of each document's own text (SHA-256), so it needs no index file: 4 % of the documents
are ``test`` (held-out perplexity and the tasks), 2 % ``valid`` (early stopping of the training), the rest ``train``.
Only torch, transformers, tokenizers, safetensors and numpy are imported, so that training runs on a bare machine.
"""

from __future__ import annotations

import bz2
import functools
import hashlib
import lzma
from importlib import resources
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from jointnas_kernels.errors import JointNASError, unknown

Split = Literal["train", "valid", "test"]
SOURCES = ("austen", "web_bible", "jargon", "wordnet")
TEST_PERCENT, VALID_PERCENT = 4, 2


def root() -> Path:
    """Folder of the embedded assets (the package is always installed unpacked)."""
    return Path(str(resources.files(__package__)))


def model_dir() -> Path:
    """The Hugging Face folder."""
    return root() / "model"


def corpus_dir() -> Path:
    """The texts."""
    return root() / "corpus"


def corpus_record() -> str:
    """Counts and hashes of the texts, JSON."""
    return (corpus_dir() / "record.json").read_text()


def task_dir() -> Path:
    """The multiple-choice tasks."""
    return root() / "tasks"


def has_weights() -> bool:
    """Whether the trained weights are installed."""
    return (model_dir() / "model.safetensors").is_file()


def load_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The embedded model in evaluation mode, on the CPU."""
    if not has_weights():
        raise JointNASError(
            f"the embedded model has no weights: {model_dir() / 'model.safetensors'} is missing; train it with "
            "'python benchmarks/embedded/train_embedded.py --out DIR', then the same with '--install DIR'"
        )
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # 56 tensors load in milliseconds
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(model_dir(), dtype=dtype).eval()
    if bar:
        logging.enable_progress_bar()
    return model


def load_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded byte-level BPE tokenizer (4,096 entries; ``<|endoftext|>`` starts and ends documents)."""
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(model_dir())
    return tokenizer


def _split_of(document: str) -> Split:
    percent = int.from_bytes(hashlib.sha256(document.encode()).digest()[:4], "big") % 100
    if percent < TEST_PERCENT:
        return "test"
    return "valid" if percent < TEST_PERCENT + VALID_PERCENT else "train"


@functools.cache
def _all_documents(source: str) -> tuple[str, ...]:
    path = next((p for p in sorted(corpus_dir().glob(f"{source}.txt.*"))), None)
    if path is None:
        raise unknown("corpus", source, SOURCES)
    raw = path.read_bytes()
    text = (bz2.decompress(raw) if path.suffix == ".bz2" else lzma.decompress(raw)).decode()
    return tuple(text.split("\n\n"))


def documents(split: Split = "train", sources: tuple[str, ...] = SOURCES) -> list[str]:
    """Documents of a split in corpus order; a document is some consecutive paragraphs (one per line) or one gloss."""
    if split not in get_args(Split):
        raise unknown("split", split, get_args(Split))
    return [d for source in sources for d in _all_documents(source) if _split_of(d) == split]


@functools.cache
def token_documents(split: Split = "train") -> tuple[np.ndarray, ...]:
    """Documents as int64 token arrays, each led by ``<|endoftext|>`` (id 0)."""
    tokenizer = Tokenizer.from_file(str(model_dir() / "tokenizer.json"))
    encoded = tokenizer.encode_batch(documents(split))  # the post-processor puts <|endoftext|> first
    return tuple(np.array(e.ids, dtype=np.int64) for e in encoded)


def order(count: int, seed: int) -> list[int]:
    """In which order a stream has its documents."""
    return [int(i) for i in np.random.default_rng(seed).permutation(count)]


def _stream(split: Split, seed: int) -> torch.Tensor:
    docs = token_documents(split)
    return torch.from_numpy(np.concatenate([docs[i] for i in order(len(docs), seed)]))


def train_tokens(seed: int = 0) -> torch.Tensor:
    """All training documents in a random order as one int64 stream [N]."""
    return _stream("train", seed)


def valid_tokens() -> torch.Tensor:
    """Validation stream [N] (used to stop the training; do not report on it)."""
    return _stream("valid", 0)


def held_out_tokens() -> torch.Tensor:
    """Test stream [N] for perplexity; no paragraph of it is in the training or validation text."""
    return _stream("test", 0)
