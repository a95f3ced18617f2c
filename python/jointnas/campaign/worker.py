"""One task of a campaign: what a process does with it."""

from __future__ import annotations

import functools
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import PreTrainedModel

from jointnas import budget, loading
from jointnas.baselines.context import Context, Picked
from jointnas.baselines.methods import METHODS
from jointnas.baselines.ptq import quantized
from jointnas.campaign.clock import Clock, seconds
from jointnas.campaign.plan import ORIGINAL, QUANTIZERS, Shared, Unit, asked_precisions, folder_of
from jointnas.campaign.variants import variant
from jointnas.compare_config import CompareConfig
from jointnas.config import RunConfig
from jointnas.data import Streams
from jointnas.distillation import bake, distil, original_logits, student_of
from jointnas.exporting import export_model, reload
from jointnas.objective import Infeasible
from jointnas.pipeline import quality, ready_tasks
from jointnas.run_folder import TABLE, read_json, write_json
from jointnas.tasks import Tasks
from jointnas_kernels.latency import LatencyTable
from jointnas_kernels.space import Choice, SearchSpace, count_params, model_bytes

PICKED, ROW, DONE, FINAL = "picked.json", "row.json", "done.json", "final"
WORK = ("checkpoints", "checkpoints-finetune", "quantizers")  # of no use once a unit has ended
LOCKED = 60.0  # seconds to wait for a process of a killed campaign to end


@dataclass
class Base:
    """What all tasks of a process share; loaded once."""

    config: CompareConfig
    space: SearchSpace  # without what model or device cannot run
    table: LatencyTable
    tasks: Tasks
    _streams: dict[int, Streams] = field(default_factory=dict)

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The original."""
        return loading.load_model(self.config.model)

    def streams(self, seed: int) -> Streams:
        """The data of a seed."""
        if seed not in self._streams:
            self._streams[seed] = loading.load_streams(self.config.data, self.config.model, seed)
        return self._streams[seed]

    @property
    def out(self) -> Path:
        """The campaign's folder."""
        return Path(self.config.out)

    @classmethod
    def load(cls, config: CompareConfig) -> Base:
        """Of a resolved configuration."""
        space, _ = loading.space_of(config, loading.model_config(config.model))
        device = None if config.latency.force else loading.device_type(config.model)
        table = LatencyTable.load(config.latency.table or Path(config.out) / TABLE, device)
        return cls(config, table.restrict(space)[0], table, ready_tasks(config))


def ended(base: Base, task: Unit | Shared) -> bool:
    """Whether a task has left what it was to leave."""
    return (folder_of(base.out, task) / (ROW if isinstance(task, Unit) else DONE)).is_file()


def work(base: Base, task: Unit | Shared) -> None:
    """Does a task, or what is left of it."""
    folder = folder_of(base.out, task)
    end = folder / (ROW if isinstance(task, Unit) else DONE)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock", timeout=LOCKED), Clock(folder) as clock:
        if isinstance(task, Shared):
            _share(base, task)
            write_json(end, {"seconds": clock.seconds})
        else:
            row = _row(base, task, folder)
            shared = sum(seconds(folder_of(base.out, need)) for need in task.needs)
            write_json(end, {**row, "seconds": clock.seconds, "shared_seconds": shared})
    for name in WORK if isinstance(task, Unit) else ():
        shutil.rmtree(folder / name, ignore_errors=True)


def context(base: Base, task: Unit | Shared) -> Context:
    """What the method of a task works with."""
    folder, own = folder_of(base.out, task), base.config
    if task.variant is not None:
        own = variant(own, task.variant)
    target = task.target_ms if isinstance(task, Unit) else None
    values = {name: getattr(own, name) for name in RunConfig.model_fields}
    values |= {"out": str(folder), "seed": task.seed, "target_latency_ms": target, "resume": "auto"}
    method = task.method if isinstance(task, Unit) else task.what
    if isinstance(task, Unit):
        precision, number = task.precision, task.number or 0
    else:  # it trains without bits, and needs one only to say that
        precise = method in METHODS and METHODS[method].precise
        precision, number = (asked_precisions(own, base.space)[0] if precise else None), 0
    quantizers = Shared(QUANTIZERS, task.seed, task.quantizers if isinstance(task, Unit) else task.variant)
    return Context(
        RunConfig.model_construct(**values), own.compare, base.model, base.streams(task.seed), base.table,
        folder_of(base.out, Shared(method, task.seed)), folder_of(base.out, quantizers), precision, number,
    )  # fmt: skip


