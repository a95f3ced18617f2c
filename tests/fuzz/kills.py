"""A small search, killed at random points, ends as one that was not: ``python -m tests.fuzz.kills --kills 200``.

A child process goes through the search, its distillation and the export, as `jointnas search --resume auto` does, and
is killed (SIGKILL): by its parent after a random time, or by itself before, in the middle of or after one of the calls
that change files, so that writes are hit far more often than time alone would. It is started again until it ends; then
every file is compared with those of a search that nobody killed. Children are forked: imports are paid once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from jointnas import checkpoint, metrics
from jointnas.bilevel import optimise
from jointnas.initialise import store
from jointnas.pipeline import finish
from jointnas.run_folder import load_supernet
from tests.jointnas import tiny

TIMED = {"seconds"}  # keys whose values differ between two runs
WRITERS: tuple[tuple[Any, str], ...] = (
    (os, "replace"), (os, "rename"), (os, "fsync"), (shutil, "rmtree"), (Path, "write_text"), (Path, "mkdir"),
    (checkpoint, "save_file"), (store, "save_file"), (metrics.Metrics, "write"),
)  # fmt: skip


def search(out: Path) -> None:
    """What `jointnas search --resume auto` does, with the tiny model; metrics and checkpoints fall on different steps.
    """
    config = tiny.config(
        out, resume="auto", tensorboard=False, target_latency_ms=0.9,
        search={"steps": 9, "save_every": 2, "log_every": 3, "gap_every": 6, "gap_batches": 1},
        quantizer={"options": {"samples": 6}},
        finetune={"steps": 5, "save_every": 2, "log_every": 3},
    )  # fmt: skip
    run = tiny.start(config)
    if (out / "choice.json").is_file():
        load_supernet(run)
    else:
        optimise(run)
    if not (out / "final").is_dir():
        finish(run)


# ---- a child --------------------------------------------------------------------------------------------------------


@dataclass
class Point:
    """Dies at the `at`-th call of WRITERS (0: never), and counts them."""

    at: int = 0
    where: str = "before"
    calls: int = 0

    def install(self) -> None:
        for owner, name in WRITERS:
            setattr(owner, name, self.wrapped(getattr(owner, name), name))

    def wrapped(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls != self.at:
                return call(*args, **kwargs)
            if self.where == "middle" and name == "write_text":
                call(args[0], args[1][: len(args[1]) // 2])
            elif self.where == "middle" and name == "save_file":
                call(*args, **kwargs)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            elif self.where == "middle" and name == "write":
                with open(args[0]._path, "ab") as file:
                    file.write(b'{"phase": "search", "st')
            elif self.where == "middle" and name == "rmtree":
                inside = sorted(Path(args[0]).glob("*"))
                if inside and inside[0].is_file():
                    inside[0].unlink()
            elif self.where == "after":
                call(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        return counted


def child(out: Path, point: Point, messages: Path, calls: Path | None = None) -> int:
    """The process id of a child that searches."""
    pid = os.fork()
    if pid:
        return pid
    try:
        sys.stdout = sys.stderr = open(messages, "w")  # noqa: SIM115
        logging.getLogger().handlers = [logging.StreamHandler(sys.stderr)]
        point.install()
        search(out)
        if calls is not None:
            with open(calls, "w") as file:
                file.write(str(point.calls))
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def ended(pid: int, seconds: float | None = None) -> int:
    """How a child ended (a negative number: the signal), killed after so many seconds if it has not."""
    deadline = time.monotonic() + (60 if seconds is None else seconds)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if seconds is None and code == -signal.SIGKILL:
                raise AssertionError("a search hangs")
            return code
        time.sleep(0.002)


# ---- what is compared -----------------------------------------------------------------------------------------------


def untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in TIMED}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def contents(out: Path) -> dict[str, Any]:
    """Everything that a run left, by path, without times; of the newest checkpoint, as others may be gone."""
    newest, found = checkpoint.latest(out / "checkpoints"), {}
    assert newest is not None
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = str(path.relative_to(out))
        if "checkpoints" in path.parts and newest not in path.parents:
            continue
        if path.name in ("manifest.json", "COMPLETE", "config.yaml"):  # hashes of times; the folder's own name
            continue
        if path.suffix == ".json":
            found[name] = untimed(json.loads(path.read_text()))
        elif path.suffix == ".safetensors" and path.parent.name == "quantizers":
            with safe_open(path, "pt") as file:  # whose header has times, too
                rows = untimed(json.loads(file.metadata()["rows"]))
                found[name] = rows, {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118
        elif path.suffix == ".jsonl":
            found[name] = [untimed(json.loads(line)) for line in path.read_text().splitlines()]
        else:
            found[name] = path.read_bytes()
    return found


def faults(out: Path, whole: dict[str, Any]) -> list[str]:
    """In what a finished run differs from the whole one."""
    found = contents(out)
    return [name for name in sorted({*whole, *found}) if found.get(name) != whole.get(name)]


def left_over(out: Path) -> list[str]:
    return [str(p) for p in out.rglob(".*") if p.name.endswith((".tmp", ".old"))]


# ---- the campaign ---------------------------------------------------------------------------------------------------


@dataclass
class Result:
    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    starts: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def campaign(root: Path, kills: int, seed: int) -> Result:
    """So many kills of searches below a folder."""
    torch.set_num_threads(1)
    began, generator, result = time.monotonic(), random.Random(seed), Result()
    messages, counted = root / "messages", root / "calls"
    for name in ("warm", "whole"):  # the first fills caches that forked children share
        start = time.monotonic()
        if name == "warm":
            search(root / name)
        else:
            assert ended(child(root / name, Point(), messages, counted)) == 0, messages.read_text()
    lasts, calls = time.monotonic() - start, int(counted.read_text())
    whole = contents(root / "whole")
    assert not faults(root / "warm", whole), faults(root / "warm", whole)
    while result.kills.total() < kills:
        out = root / f"run-{result.runs}"
        result.runs += 1
        left = calls  # of a search that is not killed again, roughly
        while True:
            result.starts += 1
            by_time = generator.random() < 0.4
            where = generator.choice(("before", "middle", "after"))
            point = Point() if by_time else Point(generator.randint(1, left), where)
            seconds = generator.uniform(0, lasts * left / calls) if by_time else None
            if result.kills.total() >= kills:
                point, seconds = Point(), None
            code = ended(child(out, point, messages), seconds)
            if code == 0:
                break
            if code != -signal.SIGKILL:
                result.failures.append(f"start {result.starts}: {messages.read_text()[-1500:]}")
                break
            result.kills["time" if by_time else f"{where} a write"] += 1
            left = max(calls // 8, left - point.at)
            newest = max(checkpoint.steps(out / "checkpoints"), default=None)  # older ones may be half removed
            if newest is not None and (damage := checkpoint.damage(out / "checkpoints" / f"step-{newest}")):
                result.failures.append(f"checkpoint {newest} after start {result.starts}: {damage}")
        if code == 0:
            differing = faults(out, whole) + left_over(out)
            result.failures += [f"{out.name} differs: {', '.join(differing)}"] if differing else []
            if not differing:
                shutil.rmtree(out)
    result.seconds = time.monotonic() - began
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    result = campaign(root, arguments.kills, arguments.seed)
    how = ", ".join(f"{count} {name}" for name, count in sorted(result.kills.items()))
    print(
        f"{result.kills.total()} kills ({how}) of {result.runs} searches, {result.starts} starts, "
        f"{result.seconds:.0f} s: {len(result.failures)} failures"
    )
    print("\n".join(result.failures[:20]))
    if not result.failures:
        shutil.rmtree(root)
    return min(1, len(result.failures))


if __name__ == "__main__":
    sys.exit(main())
