"""Bad input: one line that says what, where, what is allowed and the nearest match; exit code 2; no traceback."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jointnas import cli, config
from jointnas.config import RunConfig, SpaceConfig, build
from jointnas_kernels.errors import JointNASError
from tests.jointnas import tiny
from tests.latency.tables import synthetic


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without tokenizer, a table of this device, and damaged ones."""
    root = tmp_path_factory.mktemp("inputs")
    tiny.model().save_pretrained(root / "model")
    table = synthetic(SpaceConfig(**tiny.SPACE).build())
    table.save(root / "good.jsonl")
    lines = (root / "good.jsonl").read_text().splitlines()
    (root / "truncated.jsonl").write_text("\n".join(lines[:20]) + "\n" + lines[20][:40])
    header = json.loads(lines[0])
    header["device"] = {"type": "cuda", "name": "NVIDIA H200", "arch": "sm_90", "threads": 0}
    end = json.dumps({"kind": "end", "rows": len(lines) - 2})
    (root / "other.jsonl").write_text("\n".join([json.dumps(header), *lines[1:-1], end]) + "\n")
    row = {**json.loads(lines[5]), "median": -0.5}
    (root / "negative.jsonl").write_text("\n".join([*lines[:5], json.dumps(row), *lines[6:-1], end]) + "\n")
    (root / "space.yaml").write_text(yaml.safe_dump({**tiny.SPACE, "hiden": [64]}))
    (root / "run.yaml").write_text(yaml.safe_dump({"search": {"stpes": 3}}))
    (root / "old.yaml").write_text(yaml.safe_dump({"latency": {"seconds": 60}}))
    (root / "broken.yaml").write_text("a: [1, 2")
    return root


def search(folder: Path, *arguments: str) -> list[str]:
    space = [f"--space.{k}={json.dumps(v)}" for k, v in tiny.SPACE.items()]
    model = ["--model.source", str(folder / "model"), "--eval.tasks=[]"]
    return ["search", *model, "--out", str(folder / "out"), *space, *arguments]


