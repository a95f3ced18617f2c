"""The layout that the CPU kernels stream: one int32 tensor ``data [ceil(O/64), G, meta + words, 64]``.

A block of 64 output rows, adjacent lanes of vectors, is one stream in the order in which the kernels read it. Per
group: ``meta`` vectors, then the group's words of pack.py (32/bits inputs each), word by word. Meta of a row and group
is its scale and the sum S of its levels q, which pays for the activations' zero point:

    bf16 scales: one vector,  bits of the scale << 16 | (S & 0xffff)
    fp32 scales: two vectors, bits of the scale, then S

S fits 16 bits as long as a group holds at most 2^(16-bits) inputs; larger groups are stored as several with the same
scale. Rows beyond O have scale 0. ``planes``: the words of 32 inputs are bit-planes instead (word i holds bit i of each
q + 2^(bits-1), lowest input first), for the popcount kernel of W <= 4 times A <= 4.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.core import cpu
from jointnas_kernels.ops.lowbit.pack import merge_planes, to_words

ROWS = 64  # of a block (kBlock of the C++)


def stored_group(group_size: int, bits: int, planes: bool = False) -> int:
    """The group of the layout: the largest divisor of ``group_size`` that is whole words with sums of 16 bits."""
    word = 32 if planes else 32 // bits
    if group_size % word:
        raise JointNASError(f"the CPU kernels take a group_size that is a multiple of {word} at {bits} bits, "
                            f"got {group_size}")
    most = min(group_size, 1 << (16 - bits))
    return next(g for g in range(most // word * word, 0, -word) if group_size % g == 0)


def dense_scale(scale: Tensor) -> Tensor:
    """Contiguous, in a dtype that the kernels read."""
    return (scale if scale.dtype in cpu.DTYPES else scale.float()).contiguous()


def lay_out(packed: Tensor, scale: Tensor, bits: int, group_size: int, planes: bool) -> tuple[Tensor, ...]:
    """(data,) of the storage layout."""
    if not packed.is_cpu:
        raise JointNASError(f"weights are laid out for the CPU on the CPU, got tensors on {packed.device}")
    packed, scale, stored = packed.contiguous(), dense_scale(scale), stored_group(group_size, bits, planes)
    outputs, inputs = packed.shape[0], packed.shape[1] * 32 // bits
    height = (1 if scale.dtype == torch.bfloat16 else 2) + stored * bits // 32
    data = cpu.empty_like(packed.new_empty(()).expand(-(-outputs // ROWS), inputs // stored, height, ROWS))
    cpu.call("lowbit_pack", packed, scale, data, outputs, inputs, bits, group_size, stored, planes,
             cpu.DTYPES[scale.dtype])
    return (data,)


def read_back(
    tensors: Sequence[Tensor], outputs: int, inputs: int, bits: int, group_size: int, planes: bool,
    of: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(packed, scale) as given to :func:`lay_out`; ``of`` int64 [n]: of these rows only."""
    blocks, groups, height, lanes = tensors[0].shape
    meta = height - inputs // groups * bits // 32
    if of is None:
        rows = tensors[0].permute(0, 3, 1, 2).reshape(blocks * lanes, groups, height)[:outputs]
    else:
        rows = tensors[0][of // lanes, :, :, of % lanes]
    scales = rows[:, :: groups * group_size // inputs, 0]
    if meta == 2:
        scale = scales.contiguous().view(torch.float32)
    else:
        scale = (scales >> 16).to(torch.int16).view(torch.bfloat16)
    packed = rows[:, :, meta:].reshape(len(rows), -1)
    if planes:
        packed = to_words(merge_planes(packed.view(len(rows), -1, bits, 1), 2).view(len(rows), inputs), bits)
    return packed, scale
