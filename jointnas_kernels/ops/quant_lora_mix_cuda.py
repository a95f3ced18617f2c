"""Launcher of the CUDA C++ forward of ``quant_lora_mix`` (csrc/cuda/quant_lora_mix.cu): half types, groups of 32, 64 or
128, input channels a multiple of 128, an even rank up to 32, at most 4 precisions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels import _ext
from jointnas_kernels.ops import lowbit_cuda
from jointnas_kernels.ops.lowbit_cuda import DTYPES

WARPS, BLOCKS = 4, 2  # per block; blocks per multiprocessor (255 registers)
COLUMNS = 2  # 128-channel tiles per block: 48 KB of A at rank 32 and 3 precisions


def unsupported(weight: Tensor, rank: int, precisions: int, group_size: int) -> str | None:
    """Why the kernel cannot take these arguments; None if it can."""
    if weight.dtype not in DTYPES:
        return f"it takes float16 and bfloat16 weights, not {weight.dtype}"
    if group_size not in (32, 64, 128) or weight.shape[1] % 128:
        return f"it needs groups of 32, 64 or 128 and 128n input channels, not {group_size} and {weight.shape[1]}"
    if rank % 2 or rank > 32 or precisions > 4:
        return f"it needs an even rank up to 32 and at most 4 precisions, not {rank} and {precisions}"
    return None


def row_splits(rows: int, column_blocks: int, multiprocessors: int) -> int:
    """Blocks along the rows with the least total time: waves of blocks times tiles per warp, plus the fill of A."""
    tiles = math.ceil(rows / 16)

    def cost(splits: int) -> float:
        waves = math.ceil(column_blocks * splits / (multiprocessors * BLOCKS))
        return waves * (math.ceil(math.ceil(tiles / splits) / WARPS) + 0.5)

    return min(range(1, min(math.ceil(tiles / WARPS), 128) + 1), key=cost)


def mix_forward_cuda(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    probs: Tensor,
    clip: Tensor | None,
    scaling: float,
    bits: Sequence[int],
    group_size: int,
    columns: int = COLUMNS,
    splits: int | None = None,
) -> Tensor:
    """W~ [O, I]; ``columns`` and ``splits`` override the launch plan."""
    weight = weight.contiguous()
    (o, i), rank = weight.shape, lora_a.shape[1]
    out = torch.empty_like(weight)
    if out.numel() == 0:
        return out
    exact = torch.tensor(scaling, dtype=weight.dtype).item() == scaling
    if lora_b.dtype != weight.dtype or not exact:  # else the kernel's own product would round twice
        lora_b, scaling = lora_b.float() * scaling, 1.0
    a, b = lora_a.to(weight.dtype).contiguous(), lora_b.to(weight.dtype).contiguous()
    pi, ratio = probs.float().contiguous(), None if clip is None else clip.float().contiguous()
    if splits is None:
        splits = row_splits(o, math.ceil(i / (128 * columns)), lowbit_cuda.multiprocessors(weight))
    packed = sum(width << (8 * p) for p, width in enumerate(bits))
    with torch.cuda.device_of(weight):
        code = _ext.load(cuda=True).quant_lora_mix(
            *(0 if t is None else t.data_ptr() for t in (weight, a, b, pi, ratio, out)),
            *(o, i, rank, len(bits), group_size, packed, DTYPES[weight.dtype], columns, splits, scaling),
            lowbit_cuda.current_stream(weight),
        )
    lowbit_cuda.check_launch(code, "quant_lora_mix")
    return out
