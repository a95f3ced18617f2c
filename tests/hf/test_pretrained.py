"""save_pretrained and from_pretrained: bit for bit, without pickle; damaged folders are one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import Supernet, convert, extract, save_adapters, shrink
from jointnas_kernels.hf.families import rotary
from jointnas_kernels.space import SearchSpace
from tests.hf.hf_models import LLAMA3_ROPE, QUANT_SPACE, SPACE, ids, random_importance, randomize_lora, tiny_model

WEIGHTS_ONLY = SearchSpace.from_dict({**QUANT_SPACE.to_dict(), "act_bits": None})
CASES: dict[str, tuple[dict[str, Any], SearchSpace, dict[str, Any]]] = {
    "llama-tied": ({"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}, SPACE, {"relaxation": "gumbel"}),
    "llama-bits": ({}, QUANT_SPACE, {"act_symmetric": True, "bit_relaxation": "reinmax", "tau": 0.7}),
    "phi3": ({"family": "phi3", "sliding_window": 4}, WEIGHTS_ONLY, {"ste": "clip"}),
    "shared-pair": ({}, QUANT_SPACE, {"lora_pairs": "shared"}),
    "qwen3": ({"family": "qwen3", "tie_word_embeddings": True, "attention_bias": True}, QUANT_SPACE, {}),
    "qwen2": ({"family": "qwen2"}, SPACE, {"lora_alpha": 3.0}),
}  # fmt: skip


def build(change: dict[str, Any], space: SearchSpace, dtype: torch.dtype = torch.float32, **options: Any) -> Supernet:
    model = tiny_model(dtype, **change)
    made = randomize_lora(convert(model, space, lora_rank=4, importance=random_importance(model.config), **options))
    with torch.no_grad():
        for i, logits in enumerate(made.arch_parameters()):
            logits.copy_(torch.randn(logits.shape, generator=torch.Generator().manual_seed(i)))
    return made


def assert_same(own: Supernet, other: Supernet) -> None:
    """State, what is derived from it, and what is computed."""
    mine, theirs = own.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name
        assert value.dtype == theirs[name].dtype, name
    assert other.config.to_dict() == own.config.to_dict()
    assert other.generation_config == own.generation_config
    assert (other.space, other.order, other.choice) == (own.space, own.order, own.choice)
    trained = [{n for n, p in s.named_parameters() if p.requires_grad} for s in (own, other)]
    assert trained[0] == trained[1]
    x = ids()
    for mode in ("weight", "arch"):
        losses = [s.mode(mode)(x, labels=x).loss for s in (own, other)]
        assert torch.equal(*losses)


@pytest.mark.parametrize(("change", "space", "options"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("shards", [False, True], ids=["single", "shards"])
def test_reloads_bit_for_bit(
    tmp_path: Path, change: dict[str, Any], space: SearchSpace, options: dict[str, Any], shards: bool
) -> None:
    supernet = build(change, space, **options).mode("arch")
    supernet.seed, supernet.step, supernet.full_depth_gradient = 2**40, 11, False
    if options.get("ste") == "clip":
        for _, linear in supernet.linears():
            linear.learn_clip()
    supernet.save_pretrained(tmp_path / "saved", max_shard_size="20KB" if shards else "5GB")
    names = {f.name for f in (tmp_path / "saved").iterdir()}
    assert "supernet.json" in names
    assert ("model.safetensors.index.json" in names) == shards
    assert {Path(name).suffix for name in names} == {".json", ".safetensors"}
    again = Supernet.from_pretrained(tmp_path / "saved")
    assert (again.seed, again.step, again.current_mode, again.full_depth_gradient) == (2**40, 11, "arch", False)
    assert_same(supernet, again)
    x, choice = ids(), supernet.argmax()
    assert torch.equal(extract(supernet, choice)(x).logits, extract(again, choice)(x).logits)
    for i, s in enumerate((supernet, again)):  # the whole order, of every channel
        save_adapters(s, tmp_path / str(i))
    for file in (tmp_path / "0").rglob("*.safetensors"):
        mine, theirs = load_file(file), load_file(tmp_path / "1" / file.relative_to(tmp_path / "0"))
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_half_precision_and_a_fixed_choice(tmp_path: Path) -> None:
    supernet = build({}, QUANT_SPACE, torch.bfloat16)
    supernet.rotary = rotary(supernet.config)  # not rounded to bf16 with the model's weights
    supernet.fix(QUANT_SPACE.sample(torch.Generator().manual_seed(0))).save_pretrained(tmp_path)
    again = Supernet.from_pretrained(str(tmp_path), backend="reference")
    assert again.dtype == torch.bfloat16
    assert again.backend == "reference"
    assert again.choice == supernet.choice
    assert torch.equal(Supernet.from_pretrained(tmp_path)(ids()).logits, supernet(ids()).logits)


def test_a_shrunk_supernet(tmp_path: Path) -> None:
    """Its quantization groups are those of the space it was cut from."""
    supernet = build({}, QUANT_SPACE)
    small = shrink(supernet, QUANT_SPACE.sample(torch.Generator().manual_seed(3)))
    small.save_pretrained(tmp_path)
    assert_same(small, Supernet.from_pretrained(tmp_path))


def test_a_new_supernet_replaces_an_old_one(tmp_path: Path) -> None:
    build({}, QUANT_SPACE).save_pretrained(tmp_path, max_shard_size="20KB")
    supernet = build({"family": "qwen2"}, SPACE)
    supernet.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"supernet.json", "model.safetensors"}
    assert_same(supernet, Supernet.from_pretrained(tmp_path))
    with pytest.raises((OSError, ValueError), match=r"config\.json|Unrecognized model"):
        AutoModelForCausalLM.from_pretrained(tmp_path)  # never a plain model with random weights


def change_json(folder: Path, **change: Any) -> None:
    data = json.loads((folder / "supernet.json").read_text())
    (folder / "supernet.json").write_text(json.dumps({k: v for k, v in (data | change).items() if v != "gone"}))


def change_tensors(folder: Path, **change: Any) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **change}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


DAMAGES: dict[str, tuple[Any, str]] = {
    "no description": (lambda f: (f / "supernet.json").unlink(), "holds no supernet: it has no supernet.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "cut weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-99]),
        "model.safetensors is damaged",
    ),
    "cut description": (
        lambda f: (f / "supernet.json").write_text((f / "supernet.json").read_text()[:-99]), "supernet.json is damaged",
    ),
    "key": (lambda f: change_json(f, space="gone"), "supernet.json lacks space"),
    "format": (lambda f: change_json(f, format=2), "has format 2, supported: 1"),
    "family": (lambda f: change_json(f, config={"model_type": "gpt2"}), "supernet.json.*'gpt2'"),
    "no family": (lambda f: change_json(f, config={}), "supernet.json is damaged"),
    "space": (lambda f: change_json(f, space={**SPACE.to_dict(), "hidden": [64]}), "hidden 64 exceeds the model's 32"),
    "other space": (lambda f: change_json(f, space={**SPACE.to_dict(), "hidden": [8, 16, 32]}), "arch.logits.hidden"),
    "groups": (lambda f: change_json(f, groups={}), "supernet.json is damaged"),
    "choice": (lambda f: change_json(f, choice={"hidden": 16}), "supernet.json: missing heads"),
    "tensor": (lambda f: change_tensors(f, embedding=None), 'Missing key.*"embedding"'),
    "extra": (lambda f: change_tensors(f, more=torch.ones(1)), 'Unexpected key.*"more"'),
    "shape": (lambda f: change_tensors(f, embedding=torch.ones(2, 3)), "size mismatch for embedding"),
    "state": (lambda f: change_tensors(f, _extra_state=None), "no tensor '_extra_state'"),
    "order": (lambda f: change_tensors(f, _extra_state=torch.arange(9)), "channel order of 6 torch.int64 numbers"),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("supernet")
    build({}, SPACE).save_pretrained(folder)
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_one_error(tmp_path: Path, saved: dict[str, bytes], damage: Any, message: str) -> None:
    for name, content in saved.items():
        (tmp_path / name).write_bytes(content)
    damage(tmp_path)
    with pytest.raises(JointNASError, match=message) as error:
        Supernet.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_shards_and_unwritable_folders(tmp_path: Path) -> None:
    supernet = build({}, SPACE)
    supernet.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    lost = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(JointNASError, match=f"has no {lost.name}"):
        Supernet.from_pretrained(tmp_path / "shards")
    (tmp_path / "file").touch()
    with pytest.raises(JointNASError, match="cannot be written"):
        supernet.save_pretrained(tmp_path / "file")
