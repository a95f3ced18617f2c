"""Fake quantization of a weight in groups along its input.

    signed symmetric (default), per row o and group G of ``group_size`` channels
        s = clip · max|w| / ((2^b - 1)/2), rounded to the weight's dtype; s < 2^-100 becomes 1 (an all-zero group)
        q = clamp(rint(w / s), -2^(b-1), 2^(b-1) - 1)                      Q(w) = q · s
    asymmetric
        s = clip · (max(w,0) - min(w,0)) / (2^b - 1), rounded likewise      z = rint(clamp(qmin - clip · min(w,0) / s))
        q = clamp(rint(w / s + z), qmin, qmax)                              Q(w) = (q - z) · s

Shapes: weight [O, I], clip [O, I / group_size] (the clipping ratio in (0, 1], not a logit), result [O, I] in the
weight's dtype. Math is fp32 (fp64 for an fp64 weight) with true division: w · (1/s) moves levels at exact ties, and
ties are common, since max|w| / s is half-integral by construction.

Straight-through gradients:
    ``ste="identity"`` (Bengio et al. 2013)   dQ/dw = 1; the ratios get none
    ``ste="clip"``     (LSQ, Esser et al. 2020)   dQ/dw = [qmin <= rint(w/s + z) <= qmax],
                       dQ/ds = q - z - dQ/dw · w/s, ds/dclip = max|w| / ((2^b - 1)/2)
The statistics max|w|, min w, max w and the zero point count as constants, as LSQ treats its step size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.ops.core.dispatch import custom_op, resolve

# Below this scale 1/s or the remainder of a division could leave fp32's normal range; such groups are zero anyway.
TINY_SCALE = 2.0**-100
WEIGHT_BITS = tuple(range(2, 9))


# ---- reference ----


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype the math runs in: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _ste(value: Tensor, x: Tensor) -> Tensor:
    """``value`` going forward, the gradient of ``x`` going back; adds an exact zero, so values are not touched."""
    return value.detach() + (x - x.detach())


class Levels(NamedTuple):
    """A quantized [..., G, g] tensor; differentiable with the ``clip`` straight-through rule."""

    q: Tensor  # [..., G, g] level minus zero point
    s: Tensor  # [..., G, 1] scale
    v: Tensor  # [..., G, g] w / s
    inside: Tensor  # [..., G, g] bool: the rounded level needed no clamping
    unit: Tensor  # [..., G, 1] ds/dclip
    z: Tensor | None  # [..., G, 1] zero point, of an asymmetric quantizer


def quantize_levels(
    w: Tensor, bits: int, clip: Tensor | None, symmetric: bool = True, scale_dtype: torch.dtype | None = None
) -> Levels:
    """Levels of ``w`` [..., G, g] (in the compute dtype) with ``clip`` [..., G]; scales rounded to ``scale_dtype``."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    detached = w.detach()
    if symmetric:
        unit = detached.abs().amax(-1, keepdim=True)
        # A tensor divisor: torch turns division by a Python number into a multiplication on CUDA.
        divisor = unit.new_full((), (2**bits - 1) / 2)
        least = None
    else:
        least, most = detached.amin(-1, keepdim=True).clamp(max=0), detached.amax(-1, keepdim=True).clamp(min=0)
        unit, divisor = most - least, unit_divisor(detached, bits)
    ratio = None if clip is None else clip.to(w.dtype).unsqueeze(-1)
    raw = (unit if ratio is None else ratio * unit) / divisor
    s = raw if scale_dtype is None else _ste(raw.to(scale_dtype).to(w.dtype), raw)
    s = torch.where(s.detach() < TINY_SCALE, torch.ones_like(s), s)
    v = w / s
    if least is None:
        z = None
        rounded = _ste(v.round(), v)
    else:
        bottom = least if ratio is None else ratio.detach() * least
        z = (low - bottom / s.detach()).clamp(low, high).round()
        rounded = _ste((v + z).round(), v)
    q = rounded.clamp(low, high)
    inside = rounded.detach() == q.detach()
    return Levels(q if z is None else q - z, s, v, inside, unit / divisor, z)


def unit_divisor(like: Tensor, bits: int) -> Tensor:
    """2^b - 1 as a 0-dim tensor on the device of ``like``."""
    return like.new_full((), 2.0**bits - 1)


