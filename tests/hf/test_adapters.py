"""LoRA pairs as PEFT adapters of the original model, and PEFT's configuration as options of convert."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import Supernet, convert, load_adapters, save_adapters, shrink
from jointnas_kernels.layout import LINEARS, all_sizes, block_of
from tests.hf.hf_models import QUANT_SPACE, SPACE, ids, random_importance, randomize_lora, tiny_model

FAMILIES = ["llama", "qwen2", "qwen3", "phi3"]


def pair(
    family: str = "llama", dtype: torch.dtype = torch.float32, quantized: bool = True, **options: Any
) -> tuple[Any, Supernet]:
    """The original model, and a reordered supernet of a copy."""
    model = tiny_model(dtype, family=family)
    importance = random_importance(model.config)
    space = QUANT_SPACE if quantized else SPACE
    supernet = convert(copy.deepcopy(model), space, importance=importance, **({"lora_rank": 4} | options))
    return model, randomize_lora(supernet)


def assert_merged(model: Any, supernet: Supernet, index: int | None) -> None:
    """The merged original, in the supernet's order, bit for bit."""
    layout, sizes = block_of(model.config), all_sizes(model.config)
    for b, layer in enumerate(model.model.layers):
        block: Any = supernet.blocks[b]
        for m in layout.linears:
            rows, columns = (supernet.order.channels(axis, b) for axis in (m.rows, m.columns))
            weight = layer.get_submodule(m.module).weight[layout.rows(m, sizes)]
            assert torch.equal(weight[rows][:, columns], block.linears[m.name].adapted(index)), (b, m.name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_stock_peft_merges_what_the_supernet_merges(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model, supernet = pair(family, dtype)
    folders = save_adapters(supernet, tmp_path)
    assert [f.name for f in folders] == ["w2", "w4", "w8"]
    wrapped = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "w4", adapter_name="w4")
    assert wrapped.load_adapter(tmp_path / "w2", adapter_name="w2").unexpected_keys == []
    wrapped.merge_adapter(["w2"])
    assert_merged(_bare(wrapped), supernet, 0)
    wrapped.unmerge_adapter()
    merged = PeftModel.from_pretrained(model, tmp_path / "w4", adapter_name="w4").merge_and_unload()
    assert_merged(merged, supernet, 1)


@torch.no_grad()
def test_a_shared_pair_is_one_adapter(tmp_path: Path) -> None:
    model, supernet = pair(lora_pairs="shared")
    assert [f.name for f in save_adapters(supernet, tmp_path)] == ["default"]
    merged = PeftModel.from_pretrained(model, tmp_path / "default").merge_and_unload()
    for index in range(3):
        assert_merged(merged, supernet, index)
    _, other = pair(lora_pairs="shared", lora_alpha=16)
    for parameter in other.lora_parameters():
        parameter.zero_()
    load_adapters(other, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(supernet.lora_parameters(), other.lora_parameters(), strict=True))


def _bare(wrapped: Any) -> Any:
    """The base model with its merged linears in their places."""
    model = copy.deepcopy(wrapped.base_model.model)
    for layer in model.model.layers:
        for path in block_of(model.config).modules:
            layer.set_submodule(path, layer.get_submodule(path).get_base_layer())
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_adapted_original_is_the_unquantized_supernet(tmp_path: Path, family: str) -> None:
    model, supernet = pair(family, quantized=False)
    assert [f.name for f in save_adapters(supernet, tmp_path)] == ["default"]
    x = ids()
    before = model(x).logits
    wrapped = PeftModel.from_pretrained(model, tmp_path / "default")
    own = supernet.fix(SPACE.full())(x).logits
    assert (wrapped(x).logits - own).abs().max() <= 1e-4
    assert (before - own).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "phi3"])
@torch.no_grad()
def test_adapters_survive_another_channel_order(tmp_path: Path, family: str) -> None:
    """Saved by one supernet, loaded by one in another order, saved again: the same files."""
    model, supernet = pair(family)
    save_adapters(supernet, tmp_path / "a")
    other = convert(copy.deepcopy(model), QUANT_SPACE, lora_rank=4, importance=random_importance(model.config, 9))
    assert other.order != supernet.order
    load_adapters(other, tmp_path / "a")
    save_adapters(other, tmp_path / "b")
    for name in ("w2", "w4", "w8"):
        first, second = (load_file(tmp_path / f / name / "adapter_model.safetensors") for f in "ab")
        assert set(first) == set(second)
        assert all(torch.equal(first[k], second[k]) for k in first)
    # and without quantizers, whose groups depend on the order, both compute the same
    model, supernet = pair(family, quantized=False)
    other = convert(copy.deepcopy(model), SPACE, lora_rank=4, importance=random_importance(model.config, 9))
    save_adapters(supernet, tmp_path)
    load_adapters(other, tmp_path)
    own = supernet.fix(SPACE.full())(ids()).logits
    assert (own - other.fix(SPACE.full())(ids()).logits).abs().max() <= 1e-5 * own.abs().max()


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_adapters_that_peft_trained_are_loaded(tmp_path: Path, family: str) -> None:
    """The one A of a fused module becomes that of each linear."""
    model, supernet = pair(family, quantized=False)
    targets = [path.rpartition(".")[2] for path in block_of(model.config).modules]
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, lora_alpha=16, target_modules=targets))
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    wrapped.save_pretrained(tmp_path / "default")
    load_adapters(supernet, tmp_path)
    with torch.no_grad():
        assert (wrapped(ids()).logits - supernet.fix(SPACE.full())(ids()).logits).abs().max() <= 1e-4


