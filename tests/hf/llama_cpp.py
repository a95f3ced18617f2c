"""llama.cpp itself, and small tokenizers for it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

VOCAB = 300
TEXT = "The 12 ships of 1843 sailed north; they've not come back, and nobody's looking for them. " * 3


@functools.cache
def byte_tokenizer(pre: str = "gpt-2") -> Any:
    """Byte-level BPE of 297 tokens and one special one, in a model of 300 embeddings."""
    from jointnas_kernels.hf.gguf.tokenizer import SPLITS

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=297, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    state = json.loads(tokenizer.to_str())
    byte_level, split = state["pre_tokenizer"], SPLITS[pre]
    if split is not True:
        first = split if isinstance(split, dict) else {
            "type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}  # fmt: skip
        byte_level["use_regex"] = isinstance(split, dict)
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [first, byte_level]}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


class LlamaCpp:
    """A server inside this process, on one thread, with everything in fp32 that can be."""

    def __init__(self, path: Path, context: int = 256) -> None:
        library = pytest.importorskip("xllamacpp")
        options = library.CommonParams()
        options.model.path, options.n_ctx, options.n_parallel = str(path), context, 1
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
        options.warmup, options.verbosity = False, 0
        options.cache_type_k = options.cache_type_v = library.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = library.Server(options)

    def complete(self, prompt: list[int], tokens: int = 1, top: int = 1, force: int | None = None) -> list[dict[int, float]]:
        """Of each token it continues greedily with: the `top` most probable tokens and their log-probabilities.

        `force`: continue with this token, whatever its probability (which stays what it is). The server says nothing of
        tokens that end the text, or are a part of a character."""
        answer = self._server.handle_completions({
            "prompt": prompt, "n_predict": tokens, "n_probs": top, "temperature": -1, "cache_prompt": True,
            "logit_bias": [] if force is None else [[force, 1e6]],
        })  # fmt: skip
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if "choices" not in answer:
            raise RuntimeError(str(answer))
        rows = answer["choices"][0]["logprobs"]["content"]
        return [{t["id"]: t["logprob"] for t in row["top_logprobs"]} for row in rows]

    def logprobs(self, ids: Tensor, start: int = 0, vocab: int = VOCAB) -> Tensor:
        """[T - start, V]: after every prefix of ids [T] that is longer than `start`; for small vocabularies."""
        found = []
        for end in range(start + 1, len(ids) + 1):
            row = self.complete(ids[:end].tolist(), top=vocab, force=int(ids[0]))[0]
            found.append([row[i] for i in range(vocab)])
        return torch.tensor(found)
