"""Base weights kept in 8 bits: a supernet of the model that was rounded to them, in everything, in half the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import Supernet, convert, extract, save_adapters, shrink
from jointnas_kernels.nn.base import packed, unpacked
from jointnas_kernels.nn.linear import SupernetLinear
from jointnas_kernels.ops.quant.weights import fake_quant_weight_reference
from jointnas_kernels.space import SearchSpace
from tests.hf.hf_models import QUANT_SPACE, SPACE, ids, random_importance, randomize_lora, tiny_model

WEIGHTS_ONLY = SearchSpace.from_dict({**QUANT_SPACE.to_dict(), "act_bits": None})
SPACES = {"sizes": SPACE, "bits": QUANT_SPACE}


def supernet(
    space: SearchSpace, dtype: torch.dtype = torch.float32, base_bits: int | None = 8, **change: Any
) -> Supernet:
    model = tiny_model(dtype, **change)
    made = convert(model, space, lora_rank=4, importance=random_importance(model.config), base_bits=base_bits)
    return randomize_lora(made)


def twin(space: SearchSpace, dtype: torch.dtype = torch.float32, **change: Any) -> tuple[Supernet, Supernet]:
    """With packed weights, and the plain supernet whose weights are their values."""
    own, plain = supernet(space, dtype, **change), supernet(space, dtype, None, **change)
    for (_, mine), (_, other) in zip(own.linears(), plain.linears(), strict=True):
        other.weight.data = mine.weight.clone()
    return own, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_are_rounded_once(dtype: torch.dtype) -> None:
    own, plain = supernet(QUANT_SPACE, dtype), supernet(QUANT_SPACE, dtype, None)
    for (_, mine), (_, other) in zip(own.linears(), plain.linears(), strict=True):
        assert torch.equal(mine.weight, fake_quant_weight_reference(other.weight, 8, other.in_features))
        assert not torch.equal(mine.weight, other.weight)
        q, scale = packed(mine) or ()
        assert (q.dtype, scale.dtype) == (torch.int8, dtype)
        assert not any(p.requires_grad for p in (q, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpoints", [False, True], ids=["", "checkpoints"])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_steps_are_those_of_the_rounded_model(space: SearchSpace, checkpoints: bool, dtype: torch.dtype) -> None:
    """Losses and all gradients, bit for bit, and the teacher's logits."""
    nets, x = twin(space, dtype), ids()
    found = []
    for net in nets:
        net.gradient_checkpointing = checkpoints
        net.train()
        for mode in ("weight", "arch", "full"):
            net.mode(mode)
            net.step = 3
            net(x, labels=x).loss.backward()
        found.append([p.grad for p in net.parameters() if p.requires_grad] + [net.original(x).logits])
    assert len(found[0]) == len(found[1]) > 20
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
@torch.no_grad()
def test_choices_are_exact(tmp_path: Path, family: str) -> None:
    """One-hot, shrunk, extracted and reloaded; of a family that fuses linears, too."""
    net, x, g = supernet(WEIGHTS_ONLY, family=family), ids(), torch.Generator().manual_seed(6)
    for _ in range(8):
        choice = WEIGHTS_ONLY.sample(g)
        own, small, plain = net.fix(choice)(x).logits, shrink(net, choice), extract(net, choice)
        for _, linear in small.linears():
            assert packed(linear) is not None
        plain.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        for other in (small(x).logits, plain(x).logits, extract(small, small.choice)(x).logits, loaded(x).logits):
            assert (own - other).abs().max() <= 1e-4


@torch.no_grad()
def test_a_subset_of_channels_has_the_same_values() -> None:
    net = supernet(QUANT_SPACE)
    _, linear = next(net.linears())
    rows, columns = torch.tensor([0, 5, 9]), torch.arange(16)
    small = linear.sliced(rows, columns)
    assert torch.equal(small.weight, linear.weight[rows][:, columns])
    again = small.sliced(torch.tensor([2]), columns)
    assert torch.equal(again.weight, linear.weight[9:10, :16])
    assert again.base_bits == 8


def test_files(tmp_path: Path) -> None:
    net = supernet(QUANT_SPACE, torch.bfloat16)
    net.save_pretrained(tmp_path)
    again = Supernet.from_pretrained(tmp_path)
    mine, theirs = net.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) and mine[k].dtype == theirs[k].dtype for k in mine)
    for (_, a), (_, b) in zip(net.linears(), again.linears(), strict=True):
        assert torch.equal(a.weight, b.weight)
    state = net.search_state()
    assert not any("original" in name for name in state)
    again.load_search_state(state)


def test_unpacked_for_a_while() -> None:
    """As plain parameters, and back to the same integers."""
    net = supernet(QUANT_SPACE, torch.bfloat16)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with unpacked(net.blocks[1]):
        for name, linear in net.linears():
            inside = name.startswith("blocks.1.")
            assert (packed(linear) is None) == inside
            assert isinstance(linear.weight, torch.nn.Parameter) == inside
            assert not linear.weight.requires_grad
    again = net.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[k], again[k]) for k in state)


def test_it_takes_half_of_the_memory() -> None:
    def size(net: Supernet) -> int:
        """Of the frozen tensors of the blocks."""
        return sum(p.nbytes for p in net.blocks.parameters() if not p.requires_grad)

    own, plain = supernet(QUANT_SPACE, torch.bfloat16), supernet(QUANT_SPACE, torch.bfloat16, None)
    weights = sum(linear.weight.nbytes for _, linear in plain.linears())
    scales = sum(2 * linear.out_features for _, linear in plain.linears())
    assert size(plain) - size(own) == weights // 2 - scales


def test_nothing_that_is_put_together_is_kept_by_checkpoints() -> None:
    """Between the forward and the backward pass."""
    net, x = supernet(QUANT_SPACE), ids()
    net.gradient_checkpointing = True
    net.train()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        net(x, labels=x).loss.backward()
    shapes = {tuple(linear.weight.shape) for _, linear in net.linears()}
    assert kept
    assert not [t for t in kept if tuple(t.shape) in shapes and t.dtype == torch.float32]


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JointNASError, match="Allowed: 8"):
        supernet(QUANT_SPACE, base_bits=4)
    with pytest.raises(JointNASError, match="base weights of 8 bits"):
        save_adapters(supernet(QUANT_SPACE), tmp_path)


def test_not_a_number_stays_one() -> None:
    weight = torch.ones(2, 8)
    weight[1, 3] = float("nan")
    assert SupernetLinear(weight, rank=1, base_bits=8).weight.isnan().any(1).tolist() == [False, True]
