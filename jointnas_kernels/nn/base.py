"""Frozen base weights that are kept in 8 bits, and put together where they are read.

    W = s q      q int8 [O, I], one scale s per output, in the weight's dtype;   O I + 2 O bytes instead of 2 O I (bf16)

It is what the base model is from then on: its weights are rounded to this once, and every copy of them, or of some of
their channels, has the same values. A scale per output, not per group, so that any channels may be taken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from jointnas_kernels.errors import unknown
from jointnas_kernels.ops.core.tensors import compute_dtype
from jointnas_kernels.ops.quant.spec import quantize_groups

BASE_BITS = (8,)
KEY = "parametrizations.weight.original0"  # of q in a state dict; of s, with a 1 at its end
Packed = tuple[Tensor, Tensor]  # q, s


class _Unpacked(nn.Module):
    """What reading the weight does."""

    def __init__(self, packed: Packed | None) -> None:
        super().__init__()
        self._packed = packed  # instead of what quantizing gives, until it is registered

    def forward(self, q: Tensor, scale: Tensor) -> Tensor:
        return _joined(q, scale)

    def right_inverse(self, weight: Tensor) -> Packed:
        packed, self._packed = self._packed, None
        if packed is not None:
            return packed
        levels = quantize_groups(weight, BASE_BITS[0], weight.shape[1])
        return levels.q.flatten(-2).to(torch.int8), levels.s.squeeze(-1).to(weight.dtype)


def _joined(q: Tensor, scale: Tensor) -> Tensor:
    wide = compute_dtype(scale.dtype)
    return (q.to(wide) * scale.to(wide)).to(scale.dtype)


def pack(linear: nn.Module, bits: int, values: Packed | None = None) -> None:
    """From now on a linear's frozen weight [O, I] is 8-bit integers, and every read of it a new tensor.

    `values`: what it already is; None: it is rounded.

    Raises:
        JointNASError: other bits.
    """
    if bits not in BASE_BITS:
        raise unknown("precision of base weights", bits, BASE_BITS, where="base_bits")
    parametrize.register_parametrization(linear, "weight", _Unpacked(values))


def packed(linear: nn.Module) -> Packed | None:
    """The integers and scales of a packed weight; None: it is not packed."""
    if not parametrize.is_parametrized(linear, "weight"):
        return None
    parts: Any = linear.get_submodule("parametrizations.weight")
    return parts.original0, parts.original1


@contextlib.contextmanager
def unpacked(module: nn.Module) -> Iterator[None]:
    """Inside, the packed weights of a module's linears are plain parameters of the same values, which
    `torch.func.functional_call` can replace."""
    found = [(linear, of) for linear in module.modules() if (of := packed(linear)) is not None]
    for linear, of in found:
        value = _joined(*of)
        parametrize.remove_parametrizations(linear, "weight")
        del linear.weight
        linear.weight = nn.Parameter(value, requires_grad=False)
    try:
        yield
    finally:
        for linear, of in found:
            pack(linear, BASE_BITS[0], of)
