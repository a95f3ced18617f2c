"""From tokens to steps: token files, windows and their BOS, what losses and perplexity count, lengths."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from torch.nn.functional import cross_entropy

from jointnas import assets, cli, data, evaluation, loading, pipeline, records, tokens
from jointnas.bilevel import optimise, weight_step
from jointnas.config import DataConfig, FinetuneConfig, InitOptions, ModelConfig
from jointnas.distillation import distillation_loss
from jointnas.initialise import calibration_windows
from jointnas.preparation import prepare
from jointnas.results import text_table
from jointnas.tasks import Tasks
from jointnas_kernels.errors import JointNASError
from tests.jointnas import tiny
from tests.jointnas.tiny_tokenizers import CHATML, of_bytes, of_words
from tests.latency.tables import synthetic

BOS = 96  # of tiny.model()'s 97 words

# ---- windows --------------------------------------------------------------------------------------------------------


def test_an_epoch_visits_every_window_once() -> None:
    batches = data.Batches(torch.arange(1000), batch=4, length=10, seed=0)
    starts = torch.cat([batches.at(step).ids[:, 0] for step in range(25)])
    assert sorted(starts.tolist()) == list(range(0, 1000, 10))
    second = torch.cat([batches.at(step).ids[:, 0] for step in range(25, 50)])
    assert second.tolist() != starts.tolist()
    assert second.max() <= 990


def test_batches_depend_on_seed_and_step_alone() -> None:
    stream = torch.randint(50, (3000,))
    one, two = (data.Batches(stream, 3, 7, seed=5) for _ in range(2))
    for step in (0, 999, 3, 141):
        assert torch.equal(one.at(step).ids, two.at(step).ids)
    assert not torch.equal(one.at(0).ids, data.Batches(stream, 3, 7, seed=6).at(0).ids)


def test_seeded_streams_differ() -> None:
    draws = {torch.rand(1, generator=data.seeded(*key)).item() for key in [(0, 0), (0, 1), (1, 0), (0, 0, 0), (2,)]}
    assert len(draws) == 5
    assert torch.rand(1, generator=data.seeded(3, 4)) == torch.rand(1, generator=data.seeded(3, 4))


def test_plain_text_of_the_embedded_model_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """No BOS is added (its documents begin with <|endoftext|>), everything is learned, and the architecture has text
    that the model was not trained on."""
    known = torch.arange(10_001) % 4096
    monkeypatch.setattr("jointnas.assets.train_tokens", lambda seed: known if seed == 3 else None)
    monkeypatch.setattr("jointnas.assets.held_out_tokens", lambda: known[:512])
    monkeypatch.setattr("jointnas.assets.valid_tokens", lambda: known[512:2000])
    found = loading.load_streams(DataConfig(), ModelConfig(), 3)
    assert found.bos is None
    assert torch.equal(found.weight, known)
    assert torch.equal(found.arch, known[512:2000])
    assert torch.equal(found.held_out, known[:512])
    ids, labels = data.Batches(found.all, 8, 128, 12).at(0)
    order = torch.randperm(len(known) // 128, generator=data.seeded(12, 0))[:8]
    assert torch.equal(ids, torch.stack([known[i * 128 : (i + 1) * 128] for i in order]))
    assert torch.equal(ids, labels)


def test_every_window_begins_with_one_bos() -> None:
    stream = torch.arange(990) % 89
    stream[::37] = -1 - BOS  # documents
    stream[5::37] = -1 - stream[5::37]  # context
    batches = data.Batches(stream, batch=2, length=10, seed=1, bos=BOS)
    seen = []
    for step in range(55):
        ids, labels = batches.at(step)
        assert ids.shape == labels.shape == (2, 10)
        assert ids[:, 0].eq(BOS).all()
        assert not ids[:, 1].eq(BOS).any()
        assert labels[:, 0].eq(data.IGNORE).all()
        seen += labels[labels != data.IGNORE].tolist()
    # one epoch learns each counted token of the stream exactly once
    assert sorted(seen) == sorted(stream[stream >= 0].tolist())
    calibration = calibration_windows(stream, InitOptions(samples=20), 10, 0, BOS)
    assert calibration[:, 0].eq(BOS).all()
    assert calibration.min() >= 0


# ---- what losses and perplexity count -------------------------------------------------------------------------------


@pytest.fixture
def masked() -> data.Batch:
    ids = tiny.streams().weight[:64].view(2, 32)
    labels = ids.clone()
    labels[0, :20] = labels[1, 5:25] = data.IGNORE
    return data.Batch(ids, labels)


def nll(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[B, T-1]"""
    return cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def test_distillation_counts_answers_only(masked: data.Batch) -> None:
    student, teacher, config = tiny.model(), tiny.model(), FinetuneConfig(kd=0.7, temperature=2.0)
    with torch.no_grad():
        teacher.lm_head.weight.add_(0.05 * torch.randn_like(teacher.lm_head.weight))
    counts = masked.labels[:, 1:] != data.IGNORE
    _, parts = distillation_loss(student, lambda x: teacher(x).logits, masked.ids, config, masked.labels)
    assert parts["ce"].item() == pytest.approx(nll(student, masked.ids)[counts].mean().item(), rel=1e-5)
    p, q = ((m(masked.ids).logits[:, :-1] / 2).log_softmax(-1) for m in (teacher, student))
    kl = 4 * (p.exp() * (p - q)).sum(-1)[counts].mean().item()
    assert parts["kl"].item() == pytest.approx(kl, rel=1e-4)
    nothing = torch.full_like(masked.ids, data.IGNORE)
    empty, _ = distillation_loss(student, lambda x: teacher(x).logits, masked.ids, config, nothing)
    empty.backward()
    assert empty.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_search_counts_answers_only(masked: data.Batch, tmp_path: Path) -> None:
    run = tiny.start(tiny.config(tmp_path))
    optimizer = torch.optim.SGD(run.supernet.lora_parameters(), lr=0.0)
    nothing = data.Batch(masked.ids, torch.full_like(masked.ids, data.IGNORE))

    def loss(batch: data.Batch) -> float:
        return weight_step(run, optimizer, SimpleNamespace(at=lambda step, device: batch), 0).item()  # type: ignore[arg-type]

    run.supernet.relax().draw(data.seeded(run.config.seed, 0, 0))
    counts = masked.labels[:, 1:] != data.IGNORE
    assert loss(masked) == pytest.approx(nll(run.supernet, masked.ids)[counts].mean().item(), rel=1e-4)
    assert loss(masked) != pytest.approx(loss(data.Batch(masked.ids, masked.ids)), rel=1e-3)
    assert loss(nothing) == 0
    assert all(p.grad is None or not p.grad.any() for p in run.supernet.lora_parameters())


