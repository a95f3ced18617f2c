"""Calls of the CUDA C++ kernel of the mixture (csrc/cuda/quant_lora_mix.cu): the forward, and the dprobs of arch steps.
Half types, groups of 32, 64 or 128, input channels a multiple of 128, rank 8, 16, 24 or 32, at most 4 precisions."""

import bisect
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jointnas_kernels.ops.core import cuda
from jointnas_kernels.ops.core.arrival import counters
from jointnas_kernels.ops.quant.mixture import kernels
from jointnas_kernels.ops.quant.mixture.reference import Gradients, Mixture, Upstream, Want, tiles

WARPS = 8  # per block; one block per multiprocessor (255 registers)
MOST = 8  # weights of a launch: kMost in csrc/cuda/quant_lora_mix.cuh
# Elements of dW at a time: 256 MB, those of one input of an 8B model at once. Pieces of 2^23 would stay in the
# second-level cache, which saves little: the kernel takes 26 us for as many (H200, forward), their dW 4 us from memory
# (predicted). But each piece is two launches of the host: 56 in a block instead of 8.
CHUNK = 128 << 20


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


Shapes = tuple[tuple[int, int], ...]  # (rows, inputs) of each weight of a launch


class Plan(NamedTuple):
    """How the blocks, one per multiprocessor, share the work.

    A unit is 8 row tiles, one per warp, times ``columns`` 128-channel tiles, whose A a block keeps. Blocks take even
    shares of the units, which go down the rows of one group of columns after another, and of one weight after another.
    """

    columns: int
    blocks: int

    def stretches(self, shapes: Shapes) -> list[int]:
        """Units of every group of columns of every weight, in their order."""
        return [
            units
            for rows, inputs in shapes
            for units in [math.ceil(rows / 16 / WARPS)] * math.ceil(inputs / 128 / self.columns)
        ]

    def busiest(self, shapes: Shapes) -> tuple[int, int]:
        """(units of the busiest block, groups of columns of the block with most)."""
        ends = list(itertools.accumulate(self.stretches(shapes)))
        bounds = [ends[-1] * i // self.blocks for i in range(self.blocks + 1)]
        shares = [(a, b) for a, b in itertools.pairwise(bounds) if a < b]
        groups = [bisect.bisect_left(ends, b) - bisect.bisect_right(ends, a) + 1 for a, b in shares]
        return max(b - a for a, b in shares), max(groups)

    def cost(self, shapes: Shapes) -> float:
        """In units of a warp's work on a tile, about 2000 instructions. Fetching B of a row tile is 50 of them; while A
        comes nothing else is done, which is predicted to take 0.5, and 0.25 for each column."""
        units, groups = self.busiest(shapes)
        return units * (self.columns + 0.025) + groups * (0.5 + 0.25 * self.columns)


@functools.cache
def plan(shapes: Shapes, most: int, multiprocessors: int) -> Plan:
    """The plan of least cost for weights of these shapes with at most ``most`` columns, and no more blocks than its
    busiest block needs."""
    plans = []
    for columns in range(1, most + 1):
        units = sum(Plan(columns, 1).stretches(shapes))
        plans.append(Plan(columns, math.ceil(units / math.ceil(units / multiprocessors))))
    return min(plans, key=lambda how: how.cost(shapes))


@functools.cache
def _exact(scaling: float, dtype: torch.dtype) -> bool:
    """Whether the dtype holds the scaling."""
    return torch.tensor(scaling, dtype=dtype).item() == scaling


def operands(mixes: Sequence[Mixture]) -> list[Mixture]:
    """Mixtures that share all but weight, pairs and clip ratios, in the form the kernel reads.

    A and B in another dtype are cast by one launch, where it does not matter whether B is scaled before or behind: in
    bf16 and by a power of two. Elsewhere the kernel's own product would round twice.
    """
    (weight, *_), scaling = mixes[0][:5], mixes[0].scaling
    dtype, every = weight.dtype, [t for mix in mixes for t in mix[1:3]]
    if not all(t.dtype == dtype for t in every) or not _exact(scaling, dtype):
        if dtype == torch.bfloat16 and math.frexp(scaling)[0] == 0.5:
            sizes = [t.numel() for t in every]
            memory = weight.new_empty(sum(sizes))
            parts = [part.view(t.shape) for part, t in zip(memory.split(sizes), every, strict=True)]
            torch._foreach_copy_(parts, every)
            every = parts
        else:
            every = [t.to(dtype) if i % 2 == 0 else (t.float() * scaling).to(dtype) for i, t in enumerate(every)]
            scaling = 1.0
    probs, found = mixes[0].probs.float().contiguous(), []
    for i, mix in enumerate(mixes):
        clip = None if mix.clip is None else mix.clip.float().contiguous()
        w, a, b = (cuda.aligned(t) for t in (mix.weight, *every[2 * i : 2 * i + 2]))
        found.append(Mixture(w, a, b, probs, clip, scaling, mix.bits, mix.group_size))
    return found


class Piece(NamedTuple):
    """Some rows of one of `operands`, and W~ to write, or their dW to read."""

    mix: Mixture
    rows: slice
    target: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, inputs)."""
        return self.rows.stop - self.rows.start, self.mix.weight.shape[1]


def launch_plan(pieces: Sequence[Piece], reduce: bool) -> Plan:
    """`plan` of a launch on this device."""
    first, finest = pieces[0].mix, min(piece.mix.group_size for piece in pieces)
    most = most_columns(finest, len(first.bits), first.clip is not None, reduce, shared_limit(first.weight))
    return plan(tuple(piece.shape for piece in pieces), most, cuda.multiprocessors(first.weight))


def run(pieces: Sequence[Piece], how: Plan | None = None, total: Tensor | None = None) -> None:
    """One launch: write W~, or to ``total`` [P] the sums <dW, Q_p> over all pieces; by the usual plan if none is given.
    All have clip ratios or none."""
    how = how or launch_plan(pieces, total is not None)
    mix = pieces[0].mix
    precisions, rank, _ = mix.lora_a.shape
    weights = cuda.addresses("quant_lora_mix", mix.weight.device, [
        value
        for one, rows, target in pieces
        for value in (*one[:3], one.clip, target, len(one.weight), rows.start, rows.stop, one.weight.shape[1],
                      one.group_size)
    ])  # fmt: skip
    partial = None if total is None else total.new_empty(how.blocks, precisions)
    arrived = None if total is None else counters(total, 1)
    bits = sum(width << (8 * p) for p, width in enumerate(mix.bits))
    cuda.call(
        "quant_lora_mix", weights.buffer_info()[0], len(pieces), mix.probs, partial, total, arrived, rank, precisions,
        bits, cuda.DTYPES[mix.weight.dtype], *how, float(mix.scaling), on=mix.weight,
    )  # fmt: skip


def forward_all(mixes: Sequence[Mixture], outs: Sequence[Tensor], how: Plan | None = None) -> None:
    """W~ of each in ``outs``, by one launch for up to MOST. Inputs and groups may differ, what is left may not, and all
    have clip ratios or none. The kernel takes groups of 32 or of 64 beside those of 128, so both are two launches."""
    pieces = [Piece(mix, slice(0, len(mix.weight)), out) for mix, out in zip(operands(mixes), outs, strict=True)]
    pieces = [piece for piece in pieces if piece.target.numel()]
    small = {piece.mix.group_size for piece in pieces} - {128}
    first = min(small, default=128)
    for group in sorted(small | {first}):
        own = [one for one in pieces if one.mix.group_size == group or (group == first and one.mix.group_size == 128)]
        for start in range(0, len(own), MOST):
            run(own[start : start + MOST], how)


def forward(mix: Mixture, out: Tensor | None = None, how: Plan | None = None) -> Tensor:
    """W~, in ``out`` if there is one."""
    out = torch.empty_like(mix.weight, memory_format=torch.contiguous_format) if out is None else out
    forward_all([mix], [out], how)
    return out


def reduces(mix: Mixture) -> bool:
    """Whether the kernel can reduce dW: its shared memory fits."""
    return most_columns(mix.group_size, len(mix.bits), mix.clip is not None, True, shared_limit(mix.weight)) > 0


def probs_gradient(mixes: Sequence[Mixture], upstreams: Sequence[Upstream]) -> Tensor:
    """dprobs of linears below each other that share them, G of some of them after the other in each of ``upstreams``.
    The library GEMM writes G, at most CHUNK of it, and the forward's kernel reduces it: at 1024 tokens that GEMM is
    twice as fast as one with registers left for this epilogue."""
    mixes = operands(mixes)
    ends = [0, *itertools.accumulate(len(mix.weight) for mix in mixes)]
    launches: list[tuple[Upstream, slice, int]] = []
    start = 0
    for of in upstreams:
        step = max(256, CHUNK // mixes[0].weight.shape[1] // 256 * 256)
        launches += [(of, tile, start) for tile in tiles(of.height, step)]
        start += of.height
    totals = mixes[0].weight.new_empty(len(launches), len(mixes[0].bits), dtype=torch.float32)
    for (of, tile, start), total in zip(launches, totals, strict=True):
        grad = cuda.aligned(of.rows(tile).to(mixes[0].weight.dtype))
        first = start + tile.start  # of the rows of all
        pieces = []
        for mix, begin, end in zip(mixes, ends, ends[1:], strict=False):
            low, high = max(begin, first), min(end, start + tile.stop)
            if low < high:
                pieces.append(Piece(mix, slice(low - begin, high - begin), grad[low - first : high - first]))
        run(pieces, total=total)
    return (totals[0] if len(launches) == 1 else totals.sum(0)).to(mixes[0].probs.dtype)


def gradients(mix: Mixture, upstream: Upstream, want: Want) -> Gradients:
    """This kernel's in arch steps, where only probs have a gradient; else Triton's."""
    if want != (False, True, False) or not reduces(mix):
        return kernels.gradients(mix, upstream, want)
    return None, None, probs_gradient([mix], [upstream]), None
