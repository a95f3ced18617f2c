"""Checkpoints that are damaged, incomplete, of another model, not finite, pickled or quantized: one error, at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from jointnas import cli, loading
from jointnas.config import ModelConfig
from jointnas.exporting import export_model
from jointnas.initialise import Bits, initialise, single_space
from jointnas_kernels import hf
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf.families import build
from tests.jointnas import tiny

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tied and untied models in one file and in many, in a path with a space and other letters."""
    root = tmp_path_factory.mktemp("modèle 模型")
    tiny.model().save_pretrained(root / "single")
    tiny.model().save_pretrained(root / "sharded", max_shard_size="100KB")
    config = tiny.model().config
    config.tie_word_embeddings = False
    build(config).save_pretrained(root / "untied")
    assert len(list((root / "sharded").glob("*.safetensors"))) > 3
    return {name: root / name for name in ("single", "sharded", "untied")}


def load(folder: Path, **options: Any) -> Any:
    return loading.load_model(ModelConfig(source=str(folder), **options))


@pytest.mark.parametrize("name", ["single", "sharded", "untied"])
def test_whole_checkpoints_load(name: str, saved: dict[str, Path]) -> None:
    model, ids = load(saved[name]), torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(saved[name])(ids).logits)
    assert not any(p.requires_grad for p in model.parameters())


