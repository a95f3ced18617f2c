"""What users bring, through the command: odd models, tokenizers, paths and files. test_refused has what ends badly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from jointnas import assets
from jointnas_kernels.space import SearchSpace
from tests.jointnas.brought import EVAL, LINE, TEXT, perplexity, refused, run, save
from tests.jointnas.tiny_tokenizers import CHATML, of_bytes
from tests.latency.tables import synthetic

# ---- models of every shape, through quantization and both formats ---------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "three-heads-of-96": {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 32},
    "nine-heads-three-kv": {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3},
    "wide-heads": {"head_dim": 48},
    "narrow-heads": {"head_dim": 8, "hidden_size": 96, "num_attention_heads": 6},
    "one-block": {"num_hidden_layers": 1},
    "one-kv-head": {"num_key_value_heads": 1},
    "kv-heads-are-heads": {"num_key_value_heads": 4},
    "one-head": {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16, "tie_word_embeddings": False},
    "shards": {"shard": "30KB"},
    "bfloat16-shards": {"dtype": torch.bfloat16, "shard": "20KB"},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "head_dim": 32},
    "mistral": {"family": "mistral", "sliding_window": None},
    "phi3": {"family": "phi3", "tie_word_embeddings": False},
    "llama3-rope": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
                                        "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    "small-mlp": {"intermediate_size": 16},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_evaluated_and_quantized(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(here / "modèle 模型" / name, **MODELS[name])
    original = perplexity(str(folder), "t.txt", capsys)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert original["params"] == sum(p.numel() for p in model.parameters())
    group = 16 if "head_dim" not in MODELS[name] else min(16, MODELS[name]["head_dim"])
    out = f"out put/{name}"
    code, _, err = run(["quantize", "--method=rtn", f"--model.source={folder}", "--bits.weight=8",
                        f"--bits.group_size={group}", "--out", out, "--progress=false"], capsys)  # fmt: skip
    assert code == 0, err
    found = perplexity(out, "t.txt", capsys)
    assert found["perplexity"] == pytest.approx(original["perplexity"], rel=0.05)
    assert found["params"] == original["params"]
    assert found["bytes"] < 4 * original["params"]


@pytest.mark.parametrize("name", ["three-heads-of-96", "wide-heads", "kv-heads-are-heads", "untied", "one-block"])
def test_a_model_through_gguf(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(here / "a b", **{**MODELS[name], "vocab_size": 4096, "tokenizer": assets.load_tokenizer()})
    for _ in range(2):
        code, _, err = run(["export", "--run", "a b/", "--out", "for ü/llama", "--format=gguf"], capsys)
        if code:
            assert "exists; choose another folder" in err  # the second time
    written = perplexity("for ü/llama/model.gguf", "t.txt", capsys)
    assert written["perplexity"] == pytest.approx(perplexity("a b", "t.txt", capsys)["perplexity"], rel=1e-6)
    assert "it has model.gguf: give that file" in refused(["eval", "for ü/llama", *EVAL], capsys)


# ---- tokenizers -----------------------------------------------------------------------------------------------------

TOKENIZERS: dict[str, dict[str, Any]] = {
    "all": {"pad": "<pad>", "template": CHATML},
    "no-bos": {"bos": None},
    "no-eos": {"eos": None},
    "nothing": {"bos": None, "eos": None},
    "bos-unused": {"adds": False},
    "pad-is-eos": {"pad": "</s>"},
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_tokenizer(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text and chat records, perplexity with and without BOS, and what the exported tokenizer does."""
    options = TOKENIZERS[name]
    save(here / "t", tokenizer=of_bytes(**options))
    talk = [{"role": "user", "content": "q " * 9}, {"role": "assistant", "content": LINE}]
    (here / "c.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\r\n" for _ in range(40)))
    adds = options.get("bos", "<s>") is not None and options.get("adds", True)
    for data in ("t.txt", "c.jsonl"):
        row = perplexity("t", data, capsys)
        assert (row["perplexity_without_bos"] is not None) == adds
        assert 1 < row["perplexity"] < float("inf")
    quantize = ["quantize", "--method=gptq", "--model.source=t", "--data.source=c.jsonl", "--data.seq_len=16",
                "--options.samples=4", "--bits.group_size=16", "--out=q", "--progress=false"]  # fmt: skip
    assert run([*quantize, "--data.batch_size=1"], capsys)[0] == 0
    own, exported = (json.loads((here / f / "tokenizer.json").read_text()) for f in ("t", "q"))
    assert exported == own


# ---- names of files and folders -------------------------------------------------------------------------------------

PATHS: dict[str, tuple[str, str]] = {
    "slash": ("m/", "./t.txt"),
    "dots": ("./m/../m", "m/../t.txt"),
    "home": ("~/m", "~/t.txt"),
    "link": ("link", "link.txt"),
    "link-to-link": ("far", "link.txt"),
    "named-like-a-gguf": ("n.gguf", "t.txt"),
    "named-like-the-embedded": ("./embedded", "t.txt"),
    "unicode": ("größe 数据 [1]*", "größe 数据 [1]*.txt"),
    "dash": ("./-m", "./-t.txt"),
    "equals": ("a=b", "a=b.txt"),
    "crlf": ("m", "crlf.txt"),
    "no-last-line-end": ("m", "one.txt"),
    "json-lines-crlf": ("m", "crlf.jsonl"),
    "folder": ("m", "texts/"),
}


