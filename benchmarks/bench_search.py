"""Is the search right? Found models against random ones of the same cost, and against every choice of a small space.

python -m benchmarks.bench_search --table FILE [--device cuda] [--workers 8] [--seconds 420] [--out FOLDER]

joint       the `tiny` space with weight and activation bits. Per seed one search; then the found model and random
            choices with the same latency and parameters (each within 10 %) get the same fine-tuning from the same
            original weights.
exhaustive  no bits, hidden x intermediate x blocks = 30 choices. All of them are fine-tuned: the truth. Per seed and
            latency weight η one search; reported: whether what it found is on the true front, how far from it, and the
            hypervolume of all found models over that of the front.

--table is a latency table of the target device, e.g. from `jointnas profile --out FILE` on a CPU; it need not be the
device that trains. Cross-entropies are nats per token on held-out text. A row per search and per fine-tuned choice is
appended to FOLDER/search.jsonl as soon as it is known, the summary at the end; what a row of the same settings already
answers is not computed again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS, environment, rows_file
from benchmarks.rows import append, read, slug
from jointnas import loading
from jointnas.baselines.random_choices import random_choices
from jointnas.bilevel import optimise
from jointnas.config import RunConfig, build
from jointnas.metrics import read_metrics
from jointnas.pipeline import score
from jointnas.preparation import prepare
from jointnas.results import hypervolume, pareto
from jointnas.run_folder import Run
from jointnas_kernels.latency import LatencyTable
from jointnas_kernels.space import Choice

EXHAUSTIVE = {"heads": [4], "head_dim": [64], "weight_bits": "none", "act_bits": "none"}


@dataclass(frozen=True)
class Settings:
    """What all jobs share; hashable, so that each worker loads model, data and table once."""

    device: str
    table: str
    model: str
    search_steps: int
    finetune_steps: int
    batch: int
    seq: int
    threads: int

    def public(self, job: Job) -> dict[str, Any]:
        """What a row says of its settings: of the table only its name."""
        return {**self.__dict__, "table": Path(self.table).name, **job.search}

    def config(self, experiment: str, seed: int, **search: Any) -> RunConfig:
        joint = experiment == "joint"
        values = {
            "seed": seed,
            "progress": False,
            "tensorboard": False,
            "out": "unused",
            "model": {"source": self.model, "device": self.device},
            "data": {"batch_size": self.batch, "seq_len": self.seq},
            "space": {} if joint else EXHAUSTIVE,
            "latency": {"table": self.table, "force": True},
            "search": {
                "steps": self.search_steps, "min_steps": self.search_steps // 2, "lr_arch": 0.05, "lr_weight": 1e-3,
                "log_every": 10, "gap_every": 20, "save_every": 100_000, **search,
            },
            "finetune": {"steps": self.finetune_steps, "lr": 1e-3},
        }  # fmt: skip
        return build(RunConfig, values)


@dataclass
class Job:
    kind: str  # "search" or "score"
    experiment: str
    seed: int
    role: str  # "found", "random", "choice"; of a search: "search"
    search: dict[str, Any] = field(default_factory=dict)
    choice: Choice | None = None


class Context:
    """One worker's model, data and table."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        config = settings.config("joint", 0)
        self.model = loading.load_model(config.model)
        self.streams = loading.load_streams(config.data, config.model, seed=0)
        self.table = LatencyTable.load(settings.table, device=None)

    def prepare(self, config: RunConfig) -> Run:
        """A supernet on a copy of the original weights, LoRA at zero: where every search and comparison starts."""
        return prepare(config, copy.deepcopy(self.model), self.streams, self.table)


@functools.cache
def context(settings: Settings) -> Context:
    return Context(settings)


def work(settings: Settings, job: Job) -> dict[str, Any]:
    """Runs one job in a worker and returns its row."""
    here = context(settings)
    config = settings.config(job.experiment, job.seed, **job.search)
    began = time.monotonic()
    row: dict[str, Any] = {
        "topic": "search", "experiment": job.experiment, "kind": job.kind, "role": job.role, "seed": job.seed,
        "settings": settings.public(job),
    }  # fmt: skip
    if job.kind == "search":
        row |= run_search(here, config)
    else:
        assert job.choice is not None
        row |= asdict(score(here.prepare(config), job.choice, job.seed))
    return {**row, "seconds": time.monotonic() - began}


