"""Exports in the format of compressed-tensors: stock transformers computes exactly what the exported model did."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from jointnas import exporting, loading
from jointnas.config import ModelConfig
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import extract
from jointnas_kernels.hf.families import rotary
from jointnas_kernels.layout import block_of
from jointnas_kernels.nn import FakeQuantLinear
from jointnas_kernels.ops.lowbit.pack import pack_weight
from jointnas_kernels.ops.quant import grid
from jointnas_kernels.space import Choice, model_bytes
from tests.hf.exported import SPACE, exported, quantized_linears, supernet, uniform
from tests.hf.hf_models import ids, tiny_model

FAMILIES = [
    pytest.param(
        dtype, tied, llama3, id=f"{str(dtype)[6:]}-{'tied' if tied else 'untied'}-{'llama3' if llama3 else 'rope'}"
    )
    for dtype, tied, llama3 in itertools.product((torch.float32, torch.bfloat16), (False, True), (False, True))
]
PER_FAMILY = 7  # times 8 families: 56 choices


def drawn(tied: bool, llama3: bool) -> list[Choice]:
    g = torch.Generator().manual_seed(11 + 2 * tied + llama3)
    return [SPACE.sample(g) for _ in range(PER_FAMILY)]


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model


def difference(a: nn.Module, b: nn.Module) -> float:
    x = ids()
    return (a(x).logits.double() - b(x).logits.double()).abs().max().item()


@pytest.mark.parametrize("dtype, tied, llama3", FAMILIES)
@torch.no_grad()
def test_stock_transformers_computes_the_same(tmp_path: Path, dtype: torch.dtype, tied: bool, llama3: bool) -> None:
    net = supernet(dtype, tied, llama3)
    for choice in drawn(tied, llama3):
        model = exported(net, choice, tmp_path / "model")
        again = stock(tmp_path / "model", dtype)
        assert again.dtype == dtype
        assert difference(model, again) == 0
        for name, linear in quantized_linears(model).items():
            assert torch.equal(again.get_submodule(name).weight, linear.weight)


def test_all_combinations_are_among_them() -> None:
    seen: set[tuple[int, int]] = set()
    for tied, llama3 in itertools.product((False, True), (False, True)):
        for choice in drawn(tied, llama3):
            seen.update(zip(choice.weight_bits, choice.act_bits, strict=True))
    assert seen == set(itertools.product((2, 4, 8), (2, 4, 8, 16)))


@pytest.mark.parametrize("weight_bits, act_bits", itertools.product((2, 4, 8), (2, 4, 8, 16)), ids=lambda b: str(b))
@torch.no_grad()
def test_packer_writes_what_compressed_tensors_writes(tmp_path: Path, weight_bits: int, act_bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    g = torch.Generator().manual_seed(weight_bits)
    q = torch.randint(-(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1), (37, 96), generator=g).to(torch.int8)
    assert torch.equal(pack_weight(q, weight_bits), helpers.pack_to_int32(q, weight_bits))
    model = exported(supernet(), uniform(weight_bits, act_bits), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for name, linear in quantized_linears(model).items():
        packed, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
        assert tensors[f"{name}.weight_shape"].tolist() == list(linear.weight.shape)
        assert tensors[f"{name}.weight_shape"].dtype == torch.int64
        assert scale.dtype == linear.weight.dtype
        q = helpers.unpack_from_int32(packed, weight_bits, linear.weight.shape)
        values = q.view(*scale.shape, -1).to(scale.dtype) * scale.unsqueeze(-1)
        assert torch.equal(values.view_as(linear.weight), linear.weight)
        assert linear.group_size == (16 if name.endswith("o_proj") else 32)
        assert f"{name}.weight" not in tensors
    assert difference(model, stock(tmp_path / "model")) == 0


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"act_symmetric": True}, id="symmetric-activations"),
        pytest.param({"bias": True}, id="biases"),
        pytest.param({"act_bits": False}, id="weights-only"),
        pytest.param({"weight_bits": False}, id="activations-only"),
        pytest.param({"dtype": torch.float16, "act_symmetric": True}, id="float16"),
    ],
)
@torch.no_grad()
def test_other_schemes_are_exact(tmp_path: Path, options: dict) -> None:
    net, g = supernet(**options), torch.Generator().manual_seed(3)
    dtype = options.get("dtype", torch.float32)
    for _ in range(3):
        choice = net.space.sample(g)
        model = exported(net, choice, tmp_path / "model")
        assert difference(model, stock(tmp_path / "model", dtype)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_asymmetric_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    """Zero points per group: int8 storage, because transformers cannot load them packed."""
    model = tiny_model(dtype, hidden_size=64, intermediate_size=96, head_dim=32)
    model.model.rotary_emb = rotary(model.config)  # tiny_model rounds its frequencies to the dtype
    for i, layer in enumerate(model.model.layers):
        for path in block_of(model.config).modules:
            old = layer.get_submodule(path)
            values, of = grid.quantize(old.weight + 0.05, (2, 4, 8)[i], 16, symmetric=i == 1)
            layer.set_submodule(path, FakeQuantLinear(values, None, of, (4, 8, 16)[i]))
    choice = uniform(8, 8)
    exporting.export_model(model, tmp_path / "model", choice, (0, 1, 2))
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {g["format"] for g in config["config_groups"].values()} == {"naive-quantized", "pack-quantized"}
    assert difference(model, stock(tmp_path / "model", dtype)) == 0
    assert "hf.load" not in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize("dtype, tied, llama3", [FAMILIES[0], FAMILIES[6]])
def test_bytes_on_disk_follow_the_formula(tmp_path: Path, dtype: torch.dtype, tied: bool, llama3: bool) -> None:
    net, g = supernet(dtype, tied, llama3), torch.Generator().manual_seed(5)
    for _ in range(3):
        choice = SPACE.sample(g)
        exported(net, choice, tmp_path / "model")
        path = tmp_path / "model" / "model.safetensors"
        width = torch.finfo(dtype).bits // 8
        want = model_bytes(net.config, SPACE, choice, net.block_rank, width) + 7 * choice.blocks * 2 * 8  # shapes
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size == 8 + header + want
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        assert ("lm_head.weight" in names) != tied


def test_a_reloaded_model_keeps_its_classes_forward(tmp_path: Path) -> None:
    """compressed-tensors leaves nothing around modules that are not quantized, so the decode step runs the model."""
    quantized = quantized_linears(exported(supernet(), uniform(4, 8), tmp_path / "model"))
    model = exporting.reload(tmp_path / "model")
    assert {n for n, m in model.named_modules() if "forward" in m.__dict__} <= quantized.keys()
    assert all(type(m._parameters) is dict for m in model.modules())


def test_config_has_one_group_per_linear(tmp_path: Path) -> None:
    exported(supernet(), SPACE.full(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert config["ignore"] == ["lm_head"]
    names = list(config["config_groups"])
    assert names == sorted(names) == [f"group_{i:02d}" for i in range(21)]
    groups = config["config_groups"].values()
    order = ("self_attn.q_proj", "mlp.down_proj")
    assert [t for g in groups for t in g["targets"]][::20] == [
        f"model.layers.{b}.{n}" for b, n in zip((0, 2), order, strict=True)
    ]
    assert all(g["input_activations"] is None for g in groups)  # the full choice has 16 bits
    assert all(len(g["targets"]) == 1 for g in groups)


@torch.no_grad()
def test_shards(tmp_path: Path) -> None:
    model = exported(supernet(), uniform(4, 8), tmp_path / "model", max_shard_size="20KB")
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    assert difference(model, stock(tmp_path / "model")) == 0
    exported(supernet(), uniform(2, 8), tmp_path / "model")
    assert not list((tmp_path / "model").glob("model-*.safetensors"))  # the old folder is replaced as a whole


@torch.no_grad()
def test_a_changed_weight_is_not_exported(tmp_path: Path) -> None:
    """And whatever fails, the folder that was there stays, and nothing is left beside it."""
    net, choice = supernet(), uniform(4, 8)
    model = exported(net, choice, tmp_path / "model")
    before = {f.name: f.read_bytes() for f in (tmp_path / "model").iterdir()}
    model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    with pytest.raises(JointNASError, match=r"layers\.1\.mlp\.up_proj: 1 of 6144 weights are no multiple"):
        exporting.export_model(model, tmp_path / "model", choice, net.block_rank)
    other = extract(net, choice)
    with pytest.raises(FileNotFoundError):
        exporting.export_model(other, tmp_path / "model", choice, net.block_rank, notices=[tmp_path / "missing"])
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert {f.name: f.read_bytes() for f in (tmp_path / "model").iterdir()} == before
    with pytest.raises(JointNASError, match="converted to another dtype"):
        exporting.export_model(extract(net, choice).to(torch.bfloat16), tmp_path / "model", choice, net.block_rank)


def test_writing_needs_no_compressed_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "compressed_tensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    exported(supernet(), uniform(4, 8), tmp_path / "model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(JointNASError, match="pip install compressed-tensors"):
        exporting.reload(tmp_path / "model")
    with pytest.raises(JointNASError, match="no exported model"):
        exporting.reload(tmp_path)


def test_model_card(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_text("---\nlicense: llama3.1\ntags: [x]\n---\n# Hello\n")
    (source / "LICENSE.txt").write_text("terms")
    licence, notices = loading.licence(ModelConfig(source=str(source)))
    choice = uniform(4, 8)
    exported(
        supernet(), choice, tmp_path / "model", licence=licence, notices=notices, base="org/base",
        facts={"held-out perplexity": "12.3"},
    )  # fmt: skip
    text = (tmp_path / "model" / "README.md").read_text()
    for expected in ("license: llama3.1", "| base model | org/base |", "| held-out perplexity | 12.3 |", "hf.load"):
        assert expected in text
    rank = supernet().block_rank
    assert [line for line in text.splitlines() if line.startswith("| 1 |")] == [f"| 1 | {sorted(rank)[1]} | 4 | 8 |"]
    assert (tmp_path / "model" / "LICENSE.txt").read_text() == "terms"
    assert loading.licence(ModelConfig())[1][0].is_file()
    assert loading.licence(ModelConfig(source="org/hub-name")) == (None, [])
    record = json.loads((tmp_path / "model" / "choice.json").read_text())
    assert record["choice"] == choice.to_dict()


@torch.no_grad()
def test_an_unquantized_choice_is_a_plain_folder(tmp_path: Path) -> None:
    net = supernet(weight_bits=False, act_bits=False)
    model = exported(net, net.space.full(), tmp_path / "model")
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())
    assert difference(model, stock(tmp_path / "model")) == 0
    assert "pip install" not in (tmp_path / "model" / "README.md").read_text()
