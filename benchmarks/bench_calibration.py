"""Predictions of a latency table against the measured latency of whole models that its overhead was not fitted to.

    python -m benchmarks.bench_calibration [--model embedded] [--modes prefill decode] [--random 12] [--rounds 5]

The embedded model takes the `tiny` space; any other model is taken as it is, with a quarter to all of its blocks, every
precision of the kernels, and an 8-bit head or none. Random weights do: latency does not depend on them. Every round
profiles a table anew, fits its overhead to `--fit` random choices, and predicts others:

    random       as many random choices as `--random` says: bits, blocks (of `tiny`: all sizes) mixed
    bits         the whole architecture with random bits in every block
    depth        every number of blocks, at 16 bits and at W4A8
    precision    one precision in all blocks of the whole architecture, and its speed-up over 16 bits

All models of a round are measured in turns. Nothing is left out: a machine may change its speed between table and
models (virtual ones were seen to, every few minutes), so the errors of each round are a row of their own, the result is
their median, and a model's figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.blocks import HELP, config_of, shown
from benchmarks.harness import Recorder, Timing, arguments, guarded
from jointnas_kernels.latency import LatencyTable, Workload, feasible_choices, measure_choices, profile
from jointnas_kernels.latency.measure import fit
from jointnas_kernels.latency.timing import native_bf16
from jointnas_kernels.latency.watch import Watch
from jointnas_kernels.space import BITS, Choice, SearchSpace

SETS = ("random", "bits", "depth", "precision")
UNIFORM = (4, 8)  # weight and activation bits of models that differ in depth
Named = list[tuple[str, str, Choice]]  # set, name, choice


def space_of(model: str, config: Any, group: int) -> SearchSpace:
    if model == "embedded":
        return SearchSpace.named("tiny")
    whole = SearchSpace.single(config, (2, 4, 8), (8, 16), group, (8, 16))
    quarters = {max(1, round(whole.depth * share / 4)) for share in (1, 2, 3, 4)}
    return replace(whole, blocks=tuple(sorted(quarters)))


def unquantized(space: SearchSpace) -> SearchSpace:
    """The largest architecture with any number of blocks, in 16 bits."""
    return replace(whole(space), blocks=space.blocks, weight_bits=None, act_bits=None, head_bits=None)


def whole(space: SearchSpace) -> SearchSpace:
    """The largest architecture with all bits of the space."""
    full = space.full()
    return replace(
        space, hidden=(full.hidden,), heads=(full.heads,), head_dim=(full.head_dim,),
        intermediate=(full.intermediate,), blocks=(full.blocks,), excluded=(),
    )  # fmt: skip


def models(table: LatencyTable, space: SearchSpace, args: argparse.Namespace) -> Named:
    """What the overhead is fitted to (set `fit`), then what is held out."""
    full, head = space.full(), min(space.head_bits) if space.head_bits else None

    def uniform(bits: tuple[int, int], blocks: int) -> Choice:
        w, a = ((b,) * space.depth for b in bits)
        return replace(full, blocks=blocks, weight_bits=w, act_bits=a, head_bits=head)

    drawn = feasible_choices(table, space, args.fit + args.random, seed=0)
    others = feasible_choices(table, space, args.random + 1, seed=1)[1:]  # the first is no random one
    mixed = [replace(full, **{key: getattr(c, key) for key in (*BITS, "head_bits")}) for c in others]
    found = [("fit" if i < args.fit else "random", f"{i}", choice) for i, choice in enumerate(drawn)]
    found += [("bits", f"{i}", choice) for i, choice in enumerate(mixed)]
    found += [("depth", f"{c.blocks} in 16 bit", c) for c in unquantized(space).structures() if c.blocks < full.blocks]
    found += [("depth", f"{b} in W4A8", uniform(UNIFORM, b)) for b in space.blocks[:-1]]
    found += [("precision", "16 bit", unquantized(space).full())]
    schemes = itertools.product(space.sizes("weight_bits"), space.sizes("act_bits"))
    return found + [("precision", f"W{w}A{a}", uniform((w, a), full.blocks)) for w, a in schemes]


class Round:
    """One table, and whole models measured right after it: milliseconds by index of the model."""

    def __init__(self, named: Named, args: argparse.Namespace, model: str, workload: Workload) -> None:
        config = config_of(model, args.tiny)
        space, _ = space_of(model, config, args.group).feasible(config)
        watch = Watch.on(torch.device(args.device))  # the speed of the moment is the one to be measured
        if args.tiny:
            space, watch = replace(whole(space), blocks=space.blocks[-2:]), Watch([], waited=lambda: 0.0)
        with tempfile.TemporaryDirectory() as folder:
            table = profile(
                space, config, Path(folder) / "table.jsonl", workload=workload, device=args.device, progress=False,
                seconds_per_operation=0.002 if args.tiny else 0.02, watch=watch,
            )  # fmt: skip
        space, _ = table.restrict(space)
        # the device decides what is feasible, not the round: the first one draws
        self.named = named or models(table, space, args)
        choices = [choice for _, _, choice in self.named]
        plain, bound = table.bind(unquantized(space)), table.bind(space)
        self.operations = [(bound if choice.weight_bits else plain).predict(choice) for choice in choices]
        found = measure_choices(table, space, config, choices, seconds=0.02 if args.tiny else 0.2, watch=watch)
        self.disturbed = sum(one.contended for one in found)
        self.measured = [one.value for one in found]
        points = list(zip(self.operations, (c.blocks for c in choices), self.measured, strict=True))
        self.overhead = fit([points[i] for i in self.of("fit")])
        fixed, per_block = self.overhead.fixed, self.overhead.per_block
        self.predicted = [ops + fixed + per_block * blocks for ops, blocks, _ in points]

    def of(self, kind: str) -> list[int]:
        return [i for i, (found, _, _) in enumerate(self.named) if found == kind]

    def errors(self, kind: str, of: str = "predicted") -> list[float]:
        return [getattr(self, of)[i] / self.measured[i] - 1 for i in self.of(kind)]

    def speedup(self, i: int, of: str) -> float:
        """Over 16 bits, of a whole architecture."""
        times: list[float] = getattr(self, of)
        return times[self.of("precision")[0]] / times[i]


def mean(errors: list[float]) -> float:
    return statistics.fmean(map(abs, errors))


def worst(errors: list[float]) -> float:
    return max(map(abs, errors))


def compare(rec: Recorder, model: str, workload: Workload, args: argparse.Namespace) -> None:
    rounds: list[Round] = []
    params: dict[str, Any] = {"model": shown(model), "mode": workload.mode}
    for index in range(args.rounds):
        one = Round(rounds[0].named if rounds else [], args, model, workload)
        rounds.append(one)
        extra: dict[str, Any] = {kind: mean(one.errors(kind)) for kind in SETS} | {"disturbed": one.disturbed}
        rec.row("round", mean([e for kind in SETS for e in one.errors(kind)]), "", extra, **params, index=index)

    def median(of: Callable[[Round], float]) -> float:
        return statistics.median(map(of, rounds))

    for i, (kind, name, choice) in enumerate(rounds[0].named):
        rec.row(
            "model", Timing.of([one.measured[i] * 1e-3 for one in rounds]), **params, set=kind, choice=name,
            extra={
                "predicted": median(lambda one: one.predicted[i]) * 1e-3,  # noqa: B023
                "operations": median(lambda one: one.operations[i]) * 1e-3,  # noqa: B023
                "error": median(lambda one: one.predicted[i] / one.measured[i] - 1),  # noqa: B023
                "blocks": choice.blocks, "choice": choice.to_dict(),
            },
        )  # fmt: skip
    for i in rounds[0].of("precision")[1:]:
        extra = {"predicted": median(lambda one: one.speedup(i, "predicted"))}  # noqa: B023
        extra |= {"error": median(lambda one: one.speedup(i, "predicted") / one.speedup(i, "measured") - 1)}  # noqa: B023
        measured = Timing.of([one.speedup(i, "measured") for one in rounds])
        rec.row("speed-up", measured, "×", extra, **params, scheme=rounds[0].named[i][1])
    for kind in SETS:
        errors = [mean(one.errors(kind)) for one in rounds]
        rec.row(
            "mape", Timing(statistics.median(errors), min(errors), max(errors), len(errors)), "", **params, set=kind,
            extra={
                "worst": median(lambda one: worst(one.errors(kind))),  # noqa: B023
                "operations_only": median(lambda one: mean(one.errors(kind, "operations"))),  # noqa: B023
                "models": len(rounds[0].of(kind)), "fitted_on": args.fit,
                "fixed_ms": median(lambda one: one.overhead.fixed),
                "per_block_ms": median(lambda one: one.overhead.per_block), "batch": workload.batch,
                "seq": workload.seq, "dtype": workload.dtype, "threads": torch.get_num_threads(),
            },
        )  # fmt: skip


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--model", nargs="+", default=["embedded"], help=HELP)
    parser.add_argument("--modes", nargs="+", default=["prefill", "decode"], choices=("prefill", "decode"))
    parser.add_argument("--prefill", type=int, nargs=2, default=(4, 128), metavar=("BATCH", "TOKENS"))
    parser.add_argument("--decode", type=int, nargs=2, default=(1, 128), metavar=("BATCH", "TOKENS"), help="cached")
    parser.add_argument("--random", type=int, default=12, help="random models, and as many with random bits alone")
    parser.add_argument("--fit", type=int, default=10, help="other random models, to which the overhead is fitted")
    parser.add_argument("--group", type=int, default=64, help="of models that are taken as they are")
    parser.add_argument("--rounds", type=int, default=5, help="of a new table and all models")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 for the embedded model")
    args = parser.parse_args(argv)
    if args.tiny:
        args.random, args.fit, args.rounds = 2, 4, 2
    rec = Recorder.of("calibration", args)
    for model, mode in itertools.product(args.model, args.modes):
        dtype = args.dtype or ("bfloat16" if model != "embedded" and native_bf16() else "float32")
        workload = Workload(mode, *getattr(args, mode), dtype)
        guarded(f"{model}, {mode}", partial(compare, rec, model, workload, args))
    return rec.rows


if __name__ == "__main__":
    main()
