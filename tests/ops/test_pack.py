"""Packing and tiling are exact inverses, and every value sits where the documented formula says."""

from __future__ import annotations

import pytest
import torch

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.lowbit import pack, tiles
from jointnas_kernels.ops.quant.spec import PACKED_WEIGHT_BITS

BITS = PACKED_WEIGHT_BITS


def integers(rows: int, inputs: int, bits: int) -> torch.Tensor:
    return torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, inputs), dtype=torch.int8)


@pytest.mark.parametrize("bits", BITS)
def test_every_value_at_every_position(bits):
    per_word, offset = 32 // bits, 1 << (bits - 1)
    for position in range(per_word):
        for fill in (-offset, 0, offset - 1):  # neighbours must neither change nor be changed
            q = torch.full((2 * offset, per_word), fill, dtype=torch.int8)
            q[:, position] = torch.arange(-offset, offset, dtype=torch.int8)
            packed = pack.pack_weight(q, bits)
            assert torch.equal(pack.unpack_weight(packed, bits, q.shape), q)
            assert torch.equal((packed[:, 0] >> (bits * position)) & (2 * offset - 1), q[:, position].int() + offset)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (251, 352), (1024, 2048), (0, 64)], ids=str)
def test_round_trip(shape, bits):
    q = integers(*shape, bits)
    packed = pack.pack_weight(q, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (shape[0], shape[1] * bits // 32)
    assert torch.equal(pack.unpack_weight(packed, bits, shape), q)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
def test_tiles(rows, bits):
    inputs = 384
    q = integers(rows, inputs, bits)
    packed = pack.pack_weight(q, bits)
    tiled = tiles.tile_weight(packed, bits)
    assert tiled.shape == (-(-rows // 16), inputs // 128, bits // 2, 32, 4)
    assert torch.equal(tiles.untile_weight(tiled, bits, rows), packed)
    per_byte = 8 // bits
    for row, k in torch.stack([torch.randint(rows, (400,)), torch.randint(inputs, (400,))], 1).tolist():
        r, g, i, t = row % 16 // 8, row % 8, k % 128 // 32, k % 32 // 8
        s, h, e = k % 8 // 4, k % 4 // 2, k % 2
        field = 4 * i + 2 * s + r
        word, lane = field // per_byte, 4 * g + t
        value = tiled[row // 16, k // 128, word // 4, lane, word % 4].item()
        value >>= 8 * (2 * e + h) + bits * (field % per_byte)
        assert (value & ((1 << bits) - 1)) - (1 << (bits - 1)) == q[row, k]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 16, 33])
def test_planes(rows, bits):
    inputs = 256
    q = integers(rows, inputs, bits)
    packed = pack.pack_weight(q, bits)
    tiled = tiles.tile_planes(packed, bits)
    assert tiled.shape == (-(-rows // 16), inputs // 128, bits // 2, 32, 4)
    assert torch.equal(tiles.untile_planes(tiled, bits, rows), packed)
    for row, k in torch.stack([torch.randint(rows, (200,)), torch.randint(inputs, (200,))], 1).tolist():
        lane = 4 * (row % 8) + k % 128 // 32
        for plane in range(bits):
            word = 2 * plane + row % 16 // 8
            value = tiled[row // 16, k // 128, word // 4, lane, word % 4].item() >> (k % 32)
            assert value & 1 == (q[row, k].item() >> plane) & 1


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_scale_tiles(rows):
    scale = torch.rand(rows, 3)
    tiled = tiles.tile_scale(scale)
    assert torch.equal(tiles.untile_scale(tiled, rows), scale)
    padded = tiled.view(3, -1, 8, 2)
    for row in range(rows):
        assert torch.equal(padded[:, row // 16, row % 8, row % 16 // 8], scale[row])
    assert tiled.numel() == 3 * 16 * -(-rows // 16)
    assert tiled.count_nonzero() <= scale.numel()


def test_bad_input():
    q = integers(2, 32, 4)
    for call, message in [
        (lambda: pack.pack_weight(q, 3), "must be one of 2, 4, 8"),
        (lambda: pack.pack_weight(q[:, :12], 4), "multiple of 8"),
        (lambda: pack.pack_weight(q.float(), 4), "2-D integer"),
        (lambda: pack.pack_weight(q + 8, 4), r"must lie in \[-8, 7\]"),
        (lambda: pack.unpack_weight(pack.pack_weight(q, 4), 4, (2, 40)), "int32"),
        (lambda: tiles.tile_weight(pack.pack_weight(q, 4), 4), "multiple of 128"),
    ]:
        with pytest.raises(JointNASError, match=message):
            call()
