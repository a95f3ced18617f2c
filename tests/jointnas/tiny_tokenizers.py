"""Tokenizers small enough to check by eye: one token per byte, or per word, space and sign."""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# like Llama 2's: strips, writes BOS itself, and puts the system message into the first question
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.index0 == 1 and messages[0].role == 'system' %}<<{{ messages[0].content }}>> {% endif %}"
    "{{ m.content | trim }} [/INST]{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
    "{% endif %}{% endfor %}"
)


def of_bytes(**options: str | bool | None) -> PreTrainedTokenizerFast:
    """256 tokens, then the special ones."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return finished(inner, **options)  # type: ignore[arg-type]


def of_words(*texts: str, **options: str | bool | None) -> PreTrainedTokenizerFast:
    """The words, spaces and signs of these texts."""
    pattern = r"\w+|\s|[^\w\s]"
    words = dict.fromkeys(w for text in texts for w in re.findall(pattern, text))
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=next(iter(words))))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return finished(inner, **options)  # type: ignore[arg-type]


def finished(
    inner: Tokenizer, bos: str | None = "<s>", eos: str | None = "</s>", pad: str | None = None, adds: bool = True,
    template: str | None = None,
) -> PreTrainedTokenizerFast:  # fmt: skip
    special = [t for t in dict.fromkeys((bos, eos, pad)) if t is not None]
    inner.add_special_tokens([*special, "<|im_start|>", "<|im_end|>"])
    if bos is not None and adds:
        one = (bos, inner.token_to_id(bos))
        inner.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [one])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token=pad)
    made.chat_template = template
    return made
