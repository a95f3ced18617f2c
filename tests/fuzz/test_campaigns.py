"""The campaigns of `tests.fuzz.kills`, `disks` and `inputs`, short; and that they find what they are there for.

In processes of their own: one forks and is killed, the other limits its memory.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import disks, inputs

ROOT = Path(__file__).resolve().parents[2]


def campaign(name: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"tests.fuzz.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
    if done.returncode == disks.NOT_ALLOWED:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_killed_search_ends_as_the_whole_one() -> None:
    assert "10 kills" in campaign("kills", "--kills", "10", "--seed", "3")


@pytest.mark.slow
def test_a_search_on_small_disks_ends_as_the_whole_one() -> None:
    out = campaign("disks", "--disks", "4", "--seed", "1")
    assert ": 0 failures" in out
    assert int(out.split(" full disks")[0].split()[-1]) >= 4


@pytest.mark.slow
def test_changed_inputs_are_read_or_refused() -> None:
    out = campaign("inputs", "--cases", "300", "--seed", "1000")
    assert " 0 failures" in out
    assert all(kind in out for kind in inputs.KINDS)


def test_a_traceback_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(own: inputs.Inputs, generator: random.Random) -> None:
        raise KeyError("x")

    monkeypatch.setitem(inputs.KINDS, "choice", (broken, 1))
    own, tally = object.__new__(inputs.Inputs), inputs.Tally()
    own.work = tmp_path / "work"
    inputs.one(own, "choice", 1, tally)
    assert list(tally.failures) == [f"KeyError at fuzz/{Path(__file__).name}:{broken.__code__.co_firstlineno + 1}"]
