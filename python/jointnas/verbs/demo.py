"""`demo`: the whole mission on the embedded model, in minutes on two CPU cores.

Latency table of this machine → joint search (widths, depth, bits per block) for a latency that no single precision of
the whole model reaches → pruning, distillation, export, reload → one table with the original, random architectures of
the same cost, and the original quantized as a whole; a Pareto plot and the heat maps of the search.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from jointnas import loading
from jointnas.baselines.random_choices import random_choices
from jointnas.baselines.single_precision import single_precisions
from jointnas.bilevel import optimise
from jointnas.config import RunConfig, build
from jointnas.pipeline import distilled, evaluated, finish, reloaded
from jointnas.preparation import measure_table, prepare
from jointnas.results import text_table
from jointnas.run_folder import Run, found_choice, load_supernet, read_json, write_json
from jointnas.tasks import load_tasks
from jointnas.verbs.report import report
from jointnas_kernels.errors import JointNASError, writable
from jointnas_kernels.hf import extract, feasible_space
from jointnas_kernels.latency import LatencyTable
from jointnas_kernels.space import Choice

log = logging.getLogger(__name__)
TARGET = 0.6  # of the fastest single precision of the whole model


def demo(
    out: str = "runs/demo", device: str = "auto", seed: int = 0, randoms: int = 1, threads: int | None = None
) -> list[dict[str, Any]]:
    """Runs the whole mission on the embedded model and returns the result table.

    Args:
        out: run folder; a finished or interrupted demo in it is continued.
        device: cpu, cuda, or auto: cuda where there is one. The latency table is that device's.
        seed: of everything.
        randoms: random architectures of the found model's cost, trained for comparison.
        threads: CPU threads for all work; default: what torch uses.

    Returns:
        One row per model (`results.Row`), also written to OUT/eval.json.

    Raises:
        JointNASError: there is no such device, or `out` holds something else.
    """
    writable(out)
    start = loading.resolve(demo_config(out, device, seed))
    if threads:
        torch.set_num_threads(threads)
    began = time.monotonic()

    def say(text: str) -> None:
        log.info("[%4.0f s] %s", time.monotonic() - began, text)

    config, table = with_target(start)
    tasks = load_tasks(config.eval)
    run = prepare(config, table=table)
    say(f"latency table: {len(table.rows)} measurements on {table.header.device}")
    say(f"target {config.target_latency_ms:.2f} ms: {TARGET:.0%} of the original at its fastest precision")
    if (run.folder / "choice.json").is_file():
        load_supernet(run)
    else:
        optimise(run)
    choice = found_choice(run.folder)
    say(f"found {choice}")
    path = run.folder / "eval.json"
    rows: list[dict[str, Any]] = read_json(path) or []
    done = {r["name"] for r in rows}
    for name, of in candidates(run, choice, randoms, seed):
        if name not in done:
            rows.append(asdict(evaluated(name, candidate(run, name, of), of, run, tasks)))
            write_json(path, rows)
            say(f"{name}: perplexity {rows[-1]['perplexity']:.2f}")
    say(f"report: {report(out)}, plots in {run.folder / 'plots'}")
    return rows


text = text_table


def demo_config(out: str, device: str, seed: int) -> RunConfig:
    """Settings for a model of 5.8M parameters: larger learning rates and fewer steps than the defaults."""
    return build(
        RunConfig,
        {
            "out": out, "seed": seed, "resume": "auto", "model": {"device": device},
            "data": {"batch_size": 4, "seq_len": 128},
            "latency": {"batch": 4, "seq": 128, "seconds_per_operation": 0.02},
            "search": {
                "steps": 200, "min_steps": 100, "lr_arch": 0.05, "lr_weight": 1e-3, "eta": 0.3, "gap_every": 20,
                "log_every": 5,
            },
            "quantizer": {"options": {"samples": 16, "epochs": 2}},
            "finetune": {"steps": 160, "lr": 1e-3},
            "eval": {"tokens": 32768, "task_limit": 40},
        },
    )  # fmt: skip


def with_target(config: RunConfig) -> tuple[RunConfig, LatencyTable]:
    """Measures the run's latency table, if it is not there yet, and sets the target from it."""
    model_config = loading.model_config(config.model)
    space, _ = feasible_space(model_config, config.space.build())
    table = measure_table(config, space, model_config, Path(config.out) / "latency.jsonl")
    bound = table.bind(table.restrict(space)[0])
    fastest = min([bound.original(), *(bound.predict(choice) for _, choice in single_precisions(bound))])
    return config.model_copy(update={"target_latency_ms": TARGET * fastest}), table


def candidates(run: Run, found: Choice, randoms: int, seed: int) -> list[tuple[str, Choice | None]]:
    """What the table shows, in order."""
    rows: list[tuple[str, Choice | None]] = [("original", None)]
    rows += [(f"original {name}", choice) for name, choice in single_precisions(run.bound)]
    try:
        others = random_choices(found, run.bound, run.model_config, randoms, seed)
    except JointNASError as error:
        log.warning("%s", error)
        others = []
    rows += [(f"random {i + 1}", choice) for i, choice in enumerate(others)]
    return [*rows, ("found", found)]


def candidate(run: Run, name: str, choice: Choice | None) -> PreTrainedModel:
    """The model of one table row, ready to be measured."""
    if choice is None:
        return loading.load_model(run.config.model)
    if name.startswith("original"):  # quantized as it was before the search
        return extract(prepare(run.config, streams=run.streams, table=run.table).supernet, choice)
    if name != "found":
        return distilled(run, choice)
    model, final = finish(run)
    again = reloaded(run)
    log.info("exported to %s; reloaded by stock transformers: max|Δlogit| = %g", final, difference(model, again, run))
    return again


@torch.inference_mode()
def difference(a: PreTrainedModel, b: PreTrainedModel, run: Run) -> float:
    """The largest |Δlogit| on 256 held-out tokens."""
    ids = run.streams.held_out[:256][None].to(run.supernet.device)
    return float((a(input_ids=ids).logits - b(input_ids=ids).logits).abs().max())
