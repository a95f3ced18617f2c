"""Cut one choice out of a supernet: as a plain transformers model, or as a smaller supernet that still trains."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from jointnas_kernels.hf.families import ATTENTION, build, rotary
from jointnas_kernels.hf.reorder import Order
from jointnas_kernels.hf.supernet import Supernet
from jointnas_kernels.nn.block import ActQuant, HeadNorm, SupernetAttention, SupernetBlock, SupernetMLP, SupernetNorm
from jointnas_kernels.nn.choices import ArchParameters
from jointnas_kernels.nn.linear import FakeQuantLinear, SupernetLinear
from jointnas_kernels.ops.quant import grid
from jointnas_kernels.ops.width.masks import strided_pair_index
from jointnas_kernels.space import LINEARS, Choice, SearchSpace, kept_blocks, original_sizes


def subnet_config(config: Any, choice: Choice, kept: Sequence[int] | None = None) -> PreTrainedConfig:
    """The config of the extracted model; `kept`: the original indices of its blocks, None: the first ones."""
    data = {
        **config.to_dict(),
        "hidden_size": choice.hidden,
        "num_attention_heads": choice.heads,
        "head_dim": choice.head_dim,
        "intermediate_size": choice.intermediate,
        "num_hidden_layers": choice.blocks,
    }
    data.pop("_name_or_path", None)
    types = data.pop("layer_types", None)
    if types is not None:  # which blocks look through a sliding window
        data["layer_types"] = [types[b] for b in (range(choice.blocks) if kept is None else kept)]
    return type(config)(**data)


def kept_channels(config: Any, choice: Choice, device: torch.device | str = "cpu") -> dict[str, tuple[Tensor, Tensor]]:
    """(rows, columns) that a choice keeps of each of a block's linears, in the reordered model."""
    s, n_kv = original_sizes(config), config.num_key_value_heads
    heads, dim, d = s["heads"], s["head_dim"], choice.head_dim
    hidden, neurons = torch.arange(choice.hidden), torch.arange(choice.intermediate)
    pairs, prefix = strided_pair_index(dim, d), torch.arange(d)
    groups = torch.arange(n_kv)[:, None] * (heads // n_kv)
    kept_heads = (groups + torch.arange(choice.heads // n_kv)).flatten()

    def inside(of: Tensor, dims: Tensor) -> Tensor:
        return (of[:, None] * dim + dims).flatten()

    kv = torch.arange(n_kv)
    rows_columns = (
        (inside(kept_heads, pairs), hidden),
        (inside(kv, pairs), hidden),
        (inside(kv, prefix), hidden),
        (hidden, inside(kept_heads, prefix)),
        (neurons, hidden),
        (neurons, hidden),
        (hidden, neurons),
    )
    return {n: (r.to(device), c.to(device)) for n, (r, c) in zip(LINEARS, rows_columns, strict=True)}


@torch.no_grad()
def extract(supernet: Supernet, choice: Choice) -> PreTrainedModel:
    """A plain model of the family that computes what the supernet computes when fixed to the choice.

    LoRA is merged; linears of searched precision hold the fake-quantized weight and, where the block's act_bits are
    below 16, quantize their input per token (`FakeQuantLinear`). Its weights are copies. To train the choice further
    with its LoRA and quantizers alive, use `shrink`.
    """
    space = supernet.space
    space.check(choice)
    kept = kept_blocks(supernet.block_rank, choice.blocks)
    config = subnet_config(supernet.config, choice, kept)
    with torch.device("meta"):
        model: Any = build(config)
    hidden = slice(0, choice.hidden)
    channels = kept_channels(supernet.config, choice, supernet.device)
    pairs = _pairs(supernet, choice)
    _set(model.model.embed_tokens, supernet.embedding[:, hidden])
    _set(model.model.norm, supernet.norm.weight[hidden])
    if supernet.lm_head is not None:
        _set(model.lm_head, supernet.lm_head[:, hidden])
    for target, b in zip(model.model.layers, kept, strict=True):
        source: Any = supernet.blocks[b]
        _set(target.input_layernorm, source.input_norm.weight[hidden])
        _set(target.post_attention_layernorm, source.post_norm.weight[hidden])
        for norm, name in zip(source.attention.norms, ("q_norm", "k_norm"), strict=False):
            _set(getattr(target.self_attn, name), norm.weight[pairs])
        index = None if choice.weight_bits is None else space.sizes("weight_bits").index(choice.weight_bits[b])
        act_bits = 16 if choice.act_bits is None else choice.act_bits[b]
        for name in LINEARS:
            part, new = (source.attention, target.self_attn) if name in ATTENTION else (source.mlp, target.mlp)
            linear: SupernetLinear = getattr(part, name)
            rows, columns = channels[name]
            weight = linear.merged(index)[rows][:, columns].contiguous()
            bias = None if linear.bias is None else linear.bias[rows].clone()
            if index is None and act_bits == 16:
                _set(getattr(new, name), weight, bias)
            else:
                of = None if choice.weight_bits is None else grid.find(weight, choice.weight_bits[b], linear.group_size)
                setattr(new, name, FakeQuantLinear(weight, bias, of, act_bits, part.act.symmetric))
    model.model.rotary_emb = rotary(config).to(supernet.device)
    model.tie_weights()
    if supernet.generation_config is not None:
        model.generation_config = copy.deepcopy(supernet.generation_config)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


@torch.no_grad()
def shrink(supernet: Supernet, choice: Choice) -> Supernet:
    """The choice as a supernet of its own size, fixed to it: what `supernet.fix(choice)` computes, at the cost of the
    small model, with LoRA and quantizers still trainable (quantization-aware fine-tuning). Blocks are renumbered.

    Quantizing sliced weights equals slicing quantized ones up to the rounding of s B A, whose GEMM has another shape.
    """
    space = supernet.space
    space.check(choice)
    kept = kept_blocks(supernet.block_rank, choice.blocks)
    config = subnet_config(supernet.config, choice, kept)
    small_space = SearchSpace(
        (choice.hidden,), (choice.heads,), (choice.head_dim,), (choice.intermediate,), (choice.blocks,),
        space.weight_bits, space.act_bits, space.group_size,
    )
    rank = {b: i for i, b in enumerate(kept)}
    block_rank = tuple(rank[b] for b in supernet.block_rank if b in rank)
    order = Order(supernet.order.hidden[: choice.hidden], block_rank)
    channels = kept_channels(supernet.config, choice, supernet.device)
    pairs = _pairs(supernet, choice)
    hidden = slice(0, choice.hidden)

    def norm(module: SupernetNorm) -> SupernetNorm:
        return SupernetNorm(module.weight[hidden].clone(), module.eps, module.backend)

    old: Any = supernet.blocks[kept[0]]
    act = ActQuant(old.mlp.act.bits, old.mlp.act.symmetric, supernet.backend)
    blocks = []
    for b in kept:
        source: Any = supernet.blocks[b]
        linears = [getattr(source.attention if n in ATTENTION else source.mlp, n) for n in LINEARS]
        q, k, v, o, gate, up, down = (m.sliced(*channels[n]) for n, m in zip(LINEARS, linears, strict=True))
        norms = tuple(HeadNorm(n.weight[pairs].clone(), n.eps, n.backend) for n in source.attention.norms)
        attention = SupernetAttention(q, k, v, o, choice.head_dim, act, norms, source.attention.sliding)
        mlp = SupernetMLP(gate, up, down, act)
        blocks.append(SupernetBlock(norm(source.input_norm), attention, norm(source.post_norm), mlp))
    arch = ArchParameters(
        small_space, config, order.block_rank, relaxation=supernet.arch.relaxation,
        bit_relaxation=supernet.arch.bit_relaxation, tau=supernet.arch.tau,
    )
    small = Supernet(
        config, small_space, order, arch, supernet.embedding[:, hidden].clone(), blocks, norm(supernet.norm),
        None if supernet.lm_head is None else supernet.lm_head[:, hidden].clone(),
        rotary(config).to(supernet.device), supernet.backend, supernet.generation_config,
    )
    small.gradient_checkpointing = supernet.gradient_checkpointing
    bits = {k: None if v is None else tuple(v[b] for b in kept)
            for k, v in (("weight_bits", choice.weight_bits), ("act_bits", choice.act_bits))}
    return small.fix(Choice(choice.hidden, choice.heads, choice.head_dim, choice.intermediate, choice.blocks, **bits))


def _pairs(supernet: Supernet, choice: Choice) -> Tensor:
    """The query and key dims of each head that a choice keeps."""
    return strided_pair_index(original_sizes(supernet.config)["head_dim"], choice.head_dim, supernet.device)


def _set(module: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    module.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        module.bias = nn.Parameter(bias.detach())
