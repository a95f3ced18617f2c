"""`demo`: the whole mission on the embedded model, in minutes on two CPU cores, and whether it pays.

Latency table of this machine, decoding → a target that no single precision of the whole model reaches → the joint
search (widths, depth, bits per block) for it, and what it should beat there: a sequential pipeline (the same search
without bits, then one precision), a random choice, and the whole model at single precisions. All are trained on equally
many tokens, exported, reloaded by stock transformers, and measured in turns: a comparison (`compare`) of one target and
one seed, which ends with one sentence, one table and one page.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from jointnas import loading
from jointnas.campaign.plan import ORIGINAL
from jointnas.campaign.records import read
from jointnas.compare_config import CompareConfig
from jointnas.config import build
from jointnas.precision import Precision, precisions
from jointnas.preparation import measure_table
from jointnas.results import text_table
from jointnas.run_folder import TABLE
from jointnas.verbs.compare import compare
from jointnas.verbs.report import report
from jointnas_kernels.errors import JointNASError, writable
from jointnas_kernels.latency import LatencyTable
from jointnas_kernels.latency.bound import Bound

log = logging.getLogger(__name__)
# Of the way from the fastest single precision of the whole model to the fastest model of the space. Further down fewer
# blocks must do, which the fine-tuning of a demo, 26,000 tokens, does not mend.
SHARE = 0.05
NAMES = {"joint": "joint", "no-bits": "sequential", "random": "random", "uniform": "original at"}


def demo(
    out: str = "runs/demo", device: str = "auto", seed: int = 0, randoms: int = 1, threads: int | None = None
) -> list[dict[str, Any]]:
    """Runs the whole mission on the embedded model and returns the result table.

    Args:
        out: campaign folder; a finished or interrupted demo in it is continued.
        device: cpu, cuda, or auto: cuda where there is one. The latency table is that device's.
        seed: of everything.
        randoms: random choices at the target, trained for comparison.
        threads: CPU threads for all work; default: what torch uses.

    Returns:
        One row per model, as in OUT/results.jsonl.

    Raises:
        JointNASError: there is no such device, or `out` holds something else.
    """
    writable(out)
    start = loading.resolve(demo_config(out, device, seed, randoms))
    if threads:
        torch.set_num_threads(threads)
    began = time.monotonic()

    def say(text: str) -> None:
        log.info("[%4.0f s] %s", time.monotonic() - began, text)

    config, table = with_target(start)
    (target,) = config.compare.targets_ms
    say(f"latency table: {len(table.rows)} measurements on {table.header.device}")
    say(f"target {target:.3f} ms a token: no single precision of the whole model reaches it")
    folder = compare(config)
    rows = read(folder)
    joint = next(folder / "units" / row["unit"] for row in rows if row["method"] == "joint")
    say(f"report: {folder / 'report.html'}; of the joint search: {report(str(joint))}")
    return rows


def demo_config(out: str, device: str, seed: int, randoms: int) -> CompareConfig:
    """Settings for a model of 5.8M parameters: larger learning rates and fewer steps than the defaults."""
    return build(
        CompareConfig,
        {
            "out": out, "resume": "auto", "tensorboard": False, "model": {"device": device},
            "compare": {
                "methods": list(NAMES), "seeds": [seed], "randoms": randoms,
                "processes": 1 if device == "cuda" or torch.cuda.is_available() else min(2, torch.get_num_threads()),
            },
            "data": {"batch_size": 4, "seq_len": 128},
            "latency": {
                "workload": "decode", "batch": 1, "seq": 128, "dtype": "bfloat16", "seconds_per_operation": 0.02,
            },
            "search": {
                "steps": 40, "min_steps": 20, "lr_arch": 0.15, "lr_weight": 1e-3, "eta": 0.3, "gap_batches": 8,
                "gap_every": 20, "log_every": 5,
            },
            "quantizer": {"options": {"samples": 16, "epochs": 2}},
            "finetune": {"steps": 50, "lr": 1e-3},
            "eval": {"tokens": 32768, "task_limit": 40},
        },
    )  # fmt: skip


def with_target(config: CompareConfig) -> tuple[CompareConfig, LatencyTable]:
    """Measures the campaign's latency table, if it is not there yet, and sets the target, and the two precisions of
    which the whole model is fastest, from it.

    Raises:
        JointNASError: the device runs the whole model at no precision of the space.
    """
    model_config = loading.model_config(config.model)
    space, _ = loading.space_of(config, model_config)
    table = measure_table(config, space, model_config, Path(config.out) / TABLE)
    bound = table.bind(table.restrict(space)[0])
    fastest = single_precisions(bound)
    if not fastest:
        raise JointNASError(f"{table.header.device} runs the whole model at no precision of the space")
    best = min([bound.original(), *fastest.values()])  # 16 bits are a single precision, too
    options = {"targets_ms": [best - SHARE * (best - bound.extremes()[0])], "precisions": list(map(str, fastest))[:2]}
    return config.model_copy(update={"compare": config.compare.model_copy(update=options)}), table


def single_precisions(bound: Bound) -> dict[Precision, float]:
    """Predicted ms of the whole model at the fastest precision with A >= 8 of each number of weight bits, fastest
    first."""
    found: dict[int, tuple[float, Precision]] = {}
    for precision in precisions(bound.space):
        if (precision.act or 16) < 8:
            continue
        try:
            ms = bound.predict(precision.on(bound.space.full(), bound.space.depth))
        except JointNASError:  # infeasible bits
            continue
        found[precision.weight] = min((ms, precision), found.get(precision.weight, (ms, precision)), key=lambda e: e[0])
    return {precision: ms for ms, precision in sorted(found.values(), key=lambda entry: entry[0])}


def named(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with names for people."""
    return [
        {**row, "name": " ".join(filter(None, [NAMES.get(row["method"], ORIGINAL), row["precision"]]))}
        for row in rows if row["status"] == "done"
    ]  # fmt: skip


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """Who won, by how much, at the target."""
    (target,) = {row["target_ms"] for row in rows if row["target_ms"] is not None}
    models = {kind: [r for r in named(rows) if r["method"] == kind] for kind in NAMES}
    single = min(models["uniform"], key=lambda row: row["predicted_ms"])
    where = (
        f"At {target:.3f} ms a token, which no single precision of the whole model reaches (the fastest, "
        f"{single['precision']}, takes {single['predicted_ms']:.3f})"
    )
    ours = min(models["joint"], key=_perplexity)
    others = sorted(models["no-bits"] + models["random"], key=_perplexity)
    if not others:
        return f"{where}, only the joint search found a model: perplexity {_perplexity(ours):.1f}."
    first, second = sorted([ours, others[0]], key=_perplexity)
    rest = ", ".join(f"{row['name']} {_perplexity(row):.1f}" for row in others if row not in (first, second))
    more = _perplexity(second) / _perplexity(first) - 1
    return (
        f"{where}, {first['name']} wins: perplexity {_perplexity(first):.1f}, {second['name']} "
        f"{_perplexity(second):.1f} ({more:.0%} more)" + (f"; {rest}" if rest else "") + ". One seed."
    )


def _perplexity(row: Mapping[str, Any]) -> float:
    return float(row["perplexity"])


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the command prints."""
    return f"{text_table(named(rows))}\n\n{sentence(rows)}"
