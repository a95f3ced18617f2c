"""The decode step against stock transformers: families, precisions, dtypes, instruction sets, numbers of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.layout import block_of
from jointnas_kernels.nn.packed import PackedLinear
from jointnas_kernels.ops.core import cpu
from jointnas_kernels.ops.lowbit.pack import pack_weight
from jointnas_kernels.ops.quant import grid
from jointnas_kernels.runtime import DecodeStep, misfit
from tests.hf.hf_models import LLAMA3_ROPE, ids, tiny_model

WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-bias": {"attention_bias": True, "mlp_bias": True},
    "llama3-tied": {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    "mistral-window": {"family": "mistral", "sliding_window": 3},
    "qwen2-window": {"family": "qwen2", **WINDOWS},
    "qwen3-window": {"family": "qwen3", **WINDOWS},
    "phi3-window": {"family": "phi3", "sliding_window": 4},
    "odd": {"hidden_size": 48, "intermediate_size": 80, "head_dim": 16, "num_attention_heads": 3,
            "num_key_value_heads": 1, "vocab_size": 67},
}  # fmt: skip
LENGTH = 12


def packed(model: Any, bits: list[int], act: int, symmetric: bool = False, group: int = 16) -> Any:
    """The model on packed linears, one weight precision for each block; 16: as it is."""
    for layer, width in zip(model.model.layers, bits, strict=True):
        for path in block_of(model.config).modules if width < 16 else ():
            old = layer.get_submodule(path)
            values, of = grid.quantize(old.weight, width, group)
            words = pack_weight(grid.integers(values, of), width)
            layer.set_submodule(path, PackedLinear(words, of.scale, old.bias, width, act, symmetric))
    return model.requires_grad_(False)


def steps(model: Any, x: Tensor, threads: int = 1, isa: int = 0) -> Tensor:
    """Logits [batch, length, vocab], token by token."""
    batch, length = x.shape
    step = DecodeStep(model, threads, isa)
    caches = step.caches(batch, LENGTH)
    return torch.stack([step(x[:, t], torch.full((batch,), t), caches, t) for t in range(length)], 1)


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
@pytest.mark.parametrize("change", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_families(change: dict[str, Any], batch: int) -> None:
    """fp32: the order of sums; with quantized activations, now and then a value at the border between two levels."""
    for bits, act in (([2, 4, 8], 16), ([16, 16, 16], 16), ([4, 8, 2], 8), ([8, 4, 16], 4)):
        model = packed(tiny_model(**change), bits, act)
        x = ids(batch, LENGTH, vocab=61)
        own, stock = steps(model, x), model(x).logits
        wrong = (own - stock).abs()
        assert wrong.max() <= (2e-5 if act == 16 else 0.06) * stock.abs().max()
        assert wrong.mean() <= (2e-6 if act == 16 else 2e-3) * stock.abs().max()
        assert (own.argmax(-1) == stock.argmax(-1)).double().mean() >= (1 if act == 16 else 0.96)


@pytest.mark.parametrize("change", [FAMILIES[name] for name in ("llama", "qwen3-window", "phi3-window")])
@torch.no_grad()
def test_bf16_is_rounded_where_transformers_rounds(change: dict[str, Any]) -> None:
    """Against the same weights in fp64 the step is as near as the stock model."""
    model = packed(tiny_model(torch.bfloat16, **change), [16, 16, 16], 16)
    x = ids(2, LENGTH)
    own, stock, exact = steps(model, x), model(x).logits, model.double()(x).logits
    error, stocks = ((v.double() - exact).square().mean().sqrt() for v in (own, stock))
    assert error <= 1.3 * stocks


@pytest.mark.parametrize("act", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_results_do_not_depend_on_threads(act: int, dtype: torch.dtype) -> None:
    model = packed(tiny_model(dtype), [2, 4, 8], act)
    for batch in (1, 3):
        x = ids(batch, LENGTH)
        alone = steps(model, x)
        assert all(torch.equal(steps(model, x, threads), alone) for threads in (2, 3, 7))


@pytest.mark.parametrize("isa", range(1, len(cpu.ISAS)), ids=cpu.ISAS[1:])
@torch.no_grad()
def test_instruction_sets(isa: int) -> None:
    model = packed(tiny_model(), [2, 4, 8], 16)
    x = ids(2, LENGTH)
    try:
        own = steps(model, x, isa=isa)
    except JointNASError as error:
        pytest.skip(str(error))
    assert (own - model(x).logits).abs().max() <= 1e-4


@torch.no_grad()
def test_sequences_of_unequal_length() -> None:
    """Left padding: positions count from the first token, and slots before it are not seen."""
    model = packed(tiny_model(**FAMILIES["qwen3-window"]), [4, 8, 2], 16)
    x, padding = ids(3, LENGTH), torch.tensor([0, 4, 9])
    step = DecodeStep(model)
    caches = step.caches(3, LENGTH)
    seen = [step(x[:, t], (t - padding).clamp_min(0), caches, t, padding.clamp_max(t)) for t in range(LENGTH)]
    for row, count in enumerate(padding.tolist()):
        alone = model(x[row : row + 1, count:]).logits[0, -1]
        assert (seen[-1][row] - alone).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.half(), "not torch.float16"),
        (lambda m: m.config.update({"hidden_act": "gelu"}), "its activation is 'gelu'"),
        (lambda m: m.config.rope_parameters.update({"rope_type": "dynamic"}), "'dynamic' depend on the length"),
        (lambda m: setattr(m.model.layers[1].self_attn, "k_proj", nn.Linear(32, 32)), "block 1: q_proj, k_proj"),
    ],
    ids=["dtype", "activation", "rope", "mixed"],
)
def test_what_does_not_fit_is_named(change: Any, reason: str) -> None:
    model = packed(tiny_model(), [4, 4, 4], 8)
    assert misfit(model) is None
    change(model)
    assert reason in str(misfit(model))
    with pytest.raises(JointNASError, match="decode step: the model does not fit"):
        DecodeStep(model)


def test_tokens_and_slots_outside_are_refused() -> None:
    model = packed(tiny_model(), [4, 4, 4], 8)
    step = DecodeStep(model)
    one, caches = torch.tensor([1]), step.caches(1, LENGTH)
    with pytest.raises(JointNASError, match="a batch of 17; allowed: 1 to 16"):
        step(one.expand(17), one.expand(17), step.caches(17, 2), 0)
    with pytest.raises(JointNASError, match="2 tokens for caches of 1 sequences"):
        step(one.expand(2), one.expand(2), caches, 0)
    for ids_, positions, slot, starts in (
        (one + 60, one, 1, None), (one - 2, one, 1, None), (one, one * 99, 1, None), (one, one, 1, one + 1),
    ):
        with pytest.raises(JointNASError, match="an argument it does not support"):
            step(ids_, positions, caches, slot, starts)
    with pytest.raises(JointNASError, match="1 tokens from slot 12 on, in caches of 12"):
        step(one, one, caches, LENGTH)


@torch.no_grad()
def test_one_step_serves_many_caches() -> None:
    """Of other lengths and batches, in turns."""
    model = packed(tiny_model(), [4, 4, 4], 16)
    step = DecodeStep(model)
    texts = [ids(1, 6), ids(3, 6, seed=5)]
    caches = [step.caches(1, 6), step.caches(3, 40)]
    for t in range(6):
        own = [step(x[:, t], torch.full((len(x),), t), c, t) for x, c in zip(texts, caches, strict=True)]
    for logits, x in zip(own, texts, strict=True):
        assert (logits - model(x).logits[:, -1]).abs().max() <= 1e-4


def test_inputs_of_other_kinds_are_refused() -> None:
    step, other = (DecodeStep(packed(tiny_model(**change), [4, 4, 4], 8)) for change in ({}, {"head_dim": 8}))
    one, caches = torch.tensor([1]), step.caches(1, LENGTH)
    with pytest.raises(JointNASError, match=r"ids must be int64 \[1\] on cpu, got torch.int32 \[1\] on cpu"):
        step(one.int(), one, caches, 0)
    with pytest.raises(JointNASError, match=r"positions must be int64 \[1\] on cpu, got torch.int64 \[2\]"):
        step(one, one.expand(2), caches, 0)
    with pytest.raises(JointNASError, match="caches of another model"):
        step(one, one, other.caches(1, LENGTH), 0)


@torch.no_grad()
def test_threads_may_become_more() -> None:
    """Every thread has memory of its own."""
    step, before = DecodeStep(packed(tiny_model(), [4, 4, 4], 8)), torch.get_num_threads()
    one, caches = torch.tensor([1]), step.caches(1, LENGTH)
    try:
        torch.set_num_threads(1)
        alone = step(one, one * 0, caches, 0)
        size = len(step._memory)
        torch.set_num_threads(4)
        assert torch.equal(step(one, one * 0, caches, 0), alone)
        assert len(step._memory) > size
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_memory_follows_the_length_of_caches() -> None:
    """Attention has places for all parts of the positions: without, longer caches wrote behind its memory."""
    step = DecodeStep(packed(tiny_model(max_position_embeddings=4096), [4, 4, 4], 16), threads=1)
    one, sizes = torch.tensor([1]), []
    for length in (8, 4000, 8):
        step(one, one * 0, step.caches(1, length), 0)
        sizes.append(len(step._memory))
    assert sizes[1] > 2 * sizes[0]
    assert sizes[2] == sizes[0]


@torch.no_grad()
def test_not_a_number_stays_one() -> None:
    """In the cache, of an earlier token: all that look back at it are none."""
    step = DecodeStep(packed(tiny_model(), [4, 4, 4], 16))
    one, caches = torch.tensor([1]), step.caches(1, LENGTH)
    step(one, one * 0, caches, 0)
    caches.keys[1][0, 0, 0, 0] = torch.nan
    assert step(one, one, caches, 1).isnan().all()


def test_another_thread_is_refused() -> None:
    step = DecodeStep(packed(tiny_model(), [4, 4, 4], 16))
    one, caches = torch.tensor([1]), step.caches(1, LENGTH)
    with step._busy, pytest.raises(JointNASError, match="another thread is in it"):
        step(one, one, caches, 0)
    step(one, one, caches, 0)