@pytest.mark.parametrize("name", PATHS)
def test_paths(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for copy in ("n.gguf", "embedded", "größe 数据 [1]*", "-m", "a=b"):
        shutil.copytree("m", copy)
    for copy in ("größe 数据 [1]*.txt", "-t.txt", "a=b.txt"):
        shutil.copy("t.txt", copy)
    (here / "link").symlink_to("m")
    (here / "far").symlink_to(here / "link")
    (here / "link.txt").symlink_to(here / "t.txt")
    (here / "texts").mkdir()
    shutil.copy("t.txt", "texts/z.txt")
    Path("texts/a.txt").write_text("")  # nothing in it
    Path("crlf.txt").write_bytes(TEXT.replace("\n", "\r\n").encode())
    Path("one.txt").write_text(TEXT.rstrip("\n"))
    Path("crlf.jsonl").write_bytes(json.dumps({"text": TEXT}).encode() + b"\r\n\r\n")
    expected = perplexity("m", "t.txt", capsys)
    found = perplexity(*PATHS[name], capsys)
    rel = 0.05 if name in ("no-last-line-end", "folder") else 1e-9
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=rel)
    assert found["params"] == expected["params"]


def test_home_is_meant_wherever_a_path_is_given(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behind `=`, where no shell replaces it, and in files."""
    assert run(["eval", "~/m", "--data=~/t.txt", *EVAL, "--out=~/r.json"], capsys)[0] == 0
    assert (here / "r.json").is_file()
    Path("q.yaml").write_text("model: {source: ~/m}\nbits: {group_size: 16}\nmethod: rtn\nprogress: false\n")
    assert run(["quantize", "--config=~/q.yaml", "--out", "~/q"], capsys)[0] == 0
    assert (here / "q" / "config.json").is_file()
    assert not (here / "~").exists()


def test_out_inside_the_model_leaves_it_as_it_was(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p.name: p.read_bytes() for p in Path("m").iterdir()}
    arguments = ["quantize", "--method=rtn", "--model.source=m", "--bits.group_size=16", "--progress=false"]
    assert run([*arguments, "--out=m/w4"], capsys)[0] == 0
    assert {p.name: p.read_bytes() for p in Path("m").iterdir() if p.is_file()} == before
    assert run(["eval", "m/w4", "--data=t.txt", *EVAL], capsys)[0] == 0


# ---- a whole search -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_search_of_nine_heads_in_half_precision(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads that do not divide all widths, a sharded fp16 checkpoint, CRLF records, names with spaces; then every verb
    that takes the run."""
    model = {**MODELS["nine-heads-three-kv"], "dtype": torch.float16, "shard": "60KB", "vocab_size": 4096}
    save(here / "nine heads", **model, tokenizer=assets.load_tokenizer())
    record = json.dumps({"instruction": "Say it.", "input": "", "output": LINE * 3})
    (here / "alpaca données.json").write_bytes((record + "\r\n").encode() * 60)
    space = {"hidden": [64, 96, 144], "heads": [3, 6, 9], "head_dim": [8, 16], "intermediate": [48, 96],
             "blocks": [1, 2], "weight_bits": [4, 8], "act_bits": [8, 16], "group_size": 16}  # fmt: skip
    config = AutoConfig.from_pretrained("nine heads")
    synthetic(SearchSpace.from_dict(space).feasible(config)[0], config=config).save("table.jsonl")
    monkeypatch.setattr("jointnas.pipeline.measured_latency", lambda *_: (None, None))  # a made-up table has no kernels
    (here / "run ü.yaml").write_text(yaml.safe_dump({
        "out": "runs/nine heads", "progress": False, "tensorboard": False, "space": space,
        "model": {"source": "nine heads/"}, "latency": {"table": "./table.jsonl"}, "eval": {"tasks": [], "tokens": 256},
        "data": {"source": "alpaca données.json", "seq_len": 16, "batch_size": 2},
        "search": {"steps": 3, "lora_rank": 2, "importance_batches": 1}, "quantizer": {"init": "clip"},
        "finetune": {"steps": 2, "train": "lora"},
    }))  # fmt: skip
    code, out, err = run(["search", "--config", "run ü.yaml"], capsys)
    assert code == 0, err
    removed = json.loads(Path("runs/nine heads/env.json").read_text())["removed"]
    assert [line.split(":")[0] for line in removed][:1] == ["hidden 64"]
    assert len(removed) == 2
    assert "found" in out
    choice = json.loads(Path("runs/nine heads/choice.json").read_text())["choice"]
    assert choice["hidden"] % choice["heads"] == 0
    assert "already holds a search; pass --resume auto" in run(["search", "--config=run ü.yaml"], capsys)[2]
    for arguments in (
        ["search", "--config=run ü.yaml", "--resume=auto"], ["eval", "runs/nine heads/"],
        ["report", "--run=runs/nine heads"], ["finetune", "--run=./runs/nine heads"],
        ["export", "--run=runs/nine heads", "--out=e", "--adapters"],
        ["export", "--run=runs/nine heads", "--out=g", "--format=gguf"],
    ):  # fmt: skip
        code, _, err = run(arguments, capsys)
        assert code == 0, (arguments, err)
    plain, packed = (perplexity(f, "alpaca données.json", capsys)["perplexity"] for f in ("e", "runs/nine heads/final"))
    assert plain == packed
