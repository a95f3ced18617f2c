"""Does a long search grow or slow down? Memory and time of thousands of steps of a tiny model.

    python -m benchmarks.bench_soak [--steps 2000] [--every 20]

CPU on Linux. A step is one of the search: a weight step and an architecture step, each with its own draw and its own
random batch. Resident memory is read every few steps, after what Python's collector finds is gone; time is that of the
processor, which others on the machine disturb little. Two rows: memory, in bytes per thousand steps, and the time of a
step; `extra` has the curves. Growth and drift are lines through the second half of the curve, when caches are warm, and
through medians of tenths of it, so that outliers do not bend them. With ``--plot`` they become docs/plots/soak.svg.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.bench_memory import model_and_space, resident
from benchmarks.harness import ROOT, Recorder, Timing, arguments
from jointnas.bilevel import update
from jointnas.data import Batch
from jointnas.losses import cross_entropy
from jointnas_kernels.hf import convert
from jointnas_kernels.hf.families import family
from jointnas_kernels.nn.choices import seeded

TINY = (128, 256, 2, 128, 2, 16, "lora", False)  # as bench_memory says them
PLOT = ROOT / "docs" / "plots" / "soak.svg"


def stepper(values: tuple[Any, ...] = TINY) -> Callable[[int], None]:
    """A search's step by its number."""
    config, space, run = model_and_space(values)
    torch.manual_seed(0)
    model = family(config).model._from_config(config, dtype=torch.float32).requires_grad_(False)
    net = convert(model, space, lora_rank=4).train()
    trained = {"weight": net.lora_parameters(), "arch": net.arch_parameters()}
    optimizers = {mode: torch.optim.AdamW(of, lr=1e-3) for mode, of in trained.items()}

    def step(number: int) -> None:
        for lane, (mode, optimizer) in enumerate(optimizers.items()):
            random = seeded(0, number, lane)
            ids = torch.randint(config.vocab_size, (run.data.batch_size, run.data.seq_len), generator=random)
            net.mode(mode).relax()
            net.draw(random)
            update(optimizer, cross_entropy(net, Batch(ids, ids)), trained[mode], 1.0)

    return step


def slope(values: Sequence[float]) -> float:
    """Per value, of the least-squares line through medians of ten parts of the second half."""
    half = list(values[len(values) // 2 :])
    size = max(1, len(half) // 10)
    parts = [statistics.median(half[i : i + size]) for i in range(0, len(half) - size + 1, size)]
    if len(parts) < 2:
        return 0.0
    return statistics.linear_regression(range(len(parts)), parts).slope / size


def curves(step: Callable[[int], None], steps: int, every: int) -> tuple[list[float], list[float]]:
    """(resident bytes, processor seconds of a step), every so many steps."""
    memory, seconds = [], []
    for first in range(0, steps, every):
        began = time.process_time()
        for number in range(first, first + every):
            step(number)
        seconds.append((time.process_time() - began) / every)
        gc.collect()
        memory.append(float(resident()["VmRSS"]))
    return memory, seconds


def plot(memory: Sequence[float], seconds: Sequence[float], every: int) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "soak"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
    at = [every * (i + 1) for i in range(len(memory))]
    for axis, values, title in ((axes[0], [m / 2**20 for m in memory], "resident memory, MiB"),
                                (axes[1], [1e3 * s for s in seconds], "processor time of a step, ms")):  # fmt: skip
        axis.plot(at, values, linewidth=1)
        axis.set(title=title, xlabel="step", ylim=(0, 1.2 * max(values)))
    figure.savefig(PLOT, metadata={"Date": None})
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=20, help="steps between two readings")
    parser.add_argument("--plot", action="store_true", help=f"draw {PLOT.relative_to(ROOT)}")
    args = parser.parse_args(argv)
    every = 2 if args.tiny else args.every
    steps = 20 if args.tiny else args.steps // every * every
    memory, seconds = curves(stepper(), steps, every)
    recorder, thousand = Recorder.of("soak", args), 1000 / every
    growth, drift = slope(memory) * thousand, slope(seconds) * thousand
    warm = memory[len(memory) // 10]
    about = {"first": memory[0], "warm": warm, "last": memory[-1], "most": max(memory)}
    recorder.row("memory growth", growth, "B", {**about, "curve": memory, "every": every}, steps=steps)
    recorder.row("step", Timing.of(seconds), "s", {"drift": drift, "curve": seconds, "every": every}, steps=steps)
    print(f"{steps} steps: memory {growth / 2**20:+.2f} MiB per 1,000 steps in the second half, "
          f"{(memory[-1] - warm) / 2**20:+.2f} MiB since the first tenth; a step {1e3 * drift:+.3f} ms per 1,000 steps "
          f"of {1e3 * statistics.median(seconds):.1f} ms")  # fmt: skip
    if args.plot:
        plot(memory, seconds, every)
    return recorder.rows


if __name__ == "__main__":
    main()
