"""Launchers of the CUDA C++ kernel of ``quant_lora_mix`` (csrc/cuda/quant_lora_mix.cu): the forward, and the dprobs of
arch steps. Half types, groups of 32, 64 or 128, input channels a multiple of 128, rank 8, 16, 24 or 32, at most 4
precisions."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels import _ext
from jointnas_kernels.ops.lowbit import cuda as lowbit_cuda
from jointnas_kernels.ops.lowbit.cuda import DTYPES

WARPS = 8  # per block; one block per multiprocessor (255 registers)
CHUNK = 8 << 20  # elements of dW at a time


def unsupported(weight: Tensor, rank: int, precisions: int, group_size: int) -> str | None:
    """Why the kernel cannot take these arguments; None if it can."""
    if weight.dtype not in DTYPES:
        return f"it takes float16 and bfloat16 weights, not {weight.dtype}"
    if group_size not in (32, 64, 128) or weight.shape[1] % 128:
        return f"it needs groups of 32, 64 or 128 and 128n input channels, not {group_size} and {weight.shape[1]}"
    if rank not in (8, 16, 24, 32) or precisions > 4:
        return f"it needs rank 8, 16, 24 or 32 and at most 4 precisions, not {rank} and {precisions}"
    return None


def shared_limit(tensor: Tensor) -> int:
    """Bytes of shared memory a block may use."""
    return (227 if torch.cuda.get_device_capability(tensor.device)[0] >= 9 else 163) * 1024


def most_columns(group_size: int, precisions: int, clip: bool, reduce: bool, limit: int) -> int:
    """128-channel tiles of A that fit beside the warps' own shared memory (Layout in csrc/cuda/quant_lora_mix.cu)."""
    warp = 4096 + 8192 + (2 * 4 * 16 * 4 * 128 // group_size if clip else 0) + (4096 + 512 if reduce else 0)
    return min(4, (limit - WARPS * warp) // (precisions * 8192))


@functools.cache
def plan(rows: int, inputs: int, most: int, multiprocessors: int) -> tuple[int, int]:
    """(128-channel tiles per block, at most ``most``; blocks along the rows) with the least total time.

    In units of a warp's work on a tile (about 2000 instructions): fetching B of a row tile costs 0.05, A of a column
    0.05, and blocks run in waves of one per multiprocessor.
    """
    tiles, columns_all = math.ceil(rows / 16), inputs // 128

    def cost(columns: int, splits: int) -> float:
        waves = math.ceil(math.ceil(columns_all / columns) * splits / multiprocessors)
        return waves * (math.ceil(math.ceil(tiles / splits) / WARPS) * (columns + 0.05) + 0.05 * columns)

    choices = itertools.product(range(1, most + 1), range(1, min(math.ceil(tiles / WARPS), 128) + 1))
    return min(choices, key=lambda choice: cost(*choice))


class Mix:
    """The operands of one weight in the form the kernel reads."""

    def __init__(
        self,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        probs: Tensor,
        clip: Tensor | None,
        scaling: float,
        bits: Sequence[int],
        group_size: int,
    ) -> None:
        exact = torch.tensor(scaling, dtype=weight.dtype).item() == scaling
        if lora_b.dtype != weight.dtype or not exact:  # else the kernel's own product would round twice
            lora_b, scaling = lora_b.float() * scaling, 1.0
        self.weight, self.scaling = weight.contiguous(), scaling
        self.a, self.b = (t.to(weight.dtype).contiguous() for t in (lora_a, lora_b))
        self.probs, self.clip = probs.float().contiguous(), None if clip is None else clip.float().contiguous()
        self.bits, self.group_size = bits, group_size

    def launch(
        self,
        out: Tensor | None = None,
        grad: Tensor | None = None,
        begin: int = 0,
        end: int | None = None,
        columns: int | None = None,
        splits: int | None = None,
    ) -> Tensor | None:
        """Write ``out``, or return the partial sums [P, n] of ⟨grad, Q_p⟩ for grad = dW[begin:end]."""
        weight, (rows, inputs) = self.weight, self.weight.shape
        end = rows if end is None else end
        if columns is None or splits is None:
            multiprocessors = lowbit_cuda.multiprocessors(weight)
            most = most_columns(
                self.group_size, len(self.bits), self.clip is not None, grad is not None, shared_limit(weight)
            )
            columns, splits = plan(end - begin, inputs, most, multiprocessors)
        blocks = math.ceil(inputs / (128 * columns))
        partial = None
        if grad is not None:
            partial = torch.empty(len(self.bits), blocks * splits * WARPS, dtype=torch.float32, device=weight.device)
        pointers = (weight, self.a, self.b, grad, self.probs, self.clip, out, partial)
        with torch.cuda.device_of(weight):
            code = _ext.load(cuda=True).quant_lora_mix(
                *(0 if t is None else t.data_ptr() for t in pointers),
                *(rows, begin, end, inputs, self.a.shape[1], len(self.bits), self.group_size),
                sum(width << (8 * p) for p, width in enumerate(self.bits)),
                *(DTYPES[weight.dtype], columns, splits, self.scaling, lowbit_cuda.current_stream(weight)),
            )
        _ext.check(code, "quant_lora_mix")
        return partial


def mix_forward_cuda(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    probs: Tensor,
    clip: Tensor | None,
    scaling: float,
    bits: Sequence[int],
    group_size: int,
    columns: int | None = None,
    splits: int | None = None,
) -> Tensor:
    """W~ [O, I]; ``columns`` and ``splits`` override the launch plan."""
    mix = Mix(weight, lora_a, lora_b, probs, clip, scaling, bits, group_size)
    out = torch.empty_like(mix.weight)
    if out.numel():
        mix.launch(out, columns=columns, splits=splits)
    return out


def mix_probs_cuda(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    probs: Tensor,
    clip: Tensor | None,
    scaling: float,
    bits: Sequence[int],
    group_size: int,
) -> Tensor:
    """dprobs of dW = gradᵀ x (grad [T, O], x [T, I]), or of dW = grad [O, I] where x is None.

    The library GEMM writes some rows of dW at a time, 16 MB that stay in the second-level cache, and the forward's
    kernel reduces them: at 1024 tokens that GEMM is twice as fast as one with registers left for this epilogue.
    """
    mix = Mix(weight, lora_a, lora_b, probs, clip, scaling, bits, group_size)
    rows, inputs = weight.shape
    step = max(256, CHUNK // inputs // 256 * 256)
    sums = []
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        part = grad[begin:end] if x is None else grad[:, begin:end].T @ x.to(grad.dtype)
        sums.append(mix.launch(grad=part.to(weight.dtype).contiguous(), begin=begin, end=end))
    return torch.cat([s for s in sums if s is not None], dim=1).sum(1).to(probs.dtype)
