"""Predictions of a latency table against the measured latency of whole models that its overhead was not fitted to.

python -m benchmarks.bench_calibration [--device cpu] [--modes prefill decode] [--choices 24] [--table FILE]

The `tiny` space with bits on the embedded model's sizes: prefill of 4 x 128 tokens, one decoded token after 128. The
table is profiled and calibrated on `--fit` random choices, then `--choices` other random ones are predicted, and
measured with the kernels that the table names. What a busy machine disturbs is measured again, then left out, counted.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Recorder, Timing, arguments, guarded
from jointnas.config import ModelConfig
from jointnas.models import model_config
from jointnas_kernels.latency import LatencyTable, Workload, calibrate, feasible_choices, measure_choices, profile
from jointnas_kernels.space import SearchSpace

WORKLOADS = {"prefill": Workload("prefill", 4, 128), "decode": Workload("decode", 1, 128)}
FULL_REPEATS = 2  # resumed profiles, while operations are marked as disturbed


def compare(rec: Recorder, mode: str, args: argparse.Namespace, folder: Path) -> None:
    workload, config = WORKLOADS[mode], model_config(ModelConfig())
    whole, path = SearchSpace.named("tiny"), Path(args.table or folder / f"{mode}.jsonl")
    for _ in range(FULL_REPEATS):
        table = profile(whole, config, path, workload=workload, device=rec.device, seconds=0.02, progress=False)
        if not table.caution:
            break
    space, _ = table.restrict(whole)
    seconds = 0.02 if args.tiny else 0.3
    watch = table.watch(patience=0.5 if args.tiny else args.patience)
    fitted = calibrate(table, space, config, 4 if args.tiny else args.fit, seed=1, seconds=seconds, watch=watch)
    fitted.save(path)
    calibration = fitted.calibration
    assert calibration is not None
    seen = set(feasible_choices(table, space, args.fit, 1))
    count = 2 if args.tiny else args.choices
    choices = [c for c in feasible_choices(table, space, count + args.fit, 0) if c not in seen][:count]
    bound, plain = fitted.bind(space), LatencyTable(table.header, table.rows).bind(space)
    errors, before, disturbed = [], [], 0
    measured = measure_choices(fitted, space, config, choices, seconds=seconds, watch=watch)
    for index, (choice, found) in enumerate(zip(choices, measured, strict=True)):
        predicted, operations = bound.predict(choice), plain.predict(choice)
        extra: dict[str, Any] = {"predicted": predicted * 1e-3, "operations": operations * 1e-3}
        extra |= {"blocks": choice.blocks, "contended": found.contended, "choice": choice.to_dict()}
        timing = Timing(found.median * 1e-3, found.p10 * 1e-3, found.p90 * 1e-3, found.samples)
        rec.row("model", timing, extra=extra, mode=mode, index=index)
        disturbed += found.contended
        if not found.contended:
            errors.append(abs(predicted / found.median - 1))
            before.append(abs(operations / found.median - 1))
    if not errors:
        raise RuntimeError("every model was measured on a busy machine; stop other processes and run again")
    rec.row(
        "mape", sum(errors) / len(errors), "", mode=mode,
        extra={
            "worst": max(errors), "operations_only": sum(before) / len(before), "models": len(errors),
            "disturbed": disturbed, "fitted_on": len(calibration.points), "fixed_ms": calibration.fixed,
            "per_block_ms": calibration.per_block, "batch": workload.batch, "seq": workload.seq,
            "threads": torch.get_num_threads(), "caution": bool(fitted.caution),
        },
    )  # fmt: skip


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter))
    parser.add_argument("--modes", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--choices", type=int, default=24, help="whole models that are predicted")
    parser.add_argument("--fit", type=int, default=10, help="other whole models that the overhead is fitted to")
    parser.add_argument("--table", default=None, help="table file to use and continue (one mode only)")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for a quiet machine, per mode")
    args = parser.parse_args(argv)
    rec = Recorder("calibration", args.device, args.out, args.commit)
    with tempfile.TemporaryDirectory() as folder:
        for mode in args.modes:
            guarded(mode, partial(compare, rec, mode, args, Path(folder)))
    return rec.rows


if __name__ == "__main__":
    main()
