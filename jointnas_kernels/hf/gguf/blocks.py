"""Group-quantized weights as blocks of llama.cpp's types: the same levels and scales, where a type can hold them.

    Q8_0    32 weights   d q            q in [-128, 127]
    Q4_0    32 weights   d (q - 8)      q in [0, 15]: symmetric 4-bit levels, and those of 2 bits
    TQ2_0  256 weights   d (q - 1)      q in [0, 3]:  symmetric 2-bit levels -2 .. 1, as 1 - q with -d

d is one fp16 number. A group of inputs is a whole number of blocks that repeat its scale. Weights whose groups cut
blocks have no type here; their values are stored as they are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]
BLOCK = {"Q8_0": 32, "Q4_0": 32, "TQ2_0": 256}


def type_for(bits: int, group_size: int) -> str | None:
    """The smallest type that holds levels of 2, 4 or 8 bits in groups of this size; None: there is none."""
    fitting = {8: ("Q8_0",), 4: ("Q4_0",), 2: ("TQ2_0", "Q4_0")}[bits]
    return next((name for name in fitting if group_size % BLOCK[name] == 0), None)


def encode(q: Tensor, scale: Tensor, kind: str) -> Bytes:
    """Levels int8 [O, I] and scales fp16 [O, groups] as blocks: [O, bytes of a row]."""
    rows, size = q.shape[0], BLOCK[kind]
    blocks = q.view(rows, -1, size)
    d = scale.repeat_interleave(blocks.shape[1] // scale.shape[1], 1).unsqueeze(-1)  # [O, blocks, 1]
    if kind == "Q8_0":
        parts = [_bytes(d), blocks.view(torch.uint8)]
    elif kind == "Q4_0":
        low, high = (blocks + 8).to(torch.uint8).view(rows, -1, 2, 16).unbind(2)
        parts = [_bytes(d), low | high << 4]
    else:  # two halves of 128 weights; byte k of a half holds its weights k, k + 32, k + 64, k + 96
        fields = (1 - blocks).to(torch.uint8).view(rows, -1, 2, 4, 32).unbind(3)
        parts = [(fields[0] | fields[1] << 2 | fields[2] << 4 | fields[3] << 6).flatten(2), _bytes(-d)]
    return torch.cat(parts, -1).flatten(1).numpy()


def _bytes(d: Tensor) -> Tensor:
    return d.to(torch.float16).contiguous().view(torch.uint8)
