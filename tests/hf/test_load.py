"""Exported folders on the low-bit kernels: the fake-quantized model's numbers, in the packed model's memory."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from jointnas import assets, exporting
from jointnas_kernels import hf
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.nn import FakeQuantLinear, PackedLinear
from jointnas_kernels.ops.quant.activations import act_quant_mix
from jointnas_kernels.space import Choice, SearchSpace, model_bytes
from tests.hf.exported import SPACE, exported, quantized_linears, supernet, uniform
from tests.hf.hf_models import ids

FAMILIES = [
    pytest.param(dtype, tied, id=f"{str(dtype)[6:]}-{'tied' if tied else 'untied'}")
    for dtype, tied in itertools.product((torch.float32, torch.bfloat16), (False, True))
]


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}


def inputs_of(model: nn.Module, names: list[str], x: Tensor) -> dict[str, Tensor]:
    """What reaches each of these linears."""
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda _, args, n=n: found.__setitem__(n, args[0]))
        for n in names
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def bound(linear: FakeQuantLinear, x: Tensor, y: Tensor) -> Tensor:
    """The bound in the docstring of nn/packed.py, in fp64."""
    u, e = torch.finfo(x.dtype).eps / 2, 2.0**-24
    one = torch.ones(1)
    x_hat = act_quant_mix(x, (linear.act_bits,), one, symmetric=linear.act_symmetric).double().abs()
    terms = x_hat @ linear.weight.double().abs().T
    bias = 0 if linear.bias is None else linear.bias.double().abs()
    scales = 2 * linear.in_features // linear.group_size
    return (2 * u + (2 * linear.in_features + scales) * e) * 1.01 * terms + 3 * u * (y.double().abs() + bias)


@pytest.mark.parametrize("dtype, tied", FAMILIES)
@torch.no_grad()
def test_every_linear_is_within_its_bound(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    """On the inputs it meets in the fake-quantized model; the model as a whole where activations have 16 bits."""
    net, g, x = supernet(dtype, tied, llama3=True, bias=True), torch.Generator().manual_seed(1), ids()
    schemes = set()
    for _ in range(6):
        model = exported(net, SPACE.sample(g), tmp_path / "model")
        run = hf.load(tmp_path / "model")
        assert (type(run), run.dtype) == (LlamaForCausalLM, dtype)
        fake, packed = quantized_linears(model), packed_linears(run)
        assert fake.keys() == packed.keys()
        for name, value in inputs_of(model, list(fake), x).items():
            want, got = fake[name](value), packed[name](value)
            assert got.dtype == dtype
            assert ((got.double() - want.double()).abs() <= bound(fake[name], value, want)).all(), name
            schemes.add((packed[name].weight_bits, packed[name].act_bits))
    assert len(schemes) >= 8


@pytest.mark.parametrize("bits", [2, 4, 8])
@torch.no_grad()
def test_logits(tmp_path: Path, bits: int) -> None:
    x = ids(2, 33)
    for act_bits in (16, 8):
        model = exported(supernet(), uniform(bits, act_bits), tmp_path / "model")
        want, got = model(x).logits, hf.load(tmp_path / "model")(x).logits
        # 8 bits: a value within rounding of the border between two levels may take the other one
        assert (got - want).norm() <= (1e-5 if act_bits == 16 else 2e-2) * want.norm()


# ---- memory ---------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers the shapes of all tensors that operators make off the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[torch.dtype, tuple[int, ...]]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and not t.is_meta:
                self.shapes.add((t.dtype, tuple(t.shape)))
        return out


@pytest.mark.parametrize("dtype, tied", FAMILIES)
def test_memory_is_the_packed_size(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    """And no weight is ever dequantized: no floating-point tensor of a quantized linear's shape is made."""
    net, choice = supernet(dtype, tied), uniform(2, 8)
    model = exported(net, choice, tmp_path / "model")
    with Largest() as made:
        run = hf.load(tmp_path / "model")
    dense = {tuple(m.weight.shape) for m in quantized_linears(model).values()}
    embedding = tuple(run.model.embed_tokens.weight.shape)
    assert not [s for t, s in made.shapes if t.is_floating_point and s in dense - {embedding}]
    held = {t.data_ptr(): t.numel() * t.element_size() for t in run.state_dict().values()}
    width = torch.finfo(dtype).bits // 8
    extra = sum(m.nbytes - m.stored_bytes for m in packed_linears(run).values())  # of a kernel's own layout
    assert sum(held.values()) == model_bytes(net.config, SPACE, choice, net.block_rank, width) + extra
    for m in packed_linears(run).values():  # blocks of 64 rows; a scale and a sum of levels per group
        rows, groups = -(-m.out_features // 64) * 64, m.in_features // m.group_size
        assert m.nbytes == rows * (m.in_features * m.weight_bits // 8 + groups * (8 if dtype == torch.float32 else 4))
    assert not [n for n, t in (*run.named_parameters(), *run.named_buffers()) if t.is_meta or t.requires_grad]


# ---- generation -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path, Tensor]:
    """The embedded trained model at mixed precision, its export, and a prompt."""
    model = assets.load_model()
    depth = model.config.num_hidden_layers
    space = SearchSpace.from_dict({"base": "tiny", "blocks": [depth], "head_dim": [64]})
    net = hf.convert(model, space, lora_rank=2)
    full, g = space.full(), torch.Generator().manual_seed(2)
    bits = torch.randint(2, (depth,), generator=g).tolist()
    choice = Choice(
        full.hidden, full.heads, full.head_dim, full.intermediate, full.blocks,
        tuple((4, 8)[b] for b in bits), tuple((16, 8)[i % 2] for i in range(depth)),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("trained") / "model"
    fake = exported(net, choice, folder)
    return fake, folder, assets.load_tokenizer()("It is a truth universally", return_tensors="pt").input_ids


@pytest.mark.parametrize("cache", [None, "static"])
@torch.no_grad()
def test_greedy_generation_is_the_same(trained: tuple[LlamaForCausalLM, Path, Tensor], cache: str | None) -> None:
    fake, folder, prompt = trained
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    run = hf.load(folder, dtype=torch.float32)
    assert {(m.weight_bits, m.act_bits) for m in packed_linears(run).values()} >= {(4, 16), (8, 8)}
    want = fake.float().generate(prompt, **options)
    assert torch.equal(run.generate(prompt, **options), want)
    logits = [m(want).logits for m in (fake, run)]
    assert (logits[1] - logits[0]).norm() <= 2e-2 * logits[0].norm()
    assert torch.equal(logits[1][:, -1:].argmax(), logits[0][:, -1:].argmax())


# ---- other folders --------------------------------------------------------------------------------------------------


def edited(source: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy with another quantization config."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    change(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module")
def w4a8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("w4a8") / "model"
    exported(supernet(), uniform(4, 8), folder)
    return folder


@pytest.mark.parametrize(
    "targets", [["Linear"], ["re:.*_proj"], ["re:.*self_attn.*", "re:.*mlp.*"]], ids=lambda t: "+".join(t)
)
@torch.no_grad()
def test_targets_as_other_tools_write_them(w4a8: Path, tmp_path: Path, targets: list[str]) -> None:
    """A class or expressions for all linears, exact names for those that differ, lm_head ignored by expression."""

    def change(config: dict[str, Any]) -> None:
        groups = config["config_groups"]
        own = [g for g in groups.values() if g["targets"][0].endswith("o_proj")]  # smaller groups
        first = next(iter(groups.values()))
        config["config_groups"] = {"group_0": {**first, "targets": targets}}
        config["config_groups"] |= {f"group_{i + 1}": g for i, g in enumerate(own)}
        config["ignore"] = ["re:.*lm_head"]

    x = ids()
    folder = edited(w4a8, tmp_path / "model", change)
    run = hf.load(folder)
    assert torch.equal(run(x).logits, hf.load(w4a8)(x).logits)
    stock = AutoModelForCausalLM.from_pretrained(folder)  # reads the same config in the same way
    assert (run(x).logits - stock(x).logits).norm() <= 2e-2 * stock(x).logits.norm()


@torch.no_grad()
def test_a_folder_written_by_compressed_tensors(tmp_path: Path) -> None:
    """Scales of its own, channels where we have none, its own writer."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = hf.extract(
        supernet(weight_bits=False, act_bits=False),
        SearchSpace.from_dict({**SPACE.to_dict(), "weight_bits": None, "act_bits": None}).full(),
    )
    scheme = {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True},
        "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True},
    }
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], quantization_status="frozen")
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.unflatten(-1, (-1, 32))
            scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), module.quantization_scheme.weights)
            module.weight_scale.copy_(scale)
    compressor = compressors.ModelCompressor.from_pretrained_model(model, "pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    x, stock, run = ids(), AutoModelForCausalLM.from_pretrained(tmp_path), hf.load(tmp_path)
    assert len(packed_linears(run)) == 21
    assert all(m.act_symmetric for m in packed_linears(run).values())
    assert (run(x).logits - stock(x).logits).norm() <= 1e-2 * stock(x).logits.norm()


@torch.no_grad()
def test_activations_only_and_plain_folders(tmp_path: Path) -> None:
    x, g = ids(), torch.Generator().manual_seed(1)
    for i, net in enumerate((supernet(weight_bits=False), supernet(weight_bits=False, act_bits=False))):
        model = exported(net, net.space.sample(g), tmp_path / str(i))
        loaded, want = hf.load(tmp_path / str(i)), model(x).logits
        assert (loaded(x).logits - want).abs().max() <= 1e-5 * want.abs().max()  # other orders of sums
        loaded.runtime.enabled = False
        assert torch.equal(loaded(x).logits, want)


@torch.no_grad()
def test_shards_and_other_dtypes(tmp_path: Path) -> None:
    x, model = ids(), exported(supernet(), uniform(4, 16), tmp_path / "model", max_shard_size="20KB")
    want = model(x).logits
    assert (hf.load(tmp_path / "model")(x).logits - want).norm() <= 1e-5 * want.norm()
    half = hf.load(tmp_path / "model", dtype=torch.bfloat16)
    assert half(x).logits.dtype == torch.bfloat16
    assert (half(x).logits.float() - want).norm() <= 0.05 * want.norm()
    double = hf.load(tmp_path / "model", dtype=torch.float64, backend="reference")
    assert (double(x).logits - want).norm() <= 1e-5 * want.norm()


# ---- the layer ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_compiles(w4a8: Path) -> None:
    run, x = hf.load(w4a8), ids()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, use_cache=False).logits, run(x, use_cache=False).logits)


def test_has_no_gradients(w4a8: Path) -> None:
    linear = next(iter(packed_linears(hf.load(w4a8)).values()))
    with pytest.raises(JointNASError, match="no gradients"):
        linear(torch.randn(1, 2, linear.in_features, requires_grad=True))
    assert "W4A8, group=32, backend=cpu" in repr(linear)
    with pytest.raises(JointNASError, match=r"of 64 inputs on cpu got \(1, 2, 65\) on cpu"):
        linear(torch.randn(1, 2, 65))
    with pytest.raises(JointNASError, match="of 64 inputs on meta got"):
        linear.to("meta")(torch.randn(1, 2, 64))


# ---- errors ---------------------------------------------------------------------------------------------------------


def part(key: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
    """Change one linear's scheme."""
    return lambda config: list(config["config_groups"].values())[8][key].update(values)


UNSUPPORTED = {
    "channel": (part("weights", strategy="channel", group_size=None), "weight strategy 'channel'"),
    "actorder": (part("weights", actorder="group"), "weight actorder 'group'"),
    "bits": (part("weights", num_bits=3), "weight bits 3"),
    "float": (part("weights", type="float"), "weight type 'float'"),
    "asymmetric": (part("weights", symmetric=False), "weight symmetric = False"),
    "static": (part("input_activations", dynamic=False), "activation dynamic = False"),
    "per tensor": (part("input_activations", strategy="tensor"), "activation strategy 'tensor'"),
    "activation bits": (part("input_activations", num_bits=5), "activation bits 5"),
    "format": (lambda c: list(c["config_groups"].values())[8].update(format="int-quantized"), "'int-quantized'"),
    "outputs": (
        lambda c: list(c["config_groups"].values())[8].update(output_activations={"num_bits": 8}), "output activations"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_schemes_name_the_layer(w4a8: Path, tmp_path: Path, name: str) -> None:
    change, message = UNSUPPORTED[name]
    with pytest.raises(JointNASError, match=r"model\.layers\.1\.self_attn\.k_proj: .*Supported: weights") as error:
        hf.load(edited(w4a8, tmp_path / "model", change))
    assert message in str(error.value)


CONFIGS = {
    "method": (lambda c: c.update(quant_method="gptq"), "quantization method 'gptq' is not supported"),
    "kv cache": (lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is not supported"),
    "status": (lambda c: c.update(quantization_status="frozen"), "quantization_status 'frozen'"),
    "embedding": (
        lambda c: c["config_groups"]["group_00"]["targets"].append("Embedding"),
        "embed_tokens: only linears",
    ),
    "group size": (part("weights", group_size=64), r"k_proj.weight_scale has shape \(64, 2\)"),
    "not there": (lambda c: c["config_groups"].pop("group_08"), r"no tensor 'model.layers.1.self_attn.k_proj.weight'"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_other_bad_configs(w4a8: Path, tmp_path: Path, name: str) -> None:
    change, message = CONFIGS[name]
    with pytest.raises(JointNASError, match=message):
        hf.load(edited(w4a8, tmp_path / "model", change))


def test_bad_folders(w4a8: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(w4a8, tmp_path / name))

    with pytest.raises(JointNASError, match=r"no model folder: it has no config\.json"):
        hf.load(tmp_path / "missing")
    with pytest.raises(JointNASError, match=r"unknown backend 'cdua' in load\. Did you mean 'cuda'"):
        hf.load(w4a8, backend="cdua")
    with pytest.raises(JointNASError, match=r"q_proj \(W4A8, group 32\): .*float16"):
        hf.load(w4a8, dtype=torch.float16)
    with pytest.raises(JointNASError, match="backend 'triton' cannot run"):
        hf.load(w4a8, backend="triton")
    folder = copy("family")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(JointNASError, match=r"a model of type 'gpt2' is not supported\. Supported model types: llama"):
        hf.load(folder)
    for key, value, message in (
        ("head_dim", 16, "q_proj.weight_shape is"), ("vocab_size", 62, r"embed_tokens\.weight has shape"),
    ):  # fmt: skip
        folder = copy(f"sizes {key}")
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(JointNASError, match=message):
            hf.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(JointNASError, match=r"config\.json is damaged"):
        hf.load(folder)
    folder = copy("extra")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.0.mlp.up_proj.weight_g_idx": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(JointNASError, match=r"no use for: model\.layers\.0\.mlp\.up_proj\.weight_g_idx"):
        hf.load(folder)
    folder = copy("damaged")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(JointNASError, match="is damaged"):
        hf.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(JointNASError, match=r"has no model\.safetensors"):
        hf.load(folder)


def test_stock_reload_of_the_same_folder(w4a8: Path) -> None:
    x = ids()
    with torch.no_grad():
        want, got = exporting.reload(w4a8)(x).logits, hf.load(w4a8)(x).logits
    assert (got - want).norm() <= 2e-2 * want.norm()
