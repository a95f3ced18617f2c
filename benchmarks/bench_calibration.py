"""Predictions of a latency table against the measured latency of whole models that its overhead was not fitted to.

python -m benchmarks.bench_calibration [--device cpu] [--modes prefill decode] [--choices 24] [--rounds 5]

The `tiny` space with bits on the embedded model's sizes: prefill of 4 x 128 tokens, one decoded token after 128. Every
round profiles a table anew and measures whole models with the kernels it names: `--fit` random choices, to which the
overhead is fitted, and `--choices` other random ones, which are predicted. Nothing is left out: a machine may change
its speed between table and models (virtual ones were seen to, every few minutes), so the error of each round is a row
of its own, the result is their median, and a model's figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Recorder, Timing, arguments, guarded
from jointnas.config import ModelConfig
from jointnas.loading import model_config
from jointnas_kernels.latency import Workload, feasible_choices, measure_choices, profile
from jointnas_kernels.latency.measure import fit
from jointnas_kernels.latency.watch import Watch
from jointnas_kernels.space import Choice, SearchSpace

WORKLOADS = {"prefill": Workload("prefill", 4, 128), "decode": Workload("decode", 1, 128)}


class Round:
    """One table, and whole models measured right after it: milliseconds by index of the choice."""

    def __init__(self, choices: list[Choice], fitted: int, args: argparse.Namespace, device: str, mode: str) -> None:
        seconds = (0.002, 0.02) if args.tiny else (0.02, 0.2)
        config, space = model_config(ModelConfig()), SearchSpace.named("tiny")
        watch = Watch.on(torch.device(device))  # the speed of the moment is the one to be measured
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "table.jsonl"
            table = profile(
                space, config, path, workload=WORKLOADS[mode], device=device, seconds_per_operation=seconds[0],
                progress=False, watch=watch,
            )  # fmt: skip
        space, _ = table.restrict(space)
        # the device decides what is feasible, not the round: the first one draws
        self.choices = choices or feasible_choices(table, space, fitted + args.choices, seed=0)
        bound = table.bind(space)
        self.operations = [bound.predict(choice) for choice in self.choices]
        found = measure_choices(table, space, config, self.choices, seconds=seconds[1], watch=watch)
        self.disturbed = sum(one.contended for one in found)
        self.measured = [one.value for one in found]
        points = zip(self.operations, (c.blocks for c in self.choices), self.measured, strict=True)
        self.overhead = fit(list(points)[:fitted])
        fixed, per_block = self.overhead.fixed, self.overhead.per_block
        self.predicted = [o + fixed + per_block * c.blocks for o, c in zip(self.operations, self.choices, strict=True)]

    def errors(self, of: list[float], fitted: int) -> list[float]:
        """Of the models that the overhead was not fitted to."""
        return [p / m - 1 for p, m in zip(of, self.measured, strict=True)][fitted:]


def mean(errors: list[float]) -> float:
    return statistics.fmean(map(abs, errors))


def compare(rec: Recorder, mode: str, args: argparse.Namespace) -> None:
    workload, fitted = WORKLOADS[mode], args.fit
    rounds: list[Round] = []
    for index in range(args.rounds):
        one = Round(rounds[0].choices if rounds else [], fitted, args, rec.device, mode)
        rounds.append(one)
        extra = {"worst": max(map(abs, one.errors(one.predicted, fitted))), "disturbed": one.disturbed}
        extra |= {"operations_only": mean(one.errors(one.operations, fitted))}
        rec.row("round", mean(one.errors(one.predicted, fitted)), "", mode=mode, index=index, extra=extra)
    errors = [mean(one.errors(one.predicted, fitted)) for one in rounds]
    middle = lambda of, i: statistics.median(getattr(one, of)[i] for one in rounds)  # noqa: E731
    for i, choice in list(enumerate(rounds[0].choices))[fitted:]:
        rec.row(
            "model", Timing.of([one.measured[i] * 1e-3 for one in rounds]), mode=mode, index=i - fitted,
            extra={
                "predicted": middle("predicted", i) * 1e-3, "operations": middle("operations", i) * 1e-3,
                "blocks": choice.blocks, "choice": choice.to_dict(),
                "error": statistics.median(one.predicted[i] / one.measured[i] - 1 for one in rounds),
            },
        )  # fmt: skip
    overhead = lambda of: statistics.median(getattr(one.overhead, of) for one in rounds)  # noqa: E731
    rec.row(
        "mape", Timing(statistics.median(errors), min(errors), max(errors), len(errors)), "", mode=mode,
        extra={
            "worst": statistics.median(max(map(abs, one.errors(one.predicted, fitted))) for one in rounds),
            "operations_only": statistics.median(mean(one.errors(one.operations, fitted)) for one in rounds),
            "models": len(rounds[0].choices) - fitted, "fitted_on": fitted, "rounds": len(rounds),
            "fixed_ms": overhead("fixed"), "per_block_ms": overhead("per_block"), "batch": workload.batch,
            "seq": workload.seq, "threads": torch.get_num_threads(),
        },
    )  # fmt: skip


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--modes", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--choices", type=int, default=24, help="whole models that are predicted")
    parser.add_argument("--fit", type=int, default=10, help="other whole models that the overhead is fitted to")
    parser.add_argument("--rounds", type=int, default=5, help="of a new table and all models")
    args = parser.parse_args(argv)
    if args.tiny:
        args.choices, args.fit, args.rounds = 2, 4, 2
    rec = Recorder("calibration", args.device, args.out, args.commit)
    for mode in args.modes:
        guarded(mode, partial(compare, rec, mode, args))
    return rec.rows


if __name__ == "__main__":
    main()
