"""One eager training step, launch by launch: what runs in which order, how long, and what the device waits for.

    python -m benchmarks.bench_launches [--device cuda|cpu] [--steps NAME ...] [--layers N] [--batch B] [--tokens T]

Steps are those of bench_step: the same model, draws, loss and optimizer, adapters in the model's dtype. Each is timed
without a profiler first, then profiled once (torch.profiler, by CUPTI on a GPU). Printed are all launches in order with
grid, block, time, the gap before them and the floor of their bytes and operations where shapes say it, then the time
by kernel. Rows: the step, with its launches, the share of its time in which kernels run, and the share of the profiled
step in which the device waits for the host; and each kernel. On a CPU operators that no other one calls stand in for
launches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from benchmarks import launches, models, probe
from benchmarks.bench_step import Bench, Step
from benchmarks.harness import Recorder, arguments, ceilings, free, guarded, time_interleaved

# name: (space, mode); PEFT has neither
STEPS = {
    "qllama3 weight step": ("qllama3", "weight"),
    "qllama3 arch step": ("qllama3", "arch"),
    "llama3 weight step": ("llama3", "weight"),
    "llama3 arch step": ("llama3", "arch"),
    "PEFT LoRA": ("", ""),
}
DEFAULT = ("qllama3 weight step", "qllama3 arch step", "PEFT LoRA")


def build(bench: Bench, name: str, ids: Tensor) -> Step:
    space, mode = STEPS[name]
    if not space:
        return bench.peft(0.0, False, ids)[1]
    return bench.supernet_step(bench.supernet(space, bench.dtype), mode, ids)


def measure(
    rec: Recorder, step: Callable[[], Any], name: str, rounds: int, rates: Mapping[str, float], **shape: Any
) -> None:
    """Time, profile, print and write a step."""
    timed = time_interleaved({name: step}, rounds, 2, rec.device)[name]
    found = launches.launches(launches.profiled(step, rec.device))
    if not found or (rec.device == "cuda" and not any(x.grid for x in found)):
        raise RuntimeError("the profiler saw no launches: CUPTI is not available here")
    kernels, busy = launches.by_kernel(found, rates), launches.busy(found)
    print(
        f"\n{name}: {len(found)} launches\n{launches.listing(found, rates)}\n\n{launches.totals(kernels)}\n", flush=True
    )
    total = sum(k.seconds for k in kernels)
    for kernel in kernels:
        extra: dict[str, Any] = {"launches": kernel.launches, "share": kernel.seconds / total}
        if kernel.floor:
            extra |= {"floor": kernel.floor, "floor_share": kernel.floor / kernel.seconds}
        rec.row("kernel", kernel.seconds, "s", extra, step=name, kernel=kernel.name, **shape)
    extra = {"launches": len(found), "busy": busy, "busy_share": busy / timed.median, "span": launches.span(found)}
    if rec.device == "cuda":
        extra |= {"host": launches.host_bound(found), "host_share": launches.host_bound(found) / launches.span(found)}
    rec.row("step", timed, "s", extra, step=name, **shape)  # last: with it a step is done


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--steps", nargs="+", default=DEFAULT, choices=tuple(STEPS), help="default: all but llama3's")
    parser.add_argument("--layers", type=int, default=None, help="blocks (default: 32 on a GPU, 1 on a CPU)")
    parser.add_argument("--rounds", type=int, default=5, help="of timing without the profiler")
    probe.options(parser)
    args = parser.parse_args(argv)
    if args.tiny:
        args.batch, args.tokens = 2, 16
    rec = Recorder.of("launches", args)
    layers = 2 if args.tiny else args.layers or (32 if args.device == "cuda" else 1)
    steps = [name for name in args.steps if not rec.has("step", step=name, layers=layers)]
    if not steps:
        return rec.rows
    plan = probe.plan(
        args, models.linear_weights(models.llama_tiny() if args.tiny else models.llama_8b(args.layers or 1))
    )
    args.batch, args.tokens = plan.batch, plan.tokens
    args.dtype = next(name for name, dtype in probe.DTYPES.items() if dtype == plan.dtype)
    rates: dict[str, float] = {}
    if not args.tiny:
        limits = ceilings(rec)
        rates = {"bytes": limits["copy"], "flops": max(limits[k] for k in ("bf16", "fp32") if k in limits)}
    bench = Bench.random(args)
    ids = bench.ids(args.batch, args.tokens)
    shape = {"layers": layers, "batch": args.batch, "tokens": args.tokens, "dtype": args.dtype}
    for name in steps:

        def one(name: str = name) -> None:
            measure(rec, build(bench, name, ids), name, args.rounds, rates, **shape)

        guarded(name, one)
        free(args.device)
    return rec.rows


if __name__ == "__main__":
    main()
