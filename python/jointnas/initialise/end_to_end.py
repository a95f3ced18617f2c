"""After the blocks, the whole model: all weights and clip ratios of a plain model move together until it predicts what
the original predicts (E2E-QP of EfficientQAT, arXiv 2407.11062, which moves scales alone).

    min  E_tokens KL(softmax(head(y)) || softmax(model(ids)))

y are the original's hidden states behind its last block, which the walk over the blocks ends with; the final norm and
the head are not quantized and shared by both. A block can hardly lower the error that comes in; the next tokens tell
which part of it counts. Adam needs two further copies of the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jointnas.config import InitOptions
from jointnas.distillation import TrainableQuantLinear
from jointnas.initialise.blocks import Blocks
from jointnas.initialise.descent import descend
from jointnas.initialise.problem import Row, State, rounded, step
from jointnas.initialise.reconstruct import LARGEST, divided
from jointnas_kernels.nn.linear import FakeQuantLinear
from jointnas_kernels.ops.core.tensors import compute_dtype

log = logging.getLogger(__name__)


class _Linear(TrainableQuantLinear):
    """Its clip ratios are trained too."""

    def __init__(self, old: FakeQuantLinear, weight: Tensor, clip: Tensor) -> None:
        super().__init__(
            weight.clone(), old.bias, old.weight_bits, old.act_bits, old.group_size, None, old.act_symmetric
        )
        self.logits = nn.Parameter(clip.clamp_max(LARGEST).logit())

    def quantized(self) -> Tensor:
        """[O, I], differentiable in weight and ratios."""
        assert self.weight_bits is not None
        return rounded(self.weight, self.weight_bits, self.group_size, self.logits.sigmoid())


@torch.no_grad()
def end_to_end(
    model: nn.Module, blocks: Blocks, ids: Tensor, y: Tensor, states: Sequence[State], epochs: int,
    options: InitOptions, seed: int,
) -> tuple[list[State], Row]:  # fmt: skip
    """Goes on from what was found for every block (weights before quantization and ratios, by name).

    model: with these states installed; it is changed, and no use until the result is installed.
    ids, y: calibration windows [windows, tokens], and the original's hidden states [windows, tokens, N] for them.

    Of each eight windows one is not learned from; should the divergence there not fall, the states are returned."""
    source: Any = model
    groups: list[dict[str, Any]] = []
    for layer, state in zip(blocks.layers, states, strict=True):
        for path in blocks.modules:
            old: Any = layer.get_submodule(path)
            new = _Linear(old, state[f"{path}.weight"], state[f"{path}.clip"])
            layer.set_submodule(path, new.requires_grad_(False))
            size = step(new.weight, new.weight_bits or 0, new.group_size, state[f"{path}.clip"])
            groups.append({"params": [new.weight], "lr": options.end_lr_weight * size})
            groups.append({"params": [new.logits], "lr": options.end_lr_ratio})
    border, batch = divided(len(ids)), options.batch

    def loss(chosen: Tensor) -> Tensor:
        out = source(input_ids=ids[chosen].to(blocks.device), use_cache=False).logits
        target = source.lm_head(source.model.norm(y[chosen]))
        wide = compute_dtype(out.dtype)
        own, target = out.to(wide).log_softmax(-1), target.to(wide).log_softmax(-1)
        return F.kl_div(own, target, log_target=True, reduction="sum") / own[..., 0].numel()

    def held() -> float:
        parts = torch.arange(border % len(ids), len(ids), device=y.device).split(batch)
        return sum(float(loss(part)) * len(part) for part in parts) / sum(map(len, parts))

    start = held()
    descend(loss, groups, border, batch, epochs, y.device, seed, len(states))
    end = held()
    row: Row = {"phase": "end to end", "kl_start": start, "kl": min(start, end)}
    if not end < start:
        log.warning("end to end: the model did not improve on its blocks (%.3g to %.3g), which are kept", start, end)
        return list(states), row
    found = []
    for layer, state in zip(blocks.layers, states, strict=True):
        found.append(dict(state))
        for path in blocks.modules:
            linear: Any = layer.get_submodule(path)
            found[-1] |= {f"{path}.weight": linear.weight.detach(), f"{path}.clip": linear.logits.detach().sigmoid()}
    return found, row
