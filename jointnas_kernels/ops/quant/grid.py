"""The integers and scales behind a fake-quantized weight, exactly.

A fake-quantized weight holds products v = (q - z) s rounded once to its dtype: q an integer of b bits, one scale s (of
that dtype) and zero point z per group of inputs. Exports store q and s, so both must be recovered without any loss:

    q - z = rint(v / s)      exact while |q - z| <= 128: rounding to bf16 moves v by less than 2^-8 of itself;
                             one level off at most beyond (asymmetric 8 bits), where a neighbour is the exact one

and, where only v is known (a kernel returned it), s itself. A symmetric quantizer puts the largest magnitude of a group
on level 2^(b-1) - 1 or -2^(b-1): max|w| / s >= (2^b - 1)/2 for every clipping ratio <= 1. So s is max|v| divided by one
of these, up to the rounding of v and of the quotient: a few neighbours are tried, and one is taken if and only if it
reproduces every value of the group bit for bit. Any such scale is as good as the one that was used.

Shapes: values [O, I], scale and zero [O, I / group_size].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.core.tensors import compute_dtype
from jointnas_kernels.ops.quant.spec import level_range, quantize_groups

NEIGHBOURS = (0, 1, -1, 2, -2)  # units in the last place
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Grid(NamedTuple):
    """What a weight's values are multiples of."""

    bits: int
    scale: Tensor  # [O, G], in the weight's dtype
    zero: Tensor | None = None  # [O, G] int8 for an asymmetric quantizer


def quantize(
    weight: Tensor, bits: int, group_size: int, symmetric: bool = True, clip: Tensor | None = None
) -> tuple[Tensor, Grid]:
    """`fake_quant_weight` of the weight, and its grid."""
    levels = quantize_groups(weight.detach(), bits, group_size, clip, symmetric)
    values = levels.values.flatten(-2).to(weight.dtype)
    zero = None if levels.z is None else levels.z.squeeze(-1).to(torch.int8)
    return values, Grid(bits, levels.s.squeeze(-1).to(weight.dtype), zero)


def integers(values: Tensor, grid: Grid) -> Tensor:
    """q int8 [O, I] with (q - z) scale == values bit for bit; JointNASError if the values are not on the grid."""
    low, high = level_range(grid.bits)
    wide = compute_dtype(values.dtype)
    v, s = values.detach().to(wide).unflatten(-1, (grid.scale.shape[1], -1)), grid.scale.to(wide).unsqueeze(-1)
    z = torch.zeros_like(s) if grid.zero is None else grid.zero.to(wide).unsqueeze(-1)
    q = ((v / s).round() + z).clamp(low, high)
    wrong = ((q - z) * s).to(values.dtype) != v
    for step in (1, -1) if grid.zero is not None and wrong.any() else ():
        near = (q + step).clamp(low, high)
        fits = wrong & (((near - z) * s).to(values.dtype) == v)
        q, wrong = torch.where(fits, near, q), wrong & ~fits
    if wrong.any():
        raise JointNASError(f"{int(wrong.sum())} of {values.numel()} weights are no multiple of their group's "
                            f"{grid.bits}-bit scale: they were changed, or converted to another dtype, "
                            "after quantization")
    return q.flatten(-2).to(torch.int8)


def find(values: Tensor, bits: int, group_size: int) -> Grid:
    """The grid of values that a symmetric quantizer returned, from the values alone."""
    low, high = level_range(bits)
    wide, word = compute_dtype(values.dtype), _WORDS[values.element_size()]
    groups = values.detach().unflatten(-1, (-1, group_size))
    shape = groups.shape[:-1]
    if values.is_meta:  # sizes only
        return Grid(bits, values.new_empty(shape))
    left = groups.reshape(-1, group_size)  # groups without a scale yet
    scale = torch.ones(left.shape[0], dtype=values.dtype, device=values.device)
    index = left.ne(0).any(-1).nonzero().squeeze(-1)  # a group of zeros fits any scale
    left = left[index]
    for neighbour in NEIGHBOURS:
        for most in (high, -low):
            if not len(index):
                break
            largest = left.abs().amax(-1).to(wide)
            candidate = ((largest / most).to(values.dtype).view(word) + neighbour).view(values.dtype)
            v, s = left.to(wide), candidate.to(wide).unsqueeze(-1)
            fits = (((v / s).round().clamp(low, high) * s).to(values.dtype) == left).all(-1)
            scale[index[fits]] = candidate[fits]
            index, left = index[~fits], left[~fits]
    if len(index):
        raise JointNASError(f"{len(index)} of {scale.numel()} groups do not hold {bits}-bit levels of one scale")
    return Grid(bits, scale.view(shape))
