"""The transformer block, described once, as data: what all families have in common, and where they differ.

A block is a tuple of operations in the order they run. Whatever walks a block walks these: counts and bytes, latency
parts, kept channels, extraction, shrinking, reordering, importance, quantizer initialisation, deployment, adapters.

The channels of a weight form an axis, a product of factors, outermost first: query rows are (key-value heads, query
heads of each, dims of each in rotary pairs). A factor says which of its channels a smaller size keeps, and by which
scores they are ordered. Sizes are numbers or expectations of them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jointnas_kernels.errors import unknown

WIDTHS = ("hidden", "heads", "head_dim", "intermediate")  # searched, shared by all blocks
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Sizes = Mapping[str, Any]  # of every dimension: the widths, kv_heads, vocab

# ---- channels -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factor:
    """Channels along one dimension. A smaller size keeps the first ones, or some at a stride: rotate-half pairs
    (i, i + D/2) for i in multiples of D/d have the frequencies of a plain d-wide head."""

    dim: str  # key of its size
    per_group: bool = False  # counted inside each key-value head
    strided: bool = False
    order: str | None = None  # the scores of `Importance` that put the best channels first; None: they are not moved

    def size(self, sizes: Sizes) -> Any:
        """How many channels."""
        value = sizes[self.dim]
        if not self.per_group:
            return value
        return value // sizes["kv_heads"] if isinstance(value, int) else value / sizes["kv_heads"]

    def mask(self, full: Sizes, small: Sizes) -> Tensor:
        """[full size] bool: the channels that the smaller size keeps."""
        total, kept = self.size(full), self.size(small)
        channel = torch.arange(total, device="cpu")
        mask: Tensor = channel % (total // kept) == 0 if self.strided else channel < kept
        return mask


Axis = tuple[Factor, ...]
VOCAB = (Factor("vocab"),)
HIDDEN = (Factor("hidden", order="hidden"),)
NEURONS = (Factor("intermediate", order="neurons"),)
GROUPS = (Factor("kv_heads"),)
HEADS = (*GROUPS, Factor("heads", per_group=True, order="heads"))
PAIRS = (Factor("head_dim", strided=True),)  # of queries and keys, tied to frequencies
VALUES = (Factor("head_dim", order="value_dims"),)  # of values, and of what attention returns


def size(axis: Axis, sizes: Sizes) -> Any:
    """Channels of an axis."""
    return math.prod(factor.size(sizes) for factor in axis)


def counted(axis: Axis) -> Axis:
    """The axis without what does not matter for its size."""
    return tuple(Factor(factor.dim, factor.per_group) for factor in axis)


def kept(axis: Axis, full: Sizes, small: Sizes) -> Tensor:
    """Ascending indices [small size] of the channels that the smaller sizes keep of an axis."""
    mask = torch.ones(1, dtype=torch.bool, device="cpu")
    for factor in axis:
        mask = (mask[:, None] & factor.mask(full, small)).flatten()
    return mask.nonzero().squeeze(1)


# ---- operations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """y = W x + b. Where a family fuses linears, several are rows of one stored module."""

    name: str
    module: str  # path in the layer; in the model, for what is no part of a layer
    rows: Axis
    columns: Axis
    reads: str  # the operation whose output is its input
    bias: bool = False

    @property
    def cut_in_heads(self) -> bool:
        """Whether head_dim cuts its input inside each head, so that it needs quantization groups of its own."""
        return VALUES[0] in self.columns

    def weights(self, sizes: Sizes) -> Any:
        """Elements of W."""
        return size(self.rows, sizes) * size(self.columns, sizes)


@dataclass(frozen=True)
class Norm:
    """RMSNorm over an axis; with `heads`, over that of each head apart, with one weight for all."""

    name: str
    path: str
    axis: Axis
    heads: Axis = ()


@dataclass(frozen=True)
class Elementwise:
    """An operation without weights, and attention. `n`, `k`: what its cost depends on, for each token."""

    name: str
    n: Axis
    k: Axis | None = None


EMBEDDING = Linear("embedding", "model.embed_tokens", VOCAB, HIDDEN, "ids")
FINAL_NORM = Norm("final_norm", "model.norm", HIDDEN)
HEAD = Linear("lm_head", "lm_head", VOCAB, HIDDEN, "final_norm")


@dataclass(frozen=True)
class Block:
    """Operations in the order they run."""

    ops: tuple[Linear | Norm | Elementwise, ...]

    @functools.cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The seven, in the order of `LINEARS`."""
        return tuple(op for op in self.ops if isinstance(op, Linear))

    @functools.cached_property
    def norms(self) -> tuple[Norm, ...]:
        """Those of the hidden channels, and those of heads if there are any."""
        return tuple(op for op in self.ops if isinstance(op, Norm))

    @functools.cached_property
    def modules(self) -> dict[str, tuple[Linear, ...]]:
        """Path of every stored module in a layer -> the linears that are its rows, in their order."""
        return {path: tuple(run) for path, run in itertools.groupby(self.linears, lambda linear: linear.module)}

    def rows(self, linear: Linear, sizes: Sizes) -> slice:
        """Where a linear is among the rows of its stored module."""
        members = self.modules[linear.module]
        before = sum(size(m.rows, sizes) for m in members[: members.index(linear)])
        return slice(before, before + size(linear.rows, sizes))

    def others(self, sizes: Sizes) -> Any:
        """Parameters beside the weights of the linears: norms and biases."""
        axes = [*(norm.axis for norm in self.norms), *(linear.rows for linear in self.linears if linear.bias)]
        return sum(size(axis, sizes) for axis in axes)


