"""Hardware counters of chosen ops: DRAM bytes, throughputs, tensor cores, issue slots, occupancy, reasons of stalls.

    python -m benchmarks.bench_ncu [--ops NAME ...] [--tokens 1024]

Each op runs under Nsight Compute (ncu) in a process of its own, at the shapes of bench_kernels; all its kernels are
measured, warmed up before. Where ncu is not installed, or the driver does not permit counters, one line says why and
there are no rows: that is not a failure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import bench_kernels, ncu
from benchmarks.bench_gemm import Case, our_product, scheme_bits
from benchmarks.harness import ROOT, Recorder, arguments, guarded

LOWBIT = ("w2a8", "w4a16", "w4a8", "w8a8")  # schemes
SHAPE = (4096, 4096)  # outputs, inputs of a linear
DEFAULT = (
    "mixed_rmsnorm_quant",
    "masked_swiglu backward",
    "quant_lora_mix",
    "lowbit_linear w4a16",
    "lowbit_linear w4a8",
)


def names() -> list[str]:
    """Ops that can be chosen: elementwise ones forward and backward, quant_lora_mix, low-bit products."""
    cases = [case.name for case in bench_kernels.elementwise_cases(1, "meta", torch.bfloat16)]
    products = [f"lowbit_linear {scheme}" for scheme in LOWBIT]
    return [*cases, *(f"{case} backward" for case in cases), "quant_lora_mix", *products]


def prepare(name: str, tokens: int, device: str, shape: tuple[int, int] = SHAPE) -> Callable[[], Any]:
    """The call that is measured, its inputs made."""
    op, _, rest = name.partition(" ")
    if op == "lowbit_linear":
        w_bits, a_bits = scheme_bits(rest)
        weight = Case(*shape, w_bits, torch.bfloat16, device).weight.laid_out(device)
        x = torch.randn(tokens, shape[1], device=device).bfloat16()
        return lambda: our_product(weight, x, a_bits)
    if op == "quant_lora_mix":
        inputs = bench_kernels._mix_inputs(*shape, device, torch.bfloat16)
        return lambda: bench_kernels._mix(inputs, None)
    case = next(c for c in bench_kernels.elementwise_cases(tokens, device, torch.bfloat16) if c.name == op)
    leaves = case.make()
    if not rest:
        return lambda: case.call(leaves, None)
    wanted = [leaves[k].requires_grad_() for k in (*case.free, *case.arch)]  # an arch step's
    out = case.call(leaves, None)
    outputs = list(out) if isinstance(out, tuple) else [out]
    grads = [torch.randn_like(o) for o in outputs]
    return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)


def child(name: str, tokens: int, device: str) -> None:
    """What ncu runs: compiled and warm before it looks."""
    call = prepare(name, tokens, device, SHAPE if device == "cuda" else (64, 128))
    for _ in range(3):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def measure(rec: Recorder, program: str, metrics: list[str], op: str, tokens: int, timeout: float) -> None:
    """A row per kernel of an op, by the order of their launches."""
    command = [sys.executable, "-m", "benchmarks.bench_ncu", "--child", op, "--tokens", str(tokens)]
    for number, kernel in enumerate(ncu.run(program, command, metrics, timeout, ROOT)):
        params = {"op": op, "tokens": tokens, "launch": number, "kernel": kernel.kernel}
        rec.row("kernel", kernel.seconds, "s", kernel.extra(), **params)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--ops", nargs="+", default=list(DEFAULT), help=f"of {', '.join(names())}")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds per op")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.child, args.tokens, args.device)
        return []
    for op in args.ops:
        if op not in names():
            parser.error(f"unknown op {op!r}; allowed: {', '.join(names())}")
    rec = Recorder.of("ncu", args)
    ops = [op for op in args.ops if not rec.has("kernel", op=op, tokens=args.tokens)]
    try:
        if args.device != "cuda":
            raise ncu.NotPermitted("counters are those of a GPU")
        program = ncu.find()
        metrics = ncu.available(ncu.listed(program))
        for op in ops:
            permitted(partial(measure, rec, program, metrics, op, args.tokens, args.timeout), op)
    except ncu.NotPermitted as reason:
        print(f"ncu: not measured: {reason}", flush=True)
    return rec.rows


def permitted(call: Callable[[], None], op: str) -> None:
    """Like `guarded`, but what is not permitted for one op is not for the others."""
    refused: list[ncu.NotPermitted] = []

    def attempt() -> None:
        try:
            call()
        except ncu.NotPermitted as reason:
            refused.append(reason)

    guarded(op, attempt)
    if refused:
        raise refused[0]


if __name__ == "__main__":
    main()
