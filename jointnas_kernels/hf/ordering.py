"""Put the most important channels first, so that every choice of a space is a prefix; the outputs stay the same.

One permutation of the hidden channels for the whole model (RMSNorm does not see it), one of the MLP neurons per block,
one of the query heads inside each key-value group, one of the value dims per key-value head. Query and key dims stay:
rotary embedding ties them in pairs to frequencies (norms over them are shared by all heads, so they stay as well).
Blocks are not moved, only ranked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf.importance import Importance
from jointnas_kernels.layout import EMBEDDING, FINAL_NORM, HEAD, HIDDEN, Axis, all_sizes, block_of


@dataclass(frozen=True)
class Order:
    """What was done: new position -> original channel, of the hidden ones, and of all blocks' heads [L, H] (inside
    their key-value groups), value_dims [L, Hkv, D] and neurons [L, I]. A shrunk supernet knows the hidden ones only."""

    hidden: tuple[int, ...]
    block_rank: tuple[int, ...]  # the original blocks, most important first
    heads: Tensor | None = field(default=None, compare=False)
    value_dims: Tensor | None = field(default=None, compare=False)
    neurons: Tensor | None = field(default=None, compare=False)

    def channels(self, axis: Axis, block: int) -> Tensor:
        """Original indices of an axis' channels, in the new order.

        Raises:
            JointNASError: of a shrunk supernet.
        """
        if self.heads is None or self.value_dims is None or self.neurons is None:
            raise JointNASError("a shrunk supernet lacks channels of the original model, so it has no order of them.")
        groups, dim = self.value_dims.shape[1:]
        first, heads = torch.arange(groups)[:, None], self.heads[block].view(groups, -1)
        orders = {  # [1, channels], or [groups, channels] inside each key-value head
            "hidden": torch.tensor(self.hidden)[None],
            "neurons": self.neurons[block][None],
            "heads": heads - first * heads.shape[1],
            "value_dims": self.value_dims[block],
            None: torch.arange(dim).expand(groups, -1),  # rotary pairs stay
        }
        if len(axis) == 1:
            return orders[axis[0].order][0]
        index = first
        for inner in (orders[factor.order] for factor in axis[1:]):
            index = (index[:, :, None] * inner.shape[1] + inner[:, None, :]).flatten(1)
        return index.flatten()


    def pack(self) -> Tensor:
        """All of it in one int64 [n], for files."""
        parts = (torch.tensor(self.hidden), torch.tensor(self.block_rank), self.heads, self.value_dims, self.neurons)
        return torch.cat([part.flatten().cpu() for part in parts if part is not None])

    @classmethod
    def unpack(cls, packed: Tensor, config: Any) -> Order:
        """Inverse of `pack`, for the model that a config describes.

        Args:
            packed: int64 [n].
            config: the model's.

        Raises:
            JointNASError: it is of another model.
        """
        s = all_sizes(config)
        blocks = s["blocks"]
        shapes: tuple[tuple[int, ...], ...] = (
            (s["hidden"],), (blocks,), (blocks, s["heads"]), (blocks, s["kv_heads"], s["head_dim"]),
            (blocks, s["intermediate"]),
        )  # fmt: skip
        if packed.numel() == s["hidden"] + blocks:  # of a shrunk supernet
            shapes = shapes[:2]
        if packed.dtype != torch.int64 or packed.numel() != sum(math.prod(shape) for shape in shapes):
            raise JointNASError(f"a channel order of {packed.numel()} {packed.dtype} numbers is not this model's.")
        split = packed.split([math.prod(shape) for shape in shapes])
        hidden, rank, *rest = (part.view(shape) for part, shape in zip(split, shapes, strict=True))
        return cls(tuple(hidden.tolist()), tuple(rank.tolist()), *rest)


def identity_order(config: Any) -> Order:
    """Of a model that is not reordered: the first blocks count as the most important."""
    s = all_sizes(config)
    blocks = s["blocks"]
    return Order(
        tuple(range(s["hidden"])), tuple(range(blocks)), torch.arange(s["heads"]).expand(blocks, -1),
        torch.arange(s["head_dim"]).expand(blocks, s["kv_heads"], -1),
        torch.arange(s["intermediate"]).expand(blocks, -1),
    )


@torch.no_grad()
def reorder(model: nn.Module, importance: Importance) -> Order:
    """Permute the weights of a model of a supported family in place, most important first.

    Raises:
        JointNASError: the scores are not of this model.
    """
    config: Any = model.config
    importance.check(config)
    layout, sizes = block_of(config), all_sizes(config)
    groups, per_group = sizes["kv_heads"], sizes["heads"] // sizes["kv_heads"]
    first = torch.arange(groups)[:, None] * per_group
    order = Order(
        tuple(_descending(importance.hidden).tolist()), tuple(_descending(importance.blocks).tolist()),
        (first + _descending(importance.heads.view(-1, groups, per_group))).flatten(1),
        _descending(importance.value_dims), _descending(importance.neurons),
    )
    hidden = order.channels(HIDDEN, 0)
    embedding, head = (model.get_submodule(outer.module).weight for outer in (EMBEDDING, HEAD))
    for table in (embedding,) if head is embedding else (embedding, head):
        _permute(table, 1, hidden)
    _permute(model.get_submodule(FINAL_NORM.path).weight, 0, hidden)
    layers: Any = model.get_submodule("model.layers")
    for i, layer in enumerate(layers):
        for linear in layout.linears:
            module, own = layer.get_submodule(linear.module), layout.rows(linear, sizes)
            for tensor in (module.weight,) if module.bias is None else (module.weight, module.bias):
                _permute(tensor[own], 0, order.channels(linear.rows, i))
            _permute(module.weight[own], 1, order.channels(linear.columns, i))
        for norm in layout.norms:
            _permute(layer.get_submodule(norm.path).weight, 0, order.channels(norm.axis, i))
    return order


def _descending(scores: Tensor) -> Tensor:
    """Stable: equal scores keep their order."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def _permute(tensor: Any, dim: int, order: Tensor) -> None:
    tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))
