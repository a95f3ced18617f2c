"""Several ranks on this machine, as torchrun would start them, without a start of Python and torch for each: the fork
server has imported this module already."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from jointnas import checkpoint, parallel, sharding
from jointnas.bilevel import optimise, weight_step
from jointnas.config import RunConfig
from jointnas.data import Batches, Streams
from jointnas.distillation import distil, original_logits, student_of
from jointnas.preparation import prepare
from jointnas.run_folder import Run
from tests.jointnas import tiny
from tests.latency.tables import synthetic

Ended = tuple[Any, float]  # what a rank returned or raised, None if it was killed, and when (time.monotonic)

DIED = "died"  # file of a run folder that says when its rank was killed


def run(count: int, work: Callable[..., Any], *arguments: Any, timeout: float = 300) -> list[Ended]:
    """How `work` ended on each of so many ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {}
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_one, args=(work, rank, count, port, arguments, theirs), daemon=True)
        process.start()
        theirs.close()
        ranks[ours] = (rank, process)
    found: list[Ended] = [(None, 0.0)] * count
    deadline, left = time.monotonic() + timeout, list(ranks)
    try:
        while left:
            ready: list[Any] = wait(left, timeout=max(0.0, deadline - time.monotonic()))
            assert ready, f"{len(left)} of {count} ranks did not end within {timeout} s"
            for pipe in ready:
                left.remove(pipe)
                with contextlib.suppress(EOFError):  # killed
                    found[ranks[pipe][0]] = pipe.recv()
    finally:
        for _, process in ranks.values():
            process.join(1 if left else 30)
            process.kill()
    return found


def _one(work: Callable[..., Any], rank: int, count: int, port: int, arguments: tuple[Any, ...], results: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    try:
        found = work(*arguments)
    except Exception as error:
        found = error
    results.send((found, time.monotonic()))


def streams() -> Streams:
    """Of two thirds of the tokens only: windows, and so rows of some ranks, have few labels or none."""
    found = tiny.streams()
    context = torch.arange(len(found.all)) // 24 % 3 == 0
    return Streams(torch.where(context, -1 - found.all, found.all), found.border, found.held_out)


def config(
    out: Path | str, mode: str = "replicate", shard: int | None = None, space: dict[str, Any] = tiny.NO_BITS,
    **sections: Any,
) -> RunConfig:  # fmt: skip
    """Where trajectories are compared, without bits: what is added in another order ends at other integers, in one
    process, too (docs/distributed.md)."""
    values: dict[str, Any] = {
        "parallel": {"mode": mode, "shard": shard, **sections.pop("parallel", {})},
        "data": {"batch_size": 4, "seq_len": 16}, "quantizer": {"init": "rtn"}, "tensorboard": False,
        "search": {"steps": 3, "log_every": 1, "gap_every": 2, "save_every": 1, "importance_batches": 1},
        "finetune": {"steps": 3, "log_every": 1, "save_every": 1},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) and name in values else section
    return tiny.config(out, space, **values)


def start(run_config: RunConfig) -> Any:
    return prepare(run_config, tiny.model(), streams(), synthetic(run_config.space.build()))


def mission(run_config: RunConfig, dies: tuple[int, str] | None = None) -> dict[str, Any]:
    """Searches, steps without Adam, and distils; the supernet's and the student's parameters. A rank may be killed as
    it writes its part of a checkpoint, (rank, the end of the folder and its step)."""
    with parallel.session(run_config):
        if dies is not None and parallel.rank() == dies[0]:
            _die_writing(dies[1], run_config)
        run = start(run_config)
        choice = optimise(run).choice
        _without_adam(run)
        with sharding.whole(run.supernet):
            state = {name: value.detach().numpy().copy() for name, value in run.supernet.search_state().items()}
            student = student_of(run.supernet, choice, run_config.finetune.train)
        distil(
            student, original_logits(run.supernet), run.streams.all, run_config.finetune, batch_size=4, seq_len=16,
            folder=run.folder, resume=run_config.resume == "auto", progress=False, tensorboard=False,
        )  # fmt: skip
        trained = {f"student.{name}": p.detach().numpy().copy() for name, p in student.named_parameters()}
    return state | trained


def _without_adam(run: Run) -> None:
    """Weight steps whose size is that of the gradients, with and without clipping; Adam's does not depend on it."""
    batches = Batches(run.streams.weight, 4, 16, 0)
    for step, clip in enumerate((1e-3, 1e9)):
        run.config = run.config.model_copy(
            update={"search": run.config.search.model_copy(update={"clip_weight": clip})}
        )
        weight_step(run, torch.optim.SGD(run.supernet.lora_parameters(), lr=1.0), batches, step)


def _die_writing(where: str, run_config: RunConfig) -> None:
    real = checkpoint.save_file

    def save_file(tensors: Any, path: Path) -> None:
        real(tensors, path)
        if where in f"{path.parent.parent.name}/{path.parent.name}":
            (Path(run_config.out) / DIED).write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = save_file
