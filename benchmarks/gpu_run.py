"""Everything that needs a GPU, one command, under nine minutes; whatever it is cut at stays, and can be continued.

    python -m benchmarks.gpu_run [--out DIR] [--part 1|2] [--stages NAME,...] [--limit SECONDS] [--resume]

Part 1 says whether results are right: load and smoke, tests, memory checker, and lists the launches of a step. Part 2
what they are: GEMMs against peers, kernels, steps, a latency table with calibration, decoding, a search
(gpu_stages.py). Each stage is a process group with its own share of the time; one that fails or is cut never stops the
next. A cut one goes on at the end if time is left.

DIR gets, as it is known: rows.jsonl (all measurements), tests.jsonl (the outcome of each test), log.txt (all output),
state.json (stages: done, failed, cut or left out), at the end summary.txt, which is printed last. ``--resume`` leaves
out finished stages, and in the others what has its row; take DIR along where it continues on another machine. The
interpreter that runs this runs everything. ``python benchmarks/render.py --add DIR/rows.jsonl`` files the rows.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import gpu_stages
from benchmarks.gpu_package import CACHE, SITE
from benchmarks.gpu_stages import ROOT, Stage
from benchmarks.rows import Row, read

RESERVE = 4.0  # seconds at the end, for the summary
LEAST = 5.0  # seconds with which a stage is still started
FINISHED = ("done", "failed")
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
Plan = Callable[[Path, argparse.Namespace], list[Stage]]


def die_with(parent: int) -> None:
    """Runs in a stage before it starts: where only this run is killed, nobody else would end its stage."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # killed before it was asked for
        os._exit(1)


def shares(stages: Sequence[Stage], seconds: float) -> list[float]:
    """What each stage may take of so many seconds, in proportion to its cap; their sum is no more."""
    total = sum(stage.cap for stage in stages)
    return [seconds * stage.cap / total for stage in stages]


class Run:
    """The folder of a run, and what became of its stages."""

    def __init__(self, out: Path, limit: float) -> None:
        self.out, self.deadline = out, time.monotonic() + limit - RESERVE
        self.log, self.file = out / "log.txt", out / "state.json"
        self.state: dict[str, dict[str, Any]] = {}
        if self.file.is_file():
            self.state = json.loads(self.file.read_text())

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def note(self, stage: str, **values: Any) -> None:
        """Replaces state.json as a whole, so that a cut leaves the old or the new one."""
        self.state[stage] = self.state.get(stage, {}) | values
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(self.state, indent=1))
        new.replace(self.file)

    def all(self, stages: Sequence[Stage], at_most: dict[str, float]) -> None:
        """In order; those that were cut go on if time is left."""
        self.each(stages, at_most)
        self.each([s for s in stages if s.resumes and self.state[s.name]["state"] == "cut"], at_most)

    def each(self, stages: Sequence[Stage], at_most: dict[str, float]) -> None:
        for i, stage in enumerate(stages):
            cap = shares(stages[i:], self.left())[0]
            if cap < LEAST:
                self.note(stage.name, state="cut", reason="no time left")
            else:
                self.one(stage, min(cap, at_most.get(stage.name, cap)))

    def one(self, stage: Stage, cap: float) -> None:
        """One stage, from the command that it was cut at; cut when its time is over."""
        reason, before = stage.reason(), self.state.get(stage.name, {})
        if reason:
            self.note(stage.name, state="left out", reason=reason)
            return
        print(f"--- {stage.name}, up to {cap:.0f} s ({self.left():.0f} s left)", flush=True)
        began, spent, first = time.monotonic(), before.get("seconds", 0.0), self.log_size()
        code, done = (0, 0) if stage.always else (before.get("code", 0), before.get("commands", 0))
        self.note(stage.name, state="cut", commands=done, code=code, reason="", seconds=spent)  # until it is not
        try:
            for command in stage.commands[done:]:
                found = self.process(stage, command, began + cap - time.monotonic())
                if found is None:
                    return
                code, done = found or code, done + 1
                self.note(stage.name, commands=done, code=code)
            self.note(stage.name, state="failed" if code else "done")
        finally:
            more = {"seconds": spent + time.monotonic() - began, "problems": failures(self.since(first))}
            self.note(stage.name, **more)

    def process(self, stage: Stage, command: list[str], seconds: float) -> int | None:
        """Its exit status, or None if it was cut. A group of its own, but no session: that would outlive more cuts."""
        env = dict(os.environ, PYTHONUNBUFFERED="1", TOKENIZERS_PARALLELISM="false", TRITON_CACHE_DIR=str(CACHE))
        env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "python", SITE, env.get("PYTHONPATH", ""))))
        with open(self.log, "ab", buffering=0) as log:
            log.write(f"\n===== {stage.name}: {' '.join(command)}\n".encode())
            try:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=env | stage.env, stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT, process_group=0, preexec_fn=partial(die_with, os.getpid()),
                )  # fmt: skip
            except OSError as error:
                log.write(f"FAILED to start: {error}\n".encode())
                return 127
            try:
                return process.wait(max(0.1, seconds))
            except subprocess.TimeoutExpired:
                return None
            finally:  # also what the command left behind
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:  # stuck in the driver: not waited for
                    log.write(b"FAILED to end\n")

    def log_size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def since(self, first: int) -> str:
        if not self.log.exists():
            return ""
        with open(self.log, "rb") as file:
            file.seek(first)
            return file.read().decode(errors="replace")

    def summary(self, stages: Sequence[Stage]) -> str:
        lines = []
        for stage in stages:
            found = self.state[stage.name]
            says = f"exit {found['code']}" if found["state"] == "failed" else found["state"]
            reason = f": {found['reason']}" if found.get("reason") else ""
            lines.append(f"[{stage.name}] {says} {found.get('seconds', 0):.0f} s{reason}")
            lines += outcomes_summary(read(self.out / "tests.jsonl")) if stage.name == "test" else []
            lines += [f"  {line}" for line in found.get("problems", [])]
        return "\n".join(lines + rows_summary(read(self.out / "rows.jsonl")))[:9800]


