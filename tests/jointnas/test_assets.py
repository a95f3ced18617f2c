"""The embedded corpus, tokenizer, tasks and model."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jointnas import assets
from jointnas.config import EvalConfig
from jointnas.evaluation import accuracy, perplexity
from jointnas.tasks import CHANCE, EMBEDDED, load_tasks
from jointnas_kernels.errors import JointNASError


def _key(paragraph: str) -> str:
    return re.sub(r"\W+", " ", paragraph.lower()).strip()


@pytest.fixture(scope="module")
def tokenizer():
    return assets.load_tokenizer()


def test_everything_fits_in_16_megabytes() -> None:
    files = [f for f in assets.root().rglob("*") if f.is_file() and f.suffix != ".pyc"]
    size = sum(f.stat().st_size for f in files)
    if not assets.has_weights():
        size += 2 * 5_770_496 + 10_000
    assert size <= 16_000_000


def test_the_licence_of_the_text_is_shipped() -> None:
    notice = (assets.root() / "NOTICE.md").read_text()
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in notice
    for file in assets.corpus_dir().glob("*.txt.*"):
        assert f"corpus/{file.name}" in notice


def test_splits_are_disjoint_and_cover_the_corpus() -> None:
    splits = {s: assets.documents(s) for s in ("train", "valid", "test")}
    record = json.loads((assets.corpus_dir() / "record.json").read_text())
    assert sum(map(len, splits.values())) == sum(r["documents"] for r in record.values())
    seen = {s: {_key(p) for d in docs for p in d.split("\n")} for s, docs in splits.items()}
    assert not seen["test"] & seen["train"]
    assert not seen["valid"] & seen["train"]
    assert not seen["valid"] & seen["test"]
    total = sum(len(d) for docs in splits.values() for d in docs)
    assert 0.02 < sum(map(len, splits["test"])) / total < 0.06


def test_every_source_is_in_every_split() -> None:
    for source in assets.SOURCES:
        for split in ("train", "valid", "test"):
            assert assets.documents(split, (source,)), (source, split)


def test_unknown_split_and_source_are_errors() -> None:
    with pytest.raises(JointNASError, match="train, valid, test"):
        assets.documents("dev")  # type: ignore[arg-type]
    with pytest.raises(JointNASError, match="austen"):
        assets.documents("train", ("dickens",))


def test_token_streams_hold_every_document_once() -> None:
    held_out = assets.held_out_tokens()
    assert held_out.dtype == torch.int64
    assert held_out.ndim == 1
    assert int((held_out == 0).sum()) == len(assets.documents("test"))
    assert torch.equal(held_out, assets.held_out_tokens())
    docs = assets.token_documents("test")
    assert len(held_out) == sum(map(len, docs))
    assert np.array_equal(np.sort(held_out.numpy()), np.sort(np.concatenate(docs)))
    assert int(held_out.max()) < 4096


@pytest.mark.slow
def test_training_streams_differ_by_seed_only_in_order() -> None:
    a, b = assets.train_tokens(0), assets.train_tokens(1)
    assert torch.equal(a, assets.train_tokens(0))
    assert not torch.equal(a, b)
    assert torch.equal(torch.bincount(a, minlength=4096), torch.bincount(b, minlength=4096))


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_tokenizer_round_trip(tokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_is_what_auto_tokenizer_loads(tokenizer) -> None:
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(assets.model_dir())
    text = 'abstraction is a general concept; "it was 1,024 o\'clock"'
    assert auto(text).input_ids == tokenizer(text).input_ids
    assert len(tokenizer) == 4096
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (0, 0, 0)


@pytest.mark.parametrize("name", EMBEDDED)
def test_task_is_well_formed(name: str, tokenizer) -> None:
    config = yaml.safe_load((assets.task_dir() / f"{name}.yaml").read_text())
    assert config["task"] == f"jointnas_{name}"
    assert config["output_type"] == "multiple_choice"
    items = [json.loads(line) for line in (assets.task_dir() / f"{name}.jsonl").read_text().splitlines()]
    assert 200 <= len(items) <= 400
    assert len({json.dumps(i, sort_keys=True) for i in items}) == len(items)
    held_out = "\n\n".join(assets.documents("test")).replace("\n", " ")
    for item in items:
        assert set(item) == {"query", "choices", "answer"}
        assert len(item["choices"]) == 4
        assert len(set(item["choices"])) == 4
        assert f"{item['query']} {item['choices'][item['answer']]}" in held_out  # the truth is held-out text
        longest = max(item["choices"], key=len)
        assert len(tokenizer(f"{item['query']} {longest}").input_ids) <= 256
    answers = np.bincount([i["answer"] for i in items], minlength=4)
    assert answers.min() > 0.15 * len(items)  # no favoured position
    by_length = np.mean([np.argmax([len(c) for c in i["choices"]]) == i["answer"] for i in items])
    assert by_length < 0.40  # the length of a choice does not give it away


def test_tasks_are_what_the_script_builds(tmp_path, monkeypatch) -> None:
    from benchmarks.embedded import prepare_assets

    monkeypatch.setattr(prepare_assets.assets, "task_dir", lambda: tmp_path)
    prepare_assets.tasks()
    monkeypatch.undo()
    for file in assets.task_dir().glob("*.*l"):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_model_has_every_dimension_to_search() -> None:
    config = assets.load_model().config
    assert config.head_dim == 64
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.num_hidden_layers >= 6
    assert config.hidden_size % 128 == config.intermediate_size % 128 == 0


def test_model_is_as_good_as_its_record_says() -> None:
    record = json.loads((assets.model_dir() / "training.json").read_text())
    found = perplexity(assets.load_model(), assets.held_out_tokens(), max_tokens=32_768)
    assert found < 1.25 * record["saved_test_perplexity"]


@pytest.mark.slow
def test_model_is_clearly_above_chance(tokenizer) -> None:
    results = accuracy(assets.load_model(), tokenizer, load_tasks(EvalConfig()), limit=100)
    above = [name for name in EMBEDDED if results[name]["acc"] > CHANCE + 2.5 * results[name]["acc_stderr"]]
    assert len(above) >= 3, results