def fake_quant_weight_reference(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    clip: Tensor | None = None,
    ste: str = "identity",
    scale_dtype: torch.dtype | None = None,
) -> Tensor:
    """The op in plain differentiable torch; ``scale_dtype`` overrides what scales are rounded to (for fp64 tests)."""
    w = weight.to(compute_dtype(weight.dtype)).unflatten(-1, (-1, group_size))
    levels = quantize_levels(w, bits, clip, symmetric, scale_dtype or weight.dtype)
    out = levels.q * levels.s
    if ste == "identity":
        out = _ste(out, w)
    return out.flatten(-2).to(weight.dtype)


def fake_quant_weight_backward_reference(
    grad: Tensor, weight: Tensor, bits: int, group_size: int, symmetric: bool, clip: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dweight, dclip) of the ``clip`` rule in closed form."""
    w = weight.to(compute_dtype(weight.dtype)).unflatten(-1, (-1, group_size))
    g = grad.to(w.dtype).unflatten(-1, (-1, group_size))
    levels = quantize_levels(w, bits, clip, symmetric, weight.dtype)
    dweight = (g * levels.inside).flatten(-2).to(weight.dtype)
    dclip = (g * (levels.q - levels.v * levels.inside)).sum(-1) * levels.unit.squeeze(-1)
    return dweight, dclip.to(weight.dtype if clip is None else clip.dtype)


# ---- Triton ----


@triton.jit
def fake_quant_kernel(
    w_ptr,
    clip_ptr,
    grad_ptr,
    out_ptr,
    dclip_ptr,
    groups,
    low: tl.constexpr,
    high: tl.constexpr,
    divisor: tl.constexpr,
    tiny: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """One program per BLOCK groups; forward writes Q(w), backward the masked gradient and dclip."""
    group = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    lane = tl.arange(0, G_PAD)
    mask = (group < groups)[:, None] & (lane < G)[None, :]
    at = group[:, None] * G + lane[None, :]
    w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK, G_PAD]
    if SYMMETRIC:
        unit = tl.max(tl.abs(w), axis=1)  # [BLOCK]
        least = unit
    else:
        least = tl.minimum(tl.min(w, axis=1), 0.0)
        unit = tl.maximum(tl.max(w, axis=1), 0.0) - least
    ratio = unit * 0.0 + 1.0
    if HAS_CLIP:
        ratio = tl.load(clip_ptr + group, mask=group < groups, other=1.0).to(tl.float32)
    raw = tl.div_rn(ratio * unit, tl.full([BLOCK], divisor, tl.float32))
    s = raw.to(w_ptr.dtype.element_ty).to(tl.float32)
    s = tl.where(s < tiny, 1.0, s)
    v = tl.div_rn(w, tl.broadcast_to(s[:, None], [BLOCK, G_PAD]))
    # 1.5·2^23 pushes the fraction out of fp32's mantissa: round to nearest even in two additions, exact below 2^22.
    # Clamping first keeps |v| small and commutes with rounding except that it hides clamping; one extra level shows it.
    z = s * 0.0
    if not SYMMETRIC:
        z = low - tl.div_rn(ratio * least, s)
        z = (tl.minimum(tl.maximum(z, low), high) + 12582912.0) - 12582912.0
    t = tl.minimum(tl.maximum(v + z[:, None], low - 1.0), high + 1.0)
    rounded = (t + 12582912.0) - 12582912.0
    q = tl.minimum(tl.maximum(rounded, low), high)
    if BACKWARD:
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        inside = rounded == q
        tl.store(out_ptr + at, tl.where(inside, g, 0.0).to(out_ptr.dtype.element_ty), mask=mask)
        if HAS_CLIP:
            slope = tl.sum(g * (q - z[:, None] - tl.where(inside, v, 0.0)), axis=1)
            d = slope * tl.div_rn(unit, tl.full([BLOCK], divisor, tl.float32))
            tl.store(dclip_ptr + group, d.to(dclip_ptr.dtype.element_ty), mask=group < groups)
    else:
        tl.store(out_ptr + at, ((q - z[:, None]) * s[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    weight: Tensor, clip: Tensor | None, grad: Tensor | None, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    weight = weight.contiguous()
    clip = None if clip is None else clip.contiguous()
    out = torch.empty_like(weight)
    backward = grad is not None
    dclip = torch.empty_like(clip) if backward and clip is not None else None
    groups = weight.numel() // group_size
    if groups == 0:
        return out, dclip
    padded = triton.next_power_of_2(group_size)
    block = max(1, 4096 // padded)
    with torch.cuda.device_of(weight):
        fake_quant_kernel[(triton.cdiv(groups, block),)](
            weight, weight if clip is None else clip, weight if grad is None else grad.contiguous(), out,
            out if dclip is None else dclip, groups,
            low=float(-(2 ** (bits - 1))), high=float(2 ** (bits - 1) - 1),
            divisor=(2**bits - 1) / 2 if symmetric else 2.0**bits - 1, tiny=TINY_SCALE,
            G=group_size, G_PAD=padded, BLOCK=block, SYMMETRIC=symmetric, HAS_CLIP=clip is not None,
            BACKWARD=backward, num_warps=4,
        )  # fmt: skip
    return out, dclip


# ---- registration ----


def chosen(weight: Tensor, backend: str | None) -> str:
    """The backend that runs."""
    return resolve("fake_quant_weight", backend, weight, available=("triton", "reference"))


@custom_op(
    "fake_quant_weight",
    "(Tensor weight, Tensor? clip, int bits, int group_size, bool symmetric, str ste, str? backend) -> Tensor"
)
def _fake_quant_weight(
    weight: Tensor, clip: Tensor | None, bits: int, group_size: int, symmetric: bool, ste: str, backend: str | None
) -> Tensor:
    if chosen(weight, backend) == "triton":
        return _launch(weight, clip, None, bits, group_size, symmetric)[0]
    return fake_quant_weight_reference(weight, bits, group_size, symmetric, clip).contiguous()


@_fake_quant_weight.register_fake
def _(weight, clip, bits, group_size, symmetric, ste, backend):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@custom_op(
    "fake_quant_weight_backward",
    "(Tensor grad, Tensor weight, Tensor? clip, int bits, int group_size, bool symmetric, str? backend) "
    "-> (Tensor, Tensor)"
)
def _fake_quant_weight_backward(
    grad: Tensor, weight: Tensor, clip: Tensor | None, bits: int, group_size: int, symmetric: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    if chosen(weight, backend) == "triton":
        dweight, dclip = _launch(weight, clip, grad, bits, group_size, symmetric)
        return dweight, weight.new_empty(0) if dclip is None else dclip
    dweight, slope = fake_quant_weight_backward_reference(grad, weight, bits, group_size, symmetric, clip)
    return dweight.contiguous(), weight.new_empty(0) if clip is None else slope.contiguous()


@_fake_quant_weight_backward.register_fake
def _(grad, weight, clip, bits, group_size, symmetric, backend):
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return dweight, weight.new_empty(0) if clip is None else torch.empty_like(clip)


def _setup_context(ctx, inputs, output):
    weight, clip, ctx.bits, ctx.group_size, ctx.symmetric, ctx.ste, ctx.backend = inputs
    ctx.save_for_backward(*((weight, clip) if ctx.ste == "clip" else (None, None)))


def _backward(ctx, grad):
    if ctx.ste == "identity":
        return grad, None, None, None, None, None, None
    weight, clip = ctx.saved_tensors
    dweight, dclip = _fake_quant_weight_backward(
        grad, weight, clip, ctx.bits, ctx.group_size, ctx.symmetric, ctx.backend
    )
    return dweight, None if clip is None else dclip, None, None, None, None, None


_fake_quant_weight.register_autograd(_backward, setup_context=_setup_context)


# ---- public ----


def check_quantizer(op: str, weight: Tensor, bits: int, group_size: int, ste: str) -> None:
    """Raise JointNASError for a quantizer that cannot be applied to ``weight``."""
    if bits not in WEIGHT_BITS:
        raise unknown("weight bit width", bits, WEIGHT_BITS, where=op)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise JointNASError(f"{op}: weight must be a floating-point matrix, got {tuple(weight.shape)} {weight.dtype}")
    if group_size < 1 or weight.shape[1] % group_size:
        raise JointNASError(
            f"{op}: group_size {group_size} does not divide the {weight.shape[1]} input channels of the weight; "
            "use a divisor of it"
        )
    if ste not in ("identity", "clip"):
        raise unknown("straight-through rule", ste, ("identity", "clip"), where=op)


def check_clip(op: str, clip: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise JointNASError unless ``clip`` is None or has ``shape``."""
    if clip is not None and tuple(clip.shape) != shape:
        raise JointNASError(f"{op}: clip ratios must have shape {shape} (one per group), got {tuple(clip.shape)}")


def fake_quant_weight(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    clip: Tensor | None = None,
    ste: str = "identity",
    backend: str | None = None,
) -> Tensor:
    """Q(weight) with the straight-through gradients described at the top of this file."""
    check_quantizer("fake_quant_weight", weight, bits, group_size, ste)
    check_clip("fake_quant_weight", clip, (weight.shape[0], weight.shape[1] // group_size))
    return _fake_quant_weight(weight, clip, bits, group_size, symmetric, ste, backend)