def test_perplexity_with_bos_and_answers() -> None:
    """By its definition: BOS and the next 15 tokens, over those that count."""
    model, stream = tiny.model(), tiny.streams().held_out[:150].clone()
    total, count = 0.0, 0
    stream[40:47] = -1 - stream[40:47]
    for i in range(10):
        part = stream[15 * i : 15 * (i + 1)]
        ids = torch.cat((torch.tensor([BOS]), data.decode(part).ids))[None]
        one = nll(model, ids)[0][part >= 0]
        total, count = total + one.double().sum().item(), count + len(one)
    found = evaluation.perplexity(model, stream, bos=BOS, context=16, batch_size=3)
    assert found == pytest.approx(math.exp(total / count), rel=1e-5)
    with pytest.raises(JointNASError, match="none of 150 tokens counts"):
        evaluation.perplexity(model, -1 - data.decode(stream).ids, context=16)
    with pytest.raises(JointNASError, match="at least one window of 2 tokens"):
        evaluation.perplexity(model, stream, bos=BOS, context=1)


def test_a_run_with_bos_says_so(tmp_path: Path) -> None:
    """Recorded in env.json, both perplexities and their context in the results."""
    plain, config = tiny.streams(), tiny.config(tmp_path, tiny.NO_BITS, search={"steps": 1})
    begun = data.Streams(plain.all, plain.border, plain.held_out, bos=BOS)
    run = prepare(config, tiny.model(), begun, synthetic(config.space.build()))
    optimise(run)
    assert json.loads((tmp_path / "env.json").read_text())["bos"] is True
    model = tiny.model()
    found = pipeline.quality(model, config.model, begun.held_out, config.eval, Tasks(), BOS)
    assert found["context"] == 256
    assert found["perplexity"] == evaluation.perplexity(model, begun.held_out, bos=BOS)
    assert found["perplexity_without_bos"] == evaluation.perplexity(model, plain.held_out[plain.held_out != BOS])
    row = {"name": "x", "params": 1, "bytes": 1, "measured_ms": 1.0, "predicted_ms": 1.0, **found}
    header, _, values = text_table([row]).splitlines()
    assert header.endswith("perplexity (256 tokens)  without BOS")
    assert values.split()[-2:] == [f"{found[k]:.2f}" for k in ("perplexity", "perplexity_without_bos")]