def _share(base: Base, task: Shared) -> None:
    if task.what == QUANTIZERS:
        context(base, task).run()
        return
    share = METHODS[task.what].share
    assert share is not None
    share(context(base, task))


def _row(base: Base, unit: Unit, folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "unit": unit.name, "method": unit.variant or unit.method, "pipeline": unit.pipeline,
        "target_ms": unit.target_ms, "precision": None if unit.precision is None else str(unit.precision),
        "seed": unit.seed, "number": unit.number, "caveat": loading.caveat(base.config.model),
    }  # fmt: skip
    if unit.method == ORIGINAL:
        return {**facts, "status": "done", **_original(base)}
    if not (folder / FINAL).is_dir():
        try:
            picked = METHODS[unit.method].pick(context(base, unit))
        except Infeasible as error:
            return {**facts, "status": "infeasible", "reason": str(error)}
        _finish(picked, folder, budget.total(base.config))
    found = read_json(folder / PICKED)
    model = reload(folder / FINAL, base.config.model.device, getattr(torch, base.config.model.dtype))
    choice, rank = Choice.from_dict(found["choice"]), found["block_rank"]
    config, bound = base.model.config, base.table.bind(base.space, tuple(rank))
    size = model_bytes(config, base.space, choice, rank)
    return {
        **facts, "status": "done", **found, "params": count_params(config, choice), "bytes": size,
        "predicted_ms": bound.predict(choice), **_quality(base, model, unit.seed),
    }  # fmt: skip


def _finish(picked: Picked, folder: Path, total: int) -> None:
    """Quantizes what has no bits yet, fine-tunes with the tokens that are left of the total, and exports."""
    run, choice = picked.run, picked.choice
    config, rank = run.config, run.supernet.block_rank
    steps = budget.finetune_steps(config, total - picked.tokens)
    tokens = {
        "search": picked.tokens, "finetune": steps * budget.finetune_step(config), "evaluated": picked.evaluated,
    }  # fmt: skip
    record = {"choice": choice.to_dict(), "block_rank": list(rank), "tokens": tokens, "about": picked.about}
    write_json(folder / PICKED, record)
    if run.after is None:
        student = student_of(run.supernet, choice, config.finetune.train)
    else:
        student = student_of(*quantized(run, choice, folder / "quantizers"), config.finetune.train)
    distil(
        student, original_logits(run.supernet), run.streams.all, config.finetune.model_copy(update={"steps": steps}),
        batch_size=config.data.batch_size, seq_len=config.data.seq_len, seed=config.seed, folder=folder, resume=True,
        progress=config.progress, tensorboard=config.tensorboard, bos=run.streams.bos,
    )  # fmt: skip
    export_model(bake(student), folder / FINAL, choice, rank, **loading.origin(config.model))


def _original(base: Base) -> dict[str, Any]:
    full = SearchSpace.single(base.model.config)
    size = model_bytes(base.model.config, full, full.full())
    tokens = {"search": 0, "finetune": 0, "evaluated": 0}
    return {
        "tokens": tokens, "params": count_params(base.model.config, full.full()), "bytes": size,
        "predicted_ms": base.table.bind(base.space).original(),
        **_quality(base, base.model, base.config.compare.seeds[0]),
    }  # fmt: skip


def _quality(base: Base, model: PreTrainedModel, seed: int) -> dict[str, Any]:
    streams, config = base.streams(seed), base.config
    found = quality(model, config.model, streams.held_out, config.eval, base.tasks, streams.bos)
    return {**found, "ce": math.log(found["perplexity"])}