def run_search(here: Context, config: RunConfig) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = here.prepare(config.model_copy(update={"out": folder}))
        found = optimise(run)
        rows = read_metrics(Path(folder))
    gaps = [r["gap"] for r in rows if "gap" in r]
    return {
        **asdict(found), "block_rank": list(run.supernet.block_rank), "gap_first": gaps[0], "gap_last": gaps[-1],
        "entropy_last": rows[-1]["entropy_max"],
    }  # fmt: skip


class Bench:
    """Sends jobs to worker processes, writes rows as they come, and stops at the deadline."""

    def __init__(self, settings: Settings, workers: int, out: Path, env: dict[str, str], seconds: float) -> None:
        self.settings, self.out, self.env = settings, out, env
        self.began, self.deadline = time.monotonic(), time.monotonic() + seconds
        self.pool = multiprocessing.get_context("spawn").Pool(workers)

    def known(self) -> dict[str, dict[str, Any]]:
        """Rows that are already there, by what they answer."""
        rows = [row for row in read(self.out) if row["topic"] == "search" and row["kind"] != "summary"]
        return {self.question(row, row["settings"], row["choice"]): row for row in rows}

    @staticmethod
    def question(job: dict[str, Any], settings: dict[str, Any], choice: dict[str, Any] | None) -> str:
        who = [job[k] for k in ("experiment", "kind", "role", "seed")]
        return json.dumps([who, settings, choice if job["kind"] == "score" else None], sort_keys=True)

    def run(self, jobs: Iterable[Job]) -> list[dict[str, Any]]:
        """Rows of the jobs that finished before the deadline."""
        known, rows, waiting = self.known(), [], []
        for job in jobs:
            choice = job.choice.to_dict() if job.choice else None
            row = known.get(self.question(job.__dict__, self.settings.public(job), choice))
            if row is not None:
                rows.append(row)
            else:
                waiting.append((job, self.pool.apply_async(work, (self.settings, job))))
        while waiting and time.monotonic() < self.deadline:
            for entry in list(waiting):
                job, result = entry
                if not result.ready():
                    continue
                waiting.remove(entry)
                row = result.get()
                self.write(row)
                rows.append(row)
                what = f"ce {row['ce']:.4f}" if "ce" in row else f"{row['steps']} steps, gap {row['gap_last']:.3f}"
                took = f"{row['seconds']:.1f} s, at {time.monotonic() - self.began:.0f} s"
                print(f"{job.experiment:10s} seed {job.seed} {job.role:7s} {row['predicted_ms']:.3f} ms "
                      f"{row['params']:>9,} {what} ({took})", flush=True)  # fmt: skip
            time.sleep(0.02)
        if waiting:
            print(f"deadline: {len(waiting)} jobs were not finished", flush=True)
        return rows

    def write(self, row: dict[str, Any]) -> None:
        append(self.out, {**row, **self.env})


def joint(bench: Bench, seeds: int, randoms: int, budget: float, etas: list[float]) -> dict[str, Any]:
    """The found model of each seed against its random peers."""
    searches = [
        Job("search", "joint", s, "search", {"eta": etas[s % len(etas)], "budget_max": budget}) for s in range(seeds)
    ]
    scores: list[Job] = []
    table = LatencyTable.load(bench.settings.table, device=None)
    for row in bench.run(searches):
        seed, found = row["seed"], Choice.from_dict(row["choice"])
        config = bench.settings.config("joint", seed)
        bound = table.bind(table.restrict(config.space.build())[0], row["block_rank"])
        others = random_choices(found, bound, loading.model_config(config.model), randoms, seed)
        scores.append(Job("score", "joint", seed, "found", choice=found))
        scores += [Job("score", "joint", seed, "random", choice=c) for c in others]
    rows = bench.run(scores)
    summary: dict[str, Any] = {"seeds": {}}
    for seed in sorted({r["seed"] for r in rows}):
        own = [r["ce"] for r in rows if r["seed"] == seed and r["role"] == "found"]
        others = [r["ce"] for r in rows if r["seed"] == seed and r["role"] == "random"]
        if own and others:
            summary["seeds"][seed] = {
                "found": own[0], "median_random": statistics.median(others), "best_random": min(others),
                "randoms": len(others), "better_than": sum(own[0] < o for o in others),
            }  # fmt: skip
    done = summary["seeds"].values()
    summary["beats_median"] = f"{sum(s['found'] < s['median_random'] for s in done)} of {len(done)}"
    return summary


