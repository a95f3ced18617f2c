"""`generate`: text from a model, as it is written, and how fast it came."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from jointnas import loading
from jointnas.config import ModelConfig, build
from jointnas_kernels import hf
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.runtime import attach


@dataclass
class Generated:
    """What was written, and at what speed."""

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_s: float  # of the prompt, with the first new token
    decode_tokens_per_s: float | None  # of the tokens after the first; none: there was one
    runtime: str  # which path ran, and why (`jointnas_kernels.runtime.Runtime`)


def generate(
    prompt: str, model: str = "embedded", max_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0,
    chat: bool | None = None, seed: int = 0, device: str | None = None, dtype: str | None = None,
    revision: str | None = None, stream: bool = True,
) -> Generated:  # fmt: skip
    """Continues a prompt.

    Args:
        prompt: text.
        model: model folder (plain or quantized), .gguf file, hub name or 'embedded'.
        max_tokens: at most so many; the model's end of text comes first.
        temperature: 0 takes the most probable token; above, tokens are drawn.
        top_p: draws from the most probable tokens that hold this share.
        chat: put the prompt into the model's chat template; default: if it has one.
        seed: of the draws.
        device: where the model runs.
        dtype: in which precision.
        revision: of a hub name.
        stream: print the text as it comes.

    Raises:
        JointNASError: bad arguments, a model that cannot be read, or a prompt it cannot see at once.
    """
    for name, value, good, allowed in (
        ("max_tokens", max_tokens, max_tokens >= 1, "1 or more"),
        ("temperature", temperature, temperature >= 0, "0 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
    ):  # fmt: skip
        if not good:
            raise JointNASError(f"generate: {name} is {value}; allowed: {allowed}")
    where = {"source": model, "device": device, "dtype": dtype, "revision": revision}
    config = loading.located(build(ModelConfig, {k: v for k, v in where.items() if v is not None}, "jointnas generate"))
    tokenizer = loading.load_tokenizer(config)
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if chat and not tokenizer.chat_template:
        raise JointNASError(f"generate: model {config.source!r} has no chat template; leave --chat out")
    written = prompt
    if chat:
        turn = [{"role": "user", "content": prompt}]
        written = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    given = tokenizer(written, return_tensors="pt", add_special_tokens=not chat)
    count, most = given["input_ids"].shape[1], loading.model_config(config).max_position_embeddings
    if not 1 <= count < most:
        raise JointNASError(f"generate: the prompt has {count} tokens; this model takes 1 to {most - 1}")
    source = _load(config, dtype)
    ends = source.generation_config.eos_token_id
    torch.manual_seed(seed)
    streamer = _Timed(tokenizer, stream)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    ids = source.generate(
        given["input_ids"].to(source.device), attention_mask=given["attention_mask"].to(source.device),
        max_new_tokens=min(max_tokens, most - count), streamer=streamer, pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id if ends is None else ends,
        **{"do_sample": False, **sampling},
    )  # fmt: skip
    first, *more = streamer.times
    return Generated(
        tokenizer.decode(ids[0, count:], skip_special_tokens=True), count, 1 + len(more),
        count / (first - streamer.began), len(more) / (more[-1] - first) if more else None, str(source.runtime),
    )  # fmt: skip


def _load(config: ModelConfig, dtype: str | None) -> Any:
    folder = Path(config.source)
    resolved = loading.resolve_model(config)
    if (folder / "config.json").is_file():
        return hf.load(folder, resolved.device, None if dtype is None else getattr(torch, resolved.dtype))
    model: Any = loading.load_model(resolved)
    attach(model)
    return model


class _Timed(TextStreamer):
    """Prints the text, if it shall, and keeps the time of every token."""

    def __init__(self, tokenizer: Any, shown: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.shown, self.began = shown, time.perf_counter()
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """The prompt's tokens first, then each new one."""
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A part of the text that will not change any more."""
        if self.shown:
            super().on_finalized_text(text, stream_end)


def text(result: Generated) -> str:
    """The last lines of the command; the text itself was printed as it came."""
    decode = "" if result.decode_tokens_per_s is None else f", decode {result.decode_tokens_per_s:.1f} tokens/s"
    return (
        f"\n{result.prompt_tokens} tokens read, {result.new_tokens} written: prefill "
        f"{result.prefill_tokens_per_s:.1f} tokens/s{decode}\n{result.runtime}"
    )
