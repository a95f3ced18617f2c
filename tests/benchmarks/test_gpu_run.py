"""A GPU run on a stub device: cut anywhere it loses no row, and a resumed one completes; it never exceeds its limit."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_run, gpu_stages
from benchmarks.gpu_stages import ROOT, Stage
from benchmarks.rows import append, read, same
from tests.benchmarks import stub_device

PYTHON = [sys.executable, "-S", "-c"]


def states(out: Path) -> dict[str, str]:
    return {stage: found["state"] for stage, found in json.loads((out / "state.json").read_text()).items()}


def start(out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.benchmarks.stub_device", "--out", str(out), "--resume"]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    return subprocess.Popen(
        [*command, "--stages", ",".join(stub_device.STAGES)], cwd=ROOT, env=env, stdout=subprocess.DEVNULL,
        process_group=0,
    )  # fmt: skip


def complete(out: Path) -> None:
    assert start(out).wait() == 0
    assert sorted(map(same, read(out / "rows.jsonl"))) == sorted(stub_device.rows()), "a row is lost, or there twice"
    assert states(out) == dict.fromkeys(stub_device.STAGES, "done")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["group", "run alone", "asked to end"])
def test_cut_at_random_seconds(how: str, tmp_path: Path) -> None:
    """17 times, three ways: no row that was written is ever lost or doubled, and --resume completes."""
    began = time.monotonic()
    complete(tmp_path / "0")
    longest, dice, number, cuts = time.monotonic() - began, random.Random(how), 1, 0
    while cuts < 17:
        out = tmp_path / str(number)
        file = out / "rows.jsonl"
        before = file.read_bytes() if file.exists() else b""
        process = start(out)
        try:
            process.wait(dice.uniform(0, 0.8 * longest))
            complete(out)
            number += 1
            continue
        except subprocess.TimeoutExpired:
            cuts += 1
        if how == "group":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.send_signal(signal.SIGKILL if how == "run alone" else signal.SIGTERM)
        process.wait()
        after = file.read_bytes() if file.exists() else b""
        assert after.startswith(before)
        found = [same(row) for row in read(file)]
        assert len(found) == len(set(found))
    complete(tmp_path / str(number))


@pytest.mark.parametrize("part", [0, 1, 2])
def test_caps_add_up(part: int, tmp_path: Path) -> None:
    """To less than the limit of a part, which ends within five, eight and nine minutes."""
    args = argparse.Namespace(more=[], commit=None, package=None, tests=None, workers=8, model=None, table=None)
    stages = [stage for stage in gpu_stages.plan(tmp_path, args) if stage.name in gpu_stages.names(part)]
    assert [stage.name for stage in stages] == gpu_stages.names(part), "the order of worth"
    limit = gpu_stages.LIMITS[part]
    assert sum(stage.cap for stage in stages) < limit - gpu_run.RESERVE
    assert limit < {0: 540, 1: 300, 2: 480}[part]
    parts = gpu_run.shares(stages, limit)
    assert sum(parts) == pytest.approx(limit)
    assert all(share >= stage.cap for share, stage in zip(parts, stages, strict=True))


def test_all_tests_of_a_gpu_are_run_never_run_ones_first() -> None:
    files = [Path(file).stem for file in gpu_stages.tests()]
    assert sorted(files) == sorted(f.stem for f in (ROOT / "tests" / "gpu").glob("test_*.py"))
    assert set(files[: len(gpu_stages.NEVER_RUN)]) == set(gpu_stages.NEVER_RUN)


def run(monkeypatch: pytest.MonkeyPatch, out: Path, stages: list[Stage], *options: str) -> int:
    monkeypatch.setattr(gpu_run, "LEAST", 0.01)
    monkeypatch.setattr(gpu_run, "RESERVE", 0.1)
    names = ",".join(stage.name for stage in stages)
    return gpu_run.main(["--out", str(out), "--stages", names, *options], lambda *_: stages)


def test_the_limit_holds_whatever_a_stage_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that ignore signals, and whose children hold on."""
    file = tmp_path / "alive"
    child = f"import time\nwhile True: time.sleep(0.05); open({str(file)!r}, 'w').write(str(time.time()))"
    stubborn = "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    stubborn += f"subprocess.Popen([sys.executable, '-S', '-c', {child!r}]); time.sleep(60)"
    stages = [Stage(name, 10, [[*PYTHON, stubborn]]) for name in "abc"]
    began = time.monotonic()
    assert run(monkeypatch, tmp_path / "out", stages, "--limit", "3") == 1
    assert time.monotonic() - began < 4
    assert states(tmp_path / "out") == dict.fromkeys("abc", "cut")
    time.sleep(0.5)
    last = file.read_text() if file.exists() else ""
    time.sleep(0.5)
    assert not file.exists() or file.read_text() == last, "a child is alive"


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = [*PYTHON, "print('fine')"]
    stages = [
        Stage("load", 10, [fine], always=True),
        Stage("test", 10, [[*PYTHON, "raise SystemExit('error: no compiler')"], fine]),
        Stage("gemm", 10, [fine, [*PYTHON, "import time; time.sleep(60)"]]),
        Stage("step", 10, [["no-such-program"]]),
        Stage("decode", 10, [fine], needs=("no_such_package",)),
        Stage("smollm2", 10, [fine], without="no folder"),
        Stage("masks", 10, [fine]),
    ]
    assert run(monkeypatch, tmp_path, stages, "--cap", "gemm=1") == 1
    summary = (tmp_path / "summary.txt").read_text()
    for line in ("[test] exit 1", "no compiler", "[gemm] cut", "[step] exit 127", "[decode] left out", "no folder"):
        assert line in summary
    assert "[decode] left out 0 s: needs no_such_package, not installed" in summary
    assert (tmp_path / "log.txt").read_text().count("\nfine") == 4
    assert {f.name for f in tmp_path.iterdir()} == {"log.txt", "state.json", "summary.txt"}
    with pytest.raises(SystemExit):  # not by accident
        run(monkeypatch, tmp_path, stages)
    stages[2] = Stage("gemm", 10, [[*PYTHON, "raise SystemExit('again')"], fine])
    run(monkeypatch, tmp_path, stages, "--resume")
    assert states(tmp_path)["gemm"] == "done", "from the command that was cut"
    assert (tmp_path / "log.txt").read_text().count("\nfine") == 6, "load once more, and gemm's second command"


