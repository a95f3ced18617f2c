"""Several processes (ranks), as torchrun starts them, that train one model as one process would.

A step's batch is that of one process, and each rank takes its rows. Losses are means over the labelled tokens of that
batch: a rank weighs the mean over its own rows by its part of the tokens, and losses and gradients add up over the
ranks. Architectures are drawn from (seed, step) by every rank and compared before they are used.

Outside of a `session`, and in one of a single process, everything here is what one process does.

Two groups talk over the host's network. In that of the steps a rank that does not answer for `parallel.timeout` seconds
is lost; where ranks load, and wait for the main one, which alone measures and writes, they have patience. A rank that
has ended is noticed by both at once. What they tell each other is JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from jointnas.config import ParallelConfig, RunConfig
from jointnas.data import IGNORE, Batch, Batches
from jointnas_kernels.errors import JointNASError

PATIENCE = timedelta(days=1)  # the longest that the main rank may measure or write alone
BUCKET = 1 << 24  # gradients added up at once
T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """What this process is a part of. `mesh` [replicas, ranks of one copy] or [ranks] is that of a sharded model, None
    where each rank has all of it; `patient`: the group of those who wait."""

    options: ParallelConfig
    mesh: DeviceMesh | None
    patient: Any


_current: Session | None = None


def current() -> Session | None:
    """The session this process is in; None: it works alone."""
    return _current


def world() -> int:
    """How many ranks train together."""
    return 1 if _current is None else dist.get_world_size()


def rank() -> int:
    """This process among them."""
    return 0 if _current is None else dist.get_rank()


def is_main() -> bool:
    """Whether this rank is the one that measures, and writes logs, metrics and exports, for all."""
    return rank() == 0


# ---- beginning and end ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def session(config: RunConfig) -> Iterator[bool]:
    """Inside, this process trains together with the others that torchrun started; alone if it started none. Gives
    whether it is the main rank, which goes on alone afterwards: libraries for models talk to all ranks they find, so
    that they are only safe where all of them, or nobody, is there.

    Raises:
        JointNASError: the configuration does not fit the number of ranks, or another rank was lost.
    """
    global _current
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield True
        return
    check(config, count)
    device = "cuda" if config.model.device != "cpu" and torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(_local_device())
    timeout = timedelta(seconds=config.parallel.timeout)
    level = logging.getLogger().level
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=timeout)
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        _current = Session(config.parallel, _mesh(config.parallel, count, device, timeout), patient)
        if not is_main():
            logging.getLogger().setLevel(logging.ERROR)
        yield is_main()
    except RuntimeError as error:  # gloo's own have no type
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        silent = f"has not answered for {config.parallel.timeout:g} s (parallel.timeout)"
        lost = silent if "timed out" in str(error).lower() else "has ended"
        raise JointNASError(
            f"rank {os.environ.get('RANK')} of {count}: another rank {lost}; what it printed says why. Start all of "
            "them again with --resume auto to go on from the last checkpoint"
        ) from error
    finally:
        _current = None
        logging.getLogger().setLevel(level)
        if dist.is_initialized():
            dist.destroy_process_group()


def check(config: RunConfig, count: int) -> None:
    """Raises if so many ranks cannot divide the work of a configuration.

    Raises:
        JointNASError: batches, or ranks that share a model, that they do not divide; a numbered CUDA device.
    """
    sizes = {"data.batch_size": config.data.batch_size, "finetune.batch_size": config.finetune.batch_size}
    for name, size in sizes.items():
        if size is not None and size % count:
            raise JointNASError(
                f"{name} is {size}, which {count} ranks cannot divide: it is the batch of all of them; set a multiple "
                f"of {count}"
            )
    if config.model.device.startswith("cuda:"):
        raise JointNASError(f"model.device is {config.model.device!r}, but every rank has its own: set cuda or auto")
    options = config.parallel
    shard = _shard(options, count)
    if options.mode == "hybrid" and (shard < 2 or count % shard):
        raise JointNASError(
            f"parallel.shard is {shard}, the ranks that share a copy of the model: it must be at least 2, and divide "
            f"{count} ranks"
        )


def _shard(options: ParallelConfig, count: int) -> int:
    return options.shard or int(os.environ.get("LOCAL_WORLD_SIZE", count))


def _local_device() -> int:
    local, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= devices:
        raise JointNASError(f"there is no CUDA device for rank {local} of this node, which has {devices}; start fewer")
    return local


def _mesh(options: ParallelConfig, count: int, device: str, timeout: timedelta) -> DeviceMesh | None:
    if options.mode == "replicate":
        return None
    if options.mode == "full":
        assert dist.group.WORLD is not None
        return DeviceMesh.from_group(dist.group.WORLD, device)
    ranks = torch.arange(count).view(-1, _shard(options, count))
    own: dict[int, Any] = {}
    for dim, groups in enumerate((ranks.t(), ranks)):  # replicas of one shard, shards of one replica
        for members in groups.tolist():
            group = dist.new_group(members, timeout=timeout)  # a mesh that makes its own has torch's half hour
            if dist.get_rank() in members:
                own[dim] = group
    return DeviceMesh.from_group([own[0], own[1]], device, ranks, mesh_dim_names=("replicate", "shard"))


# ---- what ranks tell each other -------------------------------------------------------------------------------------


def exchange(text: str) -> list[str]:
    """The texts of all ranks, in their order; waits for them."""
    session = _current
    if session is None:
        return [text]
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    dist.all_gather(lengths, torch.tensor([len(data)]), group=session.patient)
    most = int(max(lengths))
    parts = [torch.zeros(most, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(parts, nn.functional.pad(data, (0, most - len(data))), group=session.patient)
    return [bytes(part[: int(n)].tolist()).decode() for part, n in zip(parts, lengths, strict=True)]


def on_each(make: Callable[[], T]) -> list[T]:
    """What it returned on every rank, plain values; if it fails on one, all of them raise.

    Raises:
        JointNASError: it failed on another rank, which the message names.
    """
    if _current is None:
        return [make()]
    value: T | None = None
    failure: Exception | None = None
    try:
        value = make()
    except Exception as error:
        failure = error
    reason = None if failure is None else str(failure) or type(failure).__name__
    found = [json.loads(text) for text in exchange(json.dumps([value, reason]))]
    if failure is not None:
        raise failure
    for other, (_, reason) in enumerate(found):
        if reason is not None:
            raise JointNASError(f"rank {other}: {reason}")
    return [value for value, _ in found]


def from_main(make: Callable[[], T]) -> T:
    """What it returned on the main rank, which alone calls it; a plain value.

    Raises:
        JointNASError: it failed there.
    """
    return on_each(make if is_main() else lambda: None)[0]  # type: ignore[return-value]


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main rank runs the block alone, then all others do: they find the files that it left.

    Raises:
        JointNASError: it failed there.
    """
    if not is_main():
        reason = json.loads(exchange("null")[0])
        if reason is not None:
            raise JointNASError(f"rank 0: {reason}")
    try:
        yield
    except Exception as error:
        if is_main():
            exchange(json.dumps(str(error)))
        raise
    if is_main():
        exchange("null")


