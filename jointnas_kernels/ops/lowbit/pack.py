"""Packed low-bit weights: the storage layout of checkpoints and the tiled layout the CUDA kernels stream.

Storage (what compressed-tensors ``pack-quantized`` writes): ``int32 [O, I*bits/32]``, value ``k`` of a row sits in
word ``k // (32/bits)`` at bit ``bits * (k % (32/bits))`` (LSB first), stored as ``q + 2^(bits-1)``.

Tiled: a *tile* is 16 rows x 128 inputs, laid out so that one warp reads it with 16-byte loads and each 32-bit word
holds exactly the values that lane feeds to ``mma``. Lane ``4g + t`` (g < 8, t < 4) holds, for F = 4i + 2s + r
(i < 4, s < 2, r < 2) and byte j = 2e + h (e, h < 2), the value of

    row    = 16*tile + 8r + g
    input  = 128*group + 32i + 8t + 4s + 2h + e

in word ``F // (8/bits)``, byte ``j``, bit ``bits * (F % (8/bits))``. Read as four bytes it is one A register of
``mma.m16n8k32.s8``; read as two halves, fields h = 0 and h = 1 are two A registers of ``mma.m16n8k16.f16``. Any order
of the 128 inputs is allowed because the other operand is read in the same order (csrc/cuda/lowbit.cuh).
Shape: ``int32 [ceil(O/16), I/128, bits/2, 32 lanes, 4 words]``; missing rows hold q = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jointnas_kernels.errors import JointNASError

WEIGHT_BITS = (2, 4, 8)
TILE_ROWS = 16
TILE_INPUTS = 128


def check_bits(bits: int, allowed: tuple[int, ...], what: str) -> None:
    """Raise unless ``bits`` is one of ``allowed``."""
    if bits not in allowed:
        raise JointNASError(f"{what} must be one of {', '.join(map(str, allowed))}, got {bits!r}")


def pack_weight(q: Tensor, bits: int) -> Tensor:
    """Signed integers ``q`` [O, I] in [-2^(bits-1), 2^(bits-1)-1] to ``int32 [O, I*bits/32]``."""
    check_bits(bits, WEIGHT_BITS, "pack_weight: bits")
    if q.dim() != 2 or q.dtype.is_floating_point or q.dtype == torch.bool:
        raise JointNASError(f"pack_weight: q must be a 2-D integer tensor, got {q.dim()}-D {q.dtype}")
    per_word = 32 // bits
    if q.shape[1] % per_word:
        raise JointNASError(
            f"pack_weight: the input size must be a multiple of {per_word} for {bits} bits, got {q.shape[1]}"
        )
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if q.numel() and (int(q.min()) < low or int(q.max()) > high):
        raise JointNASError(f"pack_weight: {bits}-bit values must lie in [{low}, {high}]")
    stored = (q.to(torch.int32) + (1 << (bits - 1))).view(q.shape[0], q.shape[1] // per_word, per_word)
    packed = torch.zeros(stored.shape[:2], dtype=torch.int32, device=q.device)
    for i in range(per_word):
        packed |= stored[:, :, i] << (bits * i)
    return packed


def unpack_weight(packed: Tensor, bits: int, shape: tuple[int, int] | torch.Size) -> Tensor:
    """Inverse of :func:`pack_weight`: ``int8`` of ``shape`` [O, I]."""
    check_bits(bits, WEIGHT_BITS, "unpack_weight: bits")
    per_word = 32 // bits
    if packed.dtype != torch.int32 or tuple(packed.shape) != (shape[0], shape[1] * bits // 32) or shape[1] % per_word:
        raise JointNASError(
            f"unpack_weight: {bits}-bit weights of shape {tuple(shape)} are packed as int32 "
            f"{(shape[0], shape[1] * bits // 32)}, got {packed.dtype} {tuple(packed.shape)}"
        )
    mask = (1 << bits) - 1
    fields = [(packed >> (bits * i)) & mask for i in range(per_word)]
    return (torch.stack(fields, dim=2).view(shape) - (1 << (bits - 1))).to(torch.int8)


def tile_weight(packed: Tensor, bits: int) -> Tensor:
    """Storage layout to tiled layout (module docstring). The input size must be a multiple of 128."""
    check_bits(bits, WEIGHT_BITS, "tile_weight: bits")
    rows, inputs = packed.shape[0], packed.shape[1] * 32 // bits
    if inputs % TILE_INPUTS:
        raise JointNASError(f"tile_weight: the input size must be a multiple of {TILE_INPUTS}, got {inputs}")
    offset, per_byte = 1 << (bits - 1), 8 // bits
    tiles, groups = -(-rows // TILE_ROWS), inputs // TILE_INPUTS
    q = torch.zeros(tiles * TILE_ROWS, inputs, dtype=torch.int8, device=packed.device)
    q[:rows] = unpack_weight(packed, bits, (rows, inputs))
    # axes: tile r g | group i t s h e  ->  tile group (i s r) lane (g t) byte (e h)
    v = q.view(tiles, 2, 8, groups, 4, 4, 2, 2, 2).permute(0, 3, 4, 6, 1, 2, 5, 8, 7)
    v = v.reshape(tiles, groups, 2 * bits, per_byte, 32, 4).to(torch.int32) + offset
    words = torch.zeros(tiles, groups, 2 * bits, 32, dtype=torch.int32, device=packed.device)
    for field in range(per_byte):
        for byte in range(4):
            words |= v[:, :, :, field, :, byte] << (8 * byte + bits * field)
    return words.view(tiles, groups, bits // 2, 4, 32).transpose(3, 4).contiguous()


def untile_weight(tiled: Tensor, bits: int, rows: int) -> Tensor:
    """Inverse of :func:`tile_weight`."""
    check_bits(bits, WEIGHT_BITS, "untile_weight: bits")
    tiles, groups = tiled.shape[:2]
    per_byte, mask = 8 // bits, (1 << bits) - 1
    words = tiled.transpose(3, 4).reshape(tiles, groups, 2 * bits, 1, 32, 1)
    shift = bits * torch.arange(per_byte, device=tiled.device).view(-1, 1, 1) + 8 * torch.arange(4, device=tiled.device)
    v = ((words >> shift.to(torch.int32)) & mask) - (1 << (bits - 1))
    # axes: tile group i s r g t e h  ->  tile r g | group i t s h e
    v = v.view(tiles, groups, 4, 2, 2, 8, 4, 2, 2).permute(0, 4, 5, 1, 2, 6, 3, 8, 7)
    return pack_weight(v.reshape(tiles * TILE_ROWS, groups * TILE_INPUTS)[:rows].to(torch.int8), bits)


def tile_planes(packed: Tensor, bits: int) -> Tensor:
    """Storage layout to bit-planes in the tiled shape: word 2i + r of lane 4g + t holds bit i of q (two's complement)
    for row 8r + g of the tile and inputs 32t .. 32t + 31 of the group, lowest first."""
    check_bits(bits, WEIGHT_BITS, "tile_planes: bits")
    rows, inputs = packed.shape[0], packed.shape[1] * 32 // bits
    if inputs % TILE_INPUTS:
        raise JointNASError(f"tile_planes: the input size must be a multiple of {TILE_INPUTS}, got {inputs}")
    tiles, groups = -(-rows // TILE_ROWS), inputs // TILE_INPUTS
    q = torch.zeros(tiles * TILE_ROWS, inputs, dtype=torch.int8, device=packed.device)
    q[:rows] = unpack_weight(packed, bits, (rows, inputs))
    v = q.view(tiles, 2, 8, groups, 4, 32).permute(0, 3, 1, 2, 4, 5).to(torch.int32)  # tile group r g t j
    words = torch.zeros(tiles, groups, bits, 2, 32, dtype=torch.int32, device=packed.device)
    for plane in range(bits):
        for j in range(32):
            words[:, :, plane] |= ((v[..., j] >> plane) & 1).flatten(3) << j
    return words.view(tiles, groups, bits // 2, 4, 32).transpose(3, 4).contiguous()


def untile_planes(tiled: Tensor, bits: int, rows: int) -> Tensor:
    """Inverse of :func:`tile_planes`."""
    check_bits(bits, WEIGHT_BITS, "untile_planes: bits")
    tiles, groups = tiled.shape[:2]
    words = tiled.transpose(3, 4).reshape(tiles, groups, bits, 2, 8, 4, 1)
    planes = (words >> torch.arange(32, dtype=torch.int32, device=tiled.device)) & 1
    weights = [1 << i for i in range(bits - 1)] + [-(1 << (bits - 1))]
    q = torch.stack([planes[:, :, i] * w for i, w in enumerate(weights)]).sum(0)  # tile group r g t j
    q = q.permute(0, 2, 3, 1, 4, 5).reshape(tiles * TILE_ROWS, groups * TILE_INPUTS)
    return pack_weight(q[:rows].to(torch.int8), bits)


def tile_scale(scale: Tensor) -> Tensor:
    """Scales [O, I/128] to [I/128, 16*ceil(O/16)], rows g and g + 8 of a tile adjacent; missing rows get scale 0."""
    rows, groups = scale.shape
    padded = scale.new_zeros(-(-rows // TILE_ROWS) * TILE_ROWS, groups)
    padded[:rows] = scale
    return padded.view(-1, 2, 8, groups).permute(3, 0, 2, 1).reshape(groups, -1).contiguous()


def untile_scale(tiled: Tensor, rows: int) -> Tensor:
    """Inverse of :func:`tile_scale`."""
    groups = tiled.shape[0]
    return tiled.view(groups, -1, 8, 2).permute(1, 3, 2, 0).reshape(-1, groups)[:rows].contiguous()
