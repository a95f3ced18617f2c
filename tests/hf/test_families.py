"""Every family through the same code: one-hot == extracted == reloaded; relaxed == its literal definition; counts."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jointnas import exporting
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import Supernet, convert, extract, importance_scores, load, shrink, subnet_config
from jointnas_kernels.hf.families import FAMILIES, build
from jointnas_kernels.latency import LatencyTable, Workload, deploy, enumerate_ops, measure_model
from jointnas_kernels.latency.measure import BackendLinear
from jointnas_kernels.layout import sliding_windows
from jointnas_kernels.nn import FakeQuantLinear, PackedLinear
from jointnas_kernels.space import Choice, SearchSpace, count_params, expected_params, kept_blocks
from tests.hf.hf_models import (
    MHA_SPACE,
    QUANT_SPACE,
    SPACE,
    assert_half_precision_is_exact_within_its_rounding,
    check_relaxed,
    ids,
    random_importance,
    randomize_lora,
    tiny_config,
    tiny_model,
)
from tests.latency.tables import synthetic

QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}  # blocks 1 and 2
VARIANTS: dict[str, dict[str, Any]] = {
    "mistral": {"family": "mistral"},
    "mistral-window": {"family": "mistral", "sliding_window": 4, "tie_word_embeddings": True},
    "qwen2": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen2-window": {"family": "qwen2", **QWEN_WINDOW},
    "qwen2-mha": {"family": "qwen2", "num_key_value_heads": 4},
    "qwen3": {"family": "qwen3", "tie_word_embeddings": True},
    "qwen3-window": {"family": "qwen3", **QWEN_WINDOW},
    "qwen3-bias-mha": {"family": "qwen3", "attention_bias": True, "num_key_value_heads": 4},
    "qwen3-linear": {
        "family": "qwen3", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    },
    "phi3": {"family": "phi3"},
    "phi3-window": {"family": "phi3", "sliding_window": 4, "tie_word_embeddings": True},
    "phi3-mha": {"family": "phi3", "num_key_value_heads": 4},
}  # fmt: skip
ALL = pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
WIDTHS_AND_BITS = SearchSpace.from_dict({**QUANT_SPACE.to_dict(), "act_bits": None})


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def space_of(change: dict[str, Any]) -> SearchSpace:
    return MHA_SPACE if change.get("num_key_value_heads") == 4 else SPACE


def made(change: dict[str, Any], space: SearchSpace, dtype: torch.dtype = torch.float32, **options: Any) -> Supernet:
    """Reordered, with LoRA; the most important block is block 1, so that extraction renumbers blocks."""
    model = tiny_model(dtype, **change)
    importance = random_importance(model.config)
    return randomize_lora(convert(model, space, lora_rank=4, importance=importance, **options))


@ALL
@torch.no_grad()
def test_choices_are_exact(tmp_path, change: dict[str, Any]) -> None:
    """fp32: supernet, extracted and shrunk model, and the checkpoint that stock transformers reloads."""
    space, x, config = space_of(change), ids(), tiny_config(**change)
    supernet = made(change, space)
    assert supernet.replaced == 3 * (11 if config.model_type == "qwen3" else 9) + 1
    for i, choice in enumerate(space):
        own = supernet.fix(choice)(x).logits
        subnet = extract(supernet, choice)
        assert type(subnet) is FAMILIES[config.model_type].model
        assert difference(own, subnet(x).logits) <= 1e-4
        assert difference(own, shrink(supernet, choice)(x).logits) <= 1e-4
        assert count_params(config, choice) == sum(p.numel() for p in subnet.parameters())
        if i % 4 == 1:
            subnet.save_pretrained(tmp_path)
            loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
            assert type(loaded) is type(subnet)
            assert difference(own, loaded(x).logits) <= 1e-4


@ALL
@torch.no_grad()
def test_choices_are_exact_in_fp64(exact_norm, change: dict[str, Any]) -> None:
    """What is left of the difference in fp32 is rounding; also with mixed bits and quantized activations."""
    x, g = ids(), torch.Generator().manual_seed(5)
    plain, quantized = made(change, space_of(change), torch.float64), None
    for choice in list(space_of(change))[::3]:
        own = plain.fix(choice)(x).logits
        assert difference(own, extract(plain, choice)(x).logits) <= 1e-12
        assert difference(own, shrink(plain, choice)(x).logits) <= 1e-12
    if change.get("num_key_value_heads") == 4:
        return
    supernet = made(change, QUANT_SPACE, torch.float64)
    for _ in range(8):
        choice = QUANT_SPACE.sample(g)
        own, subnet = supernet.fix(choice)(x).logits, extract(supernet, choice)
        quantized = quantized or any(isinstance(m, FakeQuantLinear) for m in subnet.modules())
        assert difference(own, subnet(x).logits) <= 1e-12
        assert difference(own, shrink(supernet, choice)(x).logits) <= 1e-12
    assert quantized


@ALL
@torch.no_grad()
def test_reordering_keeps_the_logits(change: dict[str, Any]) -> None:
    model, x = tiny_model(**change), ids(3, 11)
    reference = model(x).logits
    before = model.model.embed_tokens.weight.clone()
    supernet = convert(model, space_of(change), importance=importance_scores(model, [x, ids(1, 5)]))
    assert difference(supernet.embedding, before) > 0.1
    limit = 1e-5 * reference.abs().max().item()
    assert difference(model(x).logits, reference) <= limit
    assert difference(supernet.fix(supernet.space.full())(x).logits, reference) <= limit
    assert difference(supernet.original(x).logits, reference) <= limit


@pytest.mark.parametrize("name", ["mistral-window", "qwen2", "qwen3", "qwen3-window", "qwen3-bias-mha", "phi3-window"])
@pytest.mark.parametrize("bits", [False, True], ids=["widths", "weight-bits"])
def test_relaxed_forward_and_gradients_are_the_definition(name: str, bits: bool) -> None:
    """Eq. 5 as printed, biases masked with their rows, q and k norms as sums of the norms of the choices; fp64."""
    change = VARIANTS[name]
    if bits and "mha" in name:
        pytest.skip("the space with bits has two heads")
    supernet, x = made(change, WIDTHS_AND_BITS if bits else space_of(change), torch.float64), ids()
    supernet.mode("full")
    check_relaxed(supernet, x)


def test_half_precision_qwen3_is_exact_within_its_rounding() -> None:
    assert_half_precision_is_exact_within_its_rounding(**VARIANTS["qwen3"])


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen2-window", "qwen3", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_exports_reload(tmp_path, name: str, dtype: torch.dtype) -> None:
    """Packed checkpoints: stock transformers computes exactly the extracted model; low-bit kernels nearly."""
    change, g, x = VARIANTS[name], torch.Generator().manual_seed(1), ids()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    space = SearchSpace((32, 64), (2, 4), (16, 32), (32, 96), (1, 2, 3), (4, 8), (8, 16), group_size=32)
    model = tiny_model(dtype, **{**change, **sizes})
    supernet = randomize_lora(convert(model, space, lora_rank=4, importance=random_importance(model.config)))
    for _ in range(3):
        choice = space.sample(g)
        subnet = extract(supernet, choice)
        exporting.export_model(subnet, tmp_path / "model", choice, supernet.block_rank)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
        logits = subnet(x).logits
        assert difference(stock(x).logits, logits) == 0
        assert (load(tmp_path / "model")(x).logits - logits).norm() <= 0.05 * logits.norm()


@torch.no_grad()
def test_fused_linears_on_packed_kernels(tmp_path) -> None:
    """q, k, v and gate, up are one packed linear each, of one scheme; the model says the same, token by token."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    space = SearchSpace((32, 64), (2, 4), (16, 32), (32, 96), (1, 2, 3), (4, 8), (8, 16), group_size=32)
    model = tiny_model(family="phi3", **sizes)
    supernet = randomize_lora(convert(model, space, lora_rank=4, importance=random_importance(model.config)))
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    for act in (16, 8):
        choice = Choice(64, 2, 16, 96, 2, (4, 8, 8), (act,) * 3)
        subnet = extract(supernet, choice)
        exporting.export_model(subnet, tmp_path / "model", choice, supernet.block_rank)
        packed = load(tmp_path / "model")
        found = {n.rpartition(".")[2]: m for n, m in packed.named_modules() if isinstance(m, PackedLinear)}
        assert {n: (m.out_features, m.group_size) for n, m in found.items()} == {
            "qkv_proj": (2 * 16 + 2 * 2 * 16, 32), "o_proj": (64, 16), "gate_up_proj": (192, 32), "down_proj": (64, 32),
        }  # fmt: skip
        groups = AutoConfig.from_pretrained(tmp_path / "model").quantization_config["config_groups"]
        assert len(groups) == 4 * 2
        prompt = ids(1, 5)
        tokens = subnet.generate(prompt, **options)
        assert torch.equal(packed.generate(prompt, **options), tokens)
        assert len(tokens[0].unique()) > 3


