"""What is refused of what users bring: exit code 2, one line that says what, where and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from jointnas import cli
from tests.jointnas.brought import EVAL, LINE, QUANTIZE, TEXT, perplexity, refused, run

# ---- arguments, configurations and spaces ---------------------------------------------------------------------------

GPTQ = ["quantize", "--method=gptq", "--model.source=m", "--out=q", "--bits.group_size=16", "--data.source=t.txt"]
BAD: dict[str, tuple[list[str], str]] = {
    "out-is-the-model": ([*QUANTIZE, "--model.source=m", "--out=m"], "m exists; choose another folder"),
    "out-is-the-model-by-a-link": ([*QUANTIZE, "--model.source=m", "--out=./m/"], "exists; choose another folder"),
    "out-is-here": ([*QUANTIZE, "--model.source=m", "--out=."], ". exists; choose another folder"),
    "out-is-empty": ([*QUANTIZE, "--model.source=m", "--out="], "out is empty; give a path"),
    "out-below-a-file": ([*QUANTIZE, "--model.source=m", "--out=t.txt/x/y"], "t.txt' is a file, not a folder"),
    "search-below-a-file": (["search", "--out=m/config.json"], "m/config.json' is a file, not a folder"),
    "fetch-below-a-file": (["fetch", "smollm2", "--out=t.txt/x"], "t.txt' is a file, not a folder"),
    "fetch-into-another": (["fetch", "smollm2", "--out=m"], "m exists and is not smollm2; choose another --out"),
    "fetch-what": (["fetch", "smolm2"], "unknown model 'smolm2' in jointnas fetch. Did you mean 'smollm2'?"),
    "group-of-128": ([*QUANTIZE, "--model.source=m", "--out=q", "--bits.group_size=128"],
                     "hidden 64 is no multiple of 128, the quantization group size. Group sizes that fit: 16, 32."),
    "group-of-zero": ([*QUANTIZE, "--model.source=m", "--out=q", "--bits.group_size=0"], "bits.group_size"),
    "group-below-zero": ([*QUANTIZE, "--model.source=m", "--out=q", "--bits.group_size=-16"], "bits.group_size"),
    "one-bit": ([*QUANTIZE, "--model.source=m", "--out=q", "--bits.weight=1"], "greater than or equal to 2"),
    "twelve-bits": ([*QUANTIZE, "--model.source=m", "--out=q", "--bits.act=12"],
                    "act_bits contains 12; allowed: 2 to 8, and 16"),
    "method": ([*QUANTIZE, "--model.source=m", "--out=q", "--method=awq"], "'gptq', 'omniquant'"),
    "huge-seq-len": ([*GPTQ, "--data.seq_len=1000000"],
                     "data.seq_len is 1000000, but the model sees at most 128 tokens (max_position_embeddings)"),
    "negative-seq-len": ([*GPTQ, "--data.seq_len=-1"], "data.seq_len"),
    "many-samples": ([*GPTQ, "--data.seq_len=64", "--options.samples=9999"],
                     "options.samples is 9999, but 2567 tokens of data hold 40 calibration windows of 64; lower"),
    "no-data": ([*GPTQ, "--data.source=nothing.txt"], "data source 'nothing.txt' does not exist; allowed: 'embedded'"),
    "context": (["eval", "m", "--data=t.txt", "--tasks=[]", "--context=4096"],
                "eval.context is 4096, but the model sees at most 128 tokens"),
    "context-of-zero": (["eval", "m", "--tasks=[]", "--context=0"], "context: Input should be greater than or equal"),
    "tokens-nan": (["eval", "m", "--tasks=[]", "--tokens=nan"], "nan"),
    "dtype": (["eval", "m", "--dtype=float8"], "dtype: Input should be 'auto', 'float32' or 'bfloat16', got 'float8'"),
    "no-gpu": (["eval", "m", "--device=cuda:7", *EVAL], "cuda"),
    "a-device": (["eval", "m", "--device=gpu", *EVAL], "unknown device 'gpu'; allowed: auto, cpu, cuda, cuda:N"),
    "file-for-a-model": (["eval", "m/config.json", *EVAL], "model 'm/config.json' is a file; give a folder, a .gguf"),
    "weights-for-a-model": (["eval", "m/model.safetensors", *EVAL], "is a file; give a folder"),
    "text-for-a-model": ([*QUANTIZE, "--model.source=t.txt", "--out=q"], "model 't.txt' is a file; give a folder"),
    "folder-for-out": (["eval", "m", "--data=t.txt", *EVAL, "--out=m"], "'m' is a folder, not a file"),
    "taken-out": (["eval", "m", "--data=t.txt", *EVAL, "--out=t.txt"], "t.txt exists; choose another file"),
    "model-for-data": (["eval", "m", "--data=m/model.safetensors", *EVAL], "unknown extension '.safetensors'"),
    "no-such-gguf": (["eval", "no.gguf", *EVAL], "GGUF file 'no.gguf' does not exist"),
    "garbage-gguf": (["eval", "garbage.gguf", *EVAL], "GGUF file 'garbage.gguf' is damaged"),
    "empty-gguf": ([*QUANTIZE, "--model.source=empty.gguf", "--out=q"], "is no GGUF file: it does not begin with GGUF"),
    "text-as-gguf": (["search", "--model.source=text.gguf", "--out=o", "--eval.tasks=[]"], "is no GGUF file"),
    "no-hub": (["eval", "nobody/nothing", *EVAL], "model 'nobody/nothing' cannot be loaded"),
    "no-source": (["eval"], "the following arguments are required: source"),
    "two-sources": (["eval", "m", "m", *EVAL], "unrecognized arguments: m"),
    "export-a-model": (["export", "--run=m", "--out=e"], "m is no run folder: it has no config.yaml"),
    "export-nothing": (["export", "--run=none", "--out=e", "--format=gguf"],
                       "none is neither a model folder (config.json) nor a run folder (config.yaml)"),
    "export-format": (["export", "--run=m", "--out=e", "--format=ggml"], "'hf', 'gguf'"),
    "export-adapters": (["export", "--run=m", "--out=e", "--format=gguf", "--adapters"], "beside format hf only"),
    "report-a-model": (["report", "--run=m"], "m is no run folder"),
    "finetune-a-file": (["finetune", "--run=t.txt"], "t.txt' is a file, not a folder"),
    "section-as-option": (["search", "--model=m"], "--model is a section; set its parts: --model.source, "),
    "section-as-option-of-quantize": (["quantize", "--data=t.txt", "--out=q"], "--data is a section; set its parts"),
    "config-is-a-folder": (["search", "--config=m"], "configuration file 'm' is a folder, not a file"),
    "config-alone": (["search", "--config"], "expected one argument"),
    "config-is-text": (["search", "--config=t.txt"], "expected a mapping of names to values, found"),
    "config-argument": (["search", "run.yaml"], "unrecognized arguments: run.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "garbage.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(range(7, 250)))
    (here / "empty.gguf").write_bytes(b"")
    (here / "text.gguf").write_text(TEXT)
    arguments, message = BAD[name]
    assert message in refused(arguments, capsys)


CONFIGS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "expected a mapping of names to values, found nothing"),
    "comment": (b"# nothing\n", "found nothing"),
    "list": (b"- out: x\n", "found list"),
    "section-is-a-number": (b"search: 5\n", "search: Input should be a valid dictionary"),
    "section-is-a-list": (b"search: [1, 2]\n", "search: Input should be a valid dictionary"),
    "true-for-a-number": (b"search: {steps: true}\n", "search.steps: Value error, neither true nor false"),
    "false-for-a-list": (b"eval: {tasks: false}\n", "eval.tasks: "),
    "text-for-a-list": (b"eval: {tasks: gloss}\n", "eval.tasks: Input should be a valid list, got 'gloss'"),
    "fraction": (b"search: {steps: 2.5}\n", "search.steps: Input should be a valid integer"),
    "nan": (b"search: {lr_arch: .nan}\n", "search.lr_arch: Input should be a finite number, got nan"),
    "infinite": (b"search: {eta: .inf}\n", "search.eta: Input should be a finite number, got inf"),
    "zero": (b"data: {batch_size: 0}\n", "data.batch_size: Input should be greater than or equal to 1, got 0"),
    "negative": (b"target_latency_ms: -1\n", "target_latency_ms: Input should be greater than 0, got -1"),
    "width-and-a-half": (b"space: {hidden: [64.5]}\n", "space.hidden.0: Input should be a valid integer"),
    "number-for-a-list": (b"space: {hidden: 64}\n", "space.hidden: Input should be a valid list, got 64"),
    "number-for-a-path": (b"out: 7\n", "out: Input should be a valid string, got 7"),
    "twice": (b"seed: 1\nout: a\nseed: 2\n", "seed stands in line 1 and in line 3"),
    "twice-inside": (b"search:\n  eta: 1\n  eta: 2\n", "eta stands in line 2 and in line 3"),
    "twice-with-crlf": (b"seed: 1\r\nseed: 2\r\n", "seed stands in line 1 and in line 2"),
    "number-as-key": (b"1: 2\n", "unknown key '1'"),
    "key-in-a-section": (b"model: {sourse: m}\n", "unknown key 'model.sourse' in c.yaml. Did you mean 'model.source'?"),
    "program": (b"!!python/object/apply:os.mkdir [made]\n", "c.yaml: not valid YAML"),
    "latin": (b"out: \xe9\n", "c.yaml: not valid YAML"),
    "tab": (b"search:\n\tsteps: 1\n", "c.yaml: not valid YAML"),
    "deep": (b"[" * 1500, "c.yaml: not valid YAML"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_refused_configurations(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = CONFIGS[name]
    (here / "c.yaml").write_bytes(content)
    line = refused(["search", "--config=c.yaml"], capsys)
    assert message in line
    assert "c.yaml" in line


SPACES: dict[str, tuple[dict[str, Any], str]] = {
    "no-hidden": ({"hidden": []}, "hidden: at least one choice is needed"),
    "zero-blocks": ({"blocks": [0, 2]}, "blocks: 0 is not positive"),
    "twice": ({"heads": [2, 2, 4]}, "heads: [2, 2, 4] names a choice twice"),
    "too-wide": ({"hidden": [64, 128]}, "hidden"),
    "too-deep": ({"blocks": [1, 2, 3]}, "blocks"),
    "odd-head-dim": ({"head_dim": [15]}, "head_dim contains 15; rotary embedding needs an even head_dim"),
    "three-heads": ({"heads": [3, 4]}, "heads 3 is no multiple of the model's 2 key-value heads"),
    "nothing-fits": ({"hidden": [49], "heads": [2, 4]}, "Heads that fit hidden 49"),
    "head-bits": ({"head_bits": [2, 4]}, "head_bits contains 2; allowed: 4, 8, and 16 for an unquantized head"),
    "head-group": ({"head_bits": [4], "group_size": 24}, "hidden 64 is no multiple of 24, the quantization group size"),
    "bits": ({"weight_bits": [3, 16], "act_bits": [16]}, "weight_bits contains 16; allowed: 2 to 8"),
}


@pytest.mark.parametrize("name", SPACES)
def test_refused_spaces(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is measured, whether in the configuration or in a file of its own."""
    change, message = SPACES[name]
    space = {"hidden": [64], "heads": [4], "head_dim": [16], "intermediate": [96], "blocks": [2], "group_size": 16}
    (here / "c.yaml").write_text(yaml.safe_dump({
        "model": {"source": "m"}, "data": {"source": "t.txt", "seq_len": 16, "batch_size": 2}, "eval": {"tasks": []},
        "space": {**space, "weight_bits": "none", "act_bits": "none", **change}, "out": "o",
    }))  # fmt: skip
    (here / "s.yaml").write_text(yaml.safe_dump({**space, **change}))
    for arguments in (["search", "--config=c.yaml"], ["profile", "--space=./s.yaml", "--model.source=m", "--out=t"]):
        assert message in refused(arguments, capsys)


