"""Calls of the CUDA C++ kernel of the mixture (csrc/cuda/quant_lora_mix.cu): the forward, and the dprobs of arch steps.
Half types, groups of 32, 64 or 128, input channels a multiple of 128, rank 8, 16, 24 or 32, at most 4 precisions."""

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels.ops.core import cuda
from jointnas_kernels.ops.quant.mixture import kernels
from jointnas_kernels.ops.quant.mixture.reference import Gradients, Mixture, Upstream, Want, tiles

WARPS = 8  # per block; one block per multiprocessor (255 registers)
# Elements of dW at a time: 128 MB, any matrix of an 8B model at once. Pieces of 2^23 would stay in the second-level
# cache, but their reduction is bound by some 31 instructions per element (predicted: 9 us on 132 multiprocessors, where
# dW and W take 8 us from memory), and each piece is two launches of the host: 56 in a block instead of 14.
CHUNK = 64 << 20


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


@functools.cache
def _exact(scaling: float, dtype: torch.dtype) -> bool:
    """Whether the dtype holds the scaling."""
    return torch.tensor(scaling, dtype=dtype).item() == scaling


def operands(mix: Mixture) -> Mixture:
    """The mixture in the form the kernel reads."""
    weight, dtype, b, scaling = mix.weight, mix.weight.dtype, mix.lora_b, mix.scaling
    if b.dtype != dtype or not _exact(scaling, dtype):  # else the kernel's own product would round twice
        b, scaling = b.float() * scaling, 1.0
    clip = None if mix.clip is None else mix.clip.float()
    weight, a, b = (cuda.aligned(t.to(dtype)) for t in (weight, mix.lora_a, b))
    return Mixture(weight, a, b, mix.probs.float(), clip, scaling, mix.bits, mix.group_size).dense()


def launch_plan(mix: Mixture, rows: int, reduce: bool) -> tuple[int, int]:
    """`plan` for so many rows on this device."""
    most = most_columns(mix.group_size, len(mix.bits), mix.clip is not None, reduce, shared_limit(mix.weight))
    return plan(rows, mix.weight.shape[1], most, cuda.multiprocessors(mix.weight))


def warps(mix: Mixture, columns: int, splits: int) -> int:
    """Of a launch, each of which leaves a partial sum per precision."""
    return math.ceil(mix.weight.shape[1] / (128 * columns)) * splits * WARPS


def run(
    mix: Mixture, columns: int, splits: int, out: Tensor | None = None, grad: Tensor | None = None, begin: int = 0,
    end: int | None = None, partial: Tensor | None = None,
) -> None:  # fmt: skip
    """Write ``out``, or to ``partial`` [warps, P] the sums <grad, Q_p> for grad = G[begin:end]; of `operands`."""
    (rows, inputs), (precisions, rank, _) = mix.weight.shape, mix.lora_a.shape
    bits = sum(width << (8 * p) for p, width in enumerate(mix.bits))
    cuda.call(
        "quant_lora_mix", *mix[:3], grad, mix.probs, mix.clip, out, partial, rows, begin, rows if end is None else end,
        inputs, rank, precisions, mix.group_size, bits, cuda.DTYPES[mix.weight.dtype], columns, splits,
        float(mix.scaling), on=mix.weight,
    )  # fmt: skip


def forward(
    mix: Mixture, out: Tensor | None = None, columns: int | None = None, splits: int | None = None
) -> Tensor:  # fmt: skip
    """W~, in ``out`` if there is one; ``columns`` and ``splits`` override the launch plan."""
    mix = operands(mix)
    out = torch.empty_like(mix.weight) if out is None else out
    if out.numel():
        if columns is None or splits is None:
            columns, splits = launch_plan(mix, len(out), False)
        run(mix, columns, splits, out)
    return out


def reduces(mix: Mixture) -> bool:
    """Whether the kernel can reduce dW: its shared memory fits."""
    return most_columns(mix.group_size, len(mix.bits), mix.clip is not None, True, shared_limit(mix.weight)) > 0


def probs_gradient(mixes: Sequence[Mixture], upstream: Sequence[Upstream]) -> Tensor:
    """dprobs of linears that share them. The library GEMM writes G, at most CHUNK of it, and the forward's kernel
    reduces it: at 1024 tokens that GEMM is twice as fast as one with registers left for this epilogue. One sum at the
    end adds up what all these launches left."""
    launches: list[tuple[Mixture, Upstream, slice, tuple[int, int]]] = []
    for mix, of in zip(mixes, upstream, strict=True):
        read, (rows, inputs) = operands(mix), mix.weight.shape
        for tile in tiles(rows, max(256, CHUNK // inputs // 256 * 256)):
            launches.append((read, of, tile, launch_plan(read, tile.stop - tile.start, True)))
    counts = [warps(mix, *shape) for mix, _, _, shape in launches]
    sums = mixes[0].weight.new_empty(sum(counts), len(mixes[0].bits), dtype=torch.float32)
    for (mix, of, tile, shape), partial in zip(launches, sums.split(counts), strict=True):
        grad = cuda.aligned(of.rows(tile).to(mix.weight.dtype))
        run(mix, *shape, grad=grad, begin=tile.start, end=tile.stop, partial=partial)
    return sums.sum(0).to(mixes[0].probs.dtype)


def gradients(mix: Mixture, upstream: Upstream, want: Want) -> Gradients:
    """This kernel's in arch steps, where only probs have a gradient; else Triton's."""
    if want != (False, True, False) or not reduces(mix):
        return kernels.gradients(mix, upstream, want)
    return None, None, probs_gradient([mix], [upstream]), None
