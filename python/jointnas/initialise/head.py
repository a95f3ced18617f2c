"""The head in few bits: it is a large part of a small model, and all of it is read for every token.

The ratio that each group of inputs is clipped at has the least squared error, weighed by the energy of these inputs on
calibration windows if there are any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jointnas.initialise.clip import mse_clip
from jointnas.initialise.store import Store
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import Supernet
from jointnas_kernels.hf.head import put_head
from jointnas_kernels.ops.quant import grid
from jointnas_kernels.space import HEAD_BITS

WINDOWS = 32  # of the calibration that inputs' energies are taken from


@torch.no_grad()
def quantize_head(model: Any, bits: int, group_size: int, calibration: Tensor | None = None) -> None:
    """Quantizes the weight of a transformers model's head, in place, with what calibration [windows, tokens] tells of
    its inputs; they stay as they are. A tied embedding takes the head's values (`put_head`).

    Raises:
        JointNASError: other bits than 4 and 8, or a group size that does not divide the hidden size.
    """
    if bits not in HEAD_BITS[:-1]:
        raise JointNASError(f"the head's bits are {bits}; allowed: {', '.join(map(str, HEAD_BITS[:-1]))}")
    weight = model.lm_head.weight.detach()
    if weight.shape[1] % group_size:
        raise JointNASError(f"the head has {weight.shape[1]} inputs, no multiple of the group size {group_size}")
    energy = _energy(lambda ids: model.model(input_ids=ids, use_cache=False).last_hidden_state, calibration, weight)
    clip = _clip(weight, bits, group_size, energy)
    put_head(model, *grid.quantize(weight, bits, group_size, clip=clip))


@torch.no_grad()
def initialise_head(supernet: Supernet, calibration: Tensor | None = None, store: Store | None = None) -> None:
    """Clip ratios of every precision of a supernet's head, from the store if they are there, and kept in it."""
    quantizer = supernet.head_quantizer
    assert quantizer is not None
    found = None if store is None else store.load(0)
    if found is None:
        weight = supernet.head
        energy = _energy(supernet.original_states, calibration, weight)
        clips = {str(bits): _clip(weight, bits, quantizer.group_size, energy) for bits in quantizer.low}
        if store is not None:
            store.save(0, clips, [])
    else:
        clips, _ = found
    for clip, bits in zip(quantizer.clip, quantizer.low, strict=True):
        clip.copy_(clips[str(bits)])


def _energy(states: Callable[[Tensor], Tensor], calibration: Tensor | None, weight: Tensor) -> Tensor | None:
    """[N] of the head's inputs on calibration windows, their mean 1; None without any."""
    if calibration is None:
        return None
    parts = calibration[:WINDOWS].to(weight.device).split(4)
    energy = torch.stack([states(ids).double().square().sum((0, 1)) for ids in parts]).sum(0)
    return (energy / energy.mean()).float()


def _clip(weight: Tensor, bits: int, group_size: int, energy: Tensor | None) -> Tensor:
    """[V, N / group_size]."""
    return torch.cat([mse_clip(rows, bits, group_size, energy) for rows in weight.split(4096)])
