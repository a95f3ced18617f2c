"""Put the most important channels first, so that every choice of a space is a prefix; the outputs stay the same.

One permutation of the hidden channels for the whole model (RMSNorm does not see it), one of the MLP neurons per block,
one of the query heads inside each key-value group, one of the value dims per key-value head. Query and key dims stay:
rotary embedding ties them in pairs to frequencies (norms over them are shared by all heads, so they stay as well).
Blocks are not moved, only ranked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf.families import PATHS
from jointnas_kernels.hf.importance import Importance
from jointnas_kernels.space import original_sizes


@dataclass(frozen=True)
class Order:
    """What was done: new position -> original channel, and the original blocks most important first (`block_rank`)."""

    hidden: tuple[int, ...]
    block_rank: tuple[int, ...]
    heads: Tensor | None = field(default=None, compare=False)  # [L, H], each in its own key-value group
    value_dims: Tensor | None = field(default=None, compare=False)  # [L, Hkv, D]
    neurons: Tensor | None = field(default=None, compare=False)  # [L, I]; None: of a shrunk supernet

    def linears(self, block: int) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """(rows, columns) of the original weights, in the new order, of a block's linears; None: not moved."""
        if self.heads is None or self.value_dims is None or self.neurons is None:
            raise JointNASError("a shrunk supernet lacks channels of the original model, so it has no order of them.")
        n_kv, dim = self.value_dims.shape[1:]
        heads, dims, neurons = self.heads[block], self.value_dims[block], self.neurons[block]
        hidden = torch.tensor(self.hidden)
        q = (heads[:, None] * dim + torch.arange(dim)).flatten()
        v = (torch.arange(n_kv)[:, None] * dim + dims).flatten()
        o = (heads.view(n_kv, -1, 1) * dim + dims[:, None, :]).flatten()
        return {
            "q_proj": (q, hidden),
            "k_proj": (None, hidden),
            "v_proj": (v, hidden),
            "o_proj": (hidden, o),
            "gate_proj": (neurons, hidden),
            "up_proj": (neurons, hidden),
            "down_proj": (hidden, neurons),
        }


def identity_order(config: Any) -> Order:
    """Of a model that is not reordered: the first blocks count as the most important."""
    s, n_kv = original_sizes(config), config.num_key_value_heads
    blocks = s["blocks"]
    return Order(
        tuple(range(s["hidden"])),
        tuple(range(blocks)),
        torch.arange(s["heads"]).expand(blocks, -1),
        torch.arange(s["head_dim"]).expand(blocks, n_kv, -1),
        torch.arange(s["intermediate"]).expand(blocks, -1),
    )


@torch.no_grad()
def reorder(model: nn.Module, importance: Importance) -> Order:
    """Permute the weights of a model of a supported family in place, most important first."""
    config: Any = model.config
    importance.check(config)
    s, n_kv = original_sizes(config), config.num_key_value_heads
    per_group = s["heads"] // n_kv
    hidden = _descending(importance.hidden)
    first = torch.arange(n_kv)[:, None] * per_group
    order = Order(
        tuple(hidden.tolist()),
        tuple(_descending(importance.blocks).tolist()),
        (first + _descending(importance.heads.view(-1, n_kv, per_group))).flatten(1),
        _descending(importance.value_dims),
        _descending(importance.neurons),
    )
    body: Any = model.get_submodule("model")
    _permute(body.embed_tokens, columns=hidden)
    head: Any = model.get_submodule("lm_head")
    if head.weight is not body.embed_tokens.weight:
        _permute(head, columns=hidden)
    _permute_norm(body.norm, hidden)
    for i, layer in enumerate(body.layers):
        for name, (rows, columns) in order.linears(i).items():
            _permute(layer.get_submodule(PATHS[name]), rows, columns)
        _permute_norm(layer.input_layernorm, hidden)
        _permute_norm(layer.post_attention_layernorm, hidden)
    return order


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
