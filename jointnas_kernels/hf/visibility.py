"""Who sees whom in attention: padding, sliding windows, and several sequences packed into one row."""

from __future__ import annotations

import torch
from torch import Tensor

from jointnas_kernels.errors import JointNASError


def check_positions(position_ids: Tensor, batch: int, length: int) -> None:
    """Raise unless these are integer positions [batch or 1, length]."""
    shape = tuple(position_ids.shape)
    if shape not in ((batch, length), (1, length)) or position_ids.is_floating_point():
        raise JointNASError(
            f"position_ids are {position_ids.dtype} {shape}; expected integers of the shape of the token ids,"
            f" {(batch, length)}, or {(1, length)}."
        )


def sequences(position_ids: Tensor) -> Tensor | None:
    """Which sequence of its row a token belongs to, [B, T]; None if every row is one sequence. As in transformers, a
    sequence starts wherever the positions [B, T] do not go on by one."""
    starts = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1
    return starts.cumsum(-1) if bool(starts.any()) else None


def visible(
    length: int, device: torch.device, attention_mask: Tensor | None = None, packed: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """[B or 1, 1, T, T]: True where a query may look: back, in its window, at tokens that are no padding
    (`attention_mask` [B, T]) and belong to its sequence (`packed` [B, T])."""
    look = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if window is not None:
        look = look.triu(1 - window)
    look = look[None, None]
    if packed is not None:
        look = look & (packed[:, None, :, None] == packed[:, None, None, :])
    if attention_mask is not None:
        look = look & attention_mask[:, None, None, :].bool()
        look = look | torch.eye(length, dtype=torch.bool, device=device)  # left padding would see nothing: NaN
    return look
