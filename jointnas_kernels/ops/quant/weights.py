"""fake_quant_weight: a weight quantized in groups along its input, by the rules of spec.py, in floating point.

With the ``clip`` rule (LSQ, arXiv 1902.08153), from g = dL/dQ:

    dL/dw = g [qmin <= rint(w/s + z) <= qmax]        dL/ds = sum_group g (q - z - dQ/dw w/s)      ds/dclip = R / steps

With the ``identity`` rule (Bengio et al., arXiv 1308.3432) dL/dw = g, and the clipping ratios have no gradient.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.errors import unknown
from jointnas_kernels.ops.core.op import Implementations, Op
from jointnas_kernels.ops.core.tensors import bad
from jointnas_kernels.ops.quant.kernels import MAGIC, TINY, larger, smaller
from jointnas_kernels.ops.quant.spec import WEIGHT_BITS, level_range, quantize_groups, straight_through


def fake_quant_weight_reference(
    weight: Tensor, bits: int, group_size: int, symmetric: bool = True, clip: Tensor | None = None,
    ste: str = "identity",
) -> Tensor:  # fmt: skip
    """The public function in plain differentiable torch."""
    out = quantize_groups(weight, bits, group_size, clip, symmetric).values.flatten(-2)
    return (straight_through(out, weight.to(out.dtype)) if ste == "identity" else out).to(weight.dtype)


def _reference(weight: Tensor, clip: Tensor | None, bits: int, group_size: int, symmetric: bool) -> Tensor:
    return fake_quant_weight_reference(weight, bits, group_size, symmetric, clip, "clip")


def _reference_backward(
    grad: Tensor, weight: Tensor, clip: Tensor | None, bits: int, group_size: int, symmetric: bool, need: Sequence[bool]
) -> tuple[Tensor, Tensor | None]:
    levels = quantize_groups(weight, bits, group_size, clip, symmetric)
    g = grad.to(levels.q.dtype).unflatten(-1, (-1, group_size))
    dweight = (g * levels.inside).flatten(-2).to(weight.dtype)
    if clip is None:
        return dweight, None
    dclip = (g * (levels.steps - levels.v * levels.inside)).sum(-1) * levels.slope.squeeze(-1)
    return dweight, dclip.to(clip.dtype)


@triton.jit
def fake_quant_kernel(
    w_ptr, clip_ptr, grad_ptr, out_ptr, dclip_ptr, groups,
    LOW: tl.constexpr, G: tl.constexpr, G_PAD: tl.constexpr, BLOCK: tl.constexpr, SYMMETRIC: tl.constexpr,
    HAS_CLIP: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK groups; forward writes Q(w), backward the masked gradient and dclip."""
    high: tl.constexpr = -LOW - 1.0
    divisor: tl.constexpr = (high - LOW) / 2 if SYMMETRIC else high - LOW
    group = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    lane = tl.arange(0, G_PAD)
    mask = (group < groups)[:, None] & (lane < G)[None, :]
    at = group[:, None] * G + lane[None, :]
    w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK, G_PAD]
    if SYMMETRIC:
        unit = tl.reduce(tl.abs(w), 1, larger)  # [BLOCK]
        least = unit
    else:
        least = smaller(tl.reduce(w, 1, smaller), 0.0)
        unit = larger(tl.reduce(w, 1, larger), 0.0) - least
    ratio = unit * 0.0 + 1.0
    if HAS_CLIP:
        ratio = tl.load(clip_ptr + group, mask=group < groups, other=1.0).to(tl.float32)
    raw = tl.div_rn(ratio * unit, tl.full([BLOCK], divisor, tl.float32))
    s = raw.to(w_ptr.dtype.element_ty).to(tl.float32)
    s = tl.where(s < TINY, 1.0, s)
    v = tl.div_rn(w, tl.broadcast_to(s[:, None], [BLOCK, G_PAD]))
    # Clamping before rounding by MAGIC keeps |v| below 2^22, and commutes with it except that it hides clamping; one
    # extra level shows it.
    z = s * 0.0
    if not SYMMETRIC:
        z = LOW - tl.div_rn(ratio * least, s)
        z = (smaller(larger(z, LOW), high) + MAGIC) - MAGIC
    t = smaller(larger(v + z[:, None], LOW - 1.0), high + 1.0)
    rounded = (t + MAGIC) - MAGIC
    q = smaller(larger(rounded, LOW), high)
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
    grad: Tensor | None, weight: Tensor, clip: Tensor | None, bits: int, group_size: int, symmetric: bool,
    need: Sequence[bool] = (),
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(Q(w), None), or (dweight, dclip) of a gradient."""
    weight, clip = weight.contiguous(), None if clip is None else clip.contiguous()
    out = torch.empty_like(weight)
    dclip = None if grad is None or clip is None else torch.empty_like(clip)
    groups, padded = weight.numel() // group_size, triton.next_power_of_2(group_size)
    block = max(1, 4096 // padded)
    if groups:
        with torch.cuda.device_of(weight):
            fake_quant_kernel[(triton.cdiv(groups, block),)](
                weight, clip, None if grad is None else grad.contiguous(), out, dclip, groups,
                LOW=float(level_range(bits)[0]), G=group_size, G_PAD=padded, BLOCK=block, SYMMETRIC=symmetric,
                HAS_CLIP=clip is not None, BACKWARD=grad is not None, num_warps=4,
            )  # fmt: skip
    return out, dclip


_forward: Implementations = {"triton": lambda *args: _launch(None, *args)[0], "reference": _reference}
_clip = Op("fake_quant_weight", _forward, {"triton": _launch, "reference": _reference_backward})
_identity = Op("fake_quant_weight_identity", _forward, identity=("weight",), public="fake_quant_weight")


def check_quantizers(op: str, weight: Tensor, bits: Sequence[int], group_size: int, ste: str) -> None:
    """Raise JointNASError for quantizers that cannot be applied to ``weight``."""
    for width in bits:
        if width not in WEIGHT_BITS:
            raise unknown("weight bit width", width, WEIGHT_BITS, where=op)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise bad(op, f"weight must be a floating-point matrix, got {tuple(weight.shape)} {weight.dtype}")
    if group_size < 1 or weight.shape[1] % group_size:
        raise bad(op, f"group_size {group_size} does not divide the {weight.shape[1]} input channels of the weight; "
                      "use a divisor of it")
    if ste not in ("identity", "clip"):
        raise unknown("straight-through rule", ste, ("identity", "clip"), where=op)


def check_clip(op: str, clip: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise JointNASError unless ``clip`` is None or has ``shape``."""
    if clip is not None and tuple(clip.shape) != shape:
        raise bad(op, f"clip ratios must have shape {shape} (one per group), got {tuple(clip.shape)}")


