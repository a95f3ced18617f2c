"""Searches of other families through the command line: profile, search, distil, export with adapters, reload, evaluate.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from jointnas import cli
from jointnas.preparation import open_run
from jointnas.run_folder import found_choice
from jointnas_kernels import hf
from jointnas_kernels.latency import LatencyTable
from jointnas_kernels.layout import all_sizes, block_of
from tests.jointnas import tiny

SPACE = [f"--space.{k}={json.dumps(v)}" for k, v in tiny.SPACE.items()]
SMALL = [
    "--search.steps=4", "--search.lr_arch=0.1", "--search.lora_rank=4", "--search.importance_batches=1",
    "--data.seq_len=16", "--data.batch_size=2", "--finetune.steps=2", "--eval.tokens=256", "--eval.tasks=[]",
    "--progress=false", "--quantizer.options.samples=8", "--quantizer.options.epochs=1",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_the_whole_mission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr("jointnas.data.load", lambda *a, **k: tiny.streams())
    source, table, run, out = (tmp_path / n for n in ("model", "table.jsonl", "run", "out"))
    tiny.model(family).save_pretrained(source)
    profile = ["profile", "--out", str(table), "--model.source", str(source), "--latency.seq=8",
               "--latency.seconds_per_operation=1e-4", "--latency.calibrate=2", "--latency.busy=mark",
               "--progress=false", *SPACE]  # fmt: skip
    assert cli.main(profile) == 0
    dims = LatencyTable.load(table, device=None).dims
    assert (dims.qk_norm, dims.fused) == (family == "qwen3", family == "phi3")
    search = ["search", "--model.source", str(source), "--out", str(run), "--latency.table", str(table)]
    assert cli.main([*search, *SPACE, *SMALL]) == 0
    assert all(r["measured_ms"] > 0 for r in json.loads((run / "eval.json").read_text()))
    assert cli.main(["export", "--run", str(run), "--out", str(out), "--adapters", "true"]) == 0

    x, choice = torch.randint(97, (1, 12)), found_choice(run)
    stock, ours = AutoModelForCausalLM.from_pretrained(out), hf.load(out)
    assert stock.config.model_type == family
    assert stock.config.head_dim == choice.head_dim
    with torch.no_grad():
        logits = stock(x).logits
        assert (ours(x).logits - logits).abs().max() <= 0.05 * logits.abs().max()

    original = AutoModelForCausalLM.from_pretrained(source)
    merged = PeftModel.from_pretrained(original, out / "adapters" / "w8", adapter_name="w8").merge_and_unload()
    supernet = open_run(str(run)).supernet
    layout, sizes = block_of(original.config), all_sizes(original.config)
    for b, layer in enumerate(merged.model.layers):
        for m in layout.linears:
            rows, columns = (supernet.order.channels(axis, b) for axis in (m.rows, m.columns))
            weight = layer.get_submodule(m.module).weight[layout.rows(m, sizes)]
            assert torch.equal(weight[rows][:, columns], supernet.blocks[b].linears[m.name].adapted(1))


def test_other_families_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=11)).save_pretrained(tmp_path / "gpt2")
    for verb in ("profile", "search"):
        assert cli.main([verb, "--model.source", str(tmp_path / "gpt2"), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert "'gpt2' is not supported. Supported model types: llama, mistral, qwen2, qwen3, phi3" in error
