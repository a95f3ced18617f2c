"""Where results go is asked before any work: every verb that writes, every way in which a path cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jointnas import cli, config
from jointnas.config import RunConfig
from jointnas_kernels.errors import JointNASError, writable
from tests.jointnas import tiny
from tests.latency.tables import synthetic

WRITERS = {
    "search": ["search"],
    "compare": ["compare"],
    "demo": ["demo"],
    "quantize": ["quantize", "--method=rtn"],
    "profile": ["profile", "--progress=false"],
    "table-merge": ["table", "merge", "{root}/good.jsonl", "{root}/good.jsonl"],
    "table-fill": ["table", "fill", "{root}/good.jsonl"],
    "table-draw": ["table", "draw", "{root}/good.jsonl"],
    "export": ["export", "--run", "{root}/run"],
    "bench-masks": ["bench", "masks", "--tiny", "--device=cpu"],
    "bench-step": ["bench", "step", "--tiny", "--device=cpu"],
    "bench-search": ["bench", "search", "--table={root}/good.jsonl"],
}
IN_A_RUN = {"eval": [], "finetune": ["--run"], "report": ["--run"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file, a table, and what looks like a finished run."""
    root = tmp_path_factory.mktemp("outputs")
    (root / "file").write_text("x")
    synthetic(config.SpaceConfig(**tiny.SPACE).build()).save(root / "good.jsonl")
    (root / "run" / "final").mkdir(parents=True)
    (root / "run" / "config.yaml").write_text(config.dump(RunConfig()))
    return root


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("work began before the output was asked for")

    for name in ("jointnas.loading.load_model", "jointnas.loading.model_config", "jointnas.data.load",
                 "jointnas.preparation.profile", "jointnas_kernels.latency.LatencyTable.load",
                 "benchmarks.bench_masks.check_variants", "benchmarks.models.build_llama"):  # fmt: skip
        monkeypatch.setattr(name, work)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a verb that ends with exit code 2."""
    assert cli.main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jointnas")]
    return line


@pytest.mark.parametrize("name", WRITERS)
def test_below_a_file(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(root.rglob("*"))
    arguments = [a.replace("{root}", str(root)) for a in WRITERS[name]]
    for out in (root / "file" / "a", root / "file" / "a" / "b.jsonl"):
        assert f"'{root}/file' is a file, not a folder" in refused([*arguments, "--out", str(out)], capsys)
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("name", WRITERS)
def test_no_permission(
    name: str, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of somebody else, or on a disk that is mounted for reading."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode, **k: mode & os.W_OK == 0 and access(p, mode, **k))
    arguments = [a.replace("{root}", str(root)) for a in WRITERS[name]]
    message = f"'{root}' may not be written to"
    assert message in refused([*arguments, "--out", str(root / "new" / "b.jsonl")], capsys)


@pytest.mark.parametrize("verb", IN_A_RUN)
def test_a_run_that_may_not_be_written_to(
    verb: str, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert f"'{root}/run' may not be written to" in refused([verb, *IN_A_RUN[verb], str(root / "run")], capsys)


def test_what_is_of_the_other_kind(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("search", "demo"):
        assert f"'{root}/file' is a file, not a folder" in refused([verb, "--out", str(root / "file")], capsys)
    for arguments in (["table", "draw", str(root / "good.jsonl")], ["profile", "--resume"]):
        line = refused([*arguments, "--out", str(root / "run")], capsys)
        assert f"'{root}/run' is a folder, not a file" in line


def test_paths_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with spaces, other alphabets, relative ones, links; nothing is made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "old.jsonl").write_text("")
    before = sorted(tmp_path.iterdir())
    for path in ("a b/ç/漢字", "new", "./x/../y", "link", "link/deep/er", str(tmp_path)):
        assert writable(path) == Path(path)
    for path in ("old.jsonl", "real/table.jsonl", "a/b/c.jsonl"):
        assert writable(path, "file") == Path(path)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "dangling/x"], ids=["long", "zero", "dangling"])
def test_paths_that_cannot(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(JointNASError, match=r"^table .*(cannot be made|is a file)"):
        writable(path, what="table")
