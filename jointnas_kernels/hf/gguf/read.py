"""A GGUF file as a plain model of transformers: every weight is the number that its block stands for.

transformers reads GGUF, too, but leaves out rope scaling and most head sizes; its tokenizers are used.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from jointnas_kernels.errors import JointNASError, reading
from jointnas_kernels.hf.families import build, rotary
from jointnas_kernels.hf.gguf import names
from jointnas_kernels.hf.gguf.container import Container
from jointnas_kernels.hf.gguf.tokenizer import with_pre_tokenizer

PLAIN = ("F64", "F32", "F16", "BF16")


class File:
    """An open file: its metadata, and its tensors by llama.cpp's names.

    Raises:
        JointNASError: there is no such file, or it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self._gguf = Path(path), names.library()
        self._container = Container(self.path)
        self.where, self.values = self._container.where, self._container.values
        self._left = dict(self._container.entries)

    @property
    def arch(self) -> str:
        """What llama.cpp computes it as."""
        return str(self.values.get("general.architecture"))

    @property
    def config(self) -> Any:
        """The transformers config.

        Raises:
            JointNASError: the architecture, or something in it, is not supported.
        """
        values = names.config_values(self.values, self.where)
        embedding = self._left.get("token_embd.weight")
        if embedding is None:
            raise JointNASError(f"{self.where} has no tensor token_embd.weight")
        numbers = {name.split(".", 2)[1] for name in self._left if name.startswith("blk.") and name.count(".") > 1}
        blocks = max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)
        if (wanted := values["num_hidden_layers"]) > blocks:  # before so many are made
            raise JointNASError(f"{self.where} has {blocks} blocks; its metadata want {wanted}")
        biases = {name.split(".", 2)[2] for name in self._left if name.startswith("blk.") and name.endswith(".bias")}
        if self.arch == "llama" and "attn_q.bias" in biases and "attn_output.bias" not in biases:
            values["model_type"] = "qwen2"  # written as a Llama
        elif self.arch == "llama":
            values |= {"attention_bias": "attn_q.bias" in biases, "mlp_bias": "ffn_up.bias" in biases}
        with reading(self.where, "its metadata make no model"):
            config = AutoConfig.for_model(
                **values, vocab_size=embedding.shape[0], tie_word_embeddings="output.weight" not in self._left,
                dtype=torch.float32,
            )  # fmt: skip
        if names.ROPE_FACTORS in self._left:
            original = self.values.get(f"{self.arch}.rope.scaling.original_context_length")
            rope = names.llama3_rope(config, self.tensor(names.ROPE_FACTORS), original, self.where)
            config = type(config)(**{**config.to_dict(), "rope_parameters": rope})
        return config

    def tensor(self, name: str) -> Tensor:
        """fp32, as llama.cpp dequantizes it.

        Raises:
            JointNASError: there is no such tensor, or the installed gguf cannot dequantize it.
        """
        if name not in self._left:
            raise JointNASError(f"{self.where} has no tensor {name!r}")
        entry = self._left.pop(name)
        known = {kind.value: kind for kind in self._gguf.GGMLQuantizationType}
        kind = known.get(entry.kind)
        if kind is None:
            raise JointNASError(f"{self.where}: {name} has type {entry.kind}, which the installed gguf does not know")
        block, size = self._gguf.GGML_QUANT_SIZES[kind]
        stored = self._container.bytes_of(name, math.prod(entry.shape) // block * size)
        try:
            values = self._gguf.dequantize(stored.reshape(*entry.shape[:-1], -1), kind)
        except NotImplementedError:
            raise JointNASError(f"{self.where}: {name} has type {kind.name}, which gguf cannot dequantize") from None
        return torch.tensor(values, dtype=torch.float32).view(entry.shape)

    @property
    def types(self) -> dict[str, str]:
        """Type of each tensor that was not read yet."""
        kinds = {kind.value: kind.name for kind in self._gguf.GGMLQuantizationType}
        return {name: kinds.get(entry.kind, str(entry.kind)) for name, entry in self._left.items()}


def already_quantized(types: Mapping[str, str]) -> str:
    """What must be said of results of weights that come from blocks of these types; empty: nothing.

    Args:
        types: of each tensor (`File.types`).
    """
    counts = Counter(kind for kind in types.values() if kind not in PLAIN)
    grids = ", ".join(f"{count} × {kind} ({_bits(kind)} bits)" for kind, count in sorted(counts.items()))
    return "" if not grids else (
        f"the weights were on grids of few bits before anything was done here: {grids}; so results at these bits "
        "flatter, and none are those of the original weights"
    )


def _bits(kind: str) -> str:
    return "".join(itertools.takewhile(str.isdigit, kind.lstrip("ITMXNVFPQ"))) or "few"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@torch.no_grad()
def read(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a file, dequantized, in evaluation mode.

    Args:
        path: of the file; families llama (and mistral, which files call llama), qwen2, qwen3 and phi3.
        dtype: of the weights.

    Raises:
        JointNASError: the file is missing or damaged, or something in it is not supported.
    """
    file = File(path)
    config = file.config
    config.dtype = dtype
    with torch.device("meta"):
        model = build(config)
    for parameter, expected in list(model.named_parameters()):
        if parameter == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, kind = parameter.rpartition(".")
        heads = names.heads_of(module.rpartition(".")[2], file.arch, config)
        with reading(f"{file.where}: {names.tensor_name(parameter)}"):
            value = names.halved(file.tensor(names.tensor_name(parameter)), heads)
        if value.shape != expected.shape:
            raise JointNASError(f"{file.where}: {names.tensor_name(parameter)} has shape {tuple(value.shape)}; its "
                                f"metadata want {tuple(expected.shape)}")  # fmt: skip
        if not value.isfinite().all():
            raise JointNASError(f"{file.where}: {names.tensor_name(parameter)} has values that are not finite")
        model.get_submodule(module).register_parameter(kind, nn.Parameter(value.to(dtype)))
    if left := [name for name in file.types if not name.startswith("rope_factors")]:
        raise JointNASError(f"{file.where} has tensors that a {config.model_type} model has no use for: {left[0]}")
    model.tie_weights()
    model.get_submodule("model").rotary_emb = rotary(config)
    return model.eval()


def read_config(path: str | Path) -> Any:
    """The transformers config of a file.

    Args:
        path: of the file.

    Raises:
        JointNASError: as of `read`.
    """
    return File(path).config


def read_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a file.

    Args:
        path: of the file.

    Raises:
        JointNASError: the file is missing or damaged, or its tokenizer is not supported.
    """
    file = File(path)
    config_where, byte_level = file.where, file.values.get("tokenizer.ggml.model") == "gpt2"
    if byte_level and not file.values.get("tokenizer.ggml.merges"):
        raise JointNASError(f"{config_where}: its tokenizer has no merges, without which transformers cannot make one")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(file.path.parent, gguf_file=file.path.name)
    except (ValueError, KeyError, OSError, IndexError) as error:
        raise JointNASError(f"{config_where}: its tokenizer cannot be read: {_first_line(error)}") from None
    if byte_level:
        with_pre_tokenizer(tokenizer, file.values.get("tokenizer.ggml.pre"), config_where)
    return tokenizer