def test_the_space_of_another_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default fits the embedded model."""
    small = ["--data.source=t.txt", "--data.seq_len=16", "--data.batch_size=2", "--eval.tasks=[]"]
    assert "The space is tiny, that of the embedded model; give --space" in refused(
        ["search", "--model.source=m", "--out=o", *small], capsys
    )


# ---- damaged models and records -------------------------------------------------------------------------------------


def edit(name: str, **entries: Any) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return do


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return do


UP = "model.layers.0.mlp.up_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config-is-no-json": (lambda f: (f / "config.json").write_text("{"), "model 'm' cannot be loaded"),
    "config-is-a-list": (lambda f: (f / "config.json").write_text("[]"), "model 'm' cannot be loaded"),
    "config-is-empty": (lambda f: (f / "config.json").write_text(""), "model 'm' cannot be loaded"),
    "no-family": (edit("config.json", model_type="gpt2"), "gpt2"),
    "unheard-family": (edit("config.json", model_type="nonesuch"), "nonesuch"),
    "other-width": (edit("config.json", intermediate_size=80), "the config wants (64, 80)"),
    "more-blocks": (edit("config.json", num_hidden_layers=3), "lacks tensor model.layers.2"),
    "far-too-wide": (edit("config.json", intermediate_size=10**9), "the config wants (64, 1000000000)"),
    "far-too-many": (edit("config.json", num_hidden_layers=10**8), "lacks tensor model.layers.2"),
    "fewer-blocks": (edit("config.json", num_hidden_layers=1), "has no use for, tensor model.layers.1"),
    "text-for-a-width": (edit("config.json", hidden_size="wide"), "Field 'hidden_size' expected int, got str"),
    "negative-width": (edit("config.json", intermediate_size=-96), "-96"),
    "odd-heads": (edit("config.json", num_attention_heads=3), "is not a multiple of the number of attention heads"),
    "half-nan": (weights(lambda t: t.update({UP: t[UP].half().fill_(float("nan"))})), f"{UP} has NaN values"),
    "minus-infinity": (weights(lambda t: t[UP][0, :1].fill_(float("-inf"))), f"{UP} has infinite values"),
    "text-for-weights": (lambda f: (f / "model.safetensors").write_text(TEXT), "model.safetensors"),
    "weights-are-a-folder": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()), "has no weights"
    ),
    "tokenizer-is-no-json": (lambda f: (f / "tokenizer.json").write_text("{"), "the tokenizer of 'm' cannot be loaded"),
    "tokenizer-is-empty": (lambda f: (f / "tokenizer.json").write_text(""), "the tokenizer of 'm' cannot be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_models(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = DAMAGE[name]
    damage(here / "m")
    for arguments in (["eval", "m", "--data=t.txt", *EVAL], [*QUANTIZE, "--model.source=m", "--out=q"]):
        assert message in refused(arguments, capsys)


RECORDS: dict[str, tuple[str, str, str]] = {  # file, its content, the message; none: it is read
    "mixed-kinds": ("a.jsonl", "".join(json.dumps(r) + "\n" for r in [
        {"text": TEXT}, {"prompt": "1 + 1 =", "completion": " 2"}, {"instruction": "Say it.", "output": LINE},
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": LINE}]},
    ]), ""),
    "twice-a-key": ("a.jsonl", '{"text": "x", "text": ' + json.dumps(TEXT) + "}", ""),
    "last-is-other": ("a.jsonl", json.dumps({"text": TEXT}) + '\n{"titel": "x"}\n', "line 2 has the columns titel"),
    "list-in-lines": ("a.jsonl", json.dumps([{"text": TEXT}]), "line 1 is list, not a record"),
    "csv-called-jsonl": ("a.jsonl", "text,label\nhello,1\n", "line 1 is not JSON"),
    "number": ("a.json", '[{"text": 3.5}]', "record 1: column 'text' holds float, not text"),
    "nan": ("a.jsonl", '{"text": NaN}', "holds float, not text"),
    "truncated": ("a.json", '[{"text": "abc"}, {"te', "a.json is not JSON"),
    "answers-only-empty": ("a.jsonl", '{"prompt": "x", "completion": ""}\n' * 50, "has no text"),
    "upper-case": ("a.TXT", TEXT, "unknown extension '.TXT'"),
    "one-word": ("a.txt", "word", "held-out tokens have nothing to evaluate; bring more data"),
    "blank": ("a.jsonl", "\r\n\r\n", "has no text"),
    "zero-bytes": ("a.parquet", "", "a.parquet"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_records(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, content, message = RECORDS[name]
    (here / "my data").mkdir()
    (here / "my data" / file).write_text(content)
    if message:
        assert message in refused(["eval", "m", f"--data=my data/{file}", *EVAL], capsys)
    else:
        assert perplexity("m", f"my data/{file}", capsys)["perplexity"] > 1


@pytest.mark.parametrize("verb", ["eval", "export", "finetune", "fetch", "profile", "demo", "quantize"])
def test_help_says_what_options_mean(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run([verb, "--help"], capsys)
    said = cli.descriptions(cli.function_of(verb))
    own = [name for name in said if name not in cli.POSITIONAL and f"--{name}." not in out]
    assert code == 0
    assert own or verb == "fetch"
    assert all(" ".join(said[name].split()[:3]) in " ".join(out.split()) for name in own)


def test_what_was_said_of_a_model_is_said_of_what_is_made_of_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "m" / "provenance.json").write_text(json.dumps({"caveat": "on a grid before"}))
    assert run([*QUANTIZE, "--model.source=m", "--out=q"], capsys)[0] == 0
    assert perplexity("q", "t.txt", capsys)["caveat"] == "on a grid before"
