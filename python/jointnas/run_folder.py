"""What a search works with, and the folder in which it leaves everything.

    config.yaml, env.json      configuration, versions, device and space of the run
    checkpoints/step-N/        the supernet's trained parameters, optimizers and random state
    metrics.jsonl              one line per logged step
    choice.json                the found choice
    final/                     its fine-tuned model
    latency.jsonl              the latency table that it measured, if none was given

Whatever is known of the result is in eval.json, convergence.json, plots/ and report.html.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from jointnas import checkpoint, parallel, sharding
from jointnas.checkpoint import write_text
from jointnas.config import RunConfig, dump, load
from jointnas.data import Streams
from jointnas.metrics import flat
from jointnas.objective import original_params
from jointnas.precision import Precision
from jointnas_kernels.errors import JointNASError, reading, writable
from jointnas_kernels.hf import Supernet
from jointnas_kernels.latency import LatencyTable
from jointnas_kernels.latency.bound import Bound
from jointnas_kernels.space import Choice, SearchSpace

log = logging.getLogger(__name__)
TABLE = "latency.jsonl"
Optimizers = Mapping[str, torch.optim.Optimizer]


@dataclass
class Run:
    """Everything a search works with; `preparation.prepare` makes one."""

    config: RunConfig
    folder: Path
    supernet: Supernet
    streams: Streams
    table: LatencyTable
    space: SearchSpace  # without bits that the device cannot run
    removed: list[str]
    after: Precision | None = None  # which models get after a search without bits

    @property
    def model_config(self) -> Any:
        """The original model's config."""
        return self.supernet.config

    @property
    def deployed(self) -> SearchSpace:
        """The space of what runs in the end."""
        return self.space if self.after is None else self.after.of(self.space)

    @property
    def bound(self) -> Bound:
        """The table over that space and the ranked blocks."""
        return self.table.bind(self.deployed, self.supernet.block_rank)

    def as_deployed(self, choice: Choice) -> Choice:
        """A choice of the supernet with the bits that it gets after the search, if it gets any."""
        return choice if self.after is None else self.after.on(choice, self.space.depth)


@dataclass(frozen=True)
class Found:
    """What a search ends with."""

    choice: Choice
    argmax: Choice
    repaired: list[str]  # what the argmax violated; without that, `spend` may have changed it all the same
    converged: bool
    steps: int
    predicted_ms: float
    params: int
    seconds: float
    evaluated: int = 0  # tokens that choices were compared on at the end


def write_start(run: Run) -> None:
    """config.yaml and env.json."""
    environment = {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "device": str(run.table.header.device), "threads": torch.get_num_threads(), "cpus": os.cpu_count(),
        "removed": run.removed, "space": run.space.to_dict(), "block_rank": list(run.supernet.block_rank),
        "original_params": original_params(run.model_config), "bos": run.streams.bos is not None,
    }  # fmt: skip
    write_json(run.folder / "env.json", environment)
    write_text(run.folder / "config.yaml", dump(run.config))


def read_config(folder: Path) -> RunConfig:
    """The configuration of a run folder."""
    if not (folder / "config.yaml").is_file():
        raise JointNASError(
            f"{folder} is no run folder: it has no config.yaml; make one with `jointnas search --out {folder}`"
        )
    return load(folder / "config.yaml").model_copy(update={"out": str(folder)})


def found_choice(folder: Path) -> Choice:
    """What the search of a run folder found."""
    found = read_json(folder / "choice.json")
    if found is None:
        raise JointNASError(f"{folder} has no choice.json: its search has not finished; resume it with --resume auto")
    with reading(str(folder / "choice.json"), "it is damaged: remove it, and --resume auto finds the choice again"):
        return Choice.from_dict(found["choice"], where=str(folder / "choice.json"))


def final_folder(folder: Path) -> Path:
    """The finished model of a run folder."""
    read_config(folder)
    if not (folder / "final").is_dir():
        raise JointNASError(f"{folder} has no finished model; run `jointnas finetune --run {folder}` first")
    return folder / "final"


def read_json(path: Path) -> Any:
    """What a file holds; None if it is not there.

    Raises:
        JointNASError: it is no JSON.
    """
    if not path.is_file():
        return None
    with reading(str(path), "it is damaged: remove it, so that it is made again, or take it from a copy"):
        return json.loads(path.read_text())


