"""Put the most important channels first, so that every choice of a space is a prefix; the outputs stay the same.

One permutation of the hidden channels for the whole model (RMSNorm does not see it), one of the MLP neurons per block,
one of the query heads inside each key-value group, one of the value dims per key-value head. Query and key dims stay:
rotary embedding ties them in pairs to frequencies. Blocks are not moved, only ranked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..space import original_sizes
from .importance import Importance


@dataclass(frozen=True)
class Order:
    """What was done: new position -> original channel (`hidden`), and the original blocks most important first."""

    hidden: tuple[int, ...]
    block_rank: tuple[int, ...]


def identity_order(config: Any) -> Order:
    """Of a model that is not reordered: the first blocks count as the most important."""
    return Order(tuple(range(config.hidden_size)), tuple(range(config.num_hidden_layers)))


@torch.no_grad()
def reorder(model: nn.Module, importance: Importance) -> Order:
    """Permute the weights of a Llama model in place, most important first."""
    config: Any = model.config
    importance.check(config)
    s, n_kv = original_sizes(config), config.num_key_value_heads
    per_group, dim = s["heads"] // n_kv, s["head_dim"]
    hidden = _descending(importance.hidden)
    body: Any = model.get_submodule("model")
    _permute(body.embed_tokens, columns=hidden)
    head: Any = model.get_submodule("lm_head")
    if head.weight is not body.embed_tokens.weight:
        _permute(head, columns=hidden)
    _permute_norm(body.norm, hidden)
    for i, layer in enumerate(body.layers):
        attention, mlp = layer.self_attn, layer.mlp
        first = torch.arange(n_kv)[:, None] * per_group
        heads = first + _descending(importance.heads[i].view(n_kv, per_group))  # [Hkv, H / Hkv], original indices
        dims = _descending(importance.value_dims[i])  # [Hkv, D]
        q = (heads.flatten()[:, None] * dim + torch.arange(dim)).flatten()
        v = (torch.arange(n_kv)[:, None] * dim + dims).flatten()
        o = (heads[:, :, None] * dim + dims[:, None, :]).flatten()
        neurons = _descending(importance.neurons[i])
        _permute(attention.q_proj, rows=q, columns=hidden)
        _permute(attention.k_proj, columns=hidden)
        _permute(attention.v_proj, rows=v, columns=hidden)
        _permute(attention.o_proj, rows=hidden, columns=o)
        _permute(mlp.gate_proj, rows=neurons, columns=hidden)
        _permute(mlp.up_proj, rows=neurons, columns=hidden)
        _permute(mlp.down_proj, rows=hidden, columns=neurons)
        _permute_norm(layer.input_layernorm, hidden)
        _permute_norm(layer.post_attention_layernorm, hidden)
    return Order(tuple(hidden.tolist()), tuple(_descending(importance.blocks).tolist()))


def _descending(scores: Tensor) -> Tensor:
    """Stable: equal scores keep their order."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def _permute(module: Any, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    weight = module.weight
    new = weight if rows is None else weight[rows.to(weight.device)]
    weight.copy_(new if columns is None else new[:, columns.to(weight.device)])
    bias = getattr(module, "bias", None)
    if bias is not None and rows is not None:
        bias.copy_(bias[rows.to(bias.device)])


def _permute_norm(module: Any, hidden: Tensor) -> None:
    module.weight.copy_(module.weight[hidden.to(module.weight.device)])