# ---- families -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traits:
    """Where families differ. Biases are there, or not, or as the config's attribute of that name says."""

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False  # RMSNorm over the dims of each head, on queries and on keys
    fused: bool = False  # q, k, v are rows of one linear, and gate, up of another
    sliding: str = ""  # blocks that look through a sliding window: none, "all", or as the config's "layer_types" say
    zeros: tuple[str, ...] = ("attention_dropout",)  # attributes of the config that must be 0


TRAITS = {
    "llama": Traits("attention_bias", "attention_bias", "mlp_bias"),
    "mistral": Traits(sliding="all"),
    "qwen2": Traits(qkv_bias=True, sliding="layer_types"),
    "qwen3": Traits("attention_bias", "attention_bias", qk_norm=True, sliding="layer_types"),
    "phi3": Traits(fused=True, sliding="all", zeros=("attention_dropout", "resid_pdrop", "embd_pdrop")),
}
FUSED = dict.fromkeys(LINEARS[:3], "qkv_proj") | dict.fromkeys(LINEARS[4:6], "gate_up_proj")


def traits(config: Any) -> Traits:
    """Of the model that a config describes, all decided; a config without a model type counts as a Llama's.

    Raises:
        JointNASError: a model type without a row here.
    """
    kind = getattr(config, "model_type", "llama")
    if kind not in TRAITS:
        raise unknown("model type", kind, TRAITS)
    own = TRAITS[kind]

    def has(bias: bool | str) -> bool:
        return bool(getattr(config, bias, False)) if isinstance(bias, str) else bias

    return replace(own, qkv_bias=has(own.qkv_bias), o_bias=has(own.o_bias), mlp_bias=has(own.mlp_bias))


@functools.cache
def block(own: Traits) -> Block:
    """The block of a family."""

    def linear(name: str, rows: Axis, columns: Axis, reads: str, bias: bool | str) -> Linear:
        part = "self_attn" if "head_dim" in {factor.dim for factor in (*rows, *columns)} else "mlp"
        stored = FUSED.get(name, name) if own.fused else name
        return Linear(name, f"{part}.{stored}", rows, columns, reads, bool(bias))

    head_norms = (Norm("q_norm", "self_attn.q_norm", PAIRS, HEADS), Norm("k_norm", "self_attn.k_norm", PAIRS, GROUPS))
    return Block((
        Norm("input_norm", "input_layernorm", HIDDEN),
        linear("q_proj", (*HEADS, *PAIRS), HIDDEN, "input_norm", own.qkv_bias),
        linear("k_proj", (*GROUPS, *PAIRS), HIDDEN, "input_norm", own.qkv_bias),
        linear("v_proj", (*GROUPS, *VALUES), HIDDEN, "input_norm", own.qkv_bias),
        *(head_norms if own.qk_norm else ()),
        Elementwise("rope", HEADS, PAIRS),
        Elementwise("attention", HEADS, PAIRS),
        linear("o_proj", HIDDEN, (*HEADS, *VALUES), "attention", own.o_bias),
        Elementwise("add", HIDDEN),
        Norm("post_norm", "post_attention_layernorm", HIDDEN),
        linear("gate_proj", NEURONS, HIDDEN, "post_norm", own.mlp_bias),
        linear("up_proj", NEURONS, HIDDEN, "post_norm", own.mlp_bias),
        Elementwise("swiglu", NEURONS),
        linear("down_proj", HIDDEN, NEURONS, "swiglu", own.mlp_bias),
        Elementwise("add", HIDDEN),
    ))  # fmt: skip


def block_of(config: Any) -> Block:
    """The block of the model that a config describes.

    Raises:
        JointNASError: a model type that has no traits.
    """
    return block(traits(config))


def sliding_windows(config: Any) -> tuple[int | None, ...]:
    """Of every block: how many positions a token looks back at, itself included; None: all of them.

    Raises:
        JointNASError: a model type that has no traits.
    """
    which, window = traits(config).sliding, getattr(config, "sliding_window", None) or None
    if which == "layer_types":
        return tuple(window if kind == "sliding_attention" else None for kind in config.layer_types)
    return (window if which == "all" else None,) * int(config.num_hidden_layers)


# ---- sizes ----------------------------------------------------------------------------------------------------------

def original_sizes(config: Any) -> dict[str, int]:
    """The sizes of the model that a config describes, under the names of the search dimensions."""
    return {
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "intermediate": config.intermediate_size,
        "blocks": config.num_hidden_layers,
    }


def config_sizes(sizes: Sizes) -> dict[str, Any]:
    """All but the number of blocks as attributes of a transformers config."""
    axes = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": PAIRS,
            "intermediate_size": NEURONS}  # fmt: skip
    return {name: size(axis, sizes) for name, axis in axes.items()}


def all_sizes(config: Any, widths: Sizes | None = None) -> dict[str, Any]:
    """These widths, or the original sizes, and what is not searched."""
    widths = original_sizes(config) if widths is None else widths
    return {**widths, "kv_heads": config.num_key_value_heads, "vocab": config.vocab_size}
