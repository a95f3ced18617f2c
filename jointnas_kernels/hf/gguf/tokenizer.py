"""A fast tokenizer as the metadata that llama.cpp tokenizes with, and what transformers misses when it reads it back.

Byte-level BPE ("gpt2" there) needs the name of its pre-tokenizer, which splits text before merges apply; those of
`SPLITS` are known. SentencePiece BPE ("llama" there) needs a score per token: tokens made by earlier merges first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import pre_tokenizers

from jointnas_kernels.errors import JointNASError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types

_DIGITS = {"type": "Digits", "individual_digits": True}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What stands before the bytes: an expression that splits, GPT-2's own (True), digits one by one and then GPT-2's own.
SPLITS: dict[str, str | bool | dict[str, Any]] = {
    "gpt-2": True,
    "smollm": _DIGITS,
    "llama-bpe": _LLAMA3,
    "qwen2": _LLAMA3.replace("{1,3}", ""),
}
ALIKE = {"default": "gpt-2", "starcoder": "smollm", "refact": "smollm", "command-r": "smollm",
         "deepseek-r1-qwen": "qwen2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}  # fmt: skip


def split_of(pre: Mapping[str, Any] | None) -> Any:
    """What a byte-level pre-tokenizer, as tokenizer.json has it, does before the bytes; None: nothing known."""
    parts = [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    if not parts or parts[-1]["type"] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return None
    own, before = bool(parts[-1].get("use_regex", True)), parts[:-1]
    if not before:
        return own or None
    if len(before) == 1 and before[0]["type"] == "Digits" and own:
        return {key: before[0].get(key) for key in _DIGITS}
    if len(before) == 1 and before[0]["type"] == "Split" and not own and not before[0].get("invert"):
        return before[0]["pattern"].get("Regex") if before[0]["behavior"] == "Isolated" else None
    return None


def tokenizer_metadata(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """Values under their keys without `tokenizer.`, for a model with this many embeddings.

    Raises:
        JointNASError: a tokenizer that llama.cpp does not have.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise JointNASError("GGUF: only fast tokenizers (tokenizer.json) can be written")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise JointNASError(f"GGUF: a {model['type']} tokenizer cannot be written; BPE can")
    added = {token["id"]: token for token in state["added_tokens"]}
    tokens: dict[int, str] = {i: token for token, i in model["vocab"].items()}
    tokens |= {i: token["content"] for i, token in added.items()}
    if max(tokens) >= vocab_size:
        raise JointNASError(f"GGUF: the tokenizer has ids up to {max(tokens)}; the model has {vocab_size} embeddings")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    spm = bool(model.get("byte_fallback"))
    values = _sentencepiece(state, merges) if spm else _byte_level(state, merges)
    types = [_type(tokens.get(i), added.get(i), spm, model.get("unk_token")) for i in range(vocab_size)]
    values["ggml.tokens"] = [tokens.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    values["ggml.token_type"] = types
    if spm:
        scores, lowest = values["ggml.scores"], -float(len(values["ggml.scores"]))
        values["ggml.scores"] = [scores.get(token, lowest) for token in values["ggml.tokens"]]
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (found := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            values[f"ggml.{key}_token_id"] = int(found)
    ids, bos, eos = tokenizer("a").input_ids, tokenizer.bos_token_id, tokenizer.eos_token_id
    values["ggml.add_bos_token"] = bos is not None and ids[0] == bos
    values["ggml.add_eos_token"] = eos is not None and ids[-1] == eos
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        values["chat_template"] = template
    return values


def _type(token: str | None, added: Mapping[str, Any] | None, spm: bool, unk: str | None) -> int:
    if token is None:
        return UNUSED
    if spm and token == unk:
        return UNKNOWN
    if added is not None:
        return CONTROL if added["special"] else USER_DEFINED
    return BYTE if spm and len(token) == 6 and token.startswith("<0x") and token.endswith(">") else NORMAL


def _byte_level(state: Mapping[str, Any], merges: list[str]) -> dict[str, Any]:
    split = split_of(state["pre_tokenizer"])
    pre = next((name for name, known in SPLITS.items() if split is not None and known == split), None)
    if pre is None or state["normalizer"] not in (None, {"type": "NFC"}) or state["model"].get("dropout"):
        raise JointNASError(
            f"GGUF: llama.cpp has no name for this byte-level tokenizer's pre-tokenizer. Known: {', '.join(SPLITS)}"
        )
    return {"ggml.model": "gpt2", "ggml.pre": pre, "ggml.merges": merges, "ggml.add_space_prefix": False}


def _sentencepiece(state: Mapping[str, Any], merges: list[str]) -> dict[str, Any]:
    ranks: dict[str, int] = {}
    for merge in merges:
        ranks.setdefault(merge.replace(" ", ""), len(ranks))
    order = [ranks[merge.replace(" ", "")] for merge in merges]
    if order != sorted(order):
        raise JointNASError("GGUF: the merges of this tokenizer are not in the order of any scores")
    scores = {token: -float(rank) for token, rank in ranks.items()}
    normalizer, pre = state["normalizer"] or {}, state["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    prefix = any(s["type"] == "Prepend" for s in steps) or (
        pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") != "never"
    )
    known = all(s["type"] in ("Prepend", "Replace") for s in steps) and pre.get("type") in (None, "Metaspace")
    if not known:
        raise JointNASError("GGUF: this SentencePiece tokenizer normalizes text in a way that llama.cpp does not")
    return {"ggml.model": "llama", "ggml.pre": "default", "ggml.scores": scores, "ggml.add_space_prefix": prefix}


def with_pre_tokenizer(tokenizer: Any, name: str | None, where: str) -> Any:
    """The tokenizer that transformers made of a file, splitting as the file's pre-tokenizer of this name does.

    Raises:
        JointNASError: the name is not known.
    """
    known = ALIKE.get(name or "default", name)
    if known not in SPLITS:
        raise JointNASError(f"{where}: pre-tokenizer {name!r} is not known. Known: {', '.join([*SPLITS, *ALIKE])}")
    if SPLITS[known] == _DIGITS:  # transformers leaves GPT-2's own
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    elif split_of(json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]) != SPLITS[known]:
        raise JointNASError(f"{where}: the installed transformers splits its text in another way than {name!r}")
    return tokenizer