def test_a_search_on_answers_from_files(tmp_path: Path) -> None:
    """A folder model, its tokenizer with BOS, Alpaca records: importance, OmniQuant, search, distillation, quality."""
    words = [records.ALPACA, "Say 0 1 2 3 4 5 6 7 8 9"]
    tokenizer, source, path = of_words(*words), tmp_path / "my model", tmp_path / "alpaca data.jsonl"
    tiny.model().save_pretrained(source)
    tokenizer.save_pretrained(source)
    with path.open("w") as file:
        for i in range(60):
            file.write(json.dumps({"instruction": f"Say {i % 10}.", "input": "", "output": f"{i % 10} " * 9}) + "\n")
    config = tiny.config(
        tmp_path / "run", {**tiny.NO_BITS, "weight_bits": [4, 8]}, model={"source": str(source)},
        data={"source": str(path), "cache": str(tmp_path), "seq_len": 96}, search={"steps": 2, "importance_batches": 1},
        quantizer={"init": "omniquant", "options": {"samples": 2, "epochs": 1}}, finetune={"steps": 2},
    )  # fmt: skip
    run = prepare(config, table=synthetic(config.space.build()))
    found = optimise(run)
    student = pipeline.distilled(run, found.choice)
    measured = pipeline.quality(student, config.model, run.streams.held_out, config.eval, Tasks(), run.streams.bos)
    assert all(math.isfinite(measured[k]) for k in ("perplexity", "perplexity_without_bos"))
    assert json.loads((tmp_path / "run" / "env.json").read_text())["bos"] is True
    assert run.streams.bos == tokenizer.bos_token_id


def test_resuming_on_other_data_is_one_error(tmp_path: Path) -> None:
    run, _ = tiny.search(tiny.config(tmp_path, tiny.NO_BITS, search={"steps": 2}))
    config = run.config.model_copy(update={"resume": "auto"})
    table = synthetic(config.space.build())
    other = data.Streams(run.streams.all.flip(0), run.streams.border, run.streams.held_out)
    with pytest.raises(JointNASError, match="step-2 was trained on other data than 'embedded' holds now"):
        optimise(prepare(config, tiny.model(), other, table))
    other = data.Streams(run.streams.all, run.streams.border, run.streams.held_out, unseen=run.streams.all[:64])
    with pytest.raises(JointNASError, match="step-2 was trained on other data"):
        optimise(prepare(config, tiny.model(), other, table))
    again = data.Streams(run.streams.all.int(), run.streams.border, run.streams.held_out)  # as a token file has them
    optimise(prepare(config, tiny.model(), again, table))


# ---- lengths --------------------------------------------------------------------------------------------------------