def write_json(path: Path, value: Any) -> None:
    """Writes plain values as `checkpoint.write_text`."""
    write_text(path, json.dumps(value, indent=1))


def new(out: str, kind: Literal["file", "folder"] = "folder") -> Path:
    """The path of something that is not there yet, and can be made."""
    path = writable(out, kind)
    if path.exists():
        raise JointNASError(f"{out} exists; choose another {kind}")
    return path


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def save(
    run: Run, optimizers: Optimizers, step: int, seconds: float, converged: bool,
    pending: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Writes `checkpoints/step-N`. `pending`: plain values of steps that no metrics tell of yet."""
    tensors: dict[str, dict[str, Tensor]] = {"supernet": run.supernet.search_state()}
    groups: dict[str, Any] = {}
    for name, optimizer in optimizers.items():
        tensors[name], groups[name] = checkpoint.pack_optimizer(optimizer)
    tensors["rng"] = {"cpu": torch.get_rng_state()}
    state = {
        "data_position": step,  # batches and draws are functions of (seed, step)
        "seed": run.config.seed, "converged": converged, "seconds": seconds, "optimizers": groups,
        "pending": dict(pending or {}),
        "config": resumable(run.config), "data": run.streams.fingerprint(), "block_rank": list(run.supernet.block_rank),
    }  # fmt: skip
    checkpoint.save(run.folder / "checkpoints", step, tensors, state, keep=run.config.search.keep_checkpoints)


def restore(run: Run, optimizers: Optimizers) -> tuple[int, float, bool, dict[str, Any]]:
    """(step, seconds, converged, pending) of the checkpoint that was loaded, or a fresh start."""
    folder = run.folder / "checkpoints"
    if run.config.resume == "never":
        if parallel.from_main(lambda: checkpoint.steps(folder)):
            raise JointNASError(
                f"{run.folder} already holds a search; pass --resume auto to continue it, or another --out"
            )
        return 0, 0.0, False, {}
    newest = checkpoint.latest(folder)
    if newest is None:
        return 0, 0.0, False, {}
    tensors, state = checkpoint.load(newest)
    with reading(f"checkpoint {newest}", "it is not one of this search: remove it, and --resume takes the one before"):
        return _put_back(run, optimizers, newest, tensors, state)


def _put_back(
    run: Run, optimizers: Optimizers, newest: Path, tensors: dict[str, Mapping[str, Tensor]], state: dict[str, Any]
) -> tuple[int, float, bool, dict[str, Any]]:
    old, new = dict(flat(state["config"])), dict(flat(resumable(run.config)))
    for key in sorted({*old, *new}):
        was, now = old.get(key), new.get(key)
        if was != now:
            raise JointNASError(f"{newest} belongs to another configuration: {'.'.join(key)} was {was!r}, is {now!r}")
    if state["data"] != run.streams.fingerprint():
        raise JointNASError(
            f"{newest} was trained on other data than {run.config.data.source!r} holds now: put that back, or choose "
            "another --out"
        )
    _put(run, tensors["supernet"])
    for name, optimizer in optimizers.items():
        checkpoint.unpack_optimizer(optimizer, tensors[name], state["optimizers"][name])
    torch.set_rng_state(tensors["rng"]["cpu"])
    log.info("resumed from %s", newest)
    return int(state["step"]), float(state["seconds"]), bool(state["converged"]), dict(state.get("pending", {}))


def load_supernet(run: Run) -> None:
    """Puts in what the search of the run's folder trained."""
    newest = checkpoint.latest(run.folder / "checkpoints")
    if newest is None:
        raise JointNASError(f"{run.folder} has no whole checkpoint; run the search again")
    _put(run, checkpoint.load(newest)[0]["supernet"])


def _put(run: Run, state: Mapping[str, Tensor]) -> None:
    run.supernet.load_search_state(sharding.like(state, run.supernet.search_state()))


def resumable(config: RunConfig) -> dict[str, Any]:
    """The part of a configuration that a resumed run must share."""
    free = {"out", "resume", "progress", "tensorboard", "finetune", "eval", "latency", "parallel"}
    search = {"log_every", "save_every", "keep_checkpoints", "capture", "skip_most", "collapse"}
    return config.model_dump(mode="json", exclude={**dict.fromkeys(free, True), "search": search, "data": {"cache"}})
