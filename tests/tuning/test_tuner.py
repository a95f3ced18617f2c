"""Tuning on a device that is not there: costs are known, some plans compute wrong values, runs are cut anywhere."""

from __future__ import annotations

import json
import logging
import math
import os
import random
from pathlib import Path

import pytest

from jointnas_kernels import tuned
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.lowbit.choice import Candidate, candidates
from jointnas_kernels.ops.lowbit.cuda import Plan
from jointnas_kernels.tuned import Shape, Tuned
from jointnas_kernels.tuning import Job, tune
from tests.tuned.samples import H100, H200, KERNELS

SHAPES = [Shape(4, 16, 4096, 4096), Shape(2, 8, 1024, 2048), Shape(8, 8, 4096, 1024)]
JOBS = [Job(shape, least, tokens) for least, tokens in ((1, 1), (9, 16), (129, 256)) for shape in SHAPES]


class Device:
    """Costs by seed; a share of the candidates is wrong, and those are the fastest."""

    def __init__(self, wrong: float = 0.0, noise: float = 0.01, usual_is: float | None = None) -> None:
        self.wrong, self.noise, self.usual_is = wrong, noise, usual_is
        self.samples, self.made, self.seconds = 0, list[tuple[Shape, int]](), 0.0
        self.cut_at = math.inf

    def __call__(self, shape: Shape, tokens: int) -> Contest:
        self.made.append((shape, tokens))
        return Contest(self, shape, tokens)

    def clock(self) -> float:
        return self.seconds


class Contest:
    def __init__(self, device: Device, shape: Shape, tokens: int) -> None:
        self.device, self.random = device, random.Random(f"{shape} {tokens}")
        self.candidates = candidates(tokens, shape, 132)
        self.usual = self.candidates[0]
        self.costs = {c: 1 + random.Random(f"{shape} {c}").random() for c in self.candidates}
        self.bad = {c for c in self.candidates[1:] if random.Random(f"wrong {c}").random() < device.wrong}
        self.costs |= {c: self.costs[c] / 10 for c in self.bad}
        if device.usual_is is not None:
            self.costs[self.usual] = device.usual_is
        self.checked: set[Candidate] = set()

    def wrong(self, candidate: Candidate) -> str:
        self.checked.add(candidate)
        return "3 of 7 outputs are wrong" if candidate in self.bad else ""

    def sample(self, candidate: Candidate) -> float:
        assert candidate in self.checked, "timed before it was checked"
        self.device.samples += 1
        self.device.seconds += 0.001
        if self.device.samples >= self.device.cut_at:
            raise KeyboardInterrupt
        return self.costs[candidate] * math.exp(self.random.gauss(0, self.device.noise))


def run(out: Path, device: Device, jobs: list[Job] = JOBS, **options: object) -> Tuned:
    given = {"progress": False, "clock": device.clock, **options}
    return tune(jobs, device, out, H200, KERNELS, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [0.0, 0.3])
def test_finds_the_fastest_right_plan(wrong: float, tmp_path: Path) -> None:
    out, device = tmp_path / "new" / "x.json", Device(wrong)
    result = run(out, device)
    assert tuned.read(out) == result
    assert (result.device, result.kernels) == (H200, KERNELS)
    assert {(row.shape, row.tokens) for row in result.rows} == {(job.shape, job.tokens) for job in JOBS}
    for row in result.rows:
        contest = Contest(device, row.shape, row.tokens)
        right = {c: cost for c, cost in contest.costs.items() if c not in contest.bad}
        best = contest.usual if row.kernel is None else Candidate(row.kernel, row.plan and Plan(*row.plan))
        assert right[best] <= 1.05 * min(right.values())
        assert row.ms == pytest.approx(right[best], rel=0.05)
        assert row.usual_ms == pytest.approx(right[contest.usual], rel=0.05)


def test_nothing_is_stored_where_the_usual_plan_is_the_fastest(tmp_path: Path) -> None:
    result = run(tmp_path / "x.json", Device(usual_is=1.0))
    assert [row.kernel for row in result.rows] == [None] * len(JOBS)
    assert all(row.ms == row.usual_ms for row in result.rows)


