"""llama.cpp inside this process (package xllamacpp), and what it does to the inputs of quantized products."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GREEDY = {"samplers": ["top_k"], "top_k": 1}  # without the others, which would sort the vocabulary first


class LlamaCpp:
    """Its server; `exact`: with keys and values in fp32.

    A position is asked for with a token that is to follow: the server says nothing of tokens that end the text or are
    parts of characters, so it would not of every token that it chose itself."""

    def __init__(self, path: str | Path, context: int = 256, threads: int = 1, exact: bool = True) -> None:
        import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path, options.n_ctx, options.n_parallel = str(path), context, 1
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
        options.warmup, options.verbosity = False, 0
        if exact:
            options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(options)

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        answer = self._server.handle_completions({"temperature": -1, "cache_prompt": True, **request})
        found: dict[str, Any] = json.loads(answer) if isinstance(answer, str) else answer
        if "choices" not in found:
            raise RuntimeError(str(found))
        return found

    def after(self, prefix: Sequence[int], top: int) -> dict[int, float]:
        """Log-probabilities of the `top` most probable tokens after a prefix."""
        request = {"prompt": list(prefix), "n_predict": 1, "n_probs": top, "logit_bias": [[int(prefix[0]), 1e6]]}
        (row,) = self._answer(request)["choices"][0]["logprobs"]["content"]
        return {t["id"]: t["logprob"] for t in row["top_logprobs"]}

    def logprobs(self, ids: Tensor, vocab: int, start: int = 0) -> Tensor:
        """[T - start, vocab]: after every prefix of ids [T] that is longer than `start`; for small vocabularies."""
        rows = (self.after(ids[:end].tolist(), vocab) for end in range(start + 1, len(ids) + 1))
        return torch.tensor([[row[i] for i in range(vocab)] for row in rows])

    def reading(self, ids: Tensor) -> float:
        """Seconds per token of a prompt ids [T], by its own clock."""
        times = self._timings(ids, 1, cached=False)
        return float(times["prompt_ms"]) / len(ids) / 1e3

    def writing(self, ids: Tensor, tokens: int) -> float:
        """Seconds per token of so many after ids [T] (which are read first where they were not read last), by its own
        clock. It starts with the first token, which comes out of the prompt."""
        times = self._timings(ids, tokens + 1, cached=True)
        return float(times["predicted_ms"]) / tokens / 1e3

    def _timings(self, ids: Tensor, tokens: int, cached: bool) -> dict[str, Any]:
        request = {"prompt": ids.tolist(), "n_predict": tokens, "ignore_eos": True, "cache_prompt": cached}
        times: dict[str, Any] = self._answer({**request, "temperature": 0, **GREEDY})["timings"]
        if times["predicted_n"] != tokens or (not cached and times["prompt_n"] != len(ids)):
            raise RuntimeError(f"llama.cpp read or wrote another number of tokens: {times}")
        return times

    def tokenized(self, text: str) -> int:
        """How many tokens it makes of a text."""
        return int(self._answer({"prompt": text, "n_predict": 1})["usage"]["prompt_tokens"])


def eight_bit_inputs(model: nn.Module, names: Collection[str]) -> None:
    """Let these linears of a model round their inputs as llama.cpp does before products with Q8_0 or Q4_0 weights: to
    8 bits in blocks of 32, with fp16 scales."""
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args: (in_eight_bits(args[0]),))


def in_eight_bits(x: Tensor) -> Tensor:
    """x [.., 32 n] as Q8_0."""
    blocks = x.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    q = (blocks * torch.where(largest > 0, 127 / largest, torch.zeros_like(largest))).round()
    return (q * (largest / 127).half().float()).flatten(-2)
