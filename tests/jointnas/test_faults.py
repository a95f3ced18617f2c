"""Faults of disks, memory and numbers, put into a search: every one is said in one sentence, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jointnas import checkpoint, cli, loading, metrics
from jointnas.bilevel import optimise
from jointnas.config import ModelConfig
from jointnas.initialise import store
from jointnas.losses import cross_entropy
from jointnas.metrics import read_metrics
from jointnas_kernels.errors import JointNASError, panics, refusal, writing
from tests.jointnas import tiny
from tests.jointnas.tiny_tokenizers import of_bytes

FAST = {"steps": 4, "gap_every": 99, "save_every": 2, "log_every": 2}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended, with checkpoints 2 and 4."""
    out = tmp_path_factory.mktemp("faults") / "run"
    tiny.search(tiny.config(out, tensorboard=False, search=FAST))
    return out


@pytest.fixture
def run_folder(searched: Path, tmp_path: Path) -> Path:
    return shutil.copytree(searched, tmp_path / "run")


def go_on(out: Path, steps: int = 6, loss: Any = cross_entropy, change: Callable[[Any], None] | None = None) -> None:
    """Resumes a search that has two steps left."""
    for old in (out / "choice.json", *out.glob("losses-*.json")):
        old.unlink(missing_ok=True)
    # of a search of more steps, as if that had been asked for from the beginning
    for folder in (out / "checkpoints").iterdir():
        state = json.loads((folder / "state.json").read_text()) if (folder / "COMPLETE").is_file() else None
        if state is not None and state["config"]["search"]["steps"] != steps:
            state["config"]["search"]["steps"] = steps
            (folder / "state.json").write_text(json.dumps(state, indent=1))
            seal(folder)
    run = tiny.start(tiny.config(out, resume="auto", tensorboard=False, search={**FAST, "steps": steps}))
    if change is not None:
        change(run)
    optimise(run, loss)


def seal(folder: Path) -> None:
    """A manifest that is true of a checkpoint as it is."""
    files = [f for f in sorted(folder.iterdir()) if f.name not in ("manifest.json", "COMPLETE")]
    manifest = {f.name: checkpoint.sha256(f) for f in files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "COMPLETE").write_text(checkpoint.sha256(folder / "manifest.json"))


def left_over(out: Path) -> list[Path]:
    return [p for p in out.rglob(".*") if p.name.endswith((".tmp", ".old"))]


