"""Everything that needs a GPU, one command, under nine minutes: build, correctness, sanitizer, ceilings, benchmarks.

    python -m benchmarks.gpu_run [--out DIR] [--stages build,test,...] [--limit 540] [--tests PATH ...] [--commit HASH]

Each stage is a process of its own with its own time cap; a stage that fails or is cut off never stops the next one.
DIR gets rows.jsonl (all measurements), log.txt (all output), junit.xml and summary.txt; the summary is printed last. It
needs no virtual environment: the interpreter that runs it runs everything.
``python -m benchmarks.render --add DIR/rows.jsonl`` files the rows under benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = [sys.executable, "-u"]
# seconds; together more than the limit, because most stages end early and the last ones get what is left
CAPS = {
    **{"build": 120, "test": 170, "sanitize": 70, "ceilings": 40, "kernels": 90, "step": 160, "masks": 90},
    **{"gemm": 150, "search": 90, "compiled": 150},
}
DEFAULT = "build,test,sanitize,ceilings,kernels,step,masks,gemm,search"


@dataclass
class Result:
    stage: str
    code: int | None  # None: cut off at its cap
    seconds: float
    tail: str


def commands(out: Path, rows: Path, args: argparse.Namespace) -> dict[str, list[list[str]]]:
    """The processes of each stage, one after the other."""
    more = dict(m.split("=", 1) for m in args.more)
    bench = lambda name, *options: [  # noqa: E731
        *PYTHON, "-m", f"benchmarks.bench_{name}", "--device", "cuda", "--out", str(rows), *options,
        *(["--commit", args.commit] if args.commit else []),
    ]  # fmt: skip
    pytest = [*PYTHON, "-m", "pytest", *args.tests, "-q", "--tb=short", "-p", "no:cacheprovider", "--durations=8"]
    workers = ["-n", str(args.workers), "--dist", "load"] if args.workers > 1 else []
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    check = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "5"]
    plan = {
        "build": [[*PYTHON, "setup.py", "-q", "build_ext", "--inplace"]],
        "test": [[*pytest, *workers, f"--junitxml={out / 'junit.xml'}"]],
        "sanitize": [[*check, *PYTHON, "tests/gpu/every_op_once.py"]],
        "ceilings": [bench("ceilings")],
        "kernels": [bench("kernels", "--no-compile")],
        "step": [bench("step")],
        "masks": [bench("masks")],
        "gemm": [
            bench("gemm", "--contenders", "ours"),
            bench("gemm", "--sweep", "--schemes", "w4a16", "w2a8", "--tokens", "1", "16", "64", "512"),
            bench("gemm", "--contenders", "peers", "--schemes", "w4a16", "w2a8", "w8a16", "--tokens", "1", "16", "512"),
        ],
        "search": [bench("search", "--table", args.table, "--workers", "8")] if args.table else [],
        "compiled": [bench("step", "--panels", "compiled"), bench("kernels", "--only", "peers")],
    }
    for stage, options in more.items():
        plan[stage] = [[*command, *shlex.split(options)] for command in plan[stage]]
    return plan


def run_stage(stage: str, plan: list[list[str]], cap: float, log: Path) -> Result:
    """Run the stage's processes; their output goes to the log and is echoed as it comes."""
    env = dict(os.environ, PYTHONUNBUFFERED="1", TOKENIZERS_PARALLELISM="false")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python"), env.get("PYTHONPATH", "")])
    if stage == "sanitize":
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else an overrun lands inside the allocator's own big block
    started, code, first = time.monotonic(), 0, log.stat().st_size if log.exists() else 0
    for command in plan:
        with open(log, "ab") as file:
            file.write(f"\n===== {stage}: {' '.join(command)}\n".encode())
            file.flush()
            left = cap - (time.monotonic() - started)
            try:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                file.write(f"FAILED to start: {error}\n".encode())
                code = 127
                continue
            try:
                code = process.wait(timeout=max(1.0, left)) or code
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return Result(stage, None, time.monotonic() - started, _since(log, first))
    return Result(stage, code, time.monotonic() - started, _since(log, first))


def _since(log: Path, first: int) -> str:
    with open(log, "rb") as file:
        file.seek(first)
        return file.read().decode(errors="replace")


def pytest_summary(junit: Path, most: int = 15) -> list[str]:
    """Counts, then one line per failed test with the last line of its message."""
    if not junit.exists():
        return ["no junit.xml"]
    root = ET.parse(junit).getroot()
    suite = root if root.tag == "testsuite" else root[0]
    counts = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
    lines = [" ".join(f"{k}={v}" for k, v in counts.items())]
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            node = case.find(kind)
            if node is not None and len(lines) <= most:
                message = (node.get("message") or node.text or "").strip().splitlines() or [""]
                lines.append(f"  {case.get('classname', '').split('.')[-1]}::{case.get('name')}: {message[0][:200]}")
    return lines


def rows_summary(rows: list[dict], most: int = 110) -> list[str]:
    """One short line per row."""
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default=None, help="folder for the files (default: build/gpu)")
    parser.add_argument("--stages", default=DEFAULT, help=f"comma-separated, of {','.join(CAPS)}")
    parser.add_argument("--limit", type=float, default=530, help="seconds for all stages together")
    parser.add_argument("--cap", action="append", default=[], help="STAGE=SECONDS, more than once")
    parser.add_argument("--tests", nargs="+", default=["tests/gpu"], help="what the test stage runs")
    parser.add_argument("--workers", type=int, default=8, help="pytest processes: compiling kernels is host work")
    parser.add_argument("--table", default=None, help="latency table for the search stage, which is left out without")
    parser.add_argument("--more", action="append", default=[], help="STAGE='further options of its command'")
    parser.add_argument("--commit", default=None, help="recorded in the rows when the tree has no git history")
    args = parser.parse_args(argv)
    stages = [s for s in args.stages.split(",") if s]
    for stage in stages:
        if stage not in CAPS:
            parser.error(f"unknown stage {stage!r}; allowed: {', '.join(CAPS)}")
    caps = CAPS | {k: float(v) for k, v in (c.split("=") for c in args.cap)}
    out = Path(args.out).resolve() if args.out else ROOT / "build" / "gpu"
    out.mkdir(parents=True, exist_ok=True)
    log, started = out / "log.txt", time.monotonic()
    log.write_text("")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plan = commands(out, folder, args)
        results = []
        for stage in stages:
            left = args.limit - (time.monotonic() - started)
            if left < 5:
                results.append(Result(stage, None, 0.0, "no time left"))
                continue
            print(f"--- {stage} (at {time.monotonic() - started:.0f} s)", flush=True)
            results.append(run_stage(stage, plan[stage], min(caps[stage], left), log))
        rows = [json.loads(line) for f in sorted(folder.glob("*.jsonl")) for line in f.read_text().splitlines()]
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = []
    for r in results:
        state = (
            "nothing to run"
            if not plan[r.stage]
            else "cut off"
            if r.code is None
            else "ok"
            if r.code == 0
            else f"exit {r.code}"
        )
        lines.append(f"[{r.stage}] {state} {r.seconds:.0f} s")
        if r.stage == "test":
            lines += pytest_summary(out / "junit.xml")
        if r.code != 0 or "FAILED" in r.tail:
            lines += [f"  {line}" for line in failures(r.tail)]
    text = "\n".join(lines + rows_summary(rows))[:9800]
    (out / "summary.txt").write_text(text + "\n")
    print(f"=== summary ({time.monotonic() - started:.0f} s)\n{text}", flush=True)
    return 0 if all(r.code == 0 for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