def test_longer_than_the_model_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for section, name in (({"data": {"seq_len": 257}}, "data.seq_len"), ({"eval": {"context": 257}}, "eval.context")):
        with pytest.raises(JointNASError, match=rf"{name} is 257, but the model sees at most 256 tokens"):
            tiny.start(tiny.config(tmp_path, **section))
    tiny.model().save_pretrained(tmp_path / "model")
    quantize = ["quantize", "--model.source", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    assert cli.main([*quantize, "--data.seq_len=257"]) == 2
    assert "set it to 256 or less" in capsys.readouterr().err


# ---- models and their tokenizers ------------------------------------------------------------------------------------


def test_embedded_text_in_tokens_of_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "my model"
    tiny.model().save_pretrained(source)
    config = DataConfig(seq_len=8, batch_size=2, cache=str(tmp_path / "cache"))
    texts = {"train": ["one " * 40, "two " * 40, "three " * 40], "test": ["four " * 40]}
    monkeypatch.setattr("jointnas.assets.documents", texts.__getitem__)
    with pytest.raises(JointNASError, match=r"my model' has no tokenizer.* put the tokenizer's files"):
        loading.load_streams(config, ModelConfig(source=str(source)), 0)
    of_bytes().save_pretrained(source)
    with pytest.raises(JointNASError, match="the model's vocabulary ends at 96"):
        loading.load_streams(config, ModelConfig(source=str(source)), 0)
    monkeypatch.setattr("jointnas.loading.model_config", lambda config: SimpleNamespace(vocab_size=300))
    with caplog.at_level("INFO"):
        found = loading.load_streams(config, ModelConfig(source=str(source)), 0)
    assert "the embedded text, in tokens of" in caplog.text
    tokenizer = of_bytes()
    read = tokenizer.decode(data.decode(found.all).ids)
    assert read == "".join(f"<s>{texts['train'][i]}</s>" for i in assets.order(3, 0))
    assert tokenizer.decode(data.decode(found.held_out).ids) == f"<s>{texts['test'][0]}</s>"
    assert found.bos == tokenizer.bos_token_id


# ---- token files ----------------------------------------------------------------------------------------------------


class Counting:
    """A tokenizer that knows how often it was asked for texts."""

    def __init__(self) -> None:
        self.inner, self.calls, self.fail_at = of_bytes(template=CHATML), 0, -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, texts: Any, **options: Any) -> Any:
        if not isinstance(texts, str):  # that is bos_of
            self.calls += 1
            if self.calls == self.fail_at:
                raise KeyboardInterrupt
        return self.inner(texts, **options)


def talks(path: Path, count: int) -> DataConfig:
    with path.open("w") as file:
        for i in range(count):
            user = {"role": "user", "content": f"question {i}"}
            file.write(json.dumps({"messages": [user, {"role": "assistant", "content": f"answer {i}"}]}) + "\n")
    return DataConfig(source=str(path), cache=str(path.parent / "cache"), seq_len=16, batch_size=2)


def test_tokenized_once_and_resumed_bit_exact(tmp_path: Path) -> None:
    config, tokenizer = talks(tmp_path / "a.jsonl", 200), Counting()
    first = data.load(config, tokenizer)
    calls = tokenizer.calls
    lane = data.Batches(first.weight, 2, 16, 7, first.bos)
    seen = [lane.at(step) for step in range(3 * lane.windows)]
    again = data.load(config, tokenizer)
    assert tokenizer.calls == calls > 0
    assert again.all.untyped_storage().data_ptr() != first.all.untyped_storage().data_ptr()
    lane = data.Batches(again.weight, 2, 16, 7, again.bos)
    for step in range(lane.windows, 3 * lane.windows):
        assert all(torch.equal(a, b) for a, b in zip(lane.at(step), seen[step], strict=True))
    assert any((labels == data.IGNORE).sum() > 2 for _, labels in seen)  # prompts, beside BOS


def test_what_a_token_file_depends_on(tmp_path: Path) -> None:
    config, tokenizer = talks(tmp_path / "a.jsonl", 100), Counting()

    def files(config: DataConfig) -> int:
        data.load(config, tokenizer)
        return len(list((tmp_path / "cache").glob("*.tokens")))

    assert files(config) == 1
    assert files(config.model_copy(update={"seq_len": 8, "arch_fraction": 0.4})) == 1  # how it is cut, not what it is
    assert files(config.model_copy(update={"max_tokens": 1000})) == 2
    talks(tmp_path / "a.jsonl", 101)
    assert files(config) == 3
    tokenizer.inner.chat_template = "{{ bos_token }}" + CHATML
    assert files(config) == 4
    tokenizer.inner = of_bytes(bos="<|im_start|>", template=CHATML)
    assert files(config) == 5


