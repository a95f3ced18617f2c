"""Fuzz every op against its fp64 definition: ``python -m tests.fuzz --device cpu --cases 5000 --workers 2``.

One line per (op, backend, dtype): cases, failures, largest error of the values and of every gradient, first failing
seed. ``--ops OP --backend B --dtypes D --case SEED`` repeats one case and prints it. With ``--backend triton`` on the
CPU the kernels run in Triton's interpreter (fp32 and fp16; its bf16 is broken). A combination the op refuses for want
of that backend is reported as such, with the op's reason.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from benchmarks.harness import RESULTS, Recorder, device_name, slug
from tests.fuzz.cases import LIBRARY, OPS
from tests.fuzz.check import check
from tests.fuzz.source import LIMITS
from tests.fuzz.worker import DTYPES, Combination, Tally, build, run_chunk

CHUNK = 25
SUPPORTED = {
    "library": tuple(DTYPES),
    "reference": tuple(DTYPES),
    "auto": ("fp32", "fp16", "bf16"),
    "triton": ("fp32", "fp16", "bf16"),
    "cuda": ("fp16", "bf16"),
    "cpu": ("fp32", "bf16"),
}


def combinations(arguments: argparse.Namespace) -> list[Combination]:
    """Every asked-for op, backend and dtype; an op that torch implements has one backend, "library"."""
    found = []
    for op in arguments.ops:
        backends = ["library"] if op in LIBRARY else [b for b in arguments.backend if b != "library"]
        for backend in backends:
            known = ("fp32",) if op == "pack_weight" else SUPPORTED[backend]
            if backend == "triton" and arguments.device == "cpu":
                known = ("fp32", "fp16")  # the interpreter's bf16 is broken
            found += [Combination(op, backend, dtype) for dtype in known if dtype in arguments.dtypes]
    return found


def campaign(arguments: argparse.Namespace, recorder: Recorder) -> int:
    """Run everything; returns the number of failures."""
    todo = combinations(arguments)
    share = {c: -(-arguments.cases // sum(d.op == c.op and d.backend == c.backend for d in todo)) for c in todo}
    tallies = {c: Tally() for c in todo}
    # the first chunk of every combination before the second of any: workers then compile different kernels
    chunks = [
        (c, list(range(arguments.seed + start, arguments.seed + min(start + CHUNK, share[c]))))
        for start in range(0, max(share.values()), CHUNK)
        for c in todo
        if start < share[c]
    ]
    started, stop = time.monotonic(), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())  # what has run by then is reported
    pools = [ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for _ in range(arguments.workers)]
    running: dict[Future[Tally], tuple[Combination, list[int], int]] = {}
    died: set[tuple[Combination, int]] = set()
    idle, reported = list(range(arguments.workers)), started
    while chunks or running:
        if stop.is_set() or time.monotonic() - started > arguments.seconds:
            chunks.clear()
        if time.monotonic() - reported > 30:
            reported = time.monotonic()
            totals = [sum(getattr(t, key) for t in tallies.values()) for key in ("cases", "failures")]
            print(f"{reported - started:.0f} s: {totals[0]} cases, {totals[1]} failures", file=sys.stderr, flush=True)
        while chunks and idle:
            c, seeds = chunks.pop(0)
            hopeless = tallies[c].fatal or (tallies[c].skipped and not tallies[c].cases)
            if not hopeless:
                worker = idle.pop()
                work = (c, seeds, arguments.variants, arguments.limits, arguments.device)
                running[pools[worker].submit(run_chunk, *work)] = c, seeds, worker
        done, _ = wait(running, return_when=FIRST_COMPLETED) if running else (set(), None)
        for future in done:
            c, seeds, worker = running.pop(future)
            try:
                tally = future.result()
            except BrokenProcessPool:  # killed from outside if it does not happen again, else the op's fault
                tally = Tally(fatal=(c, seeds[0]) in died)
                if tally.fatal:
                    tally.fail(seeds[0], f"the process died, twice, in seeds {seeds[0]} to {seeds[-1]}")
                else:
                    chunks.insert(0, (c, seeds))
                died.add((c, seeds[0]))
                pools[worker] = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            tallies[c].add(tally)
            idle.append(worker)
            if tally.fatal:
                pools[worker].shutdown()
                print(f"lost a worker: {c}, --case {tally.first}: {tally.message[:500]}", file=sys.stderr)
                pools[worker] = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    for pool in pools:
        pool.shutdown()
    for c in todo:
        report(recorder, c, tallies[c], arguments)
    total = sum(t.cases for t in tallies.values())
    failed = sum(t.failures for t in tallies.values())
    print(f"{total} cases, {failed} failures, {time.monotonic() - started:.0f} s", flush=True)
    return failed


def report(recorder: Recorder, c: Combination, tally: Tally, arguments: argparse.Namespace) -> None:
    """One line and one raw row."""
    if tally.skipped and not tally.cases:
        print(f"{c.op:22s} {c.backend:9s} {c.dtype:4s}  not available: {tally.refused[:160]}", flush=True)
        return
    extra = {
        "cases": tally.cases, "failures": tally.failures, "first_failure": tally.first, "unsupported": tally.skipped,
        "cancelled": tally.cancelled, "undecided_levels": tally.undecided, "elements_in_band": tally.flipped,
    } | {f"error_{name}": error for name, error in sorted(tally.errors.items())}  # fmt: skip
    recorder.row(
        c.op, max(tally.errors.values(), default=0.0), "max relative error", extra, backend=c.backend, dtype=c.dtype,
        seed=arguments.seed, sizes=arguments.limits, interpreter=os.environ.get("TRITON_INTERPRET") == "1",
    )  # fmt: skip
    if tally.failures:
        print(f"    FAILED, first --case {tally.first}: {tally.message[:1200]}", flush=True)


def replay(arguments: argparse.Namespace) -> int:
    """Repeat one seed for each combination, printing what it is."""
    failed = 0
    for c in combinations(arguments):
        case = build(c, arguments.case, arguments.variants, arguments.limits)
        print(f"{c.op} {c.backend} {c.dtype}: {case.text}\n    gradients {case.wanted}, layouts {case.layouts}")
        outcome = check(case, arguments.device, arguments.case)
        print(f"    errors {outcome.errors}\n    {outcome.failures or 'passed'}", flush=True)
        failed += bool(outcome.failures)
    return failed


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    split = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", type=split, default=["auto"], help="of reference,cpu,triton,cuda,auto,library")
    parser.add_argument("--ops", type=split, default=list(OPS))
    parser.add_argument("--dtypes", type=split, default=list(DTYPES))
    parser.add_argument("--cases", type=int, default=5000, help="per op and backend, shared by its dtypes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="repeat this one seed")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no new cases after this long")
    parser.add_argument("--limits", choices=tuple(LIMITS), help="sizes (default: by device)")
    parser.add_argument("--variants", type=int, help="different kernels per op, 0 for any (default: by device)")
    parser.add_argument("--out", type=Path, help="rows (default: benchmarks/results/<device>/fuzz.jsonl)")
    arguments = parser.parse_args()
    by_device = "large" if arguments.device == "cuda" else "small" if arguments.backend == ["triton"] else "medium"
    arguments.limits = arguments.limits or by_device
    if arguments.variants is None:
        arguments.variants = 12 if arguments.device == "cuda" else 0
    names = (("op", arguments.ops, OPS), ("dtype", arguments.dtypes, DTYPES), ("backend", arguments.backend, SUPPORTED))
    for kind, asked, known in names:
        for name in asked:
            if name not in known:
                parser.error(f"unknown {kind} {name!r}; known: {', '.join(known)}")
    return arguments


def main() -> int:
    arguments = parse()
    if arguments.device == "cpu" and "triton" in arguments.backend and os.environ.get("TRITON_INTERPRET") != "1":
        print("Triton kernels run on the CPU in its interpreter only: set TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    if arguments.case is not None:
        return min(1, replay(arguments))
    out = arguments.out or RESULTS / slug(device_name(arguments.device)) / "fuzz.jsonl"
    return min(1, campaign(arguments, Recorder(out.stem, arguments.device, out.parent)))


if __name__ == "__main__":
    sys.exit(main())