# ---- a full disk ----------------------------------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool]) -> None:
    """From the first call for which `when` holds on, the disk is full: half of what should be written is."""
    plain, is_full = getattr(owner, name), [False]

    def refuse(*args: Any, **kwargs: Any) -> Any:
        is_full[0] |= when(*args)
        if not is_full[0]:
            return plain(*args, **kwargs)
        if name == "write_text":
            plain(args[0], args[1][: len(args[1]) // 2])
        if name == "save_file":
            plain(*args, **kwargs)
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise FULL

    monkeypatch.setattr(owner, name, refuse)


class SafetensorError(Exception):
    """What safetensors makes of it: no OSError."""


DISKS: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "tensors": (checkpoint, "save_file", lambda tensors, path: "step-6" in str(path)),
    "state": (Path, "write_text", lambda path, text: path.name == "state.json" and "step-6" in str(path)),
    "complete": (Path, "write_text", lambda path, text: path.name == "COMPLETE" and "step-6" in str(path)),
    "sync": (checkpoint, "fsync", lambda path: "step-6" in str(path)),
    "start": (Path, "write_text", lambda path, text: "config.yaml" in path.name),
    "choice": (Path, "write_text", lambda path, text: "choice.json" in path.name),
    "kept-metrics": (Path, "write_text", lambda path, text: "metrics.jsonl" in path.name),
    "folder": (Path, "mkdir", lambda path, *_: "step-6" in path.name),
}


@pytest.mark.parametrize("name", DISKS)
def test_a_full_disk(name: str, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        full(patch, *DISKS[name])
        with pytest.raises(JointNASError, match=r"cannot be written: No space left on device.*--resume auto"):
            go_on(run_folder)
    whole = [s for s in checkpoint.steps(run_folder / "checkpoints")
             if not checkpoint.damage(run_folder / "checkpoints" / f"step-{s}")]  # fmt: skip
    assert whole == checkpoint.steps(run_folder / "checkpoints")
    assert {2, 4} <= set(whole) or {4, 6} <= set(whole)
    assert not left_over(run_folder)
    assert [r["step"] for r in read_metrics(run_folder)][:2] == [2, 4]
    go_on(run_folder)  # there is room again
    assert (run_folder / "choice.json").is_file()
    assert [r["step"] for r in read_metrics(run_folder)] == [2, 4, 6]


def test_rows_of_metrics_on_a_full_disk(tmp_path: Path) -> None:
    """Half a line fits: it is taken back."""
    rows = metrics.Metrics(tmp_path, "search", tensorboard=False)
    rows.write(1, ce=1.0)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    file = rows._file

    class Full:
        """A file on a disk with room for five bytes."""

        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

        def write(self, line: bytes) -> int:
            if len((tmp_path / "metrics.jsonl").read_bytes()) > len(before):
                raise FULL
            return file.write(line[:5])

    rows._file = Full()  # type: ignore[assignment]
    with pytest.raises(JointNASError, match=r"metrics\.jsonl cannot be written: No space left on device"):
        rows.write(2, ce=2.0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_blocks_of_quantizers_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = store.Store(tmp_path / "q", {"method": "clip"})
    kept.save(0, {"x": torch.ones(3)}, [{"block": 0}])
    full(monkeypatch, store, "save_file", lambda *_: True)
    with pytest.raises(JointNASError, match=r"block-001\.safetensors cannot be written: No space left on device"):
        kept.save(1, {"x": torch.ones(3)}, [{"block": 1}])
    assert {p.name for p in (tmp_path / "q").iterdir()} == {"block-000.safetensors", "blocks.jsonl", "settings.json"}


def test_what_is_no_refusal_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing(tmp_path):
        (tmp_path / "nothing").read_text()
    assert refusal(OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"))
    assert refusal(ValueError("28")) is None


def test_the_command_says_it_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def draw(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "plots/curves.png")

    monkeypatch.setattr(cli, "run_verb", draw)
    assert cli.main(["doctor"]) == 2
    assert "jointnas: error: plots/curves.png cannot be written: No space left on device" in capsys.readouterr().err


# ---- files that changed ---------------------------------------------------------------------------------------------


def flip(path: Path, at: float) -> None:
    """One bit of a file, at this share of it."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 16
    path.write_bytes(content)


FILES = ("supernet.safetensors", "weight_optimizer.safetensors", "arch_optimizer.safetensors", "rng.safetensors",
         "state.json", "manifest.json", "COMPLETE")  # fmt: skip
CHANGES: dict[str, Callable[[Path], None]] = {
    "first-bit": lambda path: flip(path, 0.0), "a-bit": lambda path: flip(path, 0.6),
    "last-bit": lambda path: flip(path, 1.0), "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "halved": lambda path: os.truncate(path, path.stat().st_size // 2), "gone": lambda path: path.unlink(),
}  # fmt: skip


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_checkpoint(file: str, change: str, run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is named, the one before it is taken; alone, it is an error."""
    newest = run_folder / "checkpoints" / "step-4"
    CHANGES[change](newest / file)
    assert checkpoint.latest(run_folder / "checkpoints") == run_folder / "checkpoints" / "step-2"
    assert "skipping checkpoint" in caplog.text
    with pytest.raises(JointNASError, match=r"checkpoint .*step-4: "):
        checkpoint.load(newest)


@pytest.mark.parametrize("change", ["cut", "halved", "gone"])
def test_a_truncated_shard(change: str, tmp_path: Path) -> None:
    model = tiny.model()
    model.save_pretrained(tmp_path / "m", max_shard_size="200KB")
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 1
    CHANGES[change](shards[1])
    with pytest.raises(JointNASError, match=f"{shards[1].name}.* (truncated|missing)"):
        loading.load_model(ModelConfig(source=str(tmp_path / "m"), device="cpu"))


# ---- numbers --------------------------------------------------------------------------------------------------------


def bad_weight(run: Any) -> None:
    with torch.no_grad():
        run.supernet.blocks[0].linears["up_proj"].weight[0, 0] = float("nan")


def bad_embedding(run: Any) -> None:
    """Of a token of the next batch alone."""
    with torch.no_grad():
        run.supernet.embedding[run.streams.weight] = float("inf")


def bad_gradient(run: Any) -> None:
    for p in run.supernet.lora_parameters():
        p.register_hook(lambda grad: torch.full_like(grad, float("nan")))


NUMBERS = {
    "weight": (bad_weight, r"blocks\.0\.linears\.up_proj\.weight \(weight\)|up_proj.*\(weight\)"),
    "embedding": (bad_embedding, r"embedding \(weight\)"),
    "gradient": (bad_gradient, r"lora_[ab] \(gradient\)"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_not_finite(name: str, run_folder: Path) -> None:
    """Five steps in a row end the search with a dump, and the checkpoints stay."""
    change, message = NUMBERS[name]
    before = {p: p.read_bytes() for p in (run_folder / "checkpoints" / "step-2").iterdir()}
    with pytest.raises(JointNASError, match=r"5 weight steps in a row, up to step 8,.*") as raised:
        go_on(run_folder, steps=12, change=change)
    text = str(raised.value)
    (dump,) = run_folder.glob("not-finite-weight-8.json")
    assert str(dump) in text
    for part in ("Nothing was changed", "--resume auto", "search.lr_weight"):
        assert part in text
    found = json.loads(dump.read_text())
    assert (found["step"], found["batch"]["position"], len(found["losses"])) == (8, 8, 5)
    assert torch.tensor(found["batch"]["ids"]).shape == (2, 16)
    assert any(found["not_finite"].values())
    assert re.search(message, text), text
    kept = checkpoint.steps(run_folder / "checkpoints")
    assert not [s for s in kept if checkpoint.damage(run_folder / "checkpoints" / f"step-{s}")]
    if 2 in kept:
        assert {p: p.read_bytes() for p in before} == before


def test_a_tokenizer_that_panics(tmp_path: Path) -> None:
    """A panic of a library in Rust is no Exception; what stops a program on purpose is none of it."""
    tiny.model().save_pretrained(tmp_path)
    of_bytes().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    parts = [{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    changed = {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": {}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": changed}))
    with pytest.raises(JointNASError, match="cannot be loaded: no entry found for key"):
        loading.load_tokenizer(ModelConfig(source=str(tmp_path)))
    with pytest.raises(KeyboardInterrupt), panics():
        raise KeyboardInterrupt
