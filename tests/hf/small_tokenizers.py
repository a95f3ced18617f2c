"""Small tokenizers of the kinds that llama.cpp has."""

from __future__ import annotations

import functools
import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jointnas_kernels.hf.gguf.tokenizer import SPLITS

VOCAB = 300
TEXT = "The 12 ships of 1843 sailed north; they've not come back, and nobody's looking for them. " * 3


@functools.cache
def byte_tokenizer(pre: str = "gpt-2") -> Any:
    """Byte-level BPE of 297 tokens and one special one, in a model of 300 embeddings."""
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


@functools.cache
def sentencepiece_tokenizer() -> Any:
    """BPE with scores and byte fallback, as Llama 2 has it."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    letters = sorted({*TEXT.replace(" ", "▁")})
    vocab = {token: i for i, token in enumerate([*tokens, *letters])}
    merges: list[tuple[str, str]] = []
    for pair in (("t", "h"), ("th", "e"), ("▁", "the"), ("s", "h"), ("sh", "i"), ("shi", "p"), ("r", "t")):
        merges.append(pair)
        vocab["".join(pair)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
