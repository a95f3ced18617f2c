"""The layout that the CUDA kernels stream: tiles of 16 rows x 128 inputs, and groups of 128 inputs.

One warp reads a tile with 16-byte loads, and each 32-bit word holds exactly the values that lane feeds to ``mma``. Lane
``4g + t`` (g < 8, t < 4) holds, for F = 4i + 2s + r (i < 4, s < 2, r < 2) and byte j = 2e + h (e, h < 2), the value of

    row    = 16*tile + 8r + g
    input  = 128*group + 32i + 8t + 4s + 2h + e

in word ``F // (8/bits)``, byte ``j``, bit ``bits * (F % (8/bits))``. Read as four bytes it is one A register of
``mma.m16n8k32.s8``; read as two halves, fields h = 0 and h = 1 are two A registers of ``mma.m16n8k16.f16``. Any order
of the 128 inputs is allowed because the other operand is read in the same order (lowbit.cuh).

Bit-planes in the same shape: word 2i + r of lane 4g + t holds bit i of q (two's complement) for row 8r + g of the tile
and inputs 32t .. 32t + 31 of the group, lowest first.

Shape: ``int32 [ceil(O/16), I/128, bits/2, 32 lanes, 4 words]``; missing rows hold q = 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.core.cuda import DTYPES
from jointnas_kernels.ops.lowbit.pack import merge_planes, to_fields, to_words, unpack_weight

ROWS, INPUTS = 16, 128  # of a tile
LOCKS = 4096  # strips of rows x blocks of tokens that may be split along the inputs


def _padded(packed: Tensor, bits: int) -> Tensor:
    """Unsigned fields [whole tiles of rows, I]."""
    inputs = packed.shape[1] * 32 // bits
    if inputs % INPUTS:
        raise JointNASError(f"the CUDA kernels take an input size that is a multiple of {INPUTS}, got {inputs}")
    zero = 1 << (bits - 1)
    fields = torch.full((-(-len(packed) // ROWS) * ROWS, inputs), zero, dtype=torch.uint8, device=packed.device)
    fields[: len(packed)] = to_fields(packed, bits)
    return fields


def tile_weight(packed: Tensor, bits: int) -> Tensor:
    """Storage layout (pack.py) to tiles."""
    # axes: tile r g | group i t s h e  ->  tile group (i s r) lane (g t) byte (e h)
    u = _padded(packed, bits).view(-1, 2, 8, packed.shape[1] * 32 // bits // INPUTS, 4, 4, 2, 2, 2)
    u = u.permute(0, 3, 4, 6, 1, 2, 5, 8, 7).reshape(len(u), u.shape[3], bits // 2, 4, 8 // bits, 32, 4)
    return to_words(u.permute(0, 1, 2, 5, 3, 6, 4).flatten(4), bits)  # lowest first: byte, then field


def untile_weight(tiled: Tensor, bits: int, rows: int) -> Tensor:
    """Inverse of :func:`tile_weight`."""
    tiles, groups = tiled.shape[:2]
    u = to_fields(tiled, bits).view(tiles, groups, bits // 2, 32, 4, 4, 8 // bits).permute(0, 1, 2, 4, 6, 3, 5)
    # axes: tile group i s r g t e h  ->  tile r g | group i t s h e
    u = u.reshape(tiles, groups, 4, 2, 2, 8, 4, 2, 2).permute(0, 4, 5, 1, 2, 6, 3, 8, 7)
    return to_words(u.reshape(tiles * ROWS, groups * INPUTS)[:rows], bits)


def tile_planes(packed: Tensor, bits: int) -> Tensor:
    """Storage layout to bit-planes."""
    u = _padded(packed, bits) ^ (1 << (bits - 1))  # two's complement
    u = u.view(-1, 2, 8, packed.shape[1] * 32 // bits // INPUTS, 4, 32).permute(0, 3, 1, 2, 4, 5)  # tile group r g t j
    words = to_words(torch.stack([(u >> i) & 1 for i in range(bits)], 2), 1)
    return words.view(len(u), u.shape[1], bits // 2, 4, 32).transpose(3, 4).contiguous()


def untile_planes(tiled: Tensor, bits: int, rows: int) -> Tensor:
    """Inverse of :func:`tile_planes`."""
    tiles, groups = tiled.shape[:2]
    u = merge_planes(tiled.transpose(3, 4).reshape(tiles, groups, bits, 2, 8, 4, 1), 2) ^ (1 << (bits - 1))
    return to_words(u.permute(0, 2, 3, 1, 4, 5).reshape(tiles * ROWS, groups * INPUTS)[:rows], bits)


def tile_scale(scale: Tensor) -> Tensor:
    """Scales [O, I/128] to [I/128, 16*ceil(O/16)], rows g and g + 8 of a tile adjacent; missing rows get scale 0."""
    rows, groups = scale.shape
    padded = scale.new_zeros(-(-rows // ROWS) * ROWS, groups)
    padded[:rows] = scale
    return padded.view(-1, 2, 8, groups).permute(3, 0, 2, 1).reshape(groups, -1).contiguous()


def untile_scale(tiled: Tensor, rows: int) -> Tensor:
    """Inverse of :func:`tile_scale`."""
    groups = tiled.shape[0]
    return tiled.view(groups, -1, 8, 2).permute(1, 3, 2, 0).reshape(-1, groups)[:rows].contiguous()


def lay_out(packed: Tensor, scale: Tensor, bits: int, group_size: int, planes: bool) -> tuple[Tensor, ...]:
    """(tiles, their scales, row_sum fp32 [O]: q * scale summed over the inputs, locks int32: zero between launches)."""
    if scale.dtype not in DTYPES:
        raise JointNASError(f"the CUDA kernels take float16 or bfloat16 scales, got {scale.dtype}")
    if group_size != INPUTS:
        raise JointNASError(f"the CUDA kernels take groups of {INPUTS} inputs, got {group_size}")
    q = unpack_weight(packed, bits, (len(scale), scale.shape[1] * INPUTS)).view(*scale.shape, INPUTS)
    row_sum = (q.sum(2, dtype=torch.int32) * scale.double()).sum(1).float()
    tiles, tiled_scale = (tile_planes if planes else tile_weight)(packed, bits), tile_scale(scale)
    # last: a kernel launched early may run beside this one, but no longer beside those that wrote the weights
    locks = torch.zeros(LOCKS, dtype=torch.int32, device=packed.device)
    return tiles, tiled_scale, row_sum, locks


def read_back(tensors: Sequence[Tensor], outputs: int, inputs: int, bits: int, group_size: int, planes: bool
              ) -> tuple[Tensor, Tensor]:
    """(packed, scale) as given to :func:`lay_out`."""
    return (untile_planes if planes else untile_weight)(tensors[0], bits, outputs), untile_scale(tensors[1], outputs)
