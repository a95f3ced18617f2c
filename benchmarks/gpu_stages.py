"""The stages of a GPU run, in order of worth: what each runs, what it needs, and its part of the time."""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu_package import ROOT, SITE

PYTHON = [sys.executable, "-u"]
LIMITS = {0: 530.0, 1: 290.0, 2: 470.0}  # seconds; part 0 is both
# seconds. Of the first part what says whether results are right, of the second what they are; both load the extension.
# Together less than the limit, so that no stage starves those behind it; what one leaves over goes to the next ones.
CAPS = {
    1: {"load": 50, "smoke": 25, "test": 85, "sanitize": 45, "launches": 30},
    2: {"load": 50, "gemm": 80, "kernels": 45, "step": 65, "table": 45, "decode": 30, "smollm2": 25},
}
# seconds; only with --stages
ASKED = {"ceilings": 60, "ncu": 90, "masks": 90, "sweep": 90, "search": 90, "compiled": 150, "tune": 240}
# first those that no GPU has run since they changed; then the others, by name
NEVER_RUN = (
    "test_instruments", "test_runtime", "test_nan", "test_load", "test_backends", "test_quant", "test_lowbit",
    "test_tuned",
)  # fmt: skip
MEASURES = ("pydantic",)  # tables and configurations are read with it
CONFIGURED = (*MEASURES, "jsonargparse")  # of the command line


@dataclass(frozen=True)
class Stage:
    """Processes that run one after the other, together for `cap` seconds at most."""

    name: str
    cap: float
    commands: Sequence[list[str]]
    needs: tuple[str, ...] = ()  # packages
    without: str = ""  # why there is nothing to run
    always: bool = False  # also in a run that is resumed, maybe on another machine
    resumes: bool = True  # called again, it goes on where it was cut
    env: dict[str, str] = field(default_factory=dict)

    def reason(self) -> str:
        """Why it cannot run; empty if it can."""
        importlib.invalidate_caches()  # a stage before this one may have brought them
        path = [*sys.path, str(SITE)]
        missing = [name for name in self.needs if importlib.machinery.PathFinder.find_spec(name, path) is None]
        return self.without or (f"needs {', '.join(missing)}, not installed" if missing else "")


def names(part: int) -> list[str]:
    """The stages of a part, of both for 0."""
    return list(CAPS[part]) if part else list(CAPS[1] | CAPS[2])


def tests() -> list[str]:
    """The files of tests/gpu, never-run ones first."""
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"), key=lambda f: (f.stem not in NEVER_RUN, f.stem))
    return [str(file.relative_to(ROOT)) for file in files]


def plan(out: Path, args: argparse.Namespace) -> list[Stage]:
    """All stages; rows go to out/rows.jsonl, outcomes of tests to out/tests.jsonl."""
    rows, table, caps = str(out / "rows.jsonl"), out / "table-qllama3.jsonl", CAPS[1] | CAPS[2] | ASKED
    more = dict(m.split("=", 1) for m in args.more)

    def bench(name: str, *options: str) -> list[str]:
        commit = ["--commit", args.commit] if args.commit else []
        module = [*PYTHON, "-m", f"benchmarks.bench_{name}", "--device", "cuda", "--out", rows]
        return [*module, "--resume", *commit, *options]

    def stage(name: str, *commands: list[str], **given: object) -> Stage:
        added = shlex.split(more.get(name, ""))
        return Stage(name, caps[name], [[*command, *added] for command in commands], **given)  # type: ignore[arg-type]

    load = [*PYTHON, "-m", "benchmarks.gpu_package", "load", *([args.package] if args.package else [])]
    pytest = [*PYTHON, "-m", "pytest", *(args.tests or tests()), "-q", "--tb=short", "-p", "no:cacheprovider"]
    pytest += ["--durations=8", "-p", "benchmarks.gpu_tests", "--outcomes", str(out / "tests.jsonl")]
    workers = ["-n", str(args.workers), "--dist", "load"] if args.workers > 1 else []
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    memcheck = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "5"]
    ops = [*PYTHON, "tests/gpu/every_op_once.py"]
    jointnas = [*PYTHON, "-m", "jointnas.cli"]
    decoding = ["--latency.workload", "decode", "--latency.dtype", "bfloat16", "--latency.busy", "mark"]
    profile = [*jointnas, "profile", "--space", "qllama3", *decoding, "--device", "cuda", "--progress", "false"]
    tune = [*jointnas, "tune", "--space", "qllama3", "--out", str(out / "tuned"), "--resume", "--progress", "false"]
    search = [*jointnas, "search", "--config", "examples/smollm2.yaml", "--model.device", "cuda", "--resume", "auto"]
    search += ["--out", str(out / "smollm2"), *(["--model.source", args.model] if args.model else [])]
    return [
        stage("load", load, always=True),
        stage("smoke", ops, resumes=False),
        stage("test", [*pytest, *workers]),
        # without the cache of memory an overrun lands outside of the allocator's own big block
        stage("sanitize", [*memcheck, *ops], resumes=False, env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        stage("launches", bench("launches", "--layers", "8"), needs=MEASURES),
        stage("gemm", bench("gemm"), needs=MEASURES),
        stage("kernels", bench("kernels", "--no-compile"), needs=MEASURES),
        stage("step", bench("step"), needs=MEASURES),
        stage("table", [*profile, "--out", str(table), "--resume", "true"], needs=CONFIGURED),
        stage("decode", bench("decode", "--model", "blocks", "--no-compile"), needs=MEASURES),
        stage("smollm2", search, needs=CONFIGURED, without="" if args.model else "no --model FOLDER of SmolLM2"),
        stage("ceilings", bench("ceilings"), needs=MEASURES),
        stage("ncu", bench("ncu"), needs=MEASURES),
        stage("masks", bench("masks"), needs=MEASURES),
        stage("sweep", bench("gemm", "--sweep", "--schemes", "w4a16", "w2a8", "--tokens", "1", "16", "64", "512")),
        stage(
            "search", bench("search", "--table", args.table or "", "--workers", "8"), needs=CONFIGURED,
            without="" if args.table else "no --table FILE of its latencies",
        ),
        stage("tune", [*tune, "--seconds", "100000"], needs=CONFIGURED),  # until it is cut
        stage("compiled", bench("step", "--panels", "compiled"), bench("kernels", "--only", "peers")),
    ]  # fmt: skip
