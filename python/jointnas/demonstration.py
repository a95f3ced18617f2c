"""`demo`: the whole mission on the embedded model, in minutes on two CPU cores.

Latency table of this machine → joint search (widths, depth, bits per block) for a latency that no single precision of
the whole model reaches → pruning, distillation, export, reload → one table with the original, random architectures of
the same cost, and the original quantized as a whole; a Pareto plot and the heat maps of the search.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

from jointnas import artifact, models, plots
from jointnas.bilevel import Run, measure_table, optimise, prepare
from jointnas.config import RunConfig, build
from jointnas.distillation import bake, distil, original_logits, trainable
from jointnas.peers import fresh_supernet, random_peers
from jointnas.pipeline import describe_model, found_choice, load_supernet, write_final
from jointnas.reporting import latency_title, pareto_points, report
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import extract
from jointnas_kernels.latency.table import Bound, LatencyTable
from jointnas_kernels.space import Choice

log = logging.getLogger(__name__)
TARGET = 0.6  # of the fastest single precision of the whole model


def demo(
    out: str = "runs/demo", device: str = "cpu", seed: int = 0, randoms: int = 1, threads: int | None = None
) -> list[dict[str, Any]]:
    """Runs the demo and returns its table. A finished or interrupted one in `out` is continued.

    Args:
        out: run folder.
        device: cpu or cuda; the latency table is that device's.
        seed: of everything.
        randoms: how many random architectures of the found model's cost to train for comparison.
        threads: CPU threads for all work; default: what torch uses.
    """
    if threads:
        torch.set_num_threads(threads)
    began = time.monotonic()
    config, table = with_target(demo_config(out, device, seed))
    run = prepare(config, table=table)
    say(began, f"latency table: {len(run.table.rows)} measurements on {run.table.header.device}")
    say(began, f"target {config.target_latency_ms:.2f} ms: {TARGET:.0%} of the original at its fastest precision")
    finished = (run.folder / "choice.json").is_file()
    if finished:
        load_supernet(run)
    else:
        optimise(run)
    choice = found_choice(run.folder)
    say(began, f"found {choice}")
    path = run.folder / "demo.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    done = {r["name"] for r in rows}
    for name, model_choice in candidates(run, choice, randoms, seed):
        if name in done:
            continue
        model = candidate(run, name, model_choice)
        rows.append(describe_model(name, model, model_choice, run).to_dict())
        path.write_text(json.dumps(rows, indent=1))
        say(began, f"{name}: perplexity {rows[-1]['perplexity']:.2f}")
    (run.folder / "eval.json").write_text(json.dumps(rows, indent=1))
    plots.pareto_front(
        pareto_points(rows), run.folder / "plots" / "pareto.png", "x", "y", (latency_title(rows), "held-out perplexity")
    )
    report(str(run.folder))
    say(began, f"report: {run.folder / 'report.html'}, plots in {run.folder / 'plots'}")
    return rows


def demo_config(out: str, device: str, seed: int) -> RunConfig:
    """Settings for a model of 5.8M parameters: larger learning rates and fewer steps than the defaults."""
    return build(
        RunConfig,
        {
            "out": out,
            "seed": seed,
            "resume": "auto",
            "model": {"device": device},
            "data": {"batch_size": 4, "seq_len": 128},
            "latency": {"batch": 4, "seq": 128, "seconds": 0.02},
            "search": {
                "steps": 240, "min_steps": 100, "lr_arch": 0.05, "lr_weight": 1e-3, "eta": 0.3, "gap_every": 20,
                "log_every": 5,
            },
            "finetune": {"steps": 240, "lr": 1e-3},
            "eval": {"tokens": 32768, "task_limit": 100},
        },
    )  # fmt: skip


def with_target(config: RunConfig) -> tuple[RunConfig, LatencyTable]:
    """Measures the run's latency table, if it is not there yet, and sets the target from it."""
    space, model_config = config.space.build(), models.model_config(config.model)
    table = measure_table(config, space, model_config, Path(config.out) / "latency.jsonl")
    bound = table.bind(table.restrict(space)[0])
    fastest = min([bound.original(), *(bound.predict(choice) for _, choice in whole_model_bits(bound))])
    return config.model_copy(update={"target_latency_ms": TARGET * fastest}), table


def candidates(run: Run, found: Choice, randoms: int, seed: int) -> list[tuple[str, Choice | None]]:
    """What the table shows, in order."""
    rows: list[tuple[str, Choice | None]] = [("original", None)]
    rows += [(f"original {name}", choice) for name, choice in whole_model_bits(run.bound)]
    try:
        peers = random_peers(found, run.bound, run.model_config, randoms, seed)
    except JointNASError as error:
        log.warning("%s", error)
        peers = []
    rows += [(f"random {i + 1}", choice) for i, choice in enumerate(peers)]
    return [*rows, ("found", found)]


def whole_model_bits(bound: Bound) -> list[tuple[str, Choice]]:
    """The full architecture at one precision everywhere, for every precision that is faster than 16 bits."""
    space, full = bound.space, bound.space.full()
    found = []
    for w in space.sizes("weight_bits"):
        for a in space.sizes("act_bits"):
            choice = Choice(
                full.hidden, full.heads, full.head_dim, full.intermediate, full.blocks, (w,) * space.depth,
                (a,) * space.depth,
            )  # fmt: skip
            try:
                fast = bound.predict(choice) < bound.original()
            except JointNASError:
                continue
            if fast and w <= 8 and a >= 8:
                found.append((f"W{w}A{a}", choice))
    return found[:3]


def candidate(run: Run, name: str, choice: Choice | None) -> Any:
    """The model of one table row, ready to be measured."""
    config = run.config
    if choice is None:
        return models.load_model(config.model)
    if name.startswith("original"):
        return extract(fresh_supernet(models.load_model(config.model), run.space, run.importance), choice)
    student = trainable(run.supernet, choice)
    distil(
        student, original_logits(run.supernet), run.streams.all, config.finetune, batch_size=config.data.batch_size,
        seq_len=config.data.seq_len, seed=config.seed, folder=run.folder if name == "found" else None,
        progress=config.progress, tensorboard=config.tensorboard,
    )  # fmt: skip
    model = bake(student)
    if name != "found":
        return model
    final = write_final(run, model, choice, run.folder / "final")
    again = artifact.reload(final, config.model.device, getattr(torch, config.model.dtype))
    difference = logit_difference(model, again, run)
    log.info("exported to %s; reloaded by stock transformers: max|Δlogit| = %g", final, difference)
    return again


@torch.inference_mode()
def logit_difference(a: Any, b: Any, run: Run) -> float:
    ids = run.streams.held_out[:256][None].to(run.supernet.device)
    return (a(input_ids=ids).logits - b(input_ids=ids).logits).abs().max().item()


def say(began: float, text: str) -> None:
    log.info("[%4.0f s] %s", time.monotonic() - began, text)
