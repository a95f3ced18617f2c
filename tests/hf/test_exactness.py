"""The central promise: one-hot supernet == extracted model == the checkpoint that stock transformers reloads."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from jointnas_kernels.hf import convert, extract, importance_scores, shrink
from jointnas_kernels.nn import FakeQuantLinear
from jointnas_kernels.space import Choice, SearchSpace, count_params
from tests.hf.hf_models import (
    LLAMA3_ROPE,
    MHA_SPACE,
    QUANT_SPACE,
    SPACE,
    assert_half_precision_is_exact_within_its_rounding,
    ids,
    random_importance,
    randomize_lora,
    tiny_config,
    tiny_model,
)

FAMILIES = [
    pytest.param(tied, rope, kv, id=f"{'tied' if tied else 'untied'}-{rope}-{'mha' if kv == 4 else 'gqa'}")
    for tied, rope, kv in itertools.product((False, True), ("default", "llama3"), (2, 4))
]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def family(tied: bool, rope: str, kv: int) -> dict:
    change = {"tie_word_embeddings": tied, "num_key_value_heads": kv}
    return {**change, "rope_parameters": LLAMA3_ROPE} if rope == "llama3" else change


@pytest.mark.parametrize("tied, rope, kv", FAMILIES)
@torch.no_grad()
def test_every_choice_is_exact(tmp_path, tied: bool, rope: str, kv: int) -> None:
    """fp32, all widths x depths; norm weights and LoRA are not trivial, and channels and blocks are reordered."""
    model, space, x = tiny_model(**family(tied, rope, kv)), SPACE if kv == 2 else MHA_SPACE, ids()
    supernet = randomize_lora(convert(model, space, lora_rank=4, importance=random_importance(model.config)))
    assert supernet.block_rank != (0, 1, 2)
    for choice in space:
        own = supernet.fix(choice)(x).logits
        subnet = extract(supernet, choice)
        assert type(subnet) is LlamaForCausalLM
        assert difference(own, subnet(x).logits) <= 1e-4
        assert count_params(model.config, choice) == sum(p.numel() for p in subnet.parameters())
        subnet.save_pretrained(tmp_path)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert difference(own, loaded(x).logits) <= 1e-4
        assert difference(own, shrink(supernet, choice)(x).logits) <= 1e-4


@pytest.mark.parametrize("rope", ["default", "llama3"])
@torch.no_grad()
def test_every_choice_is_exact_in_fp64(exact_norm, rope: str) -> None:
    """What is left of the difference in fp32 is rounding: in fp64 it is gone."""
    model, x = tiny_model(torch.float64, **family(False, rope, 2)), ids()
    supernet = randomize_lora(convert(model, SPACE, lora_rank=4, importance=random_importance(model.config)))
    for choice in SPACE:
        own = supernet.fix(choice)(x).logits
        assert difference(own, extract(supernet, choice)(x).logits) <= 1e-12
        assert difference(own, shrink(supernet, choice)(x).logits) <= 1e-12


@pytest.mark.parametrize("ste", ["identity", "clip"])
@torch.no_grad()
def test_quantized_choices_are_exact(exact_norm, ste: str) -> None:
    """Mixed bits per block. In fp64, where no activation is within rounding of a quantization boundary, none flips."""
    model, x = tiny_model(torch.float64, **family(True, "llama3", 2)), ids()
    importance = random_importance(model.config)
    supernet = randomize_lora(convert(model, QUANT_SPACE, lora_rank=4, ste=ste, importance=importance))
    g, quantized = torch.Generator().manual_seed(5), 0
    for _ in range(30):
        choice = QUANT_SPACE.sample(g)
        own = supernet.fix(choice)(x).logits
        subnet = extract(supernet, choice)
        quantized += sum(isinstance(m, FakeQuantLinear) for m in subnet.modules())
        assert difference(own, subnet(x).logits) <= 1e-12
        assert difference(own, shrink(supernet, choice)(x).logits) <= 1e-12
    assert quantized > 100


@torch.no_grad()
def test_symmetric_activations_are_exact_but_for_ties(exact_norm) -> None:
    """max|x| / s is 127.5, half-integral by construction, so the last bit of a token's largest value decides its level:
    two models that add in different orders differ by one level there, and in nothing else."""
    space = SearchSpace.from_dict({**QUANT_SPACE.to_dict(), "act_bits": [8]})
    model, x, g = tiny_model(torch.float64), ids(), torch.Generator().manual_seed(9)
    supernet = randomize_lora(convert(model, space, lora_rank=4, act_symmetric=True))
    for _ in range(10):
        choice = space.sample(g)
        own, plain = supernet.fix(choice)(x).logits, extract(supernet, choice)(x).logits
        assert (own - plain).norm() <= 0.03 * plain.norm()


@torch.no_grad()
def test_quantized_weights_are_exact_in_fp32(tmp_path) -> None:
    """Without activation quantizers the extracted model is stock, and a reloaded checkpoint computes the same."""
    space = SearchSpace.from_dict({**QUANT_SPACE.to_dict(), "act_bits": None})
    model, x, g = tiny_model(), ids(), torch.Generator().manual_seed(6)
    supernet = randomize_lora(convert(model, space, lora_rank=4, importance=random_importance(model.config)))
    for _ in range(15):
        choice = space.sample(g)
        own = supernet.fix(choice)(x).logits
        subnet = extract(supernet, choice)
        assert difference(own, subnet(x).logits) <= 1e-4
        subnet.save_pretrained(tmp_path)
        assert difference(own, AutoModelForCausalLM.from_pretrained(tmp_path)(x).logits) <= 1e-4


@torch.no_grad()
def test_biases_are_exact() -> None:
    model, x = tiny_model(attention_bias=True, mlp_bias=True), ids()
    reference = model(x).logits
    supernet = convert(model, SPACE, lora_rank=4, importance=random_importance(model.config))
    assert difference(supernet.fix(SPACE.full())(x).logits, reference) <= 1e-5 * reference.abs().max()
    randomize_lora(supernet)
    for choice in SPACE:
        assert difference(supernet.fix(choice)(x).logits, extract(supernet, choice)(x).logits) <= 1e-4


def test_half_precision_is_exact_within_its_rounding() -> None:
    assert_half_precision_is_exact_within_its_rounding()


@pytest.mark.parametrize("tied, rope, kv", FAMILIES)
@torch.no_grad()
def test_reordering_keeps_the_logits(tied: bool, rope: str, kv: int) -> None:
    model, x = tiny_model(**family(tied, rope, kv)), ids(3, 11)
    reference = model(x).logits
    before = model.model.embed_tokens.weight.clone()
    supernet = convert(model, SPACE if kv == 2 else MHA_SPACE, importance=importance_scores(model, [x, ids(1, 5)]))
    assert difference(supernet.embedding, before) > 0.1  # it did move
    limit = 1e-5 * reference.abs().max().item()
    assert difference(model(x).logits, reference) <= limit  # stock code on the reordered weights
    assert difference(supernet.fix(supernet.space.full())(x).logits, reference) <= limit
    assert difference(supernet.original(x).logits, reference) <= limit


@torch.no_grad()
def test_the_original_model_is_kept() -> None:
    """The teacher: whatever LoRA, bits and sizes are doing, and also if the space does not contain the full size."""
    model, x = tiny_model(), ids()
    reference = model(x).logits
    space = SearchSpace((16,), (2,), (8,), (16,), (1, 3), (2, 4), (4,), group_size=16)
    supernet = randomize_lora(convert(model, space, lora_rank=4, importance=random_importance(model.config)))
    supernet.draw(torch.Generator().manual_seed(0))
    out = supernet.original(x, labels=x)
    assert difference(out.logits, reference) <= 1e-5 * reference.abs().max()
    assert out.loss.item() == pytest.approx(model_loss(reference, x), rel=1e-5)


def model_loss(logits: torch.Tensor, x: torch.Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).item()


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_masked(side: str) -> None:
    model, x = tiny_model(), ids(2, 9)
    mask = torch.ones_like(x)
    if side == "left":
        mask[0, :3] = 0
    else:
        mask[1, 6:] = 0
    supernet = convert(model, SPACE).fix(Choice(16, 2, 8, 48, 2))
    subnet = extract(supernet, Choice(16, 2, 8, 48, 2))
    own, plain = supernet(x, attention_mask=mask).logits, subnet(x, attention_mask=mask).logits
    assert not own.isnan().any()
    assert difference(own[mask.bool()], plain[mask.bool()]) <= 1e-4


@torch.no_grad()
def test_the_real_tiny_space() -> None:
    """Group 128, o_proj groups of 32, six blocks: the shapes of the embedded model, in fp32."""
    space = SearchSpace.named("tiny")
    config = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "head_dim": 64,
              "tie_word_embeddings": True}  # fmt: skip
    model, x, g = tiny_model(**config), ids(1, 6), torch.Generator().manual_seed(8)
    for p in model.model.layers.parameters():
        if p.dim() == 2:
            p.mul_(0.25)
    supernet = convert(model, space, lora_rank=8, importance=random_importance(model.config))
    randomize_lora(supernet, scale=0.05)
    worst = []
    for _ in range(10):
        choice = Choice.from_dict({**space.sample(g).to_dict(), "act_bits": [16] * 6})
        own = supernet.fix(choice)(x).logits
        worst.append(difference(own, extract(supernet, choice)(x).logits))
    assert max(worst) <= 1e-4


def test_meta_models_convert() -> None:
    """Sizes and structure without storage; also of a model that would not fit here."""
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config(num_hidden_layers=32, hidden_size=4096, intermediate_size=14336,
                                             num_attention_heads=32, num_key_value_heads=8, head_dim=128))  # fmt: skip
    supernet = convert(model, SearchSpace.named("qllama3"))
    assert supernet.replaced == 32 * 9 + 1
    supernet.mode("arch").draw()
    assert supernet.arch.argmax().blocks in range(1, 33)
    choice = SearchSpace.named("qllama3").sample()
    assert sum(p.numel() for p in extract(supernet, choice).parameters()) == count_params(model.config, choice)
