"""A device of a test: the stages of a GPU run, each a process that writes rows slowly and knows those that are there.

python -m tests.benchmarks.stub_device [options of benchmarks.gpu_run]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import gpu_run, gpu_stages
from benchmarks.gpu_stages import Stage
from benchmarks.rows import same

STAGES = gpu_stages.names(0)[:5]
# A command: eight rows, each longer than one buffer of a file. It starts fast, for many are started.
BENCH = """
import sys, time
from pathlib import Path
from benchmarks.rows import append, read, same
file, stage, command = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
known = set(map(same, read(file)))
for m in range(8):
    row = {"topic": stage, "name": "ours", "params": {"m": m, "command": command}, "median": m, "unit": "s"}
    if same(row) not in known:
        time.sleep(0.004)
        append(file, {**row, "extra": {"long": "µ" * 3000}})
"""


def rows() -> list[str]:
    """What a complete run holds, as `rows.same` names it."""
    return [
        same({"topic": stage, "name": "ours", "params": {"m": m, "command": command}})
        for stage in STAGES
        for command in range(1 + (stage == "gemm"))
        for m in range(8)
    ]


def plan(out: Path, _: argparse.Namespace) -> list[Stage]:
    run = [sys.executable, "-S", "-c", BENCH, str(out / "rows.jsonl")]
    return [
        Stage(name, 10, [[*run, name, str(command)] for command in range(1 + (name == "gemm"))], always=i == 0)
        for i, name in enumerate(STAGES)
    ]


if __name__ == "__main__":
    gpu_run.heed_signals()
    sys.exit(gpu_run.main(sys.argv[1:], plan))