# ---- sliding windows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mistral-window", "qwen2-window", "qwen3-window", "phi3-window"])
@pytest.mark.parametrize("side", [None, "left", "right"], ids=["whole", "left", "right"])
@torch.no_grad()
def test_windows_are_respected(tmp_path, name: str, side: str | None) -> None:
    """Longer than the window, with and without padding; the kept blocks take their own kind of attention along."""
    change, x = VARIANTS[name], ids(2, 9)
    supernet = made(change, SPACE)
    mask = torch.ones_like(x)
    if side is not None:
        mask[0, slice(0, 3) if side == "left" else slice(6, 9)] = 0
    given = None if side is None else mask
    for blocks in (1, 2):
        choice = Choice(16, 2, 8, 48, blocks)
        subnet = extract(supernet, choice)
        kept = kept_blocks(supernet.block_rank, blocks)
        assert kept == ((1,), (0, 1))[blocks - 1]
        assert sliding_windows(subnet.config) == tuple(sliding_windows(supernet.config)[b] for b in kept)
        subnet.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        own = supernet.fix(choice)(x, attention_mask=given).logits[mask.bool()]
        for other in (subnet, loaded, shrink(supernet, choice)):
            assert difference(own, other(x, attention_mask=given).logits[mask.bool()]) <= 1e-4
        wide = tiny_model(**{**change, "sliding_window": 9})
        unlimited = randomize_lora(convert(wide, SPACE, lora_rank=4, importance=random_importance(wide.config)))
        assert difference(unlimited.fix(choice)(x, attention_mask=given).logits[mask.bool()], own) > 1e-2


