"""What a CPU does in the time that one waits: its faster dtype, and shapes whose steps take seconds, by a short probe.

A GPU takes what was asked for, or the paper's batch of 8 x 128 tokens in bf16. Two cores without bf16 instructions take
20 s for a step of one block of Llama-3.1-8B at that shape, and minutes for loops over sub-matrices. What was asked for
is never changed; rows carry what was taken.
"""

from __future__ import annotations

import argparse
import datetime
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES = ((8, 128), (4, 128), (2, 128), (1, 128), (1, 64), (1, 32))  # batch x tokens, the paper's first
LONGEST = 3.0  # seconds of a LoRA step
FLOP = 4  # of a LoRA step per weight and token: forward, and backward to the inputs


class Plan(NamedTuple):
    """How to measure: dtype, batch, tokens, and about how many seconds a LoRA step takes (0: not probed)."""

    dtype: torch.dtype
    batch: int
    tokens: int
    seconds: float


def options(parser: argparse.ArgumentParser) -> None:
    """The options that a plan is made of."""
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="auto: bf16; CPU: the faster one")
    parser.add_argument("--batch", type=int, default=None, help="default: 8; CPU: what a step of seconds takes")
    parser.add_argument("--tokens", type=int, default=None, help="default: 128; CPU: the same")


def plan(args: argparse.Namespace, weights: int) -> Plan:
    """For steps of a model with so many weights in linears. ``args`` has device, dtype, batch and tokens."""
    wanted = [DTYPES[args.dtype]] if args.dtype != "auto" else list(DTYPES.values())
    shapes = [(args.batch or b, args.tokens or t) for b, t in SHAPES]
    if args.device != "cpu":
        return Plan(wanted[0], *shapes[0], 0.0)
    rates = {dtype: gemm_rate(dtype) for dtype in wanted}
    dtype = max(rates, key=lambda d: rates[d])
    return choose(dtype, rates[dtype], weights, shapes)


def choose(dtype: torch.dtype, rate: float, weights: int, shapes: list[tuple[int, int]]) -> Plan:
    """The first shape whose step is short enough at a rate in FLOP/s, or the last."""
    plans = [Plan(dtype, b, t, FLOP * weights * b * t / rate) for b, t in shapes]
    return next((p for p in plans if p.seconds <= LONGEST), plans[-1])


def gemm_rate(dtype: torch.dtype, m: int = 128, n: int = 1024, k: int = 2048) -> float:
    """FLOP/s of a matrix product that takes tens of milliseconds, the best of three."""
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    return 2.0 * m * n * k / _fastest(lambda: a @ b.t())


def copy_rate(count: int = 16 << 20) -> float:
    """Bytes per second, read and written, of a copy of 64 MB."""
    source = torch.randn(count)
    target = torch.empty_like(source)
    return 8.0 * count / _fastest(lambda: target.copy_(source))


def _fastest(call: Callable[[], object], calls: int = 4) -> float:
    taken = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return max(min(taken), 1e-9)


def announce(what: str, seconds: float) -> None:
    """Says how long it takes; the estimate is good to a factor of two or three."""
    if seconds > 0:
        print(f"{what}: about {datetime.timedelta(seconds=math.ceil(seconds))} (h:mm:ss)", flush=True)
    else:
        print(what, flush=True)