def test_adapters_that_mix_fused_linears_are_refused(tmp_path: Path) -> None:
    model, supernet = pair("phi3", quantized=False)
    config = LoraConfig(r=12, lora_alpha=48, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
                        rank_pattern={"o_proj": 4, "down_proj": 4, "gate_up_proj": 8},
                        alpha_pattern={"o_proj": 16, "down_proj": 16, "gate_up_proj": 32})  # fmt: skip
    wrapped = get_peft_model(model, config)
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    wrapped.save_pretrained(tmp_path / "default")
    with pytest.raises(JointNASError, match=r"qkv_proj.lora_B.weight mixes linears that the supernet keeps apart"):
        load_adapters(supernet, tmp_path)


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_the_configuration_is_taken_over(tmp_path: Path, rslora: bool) -> None:
    config = LoraConfig(r=3, lora_alpha=7, use_rslora=rslora, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    model, supernet = pair(lora=config, lora_rank=32)
    linear = supernet.blocks[0].attention.q_proj
    assert linear.lora_a.shape == (3, 3, 32)
    assert linear.scaling == 7 / (math.sqrt(3) if rslora else 3)
    assert linear.adapted(0).dtype == torch.float32
    small = shrink(supernet, QUANT_SPACE.full()).blocks[0].attention.q_proj
    assert (small.rank, small.scaling) == (3, linear.scaling)
    save_adapters(supernet, tmp_path)
    saved = json.loads((tmp_path / "w8" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["use_rslora"]) == (3, 7, rslora)
    assert set(saved["target_modules"]) == set(LINEARS)
    with torch.no_grad():
        merged = PeftModel.from_pretrained(model, tmp_path / "w8", adapter_name="w8").merge_and_unload()
        assert_merged(merged, supernet, 2)
    assert saved["rank_pattern"] == saved["alpha_pattern"] == {}


def test_initialisations_are_pefts() -> None:
    torch.manual_seed(0)
    big: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 512}
    for init, std in ((True, 1 / math.sqrt(3 * 512)), ("gaussian", 1 / 16)):
        made = convert(tiny_model(**big), SPACE, lora=LoraConfig(r=16, init_lora_weights=init))
        a = made.blocks[0].mlp.gate_proj.lora_a
        assert a.std().item() == pytest.approx(std, rel=0.05)
        assert made.blocks[0].mlp.gate_proj.lora_b.abs().max() == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern="),
        ({"bias": "all"}, "bias='all'"),
        ({"target_modules": ["q_proj", "v_proj"]}, "every linear of a block"),
        ({"lora_dropout": 0.1}, r"lora_dropout 0.1 is not supported; set it to 0: .*quantizer"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*Allowed: True, 'gaussian'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_unsupported_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(JointNASError, match=message):
        convert(tiny_model(), SPACE, lora=LoraConfig(**change))


def test_other_misuse_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JointNASError, match=r"expected a peft.LoraConfig"):
        convert(tiny_model(), SPACE, lora={"r": 4})  # type: ignore[arg-type]
    with pytest.raises(JointNASError, match="not both"):
        convert(tiny_model(), SPACE, lora_rank=4, lora=LoraConfig())
    _, supernet = pair()
    with pytest.raises(JointNASError, match="w2 is no PEFT adapter"):
        load_adapters(supernet, tmp_path)
    save_adapters(supernet, tmp_path)
    with pytest.raises(JointNASError, match="rank 4 and scaling 4; the supernet has rank 8"):
        load_adapters(pair(lora_rank=8)[1], tmp_path)
    with pytest.raises(JointNASError, match=r"is \(4, 32\); it must be \(4, 64\)"):
        load_adapters(convert(tiny_model(hidden_size=64), QUANT_SPACE, lora_rank=4), tmp_path)
    with pytest.raises(JointNASError, match=r"missing.*extra"):
        load_adapters(convert(tiny_model(num_hidden_layers=4), QUANT_SPACE_4, lora_rank=4), tmp_path)
    with pytest.raises(JointNASError, match="shrunk supernet"):
        save_adapters(shrink(supernet, QUANT_SPACE.full()), tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(JointNASError, match="pip install 'peft"):
        save_adapters(supernet, tmp_path)


QUANT_SPACE_4 = type(QUANT_SPACE).from_dict({**QUANT_SPACE.to_dict(), "blocks": [1, 4]})