def outcomes_summary(outcomes: list[Row], most: int = 15) -> list[str]:
    """Counts, then one line per failed test."""
    last = {row["test"]: row for row in outcomes}.values()
    counts = {kind: sum(row["outcome"] == kind for row in last) for kind in ("passed", "failed", "skipped")}
    failed = [f"  {row['test']}: {row['message'].strip()[:200]}" for row in last if row["outcome"] == "failed"]
    return [" ".join(f"{kind}={n}" for kind, n in counts.items()), *failed[:most]]


def rows_summary(rows: list[Row], most: int = 110) -> list[str]:
    """One short line per row."""
    rows = [row for row in rows if "name" in row and "kernel" not in row["params"]]  # of the kernels a step has dozens
    lines = []
    for row in rows[:most]:
        params = " ".join(f"{v}" for v in row["params"].values())
        extra = {k: v for k, v in row["extra"].items() if k in ("ratio", "share", "peak", "loop_over")}
        shown = " ".join(f"{k}={v:.3g}" for k, v in extra.items() if isinstance(v, int | float))
        scale, unit = (1e3, "ms") if row["unit"] == "s" else (1.0, row["unit"])
        lines.append(f"{row['name'][:24]} {params[:56]} {row['median'] * scale:.4g} {unit} {shown}")
    return lines + ([f"… {len(rows) - most} more rows"] if len(rows) > most else [])


def failures(output: str, most: int = 6) -> list[str]:
    """The lines of a log that say what went wrong."""
    marks = ("FAILED", "Error", "error:", "WrongResult", "Invalid __global__", "Race reported", "out of memory")
    found = [line.strip()[:220] for line in output.splitlines() if any(m in line for m in marks)]
    return list(dict.fromkeys(found))[:most]


def heed_signals() -> None:
    """So that what is asked to end takes its stage along, and says where it was."""

    def stop(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)


def main(argv: list[str] | None = None, plan: Plan = gpu_stages.plan) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "build" / "gpu"), help="folder for the files")
    parser.add_argument("--part", type=int, choices=(0, 1, 2), default=0, help="1: correctness, 2: speed, 0: both")
    parser.add_argument("--stages", help="comma-separated, instead of a part's")
    parser.add_argument("--limit", type=float, help="seconds for all stages together")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--cap", action="append", default=[], help="STAGE=SECONDS at most, more than once")
    parser.add_argument("--package", help="what `python -m benchmarks.gpu_package build` made, where it is elsewhere")
    parser.add_argument(
        "--tests", nargs="+", help="what the test stage runs (default: tests/gpu, never-run ones first)"
    )
    parser.add_argument("--workers", type=int, default=8, help="pytest processes: compiling kernels is host work")
    parser.add_argument("--model", help="folder of SmolLM2, for its search")
    parser.add_argument("--table", help="latency table for the stage `search`")
    parser.add_argument("--more", action="append", default=[], help="STAGE='further options of its commands'")
    parser.add_argument("--commit", help="recorded in the rows when the tree has no git history")
    args = parser.parse_args(argv)
    out, started = Path(args.out).resolve(), time.monotonic()
    stages = {stage.name: stage for stage in plan(out, args)}
    asked = [s for s in args.stages.split(",") if s] if args.stages else gpu_stages.names(args.part)
    for name in asked:
        if name not in stages:
            parser.error(f"unknown stage {name!r}; allowed: {', '.join(stages)}")
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, args.limit or gpu_stages.LIMITS[args.part])
    chosen = [stages[name] for name in stages if name in asked]
    there = [s.name for s in chosen if s.name in run.state and not s.always]
    if there and not args.resume:
        parser.error(f"{out} holds {', '.join(there)} of a run: --resume continues it, another --out begins a new one")
    run.all([s for s in chosen if s.always or run.state.get(s.name, {}).get("state") not in FINISHED], {
        name: float(seconds) for name, seconds in (c.split("=") for c in args.cap)
    })  # fmt: skip
    text = run.summary(chosen)
    (out / "summary.txt").write_text(text + "\n")
    print(f"=== summary ({time.monotonic() - started:.0f} s)\n{text}", flush=True)
    return 0 if all(run.state[s.name]["state"] in ("done", "left out") for s in chosen) else 1


if __name__ == "__main__":
    heed_signals()
    sys.exit(main())
