"""A device of a test: the stages of a GPU run, each a process that writes rows slowly and knows those that are there.

python -m tests.benchmarks.stub_device [options of benchmarks.gpu_run]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks import gpu_run, gpu_stages
from benchmarks.gpu_stages import Stage
from benchmarks.rows import Row, append, read, same

STAGES = gpu_stages.names(0)[:5]
ROWS = 8  # of a command


def rows(stage: str, command: int) -> list[Row]:
    """What a command measures. They are long: more than one buffer of a file."""
    shape = {"unit": "s", "extra": {"long": "µ" * 3000}}
    return [
        {"topic": stage, "name": "ours", "params": {"m": m, "c": command}, "median": m, **shape} for m in range(ROWS)
    ]


def bench(file: Path, stage: str, command: int) -> None:
    known = {same(row) for row in read(file)}
    for row in rows(stage, command):
        if same(row) not in known:
            time.sleep(0.004)
            append(file, row)


def plan(out: Path, _: argparse.Namespace) -> list[Stage]:
    run = [sys.executable, "-S", "-m", __spec__.name, "bench", str(out / "rows.jsonl")]
    return [
        Stage(name, 10, [[*run, name, str(command)] for command in range(2 if name == "gemm" else 1)], always=i == 0)
        for i, name in enumerate(STAGES)
    ]


if __name__ == "__main__":
    if sys.argv[1] == "bench":
        bench(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        gpu_run.heed_signals()
        sys.exit(gpu_run.main(sys.argv[1:], plan))
