"""The head's bits as a dimension: relaxed as defined, one-hot == extracted == reloaded, for tied and untied heads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from jointnas import exporting
from jointnas_kernels.hf import Supernet, convert, extract, load, shrink
from jointnas_kernels.nn import FakeQuantLinear, PackedLinear, linear_cross_entropy
from jointnas_kernels.nn.head import HeadQuantizer
from jointnas_kernels.ops.quant.weights import fake_quant_weight
from jointnas_kernels.space import SearchSpace
from tests.hf.hf_models import (
    HEAD_SPACE,
    check_relaxed,
    ids,
    random_alphas,
    random_importance,
    randomize_lora,
    tiny_model,
)

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
FAMILY = pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
ALONE = SearchSpace.from_dict({**HEAD_SPACE.to_dict(), "weight_bits": None})


def made(space: SearchSpace = HEAD_SPACE, dtype: torch.dtype = torch.float64, **change: Any) -> Supernet:
    model = tiny_model(dtype, **change)
    return randomize_lora(convert(model, space, lora_rank=4, importance=random_importance(model.config)))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@FAMILY
@TIED
@torch.no_grad()
def test_choices_are_exact(exact_norm, family: str, tied: bool) -> None:
    supernet, x, g = made(family=family, tie_word_embeddings=tied), ids(), torch.Generator().manual_seed(1)
    for bits in (4, 8, 16):
        choice = replace(HEAD_SPACE.sample(g), head_bits=bits)
        own, subnet = supernet.fix(choice)(x).logits, extract(supernet, choice)
        assert difference(own, subnet(x).logits) <= 1e-12
        assert difference(own, shrink(supernet, choice)(x).logits) <= 1e-12
        head, embedding = subnet.lm_head, subnet.get_input_embeddings().weight
        assert isinstance(head, FakeQuantLinear) == (bits < 16)
        assert torch.equal(head.weight, embedding) == tied
        assert subnet.config.tie_word_embeddings == (tied and bits == 16)
        assert supernet.config.tie_word_embeddings == tied
        loss = supernet(x, labels=x).loss
        assert loss.item() == pytest.approx(subnet(x, labels=x).loss.item(), rel=1e-6)


@FAMILY
@TIED
@torch.no_grad()
def test_exports_reload(tmp_path: Path, family: str, tied: bool) -> None:
    """Stock transformers computes exactly the extracted model, the low-bit kernels nearly."""
    space = SearchSpace((32, 64), (2, 4), (16, 32), (32, 96), (1, 3), (4, 8), group_size=32, head_bits=(4, 8, 16))
    change = {"family": family, "tie_word_embeddings": tied, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    supernet, x = made(space, torch.float32, **change), ids()
    for bits, blocks in ((4, space), (8, replace(space, weight_bits=None)), (16, space)):
        choice = replace(blocks.full(), head_bits=bits)
        net = supernet if blocks is space else made(blocks, torch.float32, **change)
        subnet = extract(net, choice)
        assert difference(net.fix(choice)(x).logits, subnet(x).logits) <= 1e-4
        exporting.export_model(subnet, tmp_path / "model", choice, net.block_rank)
        assert f"| head_bits | {bits} |" in (tmp_path / "model" / "README.md").read_text()
        stock, packed = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), load(tmp_path / "model")
        assert difference(stock(x).logits, subnet(x).logits) == 0
        assert isinstance(packed.lm_head, PackedLinear) == (bits < 16)
        assert difference(packed(x).logits, subnet(x).logits) <= 1e-4 * subnet(x).logits.abs().max()


@TIED
@pytest.mark.parametrize("space", [HEAD_SPACE, ALONE], ids=["all-bits", "head-alone"])
def test_relaxed_forward_and_gradients_are_the_definition(tied: bool, space: SearchSpace) -> None:
    supernet, x = made(space, tie_word_embeddings=tied).mode("full"), ids()
    check_relaxed(supernet, x)


@TIED
def test_gradients_by_finite_differences(tied: bool) -> None:
    """Of the chunked loss, too, which training uses."""
    supernet, x = made(tie_word_embeddings=tied).mode("arch").train(), ids(1, 5)
    alphas = random_alphas(supernet)

    def loss(*values: torch.Tensor) -> torch.Tensor:
        supernet.use(dict(zip(alphas, values, strict=True)))
        return supernet(x, labels=x).loss

    assert torch.autograd.gradcheck(loss, tuple(alphas.values()), eps=1e-6, atol=1e-7)


def test_the_loss_has_the_weights_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jointnas_kernels.nn.loss.CHUNK", 5 * 11)  # chunks of 5 tokens
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 8, generator=g, dtype=torch.float64).requires_grad_() for n in (12, 11))
    labels = torch.randint(11, (12,), generator=g)
    labels[3] = -100
    own = torch.autograd.grad(3 * linear_cross_entropy(x, weight, labels), (x, weight))
    want = torch.autograd.grad(3 * torch.nn.functional.cross_entropy(x @ weight.T, labels), (x, weight))
    for a, b in zip(own, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_quantizer_is_the_specification(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 64, generator=g).to(dtype)
    quantizer = HeadQuantizer(weight, (4, 8, 16), 32)
    quantizer.clip.copy_(0.6 + 0.4 * torch.rand(quantizer.clip.shape, generator=g))
    parts = [*(fake_quant_weight(weight, b, 32, clip=quantizer.clip[i]) for i, b in enumerate((4, 8))), weight]
    for i, part in enumerate(parts):
        assert torch.equal(quantizer(weight, index=i), part)
    probs = torch.tensor([0.2, 0.5, 0.3], requires_grad=True)
    mixed = quantizer(weight, probs)
    near = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(
        mixed.float(), sum(p * q.float() for p, q in zip(probs, parts, strict=True)), rtol=near, atol=near
    )
    upstream = torch.randn(37, 64, generator=g).to(dtype)
    mixed.backward(upstream)
    want = torch.stack([(upstream.float() * part.float()).sum() for part in parts])
    torch.testing.assert_close(probs.grad, want, rtol=10 * near, atol=10 * near)


def test_only_architecture_steps_pay_for_the_gradient() -> None:
    supernet, x = made(dtype=torch.float32).train(), ids()
    for mode, wanted in (("weight", False), ("arch", True)):
        sample = supernet.mode(mode).draw(torch.Generator().manual_seed(0))
        assert supernet.tables(sample.head_probs, sample.head_index)[1].requires_grad == wanted
        supernet.zero_grad()
        supernet(x, labels=x).loss.backward()
        assert (supernet.arch.logits["head_bits"].grad is not None) == wanted
        supernet.arch.zero_grad()


def test_saved_and_resumed(tmp_path: Path) -> None:
    supernet, x = made(dtype=torch.float32, tie_word_embeddings=True), ids()
    with torch.no_grad():
        supernet.arch.logits["head_bits"].copy_(torch.tensor([0.3, 2.0, -1.0]))
    assert supernet.argmax().head_bits == 8
    supernet.eval().save_pretrained(tmp_path)
    assert torch.equal(Supernet.from_pretrained(tmp_path).eval()(x).logits, supernet(x).logits)
    model = tiny_model(tie_word_embeddings=True)
    other = convert(model, HEAD_SPACE, lora_rank=4, importance=random_importance(model.config)).eval()
    for _, linear in other.linears():
        linear.set_clip(torch.ones(2, linear.out_features, linear.in_features // linear.group_size))
    other.load_search_state(supernet.search_state())
    assert torch.equal(other(x).logits, supernet(x).logits)


@torch.no_grad()
def test_the_original_is_kept() -> None:
    model, x = tiny_model(tie_word_embeddings=True), ids()
    reference = model(x).logits
    supernet = randomize_lora(convert(model, HEAD_SPACE, lora_rank=4)).fix(replace(HEAD_SPACE.full(), head_bits=4))
    assert difference(supernet.original(x).logits, reference) <= 1e-5 * reference.abs().max()
    assert difference(supernet(x).logits, reference) > 1e-2