def wait() -> None:
    """Until all ranks are here, however long one takes: before what they do in step, where none may be late."""
    exchange("null")


def any_rank(flag: bool) -> bool:
    """Whether it is true on any rank."""
    if _current is None:
        return flag
    found = torch.tensor(int(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def agree(alphas: Mapping[str, Tensor], what: str) -> None:
    """Compares host values, keyed by name, with those of the other ranks, before anything is computed with them.

    Raises:
        JointNASError: on every rank, if they differ anywhere.
    """
    if _current is None:
        return
    digest = hashlib.sha256(what.encode())
    for name, value in alphas.items():
        digest.update(name.encode())
        digest.update(value.detach().contiguous().numpy().tobytes())
    own = torch.tensor([int.from_bytes(digest.digest()[:7], "big")])
    found = [torch.empty_like(own) for _ in range(world())]
    dist.all_gather(found, own)
    others = [str(r) for r, value in enumerate(found) if not torch.equal(value, found[0])]
    if others:
        raise JointNASError(
            f"{what} differs between ranks: {', '.join(others)} from 0. All must have one configuration, the same data "
            "and the same versions; start them again with --resume auto"
        )


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """The main rank's values into the same tensors of all others."""
    if _current is not None:
        wait()
        for tensor in tensors:
            whole = tensor.contiguous()  # of a view a copy
            dist.broadcast(whole, 0)
            tensor.copy_(whole)


# ---- a step ---------------------------------------------------------------------------------------------------------


def rows(batches: Batches, step: int, device: torch.device | str) -> tuple[Batch, float]:
    """This rank's rows [B / ranks, T] of the batch of a step, and what part of its labelled tokens they hold."""
    if _current is None:
        return batches.at(step, device), 1.0
    batch = batches.at(step)
    count = len(batch.ids) // world()
    own = slice(rank() * count, (rank() + 1) * count)
    learned = batch.labels[:, 1:] != IGNORE
    part = int(learned[own].sum()) / max(1, int(learned.sum()))
    return Batch(batch.ids[own], batch.labels[own]).to(device), part


def total(value: Tensor) -> Tensor:
    """The sum of a scalar over the ranks."""
    if _current is None:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


@torch.no_grad()
def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds the gradients of all ranks up, in place; those of sharded parameters already are."""
    if _current is None:
        return
    bucket: list[Tensor] = []
    for p in parameters:
        if p.grad is None or isinstance(p, DTensor):
            continue
        if bucket and (sum(g.numel() for g in bucket) > BUCKET or p.grad.dtype != bucket[0].dtype):
            _add(bucket)
            bucket = []
        bucket.append(p.grad)
    if bucket:
        _add(bucket)


def _add(gradients: list[Tensor]) -> None:
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for g, whole in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(whole.view_as(g))


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """The state that Adam and AdamW make at a parameter's first step, now: what does not fit fails at once on all ranks
    alike, not where one of them first draws a block."""
    if _current is None:
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            step = torch.zeros((), dtype=torch.get_default_dtype(), device=p.device if group["fused"] else "cpu")
            moments = {name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": step, **moments}