# ---- counts and latency ---------------------------------------------------------------------------------------------


@ALL
def test_expected_params_is_the_expectation(change: dict[str, Any]) -> None:
    space, config, g = space_of(change), tiny_config(**change), torch.Generator().manual_seed(3)
    keys = ("hidden", "heads", "head_dim", "intermediate", "blocks")
    probs = {k: torch.rand(len(space.sizes(k)), generator=g, dtype=torch.float64) for k in keys}
    probs = {k: v / v.sum() for k, v in probs.items()}

    def probability(choice: Choice) -> float:
        return math.prod(probs[k][space.sizes(k).index(getattr(choice, k))].item() for k in keys)

    total = sum(probability(choice) * count_params(config, choice) for choice in space)
    assert expected_params(config, space, probs).item() == pytest.approx(total, rel=1e-12)


def test_known_sizes() -> None:
    """Parameters of published checkpoints, from their configs alone."""
    sizes = {
        "qwen2": ({"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
                   "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}, 494_032_768),
        "qwen3": ({"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
                   "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
                  596_049_920),
        "mistral": ({"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}, 7_241_732_096),
        "phi3": ({"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 32, "vocab_size": 32064}, 3_821_079_552),
    }  # fmt: skip
    for kind, (values, count) in sizes.items():
        config = AutoConfig.for_model(kind, **values)
        dim = values.get("head_dim", values["hidden_size"] // values["num_attention_heads"])
        full = Choice(values["hidden_size"], values["num_attention_heads"], dim, values["intermediate_size"],
                      values["num_hidden_layers"])  # fmt: skip
        assert count_params(config, full) == count
        with torch.device("meta"):
            assert sum(p.numel() for p in build(subnet_config(config, full)).parameters()) == count


def test_latency_parts_of_qwen3() -> None:
    """Its head norms are operations of their own, and a prediction is the sum over them."""
    workload = Workload(seq=8)
    config = tiny_config("qwen3")
    norms = {s for s in enumerate_ops(SPACE, config, workload) if s.op == "norm"}
    assert {(s.m, s.n) for s in norms} == {(8, 16), (8, 32)} | {(8 * h, d) for h in (2, 4) for d in (8, 16)}
    llama = {s for s in enumerate_ops(SPACE, tiny_config(), workload) if s.op == "norm"}
    assert {(s.m, s.n) for s in llama} == {(8, 16), (8, 32)}


@torch.no_grad()
def test_latency_and_deployment_of_fused_linears() -> None:
    """One operation for q, k, v and one for gate, up; a deployed model has as many."""
    sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 192, "vocab_size": 97}
    space = SearchSpace((64, 128), (2, 4), (16, 32), (64, 192), (1, 3), (4, 8), (8, 16), group_size=64)
    config, choice = tiny_config("phi3", **sizes), Choice(64, 2, 16, 64, 1, (8, 8, 8), (16, 16, 16))
    shapes = {(s.n, s.k) for s in enumerate_ops(space, config, Workload(seq=8)) if s.op == "linear"}
    assert {(2 * 16 + 2 * 2 * 16, 64), (2 * 64, 64), (64, 2 * 16)} <= shapes
    assert (2 * 16, 64) not in shapes
    made_up = synthetic(space, config=config)
    table = LatencyTable(made_up.header, [r.model_copy(update={"backend": "ours-cpu"}) for r in made_up.rows])
    assert table.dims.fused
    model: Any = build(subnet_config(config, choice)).eval()
    x = torch.randint(97, (1, 16))
    before = model(x).logits
    deployed = deploy(model, choice, space, table)
    assert sum(isinstance(m, BackendLinear) for m in deployed.modules()) == 4
    assert difference(deployed(x).logits, before) <= 0.03 * before.abs().max()


def test_latency_behind_a_window_is_refused() -> None:
    config = tiny_config("mistral", sliding_window=4)
    assert enumerate_ops(SPACE, config, Workload(seq=4))
    with pytest.raises(JointNASError, match="looks back 4 positions, the workload 8"):
        enumerate_ops(SPACE, config, Workload(seq=8))


@torch.no_grad()
def test_deployed_models_keep_their_biases() -> None:
    space = SearchSpace((64, 128), (2, 4), (16, 32), (64, 192), (1, 3), (4, 8), (8, 16), group_size=64)
    sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 192, "vocab_size": 97}
    config, choice = tiny_config("qwen2", **sizes), Choice(64, 2, 16, 64, 1, (8, 8, 8), (16, 16, 16))
    model: Any = build(subnet_config(config, choice)).eval()
    for p in model.parameters():
        p.normal_(std=0.1)
    x = torch.randint(97, (1, 16))
    before = model(x).logits
    made_up = synthetic(space)
    table = LatencyTable(made_up.header, [r.model_copy(update={"backend": "ours-cpu"}) for r in made_up.rows])
    deployed = deploy(model, choice, space, table)
    assert difference(deployed(x).logits, before) <= 0.03 * before.abs().max()
    assert measure_model(deployed, Workload(seq=4), seconds=1e-3, samples=2) is not None


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_ropes_that_depend_on_head_dim_are_refused() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    for kind in ("qwen2", "qwen3"):
        with pytest.raises(JointNASError, match=r"rope type 'yarn'.*head_dim 8 of 16"):
            convert(tiny_model(family=kind, rope_parameters=yarn, max_position_embeddings=256), SPACE)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"resid_pdrop": 0.1}, "resid_pdrop 0.1 is not supported; set it to 0"),
        ({"embd_pdrop": 0.1}, "embd_pdrop 0.1 is not supported; set it to 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         "8 of 16 dims are rotated; all of them must be"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
                              "long_factor": [2.0] * 8}, "num_attention_heads": 2},
         r"rope type 'longrope'.*head_dim 8 of 16"),
    ],
    ids=["residual-dropout", "embedding-dropout", "partial-rotary", "longrope"],
)  # fmt: skip
def test_phi3s_that_differ_are_refused(change: dict[str, Any], message: str) -> None:
    space = SearchSpace((16, 32), (2,), (8, 16), (16, 48), (1, 2, 3))
    with pytest.raises(JointNASError, match=message):
        convert(tiny_model(family="phi3", **change), space)


def test_norms_of_another_kind_are_named() -> None:
    model = tiny_model(family="qwen3")
    model.model.layers[1].self_attn.k_norm = torch.nn.LayerNorm(16)
    with pytest.raises(JointNASError, match=r"layers.1.self_attn.k_norm is a LayerNorm, not a Qwen3RMSNorm"):
        convert(model, SPACE)


def test_configs_of_other_families_are_named() -> None:
    with pytest.raises(JointNASError, match=r"type 'gpt2' is not supported.*llama, mistral, qwen2, qwen3, phi3"):
        build(SimpleNamespace(model_type="gpt2"))
