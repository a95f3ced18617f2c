"""The quantizers, once: allowed bits, levels, scales, zero points and rounding, in plain differentiable torch.

                      symmetric                    asymmetric
    range R           max|x|                       max(x, 0) - min(x, 0)
    scale s           c R / ((2^b - 1) / 2)        c R / (2^b - 1)
    zero point z      0                            rint(clamp(qmin - c min(x, 0) / s))
    level q           clamp(rint(x / s + z))       the same                                      Q(x) = (q - z) s

Levels are signed, qmin = -2^(b-1) to qmax = 2^(b-1) - 1, and rint takes ties to the even one.

    weights       one s and z per row and group of inputs; c is the clipping ratio in (0, 1] of OmniQuant (arXiv
                  2308.13137), 1 if not given. Math in fp32 (fp64 for fp64), but s is rounded to the weight's dtype
                  before anything is divided by it; s < 2^-100 becomes 1 (a group of zeros).
    activations   one s and z per token (the last dimension), from its own range; c = 1. Every operation above is
                  rounded to x's dtype, save the last product; s = 0 becomes the dtype's epsilon. This is what
                  compressed-tensors executes on a reloaded checkpoint, bit for bit.

Divisions are true ones: x (1/s) moves levels at exact ties, and ties are common, since max|x| / s is half-integral by
construction. Gradients pass rint unchanged and clamp where it does nothing; R, min(x, 0) and z count as constants (LSQ,
arXiv 1902.08153).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from jointnas_kernels.ops.core.tensors import compute_dtype

WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8)
ACT_BITS = (*WEIGHT_BITS, 16)  # 16: not quantized
PACKED_WEIGHT_BITS = (2, 4, 8)  # that are stored, and multiplied by low-bit kernels
PACKED_ACT_BITS = (*PACKED_WEIGHT_BITS, 16)
# Below this scale 1/s or the remainder of a division could leave fp32's normal range; such groups are zero anyway.
TINY_SCALE = 2.0**-100


def level_range(bits: int) -> tuple[int, int]:
    """(qmin, qmax)."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def divisor(bits: int, symmetric: bool) -> float:
    """R / s without clipping: how many steps the range has."""
    return ((1 << bits) - 1) / (2 if symmetric else 1)


def extent(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """(R, min(x, 0)) over the last dimension, both [..., 1]; (R, None) if symmetric."""
    if symmetric:
        return x.abs().amax(-1, keepdim=True), None
    least = x.amin(-1, keepdim=True).clamp(max=0)
    return x.amax(-1, keepdim=True).clamp(min=0) - least, least


def straight_through(value: Tensor, x: Tensor) -> Tensor:
    """``value`` going forward, the gradient of ``x`` going back; adds an exact zero, which turns -0 into 0 only."""
    return value.detach() + (x - x.detach() if x.requires_grad else 0.0)


class Levels(NamedTuple):
    """A quantized tensor [..., n] with one scale per n; q - z, s and v are differentiable."""

    q: Tensor  # [..., n] levels
    s: Tensor  # [..., 1] scale
    z: Tensor | None  # [..., 1] zero point of an asymmetric quantizer
    v: Tensor  # [..., n] x / s
    rounded: Tensor  # [..., n] levels before clamping
    slope: Tensor  # [..., 1] ds/dc

    @property
    def inside(self) -> Tensor:
        """[..., n] bool: the level needed no clamping."""
        return self.rounded.detach() == self.q.detach()

    @property
    def steps(self) -> Tensor:
        """[..., n] q - z."""
        return self.q if self.z is None else self.q - self.z

    @property
    def values(self) -> Tensor:
        """[..., n] Q(x) in the compute dtype, not yet rounded to that of x."""
        dtype = compute_dtype(self.q.dtype)
        return self.steps.to(dtype) * self.s.to(dtype)

    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """(q as int8, s, z as int8)."""
        z = torch.zeros_like(self.s) if self.z is None else self.z
        return self.q.to(torch.int8), self.s, z.to(torch.int8)


def _levels(x: Tensor, s: Tensor, bottom: Tensor | None, bits: int, slope: Tensor) -> Levels:
    """Levels of x at the scale s; ``bottom``: c min(x, 0)."""
    low, high = level_range(bits)
    v = x / s
    z = None if bottom is None else (low - bottom / s.detach()).clamp(low, high).round()
    rounded = straight_through((v if z is None else v + z).round(), v)
    return Levels(rounded.clamp(low, high), s, z, v, rounded, slope)


def quantize_groups(
    weight: Tensor, bits: int, group_size: int, clip: Tensor | None = None, symmetric: bool = True,
    scale_dtype: torch.dtype | None = None,
) -> Levels:  # fmt: skip
    """Levels [..., G, group_size] of a weight [..., I] with I = G group_size; clip: the ratios c [..., G].

    Scales are rounded to ``scale_dtype``, the weight's if not given.
    """
    w = weight.to(compute_dtype(weight.dtype)).unflatten(-1, (-1, group_size))
    span, bottom = extent(w.detach(), symmetric)
    # A tensor divisor: torch turns division by a Python number into a multiplication on CUDA.
    steps = span.new_full((), divisor(bits, symmetric))
    raw = slope = span / steps
    if clip is not None:
        ratio = clip.to(w.dtype).unsqueeze(-1)
        raw, bottom = ratio * span / steps, None if bottom is None else ratio.detach() * bottom
    s = straight_through(raw.to(scale_dtype or weight.dtype).to(w.dtype), raw)
    s = torch.where(s.detach() < TINY_SCALE, torch.ones_like(s), s)
    return _levels(w, s, bottom, bits, slope)


def _token_levels(x: Tensor, bits: int, symmetric: bool = False) -> Levels:
    """Levels of activations [..., N], per token; 2 to 8 bits. All parts have x's dtype."""
    span, bottom = extent(x.detach(), symmetric)
    s = span / span.new_full((), divisor(bits, symmetric))  # a tensor divisor, as above
    s = torch.where(s == 0, torch.finfo(x.dtype).eps, s)
    return _levels(x, s, bottom, bits, s)


def quantize_tokens(x: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(levels int8 [..., N], scale [..., 1] in x's dtype, zero point int8 [..., 1]) of activations [..., N]."""
    return _token_levels(x, bits, symmetric).integers()


def fake_quant_tokens(x: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    """Q(x) of activations [..., N] in the compute dtype, not yet rounded to that of x; 16 bits return x."""
    return x.to(compute_dtype(x.dtype)) if bits == 16 else _token_levels(x, bits, symmetric).values
