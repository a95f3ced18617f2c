"""Triton's cache of a GPU machine, filled where there is no GPU.

    python -m benchmarks.triton_ahead fill --cache FOLDER [--stages smoke test ...] [--seconds S]
    python -m benchmarks.triton_ahead check --cache FOLDER [--stages ...]

Run by a Python of the version that the GPU machine has, with the very same build of Triton and torch: keys hold a hash
of Triton, the version of its ptxas, the source of the kernel and of all that it calls, types, which arguments are 1 or
multiples of 16, constants and options. So no list of kernels is kept here: the commands of a GPU run's own stages
(gpu_stages.py) run on a GPU that is not there (absent_gpu.py), and what they launch is compiled. Each is a process that
is stopped when its time is over; what it compiled until then stays.

``check`` runs the same and fails if the compiler was called at all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks import gpu_stages
from benchmarks.absent_gpu import absent
from benchmarks.gpu_stages import PYTHON, ROOT

# Less of what is only repeated: kernels of a third block, or of a second round, are the same.
MORE = ("step=--layers 2 --rounds 1 --panels main", "kernels=--tokens 1024")
STAGES = ("smoke", "step", "kernels", "decode", "test")
SAYS, ENDED = "triton_ahead: ", "triton_ahead ended"


def commands(stage: str, out: Path) -> list[list[str]]:
    """What a stage runs, without the interpreter."""
    given = argparse.Namespace(more=MORE, commit="absent", package=None, tests=None, workers=1, model=None, table=None)
    found = {s.name: s for s in gpu_stages.plan(out, given)}[stage]
    return [[part for part in command[len(PYTHON) :] if part != "--resume"] for command in found.commands]


def run(stage: str) -> None:
    """One stage, in this process; what was found and compiled is printed."""
    out = os.fdopen(os.dup(1), "w", buffering=1)  # tests capture the other one

    def said(hits: int, compiled: int) -> None:  # at once, for one that is stopped
        out.write(f"\n{SAYS}{json.dumps({'hits': hits, 'compiled': compiled})}\n")

    with tempfile.TemporaryDirectory() as folder, absent() as counter:
        counter.said = said
        for command in commands(stage, Path(folder)):
            module, sys.argv = command[0] == "-m", command[1:] if command[0] == "-m" else command
            try:
                function = runpy.run_module if module else runpy.run_path
                function(sys.argv[0], run_name="__main__", **({"alter_sys": True} if module else {}))
            except SystemExit:
                pass
            except Exception:
                traceback.print_exc()
            print(ENDED, flush=True)


def stages(names: Sequence[str], cache: Path, seconds: float) -> tuple[int, int]:
    """Each in a process of its own; (found in the cache, compiled), of all."""
    found: list[dict[str, int]] = []
    for name in names:
        began, env = time.monotonic(), os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONUNBUFFERED": "1"}
        env["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "python"), env.get("PYTHONPATH", "")))
        with tempfile.TemporaryFile("w+") as log:
            with contextlib.suppress(subprocess.TimeoutExpired):
                command = [sys.executable, "-m", "benchmarks.triton_ahead", "run", "--stages", name]
                subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=log, timeout=seconds)
            log.seek(0)
            lines = log.read().splitlines()
        said = [line for line in lines if line.startswith(SAYS)]
        last = json.loads(said[-1].removeprefix(SAYS)) if said else {"hits": 0, "compiled": 0}
        found.append(last)
        how = "" if ENDED in lines else ", did not end"
        counts = f"{last['hits']} found, {last['compiled']} compiled"
        print(f"{name}: {counts}, {time.monotonic() - began:.0f} s{how}", flush=True)
    return sum(f["hits"] for f in found), sum(f["compiled"] for f in found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("verb", choices=("fill", "check", "run"))
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "triton-ahead")
    parser.add_argument("--stages", nargs="+", default=STAGES, help=f"default: {' '.join(STAGES)}")
    parser.add_argument("--seconds", type=float, default=600.0, help="of a stage, at most")
    args = parser.parse_args(argv)
    if args.verb == "run":
        run(args.stages[0])
        return 0
    began = time.monotonic()
    hits, compiled = stages(args.stages, args.cache.resolve(), args.seconds)
    size = sum(f.stat().st_size for f in args.cache.rglob("*") if f.is_file())
    print(f"{args.cache}: {size / 2**20:.1f} MiB, {time.monotonic() - began:.0f} s; {hits} found, {compiled} compiled")
    return 1 if args.verb == "check" and (compiled or not hits) else 0


if __name__ == "__main__":
    sys.exit(main())
