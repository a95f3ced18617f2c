"""Adam over calibration windows, with a short warm-up and a cosine: how all learned methods learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jointnas_kernels.nn.choices import seeded


def descend(
    loss: Callable[[Tensor], Tensor], groups: list[dict[str, Any]], count: int, batch: int, epochs: int,
    device: torch.device, *seeds: int, warmup: float = 0.05, floor: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.95),
) -> None:  # fmt: skip
    """Minimises loss(indices of some windows) over `count` windows; `groups` are Adam's: leaves, and their rates,
    which rise over the share `warmup` of the steps and end at the share `floor` of themselves."""
    leaves = [leaf.requires_grad_() for group in groups for leaf in group["params"]]
    optimizer = torch.optim.Adam(groups, betas=betas)
    total = epochs * math.ceil(count / batch)

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / total))
        return min(1.0, (step + 1) / max(1.0, warmup * total)) * (floor + (1 - floor) * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for epoch in range(epochs):
        order = torch.randperm(count, generator=seeded(*seeds, epoch)).to(device)
        for chosen in order.split(batch):
            with torch.enable_grad():
                value = loss(chosen)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            schedule.step()
    for leaf in leaves:
        leaf.requires_grad_(False)
