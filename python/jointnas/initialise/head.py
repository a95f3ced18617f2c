"""The head in few bits: it is a large part of a small model, and all of it is read for every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jointnas.initialise.clip import mse_clip
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.nn.linear import FakeQuantLinear
from jointnas_kernels.ops.quant import grid

HEAD_BITS = (4, 8)
WINDOWS = 32  # of the calibration that inputs' energies are taken from


@torch.no_grad()
def quantize_head(model: Any, bits: int, group_size: int, calibration: Tensor | None = None) -> None:
    """Quantizes the weight of a transformers model's head, in place; its inputs stay as they are.

    The ratio that each group of `group_size` inputs is clipped at has the least squared error, weighed by the energy of
    these inputs on `calibration` [windows, tokens] if there is one. An embedding that is tied to the head takes its
    values, and is a tensor of its own from then on: checkpoint formats cannot say that a quantized matrix is both.

    Raises:
        JointNASError: other bits than 4 and 8, or a group size that does not divide the hidden size.
    """
    if bits not in HEAD_BITS:
        raise JointNASError(f"the head's bits are {bits}; allowed: {', '.join(map(str, HEAD_BITS))}")
    weight = model.lm_head.weight.detach()
    if weight.shape[1] % group_size:
        raise JointNASError(f"the head has {weight.shape[1]} inputs, no multiple of the group size {group_size}")
    energy = None
    if calibration is not None:
        parts = calibration[:WINDOWS].to(weight.device).split(4)
        inputs = (model.model(input_ids=ids, use_cache=False).last_hidden_state for ids in parts)
        energy = torch.stack([x.double().square().sum((0, 1)) for x in inputs]).sum(0)
        energy = (energy / energy.mean()).float()
    clip = torch.cat([mse_clip(rows, bits, group_size, energy) for rows in weight.split(4096)])
    values, found = grid.quantize(weight, bits, group_size, clip=clip)
    model.lm_head = FakeQuantLinear(values, model.lm_head.bias, found).requires_grad_(False)
    if model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        embedding = model.get_input_embeddings()
        embedding.weight = torch.nn.Parameter(values.clone(), requires_grad=False)
