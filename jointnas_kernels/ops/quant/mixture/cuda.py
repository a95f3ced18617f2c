"""Calls of the CUDA C++ kernel of the mixture (csrc/cuda/quant_lora_mix.cu): the forward, and the dprobs of arch steps.
Half types, groups of 32, 64 or 128, input channels a multiple of 128, rank 8, 16, 24 or 32, at most 4 precisions."""

import functools
import itertools
import math
from typing import NamedTuple

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


class Plan(NamedTuple):
    """How the blocks, one per multiprocessor, share the work.

    A unit is 8 row tiles, one per warp, times ``columns`` 128-channel tiles, whose A a block keeps. Blocks take even
    shares of the units, which go down the rows of one group of columns after another.
    """

    columns: int
    blocks: int

    def busiest(self, rows: int, inputs: int) -> tuple[int, int]:
        """(units of the busiest block, groups of columns of the block with most)."""
        down = math.ceil(rows / 16 / WARPS)
        units = math.ceil(inputs / 128 / self.columns) * down
        bounds = [units * i // self.blocks for i in range(self.blocks + 1)]
        shares = [(a, b) for a, b in itertools.pairwise(bounds) if a < b]
        return max(b - a for a, b in shares), max((b - 1) // down - a // down + 1 for a, b in shares)

    def cost(self, rows: int, inputs: int) -> float:
        """In units of a warp's work on a tile, about 2000 instructions. Fetching B of a row tile is 50 of them; while A
        comes nothing else is done, which is predicted to take 0.5, and 0.25 for each column."""
        units, groups = self.busiest(rows, inputs)
        return units * (self.columns + 0.025) + groups * (0.5 + 0.25 * self.columns)


@functools.cache
def plan(rows: int, inputs: int, most: int, multiprocessors: int) -> Plan:
    """The plan of least cost with at most ``most`` columns, and no more blocks than its busiest block needs."""
    units = [math.ceil(inputs / 128 / columns) * math.ceil(rows / 16 / WARPS) for columns in range(1, most + 1)]
    shares = [math.ceil(all_units / multiprocessors) for all_units in units]
    plans = [Plan(i + 1, math.ceil(all_units / shares[i])) for i, all_units in enumerate(units)]
    return min(plans, key=lambda how: how.cost(rows, inputs))


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
    how: Plan | None = None,
) -> Tensor | None:  # fmt: skip
    """Write ``out``, or return the partial sums [P, n] of <grad, Q_p> for grad = G[begin:end]; of `operands`."""
    (rows, inputs), (precisions, rank, _) = mix.weight.shape, mix.lora_a.shape
    end = rows if end is None else end
    if how is None:
        limit = shared_limit(mix.weight)
        most = most_columns(mix.group_size, precisions, mix.clip is not None, grad is not None, limit)
        how = plan(end - begin, inputs, most, cuda.multiprocessors(mix.weight))
    partial = None
    if grad is not None:
        partial = mix.weight.new_empty(precisions, how.blocks * WARPS, dtype=torch.float32)
    bits = sum(width << (8 * p) for p, width in enumerate(mix.bits))
    cuda.call(
        "quant_lora_mix", *mix[:3], grad, mix.probs, mix.clip, out, partial, rows, begin, end, inputs, rank, precisions,
        mix.group_size, bits, cuda.DTYPES[mix.weight.dtype], *how, float(mix.scaling), on=mix.weight,
    )  # fmt: skip
    return partial


def forward(mix: Mixture, how: Plan | None = None) -> Tensor:
    """W~, by the usual plan if none is given."""
    mix = operands(mix)
    out = torch.empty_like(mix.weight)
    if out.numel():
        run(mix, out, how=how)
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
