"""Every verb once, through the command line, on a random model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from jointnas import cli, exporting
from jointnas.run_folder import found_choice
from tests.jointnas import tiny

SPACE = [f"--space.{k}={json.dumps(v)}" for k, v in tiny.SPACE.items()]
SMALL = [
    "--search.steps=8", "--search.lr_arch=0.1", "--search.budget_max=0.7", "--search.lora_rank=4", "--data.seq_len=16",
    "--data.batch_size=2", "--finetune.steps=4", "--eval.tokens=512", "--eval.tasks=[]",
    "--progress=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished `jointnas search`, made from the outside: model folder, profiled table, flags."""
    root = tmp_path_factory.mktemp("pipeline")
    tiny.model().save_pretrained(root / "model")
    table, out = root / "table.jsonl", root / "run"
    profile = ["profile", "--out", str(table), "--model.source", str(root / "model"), "--latency.seq=8",
               "--latency.seconds_per_operation=1e-4", "--latency.calibrate=2", "--latency.busy=mark",
               "--progress=false", *SPACE]  # fmt: skip
    search = ["search", "--model.source", str(root / "model"), "--out", str(out), "--latency.table", str(table)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jointnas.data.load", lambda *a, **k: tiny.streams())
        assert cli.main(profile) == 0
        assert cli.main([*search, *SPACE, *SMALL]) == 0
    return out


@pytest.fixture(autouse=True)
def text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jointnas.data.load", lambda *a, **k: tiny.streams())


def test_everything_is_there(run: Path) -> None:
    names = {p.name for p in run.iterdir()}
    assert {"config.yaml", "env.json", "choice.json", "metrics.jsonl", "eval.json", "report.html", "final"} <= names
    assert {p.name for p in (run / "plots").iterdir()} >= {"probabilities.png", "curves.png"}
    rows = json.loads((run / "eval.json").read_text())
    assert [r["name"] for r in rows] == ["original", "found"]
    assert rows[1]["params"] <= 0.7 * rows[0]["params"]
    assert all(r["measured_ms"] > 0 and r["predicted_ms"] > 0 and r["perplexity"] > 1 for r in rows)


def test_final_folder_loads_in_stock_transformers(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    choice = found_choice(run)
    config = model.config
    sizes = (config.hidden_size, config.num_attention_heads, config.head_dim, config.intermediate_size)
    assert sizes == (choice.hidden, choice.heads, choice.head_dim, choice.intermediate)
    assert config.num_hidden_layers == choice.blocks
    ids = torch.randint(97, (1, 12))
    assert torch.equal(model(ids).logits, exporting.reload(run / "final")(ids).logits)
    stored = json.loads((run / "final" / "config.json").read_text())
    assert (choice.weight_bits is not None) == ("quantization_config" in stored)


def test_resuming_a_finished_run_keeps_it(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    before = (copy / "choice.json").read_text()
    weights = (copy / "final" / "model.safetensors").read_bytes()
    assert cli.main(["search", "--config", str(copy / "config.yaml"), "--out", str(copy), "--resume", "auto"]) == 0
    assert (copy / "choice.json").read_text() == before
    assert (copy / "final" / "model.safetensors").read_bytes() == weights


def test_the_other_verbs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(run)]) == 0
    assert "found" in capsys.readouterr().out
    assert cli.main(["report", "--run", str(run)]) == 0
    assert cli.main(["finetune", "--run", str(run)]) == 0
    assert cli.main(["export", "--run", str(run), "--out", str(tmp_path / "copy")]) == 0
    assert (tmp_path / "copy" / "README.md").is_file()
    assert cli.main(["export", "--run", str(run), "--out", str(tmp_path / "copy")]) == 2
