"""Tiny models cut out of a supernet, and exported."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from jointnas import exporting
from jointnas_kernels.hf import Supernet, convert, extract
from jointnas_kernels.nn import FakeQuantLinear
from jointnas_kernels.space import Choice, SearchSpace
from tests.hf.hf_models import LLAMA3_ROPE, random_importance, randomize_lora, tiny_model

# hidden / heads is never the head_dim of a choice's largest heads; o_proj's groups (16) are smaller than the others'
SPACE = SearchSpace((32, 64), (2, 4), (16, 32), (32, 96), (1, 2, 3), (2, 4, 8), (2, 4, 8, 16), group_size=32)


@functools.cache
def supernet(
    dtype: torch.dtype = torch.float32, tied: bool = False, llama3: bool = False, act_symmetric: bool = False,
    bias: bool = False, weight_bits: bool = True, act_bits: bool = True,
) -> Supernet:  # fmt: skip
    change: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "tie_word_embeddings": tied}
    if llama3:
        change["rope_parameters"] = LLAMA3_ROPE
    if bias:
        change |= {"attention_bias": True, "mlp_bias": True}
    values = SPACE.to_dict()
    values["weight_bits"] = values["weight_bits"] if weight_bits else None
    values["act_bits"] = values["act_bits"] if act_bits else None
    model = tiny_model(dtype, **change)
    space = SearchSpace.from_dict(values)
    made = convert(model, space, lora_rank=4, importance=random_importance(model.config), act_symmetric=act_symmetric)
    return randomize_lora(made)


def uniform(weight_bits: int, act_bits: int) -> Choice:
    """The full architecture at one precision."""
    full = SPACE.full()
    return Choice(
        full.hidden, full.heads, full.head_dim, full.intermediate, full.blocks, (weight_bits,) * 3, (act_bits,) * 3
    )


def exported(net: Supernet, choice: Choice, folder: Path, **options: Any) -> LlamaForCausalLM:
    """The extracted model, also written to the folder."""
    model = extract(net, choice)
    exporting.export_model(model, folder, choice, net.block_rank, **options)
    return model


def quantized_linears(model: nn.Module) -> dict[str, FakeQuantLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantLinear)}