@pytest.mark.slow
def test_outcomes_of_tests_survive_a_cut(tmp_path: Path) -> None:
    """What passed or was skipped is not run again; two workers."""
    file, cases = tmp_path / "tests.jsonl", tmp_path / "test_cases.py"
    cases.write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(4))\ndef test_it(n):\n"
        "    if n == 1: pytest.skip('no')\n    assert n != 2 or False\n"
    )
    for workers, counts in (("2", (2, 1, 1)), ("0", (0, 1, 0)), ("2", (0, 1, 0))):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu_tests", "--outcomes", str(file)]
        before = len(read(file))
        subprocess.run(
            [*command, "-n", workers, "-c", os.devnull, "--rootdir", str(tmp_path), str(cases)], cwd=tmp_path,
            env=dict(os.environ, PYTHONPATH=str(ROOT)), stdout=subprocess.DEVNULL,
        )  # fmt: skip
        new = [row["outcome"] for row in read(file)[before:]]
        assert tuple(new.count(kind) for kind in ("passed", "failed", "skipped")) == counts
    summary = gpu_run.outcomes_summary(read(file))
    assert summary[0] == "passed=2 failed=1 skipped=1"
    assert "test_it[2]" in summary[1]
    assert "assert" in summary[1]


def test_a_line_that_was_cut_is_no_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    append(file, {"a": 1})
    file.write_bytes(file.read_bytes() + b'{"b": "\xc2')
    assert read(file) == [{"a": 1}]
    append(file, {"c": "µ"})
    assert read(file) == [{"a": 1}, {"c": "µ"}]
