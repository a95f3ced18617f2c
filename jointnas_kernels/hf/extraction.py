"""Cut one choice out of a supernet: as a plain transformers model, or as a smaller supernet that still trains."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf.families import build, rotary
from jointnas_kernels.hf.head import put_head
from jointnas_kernels.hf.ordering import Order
from jointnas_kernels.hf.supernet import Supernet
from jointnas_kernels.layout import EMBEDDING, FINAL_NORM, HEAD, HIDDEN, Axis, all_sizes, block_of, kept
from jointnas_kernels.nn.block import ActQuant, SupernetBlock
from jointnas_kernels.nn.choices import ArchParameters
from jointnas_kernels.nn.linear import FakeQuantLinear, joined
from jointnas_kernels.ops.quant import grid
from jointnas_kernels.space import ATTENTION, BITS, Choice, SearchSpace, kept_blocks, subnet_config


class _Cut:
    """What a choice keeps of a supernet: original indices of its blocks, its config, and channels of any axis."""

    def __init__(self, supernet: Supernet, choice: Choice) -> None:
        supernet.space.check(choice)
        self.blocks = kept_blocks(supernet.block_rank, choice.blocks)
        try:
            self.config = subnet_config(supernet.config, choice, self.blocks)
        except JointNASError as error:
            near = supernet.space.nearest(choice).named(ATTENTION)
            raise JointNASError(f"no stock model is {error} Nearest in the space: {near}.") from None
        self._sizes = all_sizes(supernet.config), all_sizes(supernet.config, choice.widths)
        self._device, self._channels = supernet.device, dict[Axis, Tensor]()

    def channels(self, axis: Axis) -> Tensor:
        """Their indices in the reordered model."""
        if axis not in self._channels:
            self._channels[axis] = kept(axis, *self._sizes).to(self._device)
        return self._channels[axis]


@torch.no_grad()
def extract(supernet: Supernet, choice: Choice) -> PreTrainedModel:
    """A plain model of the family that computes what the supernet computes when fixed to the choice.

    LoRA is merged; linears of searched precision, the head among them, hold the fake-quantized weight and, where the
    block's act_bits are below 16, quantize their input per token (`FakeQuantLinear`). An embedding tied to a quantized
    head has its values. Its weights are copies. To train the choice further with its LoRA and quantizers alive, use
    `shrink`.

    Raises:
        JointNASError: the choice is not one of the supernet's space, or the model's class refuses its sizes.
    """
    cut = _Cut(supernet, choice)
    with torch.device("meta"):
        model: Any = build(cut.config)
    layout, hidden = block_of(supernet.config), cut.channels(HIDDEN)
    index = None if choice.head_bits is None else supernet.space.sizes("head_bits").index(choice.head_bits)
    embedding, head = (table[:, hidden] for table in supernet.tables(index=index))
    _set(model, EMBEDDING.module, embedding)
    _set(model, FINAL_NORM.path, supernet.norm.weight[hidden])
    if choice.head_bits is not None and choice.quantizes_head:
        put_head(model, head, grid.find(head, choice.head_bits, supernet.space.group(HEAD)))
    elif supernet.lm_head is not None:
        _set(model, HEAD.module, head)
    for target, b in zip(model.model.layers, cut.blocks, strict=True):
        source: Any = supernet.blocks[b]
        for norm in layout.norms:
            _set(target, norm.path, source.norms[norm.name].weight[cut.channels(norm.axis)])
        bits, act_bits = choice.bits(b)
        for path, members in layout.modules.items():
            old = [(source.linears[m.name], cut.channels(m.rows), cut.channels(m.columns)) for m in members]
            weight = joined(m.merged(m.index_of(bits))[rows][:, columns] for m, rows, columns in old)
            bias = joined(None if m.bias is None else m.bias[rows] for m, rows, _ in old)
            if bits is None and act_bits == 16:
                _set(target, path, weight, bias)
            else:
                of = None if bits is None else grid.find(weight, bits, old[0][0].group_size)
                target.set_submodule(path, FakeQuantLinear(weight, bias, of, act_bits, source.mlp.act.symmetric))
    model.model.rotary_emb = rotary(cut.config).to(supernet.device)
    model.tie_weights()
    if supernet.generation_config is not None:
        model.generation_config = copy.deepcopy(supernet.generation_config)
    extracted: PreTrainedModel = model.requires_grad_(True).eval()
    return extracted


@torch.no_grad()
def shrink(supernet: Supernet, choice: Choice) -> Supernet:
    """The choice as a supernet of its own size, fixed to it: what `supernet.fix(choice)` computes, at the cost of the
    small model, with LoRA and quantizers still trainable (quantization-aware fine-tuning). Blocks are renumbered.

    Quantizing sliced weights equals slicing quantized ones up to the rounding of s B A, whose GEMM has another shape.

    Raises:
        JointNASError: the choice is not one of the supernet's space, or the model's class refuses its sizes.
    """
    cut, space, layout = _Cut(supernet, choice), supernet.space, block_of(supernet.config)
    small_space = SearchSpace.single(cut.config, space.weight_bits, space.act_bits, space.group_size, space.head_bits)
    rank = {b: i for i, b in enumerate(cut.blocks)}
    block_rank = tuple(rank[b] for b in supernet.block_rank if b in rank)
    order = Order(supernet.order.hidden[: choice.hidden], block_rank)

    def norm(old: Any, axis: Axis) -> Any:
        return type(old)(old.weight[cut.channels(axis)], old.eps, old.backend)

    first: Any = supernet.blocks[cut.blocks[0]]
    act = ActQuant(first.mlp.act.bits, first.mlp.act.symmetric, supernet.backend)
    blocks = []
    for b in cut.blocks:
        old: Any = supernet.blocks[b]
        linears = {m.name: old.linears[m.name].sliced(cut.channels(m.rows), cut.channels(m.columns))
                   for m in layout.linears}  # fmt: skip
        norms = {n.name: norm(old.norms[n.name], n.axis) for n in layout.norms}
        blocks.append(SupernetBlock(linears, norms, act, choice.head_dim, old.attention.sliding))
    arch = ArchParameters(
        small_space, cut.config, order.block_rank, relaxation=supernet.arch.relaxation,
        bit_relaxation=supernet.arch.bit_relaxation, tau=supernet.arch.tau,
    )
    hidden = cut.channels(HIDDEN)
    small = Supernet(
        cut.config, small_space, order, arch, supernet.embedding[:, hidden], blocks,
        norm(supernet.norm, HIDDEN), None if supernet.lm_head is None else supernet.lm_head[:, hidden],
        rotary(cut.config).to(supernet.device), supernet.backend, supernet.generation_config,
    )
    if supernet.head_quantizer is not None:
        small.head_quantizer = supernet.head_quantizer.sliced(small.embedding, hidden)
    small.gradient_checkpointing = supernet.gradient_checkpointing
    bits: dict[str, Any] = {k: tuple(getattr(choice, k)[b] for b in cut.blocks) for k in BITS if getattr(choice, k)}
    return small.fix(replace(choice, **bits))


def _set(parent: nn.Module, path: str, weight: Tensor, bias: Tensor | None = None) -> None:
    module: Any = parent.get_submodule(path)
    module.weight = nn.Parameter(weight.detach())
    if bias is not None:
        module.bias = nn.Parameter(bias.detach())
