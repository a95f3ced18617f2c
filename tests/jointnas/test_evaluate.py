"""`jointnas eval` on model folders: plain, quantized, the embedded model. Runs: test_pipeline."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jointnas import assets, cli, exporting, loading
from jointnas.config import DataConfig, ModelConfig
from jointnas.evaluation import perplexity
from jointnas.verbs.evaluate import evaluate, text
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import convert, extract
from jointnas_kernels.space import SearchSpace, count_params

TEXT = "The river runs by the old red house. Nobody knows how old it is, and nobody asks.\n" * 20


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1,
        vocab_size=4096, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("a model")
    model().save_pretrained(root / "plain")
    assets.load_tokenizer().save_pretrained(root / "plain")
    (root / "text.txt").write_text(TEXT)
    return root


def mean_loss(of: torch.nn.Module, ids: torch.Tensor, context: int) -> float:
    losses = []
    for i in range(0, len(ids) - context + 1, context):
        window = ids[None, i : i + context]
        losses.append(of(input_ids=window, labels=window).loss.item())
    return sum(losses) / len(losses)


def test_a_plain_folder_through_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Perplexity on the text of a file, tasks of this package, a table and a JSON file."""
    out = folder / "result.json"
    arguments = ["eval", str(folder / "plain"), "--data", str(folder / "text.txt"), "--tasks=gloss,word",
                 "--task-limit=3", "--context=32", "--out", str(out)]  # fmt: skip
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert printed.rstrip() == text(rows)
    assert "perplexity (32 tokens)" in printed
    assert set(rows[0]["tasks"]) == {"gloss", "word", "mean"}
    assert rows[0]["tasks"]["gloss"]["items"] == 3
    assert rows[0]["params"] == sum(p.numel() for p in model().parameters())
    assert rows[0]["bytes"] == (folder / "plain" / "model.safetensors").stat().st_size
    assert (rows[0]["measured_ms"], rows[0]["predicted_ms"]) == (None, None)
    tokenizer = assets.load_tokenizer()
    ids = torch.tensor([*tokenizer(TEXT, add_special_tokens=False).input_ids, tokenizer.eos_token_id])
    assert rows[0]["perplexity"] == pytest.approx(math.exp(mean_loss(model(), ids, 32)), rel=1e-3)
    assert cli.main(arguments) == 2
    assert "result.json exists" in capsys.readouterr().err


def held_out(source: Path) -> torch.Tensor:
    """The embedded held-out text, document by document, in tokens of the model."""
    streams = loading.load_streams(DataConfig(batch_size=1, seq_len=2), ModelConfig(source=str(source)), 0)
    return streams.held_out


def test_a_quantized_folder(folder: Path) -> None:
    """A compressed-tensors export is evaluated as what it computes."""
    source = model()
    space = SearchSpace.single(source.config, (4,), (8,), 32)
    supernet = convert(source, space, lora_rank=4)
    choice = space.full()
    quantized = extract(supernet, choice)
    exporting.export_model(
        quantized, folder / "w4a8", choice, supernet.block_rank, tokenizer=assets.load_tokenizer()
    )
    (row,) = evaluate(str(folder / "w4a8"), tasks=[], tokens=512, context=64)
    ids = held_out(folder / "w4a8")
    assert row["perplexity"] == pytest.approx(perplexity(quantized, ids, context=64, max_tokens=512), rel=1e-5)
    assert row["tasks"] == {}
    assert row["params"] == count_params(source.config, choice)
    (plain,) = evaluate(str(folder / "plain"), tasks=[], tokens=512, context=64)
    assert row["perplexity"] != plain["perplexity"]
    assert row["bytes"] < plain["bytes"]


@pytest.mark.slow
def test_the_embedded_text_in_tokens_of_the_model(folder: Path) -> None:
    """A model with the embedded tokenizer sees the embedded held-out text, document by document or as a whole."""
    (row,) = evaluate(str(folder / "plain"), tasks=[], tokens=2048, context=128)
    assert row["context"] == 128
    ids = held_out(folder / "plain")
    assert sorted(ids.tolist()) == sorted(assets.held_out_tokens().tolist())  # documents in another order
    assert row["perplexity"] == pytest.approx(perplexity(model(), ids, context=128, max_tokens=2048))
    (embedded,) = evaluate("embedded", tasks=[], tokens=2048, context=128)
    want = perplexity(assets.load_model(), assets.held_out_tokens(), context=128, max_tokens=2048)
    assert embedded["perplexity"] == pytest.approx(want)


def test_what_is_of_a_run_cannot_be_set(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(JointNASError, match=r"is a run: its dtype is that of its config\.yaml; leave --dtype out"):
        evaluate(str(tmp_path), dtype="bfloat16")


def test_a_model_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "alone")
    with pytest.raises(JointNASError, match="tokenizer"):
        evaluate(str(tmp_path / "alone"), tokens=512)