def test_a_killed_tokenization_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jointnas.tokens.BLOCK", 500)
    config, tokenizer = talks(tmp_path / "a.jsonl", 200), Counting()
    whole = data.load(config.model_copy(update={"cache": str(tmp_path / "other")}), tokenizer)
    tokenizer.fail_at = tokenizer.calls + 5
    with pytest.raises(KeyboardInterrupt):
        data.load(config, tokenizer)
    left = list((tmp_path / "cache").glob("*.part"))
    assert left
    assert left[0].stat().st_size > 0
    assert not list((tmp_path / "cache").glob("*.tokens"))
    assert torch.equal(data.load(config, tokenizer).all, whole.all)
    assert not list((tmp_path / "cache").glob("*.part"))
    path = next((tmp_path / "cache").glob("*.tokens"))
    path.write_bytes(path.read_bytes()[:-4])  # torn
    assert torch.equal(data.load(config, tokenizer).all, whole.all)


def test_streams_are_mapped_not_loaded(tmp_path: Path) -> None:
    """Parts of one file, as `all` is: nothing of the size of the data is copied."""
    found = data.load(talks(tmp_path / "a.jsonl", 200), of_bytes(template=CHATML))
    begin, size = found.all.data_ptr(), found.all.element_size()
    assert found.arch.data_ptr() == begin + size * found.border
    assert found.held_out.data_ptr() == begin + size * len(found.all)


def test_a_cache_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    config = talks(tmp_path / "a.jsonl", 100)
    (tmp_path / "file").write_text("")
    with pytest.raises(JointNASError, match=r"data\.cache: .*file.* cannot be written"):
        data.load(config.model_copy(update={"cache": str(tmp_path / "file" / "x")}), of_bytes(template=CHATML))


def test_default_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tokens.cache_folder(None) == tmp_path / "jointnas" / "tokens"
    assert tokens.cache_folder("~/x") == Path.home() / "x"


# ---- the hub --------------------------------------------------------------------------------------------------------


def test_a_data_set_is_streamed_as_far_as_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def rows(split: str) -> Iterator[dict[str, Any]]:
        nonlocal read
        for read in range(1000):
            if read == 300:
                raise ConnectionError("gone")
            yield {"instruction": f"Say {read}.", "input": "", "output": str(read)}

    def builder(name: str, subset: str | None) -> Any:
        assert (name, subset) == ("some/alpaca", "en")
        return SimpleNamespace(cache_dir="some/alpaca/en/0.0.0/commit", as_streaming_dataset=rows)

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr("jointnas.tokens.BLOCK", 1000)
    tokenizer = of_bytes()
    config = DataConfig(source="hf:some/alpaca/config=en", cache=str(tmp_path), max_tokens=5000)
    found = data.load(config, tokenizer)
    assert len(found.all) == 5000
    assert 200 < len(found.held_out) < 300
    assert read < 60
    document = records.ALPACA.format(instruction="Say 0.") + "0</s>"
    assert tokenizer.decode(data.decode(found.all).ids[: len(document) - 2]).startswith(f"<s>{document}"[:-3])
    with pytest.raises(JointNASError, match="data set 'some/alpaca' cannot be loaded: gone"):
        data.load(config.model_copy(update={"max_tokens": None}), tokenizer)


def test_a_data_set_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda *a: (_ for _ in ()).throw(FileNotFoundError("no such"))
    )
    with pytest.raises(JointNASError, match="data set 'no/where' cannot be loaded: no such"):
        data.load(DataConfig(source="hf:no/where", cache=str(tmp_path)), of_bytes())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(JointNASError, match="needs the `datasets` package: pip install"):
        data.load(DataConfig(source="hf:no/where", cache=str(tmp_path)), of_bytes())