def change(file: Path, how: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(file)
    how(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def put(name: str, value: float) -> Callable[[Path], None]:
    return lambda f: change(f / SINGLE, lambda t: t[name].view(-1)[-1:].fill_(value))


def cut(f: Path, keep: float) -> None:
    blob = (f / SINGLE).read_bytes()
    (f / SINGLE).write_bytes(blob[: int(keep * len(blob))])


def pickled(f: Path) -> None:
    torch.save({}, f / "pytorch_model.bin")
    (f / SINGLE).unlink()


def edit_index(f: Path, how: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((f / INDEX).read_text())
    how(index["weight_map"])
    (f / INDEX).write_text(json.dumps(index))


NORM = "model.norm.weight"
BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "cut in a tensor": (
        "single", lambda f: cut(f, 0.5),
        rf"{SINGLE} is truncated: its \d+ bytes end inside tensor model\.layers",
    ),
    "cut at the end": ("single", lambda f: cut(f, 0.9999), f"{SINGLE} is truncated: .* inside tensor {NORM}"),
    "cut in the header": (
        "single", lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:50]),
        "50 bytes end inside its header",
    ),
    "empty": ("single", lambda f: (f / SINGLE).write_bytes(b""), "0 bytes end inside its header"),
    "header": (
        "single", lambda f: (f / SINGLE).write_bytes((9).to_bytes(8, "little") + b"{'a': 1}}" * 9),
        "damaged header",
    ),
    "git lfs": (
        "single", lambda f: (f / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "Git LFS pointer",
    ),
    "nan": ("single", put(DOWN, float("nan")), f"{SINGLE}: {DOWN} has NaN values"),
    "infinite": (
        "single", put("model.embed_tokens.weight", float("-inf")),
        r"model\.embed_tokens\.weight has infinite values",
    ),
    "nan in a norm": ("single", put(NORM, float("nan")), f"{NORM} has NaN values"),
    "nan in a head": ("untied", put("lm_head.weight", float("nan")), r"lm_head\.weight has NaN values"),
    "nan in a shard": (
        "sharded", lambda f: change(shard_of(f, DOWN), lambda t: t[DOWN].fill_(float("nan"))),
        rf"model-\d+-of-\d+\.safetensors: {DOWN} has NaN",
    ),
    "lacks one": (
        "single", lambda f: change(f / SINGLE, lambda t: t.pop(DOWN)),
        f"lacks tensor {DOWN}; is it",
    ),
    "lacks many": (
        "single", lambda f: change(f / SINGLE, lambda t: [t.pop(k) for k in list(t) if "mlp" in k]),
        r"lacks tensor model\.layers\.0\.mlp\.down_proj\.weight and 8 more",
    ),
    "lacks the head": (
        "untied", lambda f: change(f / SINGLE, lambda t: t.pop("lm_head.weight")),
        r"lacks tensor lm_head\.weight",
    ),
    "has more": (
        "single", lambda f: change(f / SINGLE, lambda t: t.update(extra=torch.ones(2))),
        f"{SINGLE} has, but its config has no use for, tensor extra",
    ),
    "shape": (
        "single", lambda f: change(f / SINGLE, lambda t: t.update({NORM: torch.ones(64)})),
        rf"{SINGLE}: {NORM} has shape \(64,\); the config wants \(128,\)",
    ),
    "shard missing": (
        "sharded", lambda f: shard_of(f, DOWN).unlink(),
        r"model-\d{5}-of-\d{5}\.safetensors is missing; .*index\.json says that it holds",
    ),
    "shard cut": (
        "sharded", lambda f: shard_of(f, DOWN).write_bytes(shard_of(f, DOWN).read_bytes()[:-5]),
        r"of-\d{5}.*is truncated: .* inside tensor",
    ),
    "index names more": (
        "sharded", lambda f: edit_index(f, lambda m: m.update(extra=m[DOWN])),
        "has no tensor extra, which .*index.json",
    ),
    "index lacks one": (
        "sharded", lambda f: change(shard_of(f, DOWN), lambda t: t.pop(DOWN)) or edit_index(f, lambda m: m.pop(DOWN)),
        f"lacks tensor {DOWN}",
    ),
    "index broken": ("sharded", lambda f: (f / INDEX).write_text("{"), "index.json is damaged"),
    "index empty": (
        "sharded", lambda f: (f / INDEX).write_text("{}"),
        "index.json is damaged: KeyError 'weight_map'",
    ),
    "pickled": ("single", pickled, r"pickled weights \(pytorch_model\.bin\), which can run code"),
    "no weights": ("single", lambda f: (f / SINGLE).unlink(), "has no weights: no model.safetensors"),
}  # fmt: skip


@pytest.fixture
def broken(request: pytest.FixtureRequest, saved: dict[str, Path], tmp_path: Path) -> tuple[Path, str]:
    which, how, message = BAD[request.param]
    shutil.copytree(saved[which], tmp_path / "model")
    how(tmp_path / "model")
    return tmp_path / "model", message


@pytest.mark.parametrize("broken", BAD, indirect=True, ids=lambda n: n.replace(" ", "-"))
def test_a_bad_checkpoint_is_one_error(broken: tuple[Path, str]) -> None:
    folder, message = broken
    with pytest.raises(JointNASError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("importance", ["true", "false"])
@pytest.mark.parametrize("broken", ["cut in a tensor", "nan", "lacks one"], indirect=True)
def test_before_any_work_with_and_without_importance(
    broken: tuple[Path, str], importance: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = broken
    monkeypatch.setattr("jointnas.preparation.profile", lambda *a, **k: pytest.fail("profiled a broken model"))
    arguments = ["--model.source", str(folder), "--out", str(folder.parent / "out")]
    assert cli.main(["search", *arguments, f"--search.importance={importance}"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jointnas: error")]
    assert len(lines) == 1
    assert str(folder) in lines[0]
    assert not (folder.parent / "out").exists()


def test_values_that_the_dtype_cannot_hold(saved: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(saved["single"], tmp_path / "model")
    put(DOWN, 3.4e38)(tmp_path / "model")
    load(tmp_path / "model", dtype="float32")
    with pytest.raises(JointNASError, match=f"{DOWN} has infinite values in bfloat16"):
        load(tmp_path / "model", dtype="bfloat16")


def test_old_checkpoints_with_rotary_frequencies(saved: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(saved["single"], tmp_path / "model")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(tmp_path / "model" / SINGLE, lambda t: t.update({name: torch.ones(16)}))
    load(tmp_path / "model")


# ---- quantized already ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our own W4A8 export."""
    folder, model = tmp_path_factory.mktemp("quantized") / "w4", tiny.model()
    space = single_space(model.config, 4, 8, 64)
    initialise(model, "rtn", bits=Bits.of(space.full(), space), progress=False)
    return export_model(model, folder, space.full(), range(3))


def declare(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": entries}))


OTHERS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


@pytest.mark.parametrize("name", ["compressed-tensors", *OTHERS])
def test_quantized_folders_are_refused_before_their_weights(
    name: str, exported: Path, saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = exported
    if name in OTHERS:
        folder = tmp_path / "model"
        shutil.copytree(saved["single"], folder)
        declare(folder, **OTHERS[name])
    monkeypatch.setattr("jointnas.weights.read", lambda *a: pytest.fail("weights were read"))
    for verb in (["search", "--eval.tasks=[]"], ["quantize", "--method=rtn", "--bits.group_size=64"]):
        assert cli.main([*verb, "--model.source", str(folder), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert f"is quantized already ({name})" in error
        assert "give the model that it was made from" in error


def test_quantized_model_objects_are_refused(exported: Path) -> None:
    """Before and after the first call, which unpacks the weights; and with the config's note removed."""
    model = AutoModelForCausalLM.from_pretrained(exported)
    space = single_space(tiny.model().config, 4, 8, 64)
    for _ in range(2):
        with pytest.raises(JointNASError, match=r"convert: the model is quantized already.*model\.dequantize"):
            hf.convert(model, space)
        model(torch.zeros(1, 1, dtype=torch.long))
    packed = AutoModelForCausalLM.from_pretrained(exported)
    del packed.config.quantization_config
    packed.is_quantized = False
    with pytest.raises(JointNASError, match=r"q_proj is a \w+, not a plain torch\.nn\.Linear with a weight"):
        hf.convert(packed, space)
