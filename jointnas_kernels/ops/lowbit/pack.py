"""Packed low-bit integers as checkpoints store them (compressed-tensors ``pack-quantized``).

``int32 [O, I*bits/32]``: value ``k`` of a row sits in word ``k // (32/bits)`` at bit ``bits * (k % (32/bits))`` (lowest
first), as ``q + 2^(bits-1)``. Bytes of a word are taken lowest first, too (little-endian machines).
"""

import torch
from torch import Tensor

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.core.tensors import bad
from jointnas_kernels.ops.quant.spec import PACKED_WEIGHT_BITS, level_range


def check_bits(bits: int, allowed: tuple[int, ...], what: str) -> None:
    """Raise unless ``bits`` is one of ``allowed``."""
    if bits not in allowed:
        raise JointNASError(f"{what} must be one of {', '.join(map(str, allowed))}, got {bits!r}")


def to_words(fields: Tensor, bits: int) -> Tensor:
    """Unsigned integers of 1, 2, 4 or 8 bits, uint8 [..., n], to words int32 [..., n*bits/32], lowest first."""
    per_byte = 8 // bits
    packed = fields[..., ::per_byte].clone(memory_format=torch.contiguous_format)
    for i in range(1, per_byte):
        packed |= fields[..., i::per_byte] << (bits * i)
    return packed.view(torch.int32)


def to_fields(words: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`to_words`."""
    # not contiguous(): that keeps odd strides of dimensions of size 1, which view refuses
    packed, mask = words.clone(memory_format=torch.contiguous_format).view(torch.uint8), (1 << bits) - 1
    return torch.stack([(packed >> (bits * i)) & mask for i in range(8 // bits)], -1).flatten(-2)


def merge_planes(words: Tensor, dim: int) -> Tensor:
    """Bit-planes, int32 [.., bits at ``dim``, .., n/32], to the integers uint8 [.., n] whose bits they hold."""
    planes = [to_fields(plane, 1) << i for i, plane in enumerate(words.unbind(dim))]
    return torch.stack(planes).sum(0, dtype=torch.uint8)


def pack_weight(q: Tensor, bits: int) -> Tensor:
    """Signed integers to the storage layout (module docstring).

    Args:
        q: [O, I] of any integer dtype, in [-2^(bits-1), 2^(bits-1)-1]; I a multiple of 32/bits.
        bits: 2, 4 or 8.

    Returns:
        int32 [O, I*bits/32].

    Raises:
        JointNASError: another number of bits, no integers, or values or a size that do not fit.
    """
    check_bits(bits, PACKED_WEIGHT_BITS, "pack_weight: bits")
    if q.dim() != 2 or q.dtype.is_floating_point or q.dtype == torch.bool:
        raise bad("pack_weight", f"q must be a 2-D integer tensor, got {q.dim()}-D {q.dtype}")
    per_word, (low, high) = 32 // bits, level_range(bits)
    if q.shape[1] % per_word:
        raise bad("pack_weight", f"the input size must be a multiple of {per_word} for {bits} bits, got {q.shape[1]}")
    if q.numel() and (int(q.min()) < low or int(q.max()) > high):
        raise bad("pack_weight", f"{bits}-bit values must lie in [{low}, {high}]")
    return to_words(q.to(torch.uint8) + (1 << (bits - 1)), bits)


def unpack_weight(packed: Tensor, bits: int, shape: tuple[int, int] | torch.Size) -> Tensor:
    """Inverse of :func:`pack_weight`.

    Args:
        packed: int32 [O, I*bits/32].
        bits: 2, 4 or 8.
        shape: (O, I).

    Returns:
        int8 [O, I].

    Raises:
        JointNASError: another number of bits, or a tensor that does not have this shape.
    """
    check_bits(bits, PACKED_WEIGHT_BITS, "unpack_weight: bits")
    stored = (shape[0], shape[1] * bits // 32)
    if packed.dtype != torch.int32 or tuple(packed.shape) != stored or shape[1] * bits % 32:
        raise bad("unpack_weight", f"{bits}-bit weights of shape {tuple(shape)} are packed as int32 {stored}, "
                                   f"got {packed.dtype} {tuple(packed.shape)}")
    return (to_fields(packed, bits) - (1 << (bits - 1))).view(torch.int8)