def exhaustive(bench: Bench, seeds: int, etas: list[float]) -> dict[str, Any]:
    """Searches at several η against the true front of all 30 choices."""
    space = bench.settings.config("exhaustive", 0).space.build()
    searches = [Job("search", "exhaustive", s, "search", {"eta": e}) for s in range(seeds) for e in etas]
    rows = bench.run([*searches, *(Job("score", "exhaustive", 0, "choice", choice=c) for c in space)])
    truth = {Choice.from_dict(r["choice"]): (r["predicted_ms"], r["ce"]) for r in rows if r["kind"] == "score"}
    choices = list(truth)
    points = [truth[c] for c in choices]
    if not points:
        return {"choices": 0, "of": space.size()}
    front = [points[i] for i in pareto(points)]
    reference = (max(p[0] for p in points) * 1.01, max(p[1] for p in points) * 1.01)
    summary: dict[str, Any] = {
        "choices": len(points), "of": space.size(), "front": len(front), "searches": [], "hypervolume": {},
    }  # fmt: skip
    for row in rows:
        found = Choice.from_dict(row["choice"]) if row["kind"] == "search" else None
        if found is None or found not in truth:
            continue
        latency, ce = truth[found]
        best = min(p[1] for p in points if p[0] <= latency)
        summary["searches"].append({
            "seed": row["seed"], "eta": row["settings"]["eta"], "ms": latency, "ce": ce, "on_front": ce <= best,
            "behind_front": ce - best, "rank": sum(p[0] <= latency and p[1] < ce for p in points),
        })  # fmt: skip
    for seed in range(seeds):
        own = [(s["ms"], s["ce"]) for s in summary["searches"] if s["seed"] == seed]
        if own:
            summary["hypervolume"][seed] = hypervolume(own, reference) / hypervolume(front, reference)
    together = [(s["ms"], s["ce"]) for s in summary["searches"]]
    if together:
        summary["hypervolume"]["all"] = hypervolume(together, reference) / hypervolume(front, reference)
    summary["on_front"] = f"{sum(s['on_front'] for s in summary['searches'])} of {len(summary['searches'])}"
    return summary


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, help="latency table of the target device")
    parser.add_argument("--device", default="cpu", help="where to train")
    parser.add_argument("--model", default="embedded", help="'embedded' or a transformers folder")
    parser.add_argument("--out", help="folder of search.jsonl, or file.jsonl; default: benchmarks/results/<device>")
    parser.add_argument("--resume", action="store_true", help="nothing to ask for: what is there is never run again")
    parser.add_argument("--commit", help="for trees without history")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per worker")
    parser.add_argument("--seconds", type=float, default=420.0, help="stop after this time, with what is there")
    parser.add_argument("--only", choices=("joint", "exhaustive"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--randoms", type=int, default=8)
    parser.add_argument("--budget", type=float, default=0.6, help="joint: share of the original's parameters")
    parser.add_argument("--joint-etas", type=float, nargs="+", default=[1.0])
    parser.add_argument("--etas", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0])
    parser.add_argument("--search-steps", type=int, default=400)
    parser.add_argument("--finetune-steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    args = parser.parse_args(argv)
    env = environment(args.device.partition(":")[0], args.commit)
    out = rows_file(args.out or RESULTS / slug(env["device"]), "search")
    settings = Settings(
        args.device, str(Path(args.table).resolve()), args.model, args.search_steps, args.finetune_steps, args.batch,
        args.seq, args.threads,
    )  # fmt: skip
    bench = Bench(settings, args.workers, out, env, args.seconds)
    summary: dict[str, Any] = {}
    try:
        if args.only != "exhaustive":
            summary["joint"] = joint(bench, args.seeds, args.randoms, args.budget, args.joint_etas)
        if args.only != "joint":
            summary["exhaustive"] = exhaustive(bench, args.seeds, args.etas)
    finally:
        bench.pool.terminate()
    bench.write({"topic": "search", "kind": "summary", **summary})
    print(json.dumps(summary, indent=1))
    return summary


if __name__ == "__main__":
    main()
