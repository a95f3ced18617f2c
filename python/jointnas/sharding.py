"""Models whose parameters are divided among ranks (FSDP2): each block is put together while it is computed.

Gradients are summed, not averaged (`parallel`). The architecture's logits are left out: a few hundred numbers on the
host, whose gradients `parallel.add_gradients` adds up.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from jointnas import parallel
from jointnas_kernels.hf import Supernet

M = TypeVar("M", bound=nn.Module)


def sharding() -> bool:
    """Whether ranks share copies of the model."""
    session = parallel.current()
    return session is not None and session.mesh is not None


def shard(model: nn.Module) -> None:
    """Divides the parameters of a supernet, or of a plain model, among the ranks that share a copy, in place; each puts
    its part on its device. Where each rank has all of it, nothing."""
    session = parallel.current()
    if session is None or session.mesh is None:
        return
    ranks, source = session.mesh.size(-1), _any(model)
    supernet = isinstance(model, Supernet)
    blocks = list(source.blocks if supernet else source.model.layers)
    halves = any(p.requires_grad and p.dtype.itemsize < 4 for p in model.parameters())
    for module in (*blocks, model):
        fully_shard(
            module, mesh=session.mesh, reshard_after_forward=True,
            shard_placement_fn=lambda p: Shard(dim_of(p.shape, ranks)),
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32 if halves else None),
            ignored_params=set(source.arch.parameters()) if supernet else None,
        )  # fmt: skip
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    if supernet:
        register_fsdp_forward_method(model, "original")
        for block in blocks:
            register_fsdp_forward_method(block, "skipped")


def sharded(model: M) -> M:
    """A copy that is sharded; where each rank has all of the model, the model itself."""
    if not sharding():
        return model
    model = copy.deepcopy(model)
    shard(model)
    return model


@torch.no_grad()
def collect(trained: nn.Module, into: nn.Module) -> None:
    """Puts the parameters of a `sharded` copy into the model that it was made of."""
    if trained is not into:
        for p, target in zip(trained.parameters(), into.parameters(), strict=True):
            target.copy_(_whole(p) if isinstance(p, DTensor) else p)


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Inside, the parameters of a sharded model are whole, to be read, not for forward passes: on each rank's device,
    or on the host if that is where models are prepared (`parallel.prepare`). All ranks enter together."""
    session = parallel.current()
    on_host = session is not None and session.options.prepare == "host"
    kept = [
        (module, name, p)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if isinstance(p, DTensor)
    ]
    for module, name, p in kept:
        value = _whole(p)
        setattr(module, name, nn.Parameter(value.cpu() if on_host else value, p.requires_grad))
    try:
        yield
    finally:
        for module, name, p in kept:
            setattr(module, name, p)


@torch.no_grad()
def _whole(value: DTensor) -> Tensor:
    full: Tensor = value.full_tensor()
    return full


def _any(model: nn.Module) -> Any:
    return model


# ---- parts of tensors -----------------------------------------------------------------------------------------------


def dim_of(shape: torch.Size, ranks: int) -> int:
    """The dimension that is divided: the first that leaves all ranks the same, else the first (torch's rule)."""
    return next((d for d, size in enumerate(shape) if size % ranks == 0), 0)


class Position(NamedTuple):
    """What this rank has of a tensor: part `number` of `parts` along `dim`, of the `first` copy or another."""

    dim: int
    number: int
    parts: int
    first: bool


def position(value: DTensor) -> Position:
    """What this rank has of a tensor."""
    mesh, placement = value.device_mesh, value.placements[-1]
    assert isinstance(placement, Shard)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    return Position(placement.dim, coordinate[-1], mesh.size(-1), not any(coordinate[:-1]))


def like(values: Mapping[str, Tensor], models: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors by name, each divided as the one of that name in `models`, if there is one, is."""
    return {name: part(values[name], models[name]) if name in models else values[name] for name in values}


def part(value: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, divided as `model`, of the same shape, is: a copy of this rank's part."""
    if not isinstance(model, DTensor):
        return value
    at = position(model)
    full, size = value.shape[at.dim], -(-value.shape[at.dim] // at.parts)
    start = min(at.number * size, full)
    own = value.narrow(at.dim, start, min(size, full - start)).to(model.device, copy=True).contiguous()
    return DTensor.from_local(
        own, model.device_mesh, model.placements, run_check=False, shape=model.shape, stride=model.stride()
    )
