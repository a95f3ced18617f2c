"""Calls of the CUDA C++ kernel of the mixture (csrc/cuda/quant_lora_mix.cu): the forward, and the dprobs of arch steps.
Half types, groups of 32, 64 or 128, input channels a multiple of 128, rank 8, 16, 24 or 32, at most 4 precisions."""

import functools
import itertools
import math

import torch
from torch import Tensor

from jointnas_kernels.ops.core import cuda
from jointnas_kernels.ops.quant.mixture import kernels
from jointnas_kernels.ops.quant.mixture.reference import Gradients, Mixture, Upstream, Want, tiles

WARPS = 8  # per block; one block per multiprocessor (255 registers)
CHUNK = 8 << 20  # elements of dW at a time


def unsupported(mix: Mixture) -> str | None:
    """Why the kernel cannot take these arguments; None if it can."""
    weight, rank, group_size = mix.weight, mix.lora_a.shape[1], mix.group_size
    if weight.dtype not in cuda.DTYPES:
        return f"it takes float16 and bfloat16 weights, not {weight.dtype}"
    if group_size not in (32, 64, 128) or weight.shape[1] % 128:
        return f"it needs groups of 32, 64 or 128 and 128n input channels, not {group_size} and {weight.shape[1]}"
    if rank not in (8, 16, 24, 32) or len(mix.bits) > 4:
        return f"it needs rank 8, 16, 24 or 32 and at most 4 precisions, not {rank} and {len(mix.bits)}"
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


def operands(mix: Mixture) -> Mixture:
    """The mixture in the form the kernel reads."""
    weight, dtype, b, scaling = mix.weight, mix.weight.dtype, mix.lora_b, mix.scaling
    exact = torch.tensor(scaling, dtype=dtype).item() == scaling
    if b.dtype != dtype or not exact:  # else the kernel's own product would round twice
        b, scaling = b.float() * scaling, 1.0
    clip = None if mix.clip is None else mix.clip.float()
    weight, a, b = (cuda.aligned(t.to(dtype)) for t in (weight, mix.lora_a, b))
    return Mixture(weight, a, b, mix.probs.float(), clip, scaling, mix.bits, mix.group_size).dense()


def run(
    mix: Mixture, out: Tensor | None = None, grad: Tensor | None = None, begin: int = 0, end: int | None = None,
    columns: int | None = None, splits: int | None = None,
) -> Tensor | None:  # fmt: skip
    """Write ``out``, or return the partial sums [P, n] of <grad, Q_p> for grad = G[begin:end]; of `operands`."""
    (rows, inputs), (precisions, rank, _) = mix.weight.shape, mix.lora_a.shape
    end = rows if end is None else end
    if columns is None or splits is None:
        limit = shared_limit(mix.weight)
        most = most_columns(mix.group_size, precisions, mix.clip is not None, grad is not None, limit)
        columns, splits = plan(end - begin, inputs, most, cuda.multiprocessors(mix.weight))
    partial = None
    if grad is not None:
        blocks = math.ceil(inputs / (128 * columns))
        partial = mix.weight.new_empty(precisions, blocks * splits * WARPS, dtype=torch.float32)
    bits = sum(width << (8 * p) for p, width in enumerate(mix.bits))
    cuda.call(
        "quant_lora_mix", *mix[:3], grad, mix.probs, mix.clip, out, partial, rows, begin, end, inputs, rank, precisions,
        mix.group_size, bits, cuda.DTYPES[mix.weight.dtype], columns, splits, float(mix.scaling), on=mix.weight,
    )  # fmt: skip
    return partial


def forward(mix: Mixture, columns: int | None = None, splits: int | None = None) -> Tensor:
    """W~; ``columns`` and ``splits`` override the launch plan."""
    mix = operands(mix)
    out = torch.empty_like(mix.weight)
    if out.numel():
        run(mix, out, columns=columns, splits=splits)
    return out


def probs_gradient(mix: Mixture, upstream: Upstream) -> Tensor:
    """dprobs. The library GEMM writes some rows of G at a time, 16 MB that stay in the second-level cache, and the
    forward's kernel reduces them: at 1024 tokens that GEMM is twice as fast as one with registers left for this
    epilogue."""
    read = operands(mix)
    rows, inputs = mix.weight.shape
    sums = []
    for tile in tiles(rows, max(256, CHUNK // inputs // 256 * 256)):
        grad = cuda.aligned(upstream.rows(tile).to(mix.weight.dtype))
        sums.append(run(read, grad=grad, begin=tile.start, end=tile.stop))
    return torch.cat([s for s in sums if s is not None], dim=1).sum(1).to(mix.probs.dtype)


def gradients(mix: Mixture, upstream: Upstream, want: Want) -> Gradients:
    """This kernel's in arch steps, where only probs have a gradient; else Triton's."""
    group, precisions, clip = mix.group_size, len(mix.bits), mix.clip is not None
    if want != (False, True, False) or most_columns(group, precisions, clip, True, shared_limit(mix.weight)) < 1:
        return kernels.gradients(mix, upstream, want)
    return None, None, probs_gradient(mix, upstream), None