def test_a_plan_holds_from_where_it_still_beats_the_usual_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Device(usual_is=3.0)
    assert [row.least for row in run(tmp_path / "a.json", slow, JOBS[3:6]).rows] == [9] * 3
    ends = [tokens for _, tokens in slow.made]
    assert ends == [16, 9] * 3

    usual = Contest.__init__

    def fast_with_few(self: Contest, device: Device, shape: Shape, tokens: int) -> None:
        usual(self, device, shape, tokens)
        self.costs[self.usual] = 0.5 if tokens == 9 else 3.0

    monkeypatch.setattr(Contest, "__init__", fast_with_few)
    assert [row.least for row in run(tmp_path / "b.json", Device(), JOBS[3:6]).rows] == [16] * 3


@pytest.mark.parametrize("cut_at", [1, 200, 900, 1500, 2500])
def test_a_cut_run_loses_one_product_at_most_and_goes_on(cut_at: int, tmp_path: Path) -> None:
    out, device = tmp_path / "x.json", Device()
    device.cut_at = cut_at
    with pytest.raises(KeyboardInterrupt):
        run(out, device)
    there = tuned.read(out)
    begun = list(dict.fromkeys((shape, tokens) for shape, tokens in device.made if tokens != 9 and tokens != 129))
    assert (len(there.rows) if there else 0) == len(begun) - 1
    assert [file.name for file in tmp_path.iterdir()] == (["x.json"] if there else [])
    again = Device()
    result = run(out, again, resume=True)
    done = {(row.shape, row.tokens) for row in there.rows} if there else set()
    assert not done & {pair for pair in again.made if pair[1] not in (9, 129)}, "measured twice"
    assert len(result.rows) == len(JOBS)
    assert set(there.rows if there else ()) <= set(result.rows)
    measured = again.samples
    assert run(out, again, resume=True).rows == result.rows
    assert again.samples == measured


def test_a_cut_while_writing_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "x.json"
    run(out, Device(), JOBS[:1])
    before = out.read_bytes()

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        run(out, Device(), JOBS[:2], resume=True)
    assert out.read_bytes() == before


def test_no_product_is_begun_after_the_seconds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    device = Device()
    one = Device()
    run(tmp_path / "one.json", one, JOBS[:1])
    with caplog.at_level(logging.INFO):
        result = run(tmp_path / "x.json", device, seconds=2.5 * one.seconds)
    assert 2 <= len(result.rows) <= 4
    assert f"{len(JOBS) - len(result.rows)} of {len(JOBS)} products are left" in caplog.text
    first = JOBS[: len(result.rows)]
    assert {(row.shape, row.tokens) for row in result.rows} == {(job.shape, job.tokens) for job in first}


def test_a_usual_plan_that_is_wrong_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Contest, "wrong", lambda self, candidate: "refused" if candidate == self.usual else "")
    assert run(tmp_path / "x.json", Device(), JOBS[:1]).rows == ()
    assert "does not work: refused" in caplog.text
    assert not (tmp_path / "x.json").exists()


def test_what_cannot_be_continued(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    run(out, Device(), JOBS[:1])
    with pytest.raises(JointNASError, match="exists; pass --resume true"):
        run(out, Device())
    for device, kernels, why in ((H100, KERNELS, "another device"), (H200, "0" * 16, "other kernels")):
        with pytest.raises(JointNASError, match=f"cannot be continued: it is of {why}"):
            tune(JOBS, Device(), out, device, kernels, resume=True, progress=False)
    out.write_text(json.dumps({"format": "other"}))
    with pytest.raises(JointNASError, match="no file of tuned plans"):
        run(out, Device(), resume=True)


def test_of_two_rows_the_nearer_count_is_found(tmp_path: Path) -> None:
    out, shape = tmp_path / "x.json", SHAPES[0]
    run(out, Device(usual_is=3.0), [Job(shape, 9, 16)])
    run(out, Device(usual_is=3.0), [Job(shape, 7, 12)], resume=True)
    file = tuned.read(out)
    assert file is not None
    plans = tuned.Plans([file])
    assert [plans.find(tokens, shape).tokens for tokens in (7, 10, 12, 13, 16)] == [12, 12, 12, 16, 16]  # type: ignore[union-attr]