def fake_quant_weight(
    weight: Tensor, bits: int, group_size: int, symmetric: bool = True, clip: Tensor | None = None,
    ste: str = "identity", backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Q(w) = (q - z) s with levels q = clamp(rint(w / s + z)), and a scale s and zero point z per group of inputs.

    ops/quant/spec.py says how the range of a group gives s and z.

    Args:
        weight: [O, I] in any floating dtype.
        bits: 2 to 8.
        group_size: a divisor of I.
        symmetric: signed levels around 0; else the range of a group has a zero point.
        clip: ratios [O, I / group_size] in (0, 1] that shrink the range of each group (OmniQuant, arXiv 2308.13137).
        ste: gradients, "identity" (Bengio et al., arXiv 1308.3432): dQ/dw = 1 and none for clip; "clip" (LSQ, arXiv
            1902.08153): 1 or 0 for weights inside or outside of the levels, and LSQ's slope for clip.
        backend: "triton" or "reference"; None: by device and dtype.

    Returns:
        [O, I] in the weight's dtype; computed in fp32 (fp64 for fp64) and rounded once.

    Raises:
        JointNASError: bits, shapes or a rule that do not exist or fit, or a backend that cannot run.
    """
    check_quantizers("fake_quant_weight", weight, (bits,), group_size, ste)
    check_clip("fake_quant_weight", clip, (weight.shape[0], weight.shape[1] // group_size))
    return (_identity if ste == "identity" else _clip)(weight, clip, bits, group_size, symmetric, backend)