CASES = {
    "verb": (lambda f: ["serch"], "unknown verb 'serch'. Did you mean 'search'?"),
    "option": (lambda f: ["search", "--search.stps=3"], "Did you mean '--search.steps'? Allowed: --search.steps"),
    "value": (lambda f: ["search", "--search.steps=abc"], "search.steps"),
    "out-of-range": (lambda f: ["search", "--search.steps=0"], "search.steps"),
    "old-name": (lambda f: ["search", "--latency.seconds=1"], "Did you mean '--latency.seconds_per_operation'?"),
    "old-key": (lambda f: ["search", "--config", str(f / "old.yaml")], "Did you mean 'latency.seconds_per_operation'?"),
    "too-long": (lambda f: ["search", "--latency.seconds_per_operation=60"], "less than or equal to 5"),
    "too-long-profile": (lambda f: ["profile", "--out=t", "--latency.seconds_per_operation=60"], "or equal to 5"),
    "choice": (lambda f: ["search", "--search.relaxation=soft"], "relaxation"),
    "config-key": (lambda f: ["search", "--config", str(f / "run.yaml")], "Did you mean 'search.steps'?"),
    "config-missing": (lambda f: ["search", "--config", str(f / "none.yaml")], "does not exist"),
    "config-broken": (lambda f: ["search", "--config", str(f / "broken.yaml")], "not valid YAML"),
    "space-key": (lambda f: ["search", "--space", str(f / "space.yaml")], "'hiden' in {f}/space.yaml. Did you mean"),
    "space-name": (lambda f: ["search", "--space", "tinny"], "Did you mean 'tiny'? Allowed: llama3, qllama3, tiny"),
    "heads": (lambda f: search(f, "--space.heads=[3,4]"), "heads 3 is no multiple of the model's 2 key-value heads"),
    "group": (lambda f: search(f, "--space.hidden=[96,128]"), "hidden 96 is no multiple of 64"),
    "truncated": (lambda f: search(f, f"--latency.table={f}/truncated.jsonl"), "is truncated (19 whole rows"),
    "wrong-device": (lambda f: search(f, f"--latency.table={f}/other.jsonl"), "was measured on cuda 'NVIDIA H200'"),
    "negative": (lambda f: search(f, f"--latency.table={f}/negative.jsonl"), "positive finite number, got -0.5"),
    "no-table": (lambda f: search(f, f"--latency.table={f}/none.jsonl"), "does not exist; make one with"),
    "model": (lambda f: ["search", "--model.source", str(f / "no" / "x")], "model folder '{f}/no/x' does not exist"),
    "not-a-model": (lambda f: ["search", "--model.source", str(f)], "has no config.json"),
    "device": (lambda f: ["doctor", "--device", "tpu"], "unknown device 'tpu'; allowed: auto, cpu, cuda"),
    "no-run": (lambda f: ["report", "--run", str(f)], "is no run folder"),
    "no-tokenizer": (lambda f: search(f, "--eval.tasks=[gloss]"), "a model without tokenizer needs eval.tasks = []"),
    "eval-nothing": (lambda f: ["eval", str(f)], "is neither a run folder (config.yaml) nor a model folder"),
    "eval-no-folder": (lambda f: ["eval", str(f / "x")], "model folder '{f}/x' does not exist"),
    "eval-dtype": (lambda f: ["eval", str(f / "model"), "--dtype=int3"], "jointnas eval: dtype: "),
    "eval-window": (lambda f: ["eval", str(f / "model"), "--tokens=100", "--context=256"],
                    "jointnas eval: Value error, tokens = 100 is less than one window of context = 256"),
    "eval-task": (lambda f: ["eval", str(f / "model"), "--tasks=[paper]", "--task_files=none"],
                  "eval.task_files: folder 'none' does not exist"),
    "export-no-run": (lambda f: ["export", "--run", str(f), "--out", str(f / "x")], "is no run folder: it has no"),
    "table-exists": (lambda f: ["profile", "--out", str(f / "good.jsonl")], "exists; pass --resume true"),
    "tune": (lambda f: ["tune", "--space=qllama3"], "tune measures kernels of NVIDIA GPUs, and torch sees no CUDA"),
    "tune-dtype": (lambda f: ["tune", "--dtype=float32"], "unknown dtype 'float32'"),
    "tune-seconds": (lambda f: ["tune", "--seconds=0"], "seconds must be positive, got 0"),
    "required": (lambda f: ["profile"], "out"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jointnas.data.load", lambda *a, **k: tiny.streams())
    arguments, message = CASES[case]
    assert cli.main(arguments(folder)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jointnas")]
    assert len(lines) == 1
    assert message.replace("{f}", str(folder)) in lines[0]
    assert not list(tmp_path.iterdir())


def test_budget_no_candidate_satisfies(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jointnas.data.load", lambda *a, **k: tiny.streams())
    arguments = search(folder, f"--latency.table={folder}/good.jsonl", "--search.budget_max=0.01")
    assert cli.main(arguments) == 2
    assert "no choice of the space satisfies the limits" in capsys.readouterr().err
    assert cli.main(search(folder, f"--latency.table={folder}/good.jsonl", "--target-latency-ms", "1e-9")) == 2
    assert "its fastest choice takes" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [v for v in cli.VERBS if v != "bench"])
def test_every_verb_has_a_parser_and_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*verb.split(), "--help"]) == 0
    assert verb in capsys.readouterr().out


def test_usage_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(v in out for v in cli.VERBS)


def test_print_config_is_a_loadable_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["search", "--search.steps=7", "--target-latency-ms", "2.5", "--print_config"]) == 0
    path = tmp_path / "config.yaml"
    path.write_text(capsys.readouterr().out)
    loaded = config.load(path)
    assert loaded.search.steps == 7
    assert loaded.target_latency_ms == 2.5
    assert config.load(path) == build(RunConfig, yaml.safe_load(config.dump(loaded)))


def test_yaml_then_flags(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("search: {steps: 7, eta: 2.0}\nspace: {weight_bits: none, blocks: [2, 3]}\n")
    values = cli.parse("search", ["--config", str(path), "--search.steps=9"])
    assert values is not None
    built = build(RunConfig, values)
    assert (built.search.steps, built.search.eta) == (9, 2.0)
    space = built.space.build()
    assert space.weight_bits is None
    assert space.blocks == (2, 3)


def test_every_verb_is_a_function() -> None:
    import jointnas

    for verb in cli.VERBS:
        group, _, name = {"eval": "evaluate", "profile": "table measure"}.get(verb, verb).rpartition(" ")
        module = importlib.import_module(f"jointnas.verbs.{group or name}")
        assert cli.function_of(verb) is getattr(module, name)
        assert getattr(getattr(jointnas, group) if group else jointnas, name) is getattr(module, name)


def test_unknown_public_name() -> None:
    import jointnas

    with pytest.raises(AttributeError, match="has no attribute 'serch'"):
        _ = jointnas.serch


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch-int8: W8A8, W8A16" in out
    assert "compiled extension" in out


def test_build_names_the_field() -> None:
    with pytest.raises(JointNASError, match=r"configuration: search\.eta: .* got -1"):
        build(RunConfig, {"search": {"eta": -1}})


def test_a_reader_that_stops_early_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from jointnas.cli import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
