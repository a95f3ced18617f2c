"""The mixture of an activation's precisions, quantized per token (the last dimension), dynamically:

    y = sum_q probs[q] · Q_q(mask ⊙ x),      Q_16 = identity

    asymmetric (default)   mn = min(x, 0), mx = max(x, 0), s = (mx - mn) / (2^b - 1), z = rint(clamp(qmin - mn / s))
                           Q(x) = (rint(clamp(x / s + z)) - z) · s
    symmetric              s = max|x| / ((2^b - 1) / 2), z = 0
    s = 0 becomes the dtype's epsilon.

This is what compressed-tensors executes on a reloaded checkpoint with dynamic per-token activations, bit for bit: every
operation above is rounded to x's dtype (for bf16 that matters: mx - mn, mn / s, x / s and x / s + z are rounded to 8
bits each). Only the last product enters the mixture unrounded, which is summed in fp32 (fp64 for fp64) and rounded
once; for a one-hot mixture that is the same.

Shapes: x [..., N], mask [N] (optional, fp32; the product is rounded to x's dtype first), probs [Q], y [..., N].

Gradients (straight through, s and z constant), with P = sum_q probs[q]:
    dx = P · mask ⊙ g      dprobs[q] = ⟨g, Q_q⟩      dmask[n] = P · sum_tokens g x
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.ops.core import cpu_calls as cpu
from jointnas_kernels.ops.core.dispatch import custom_op, no_grad_slot, resolve
from jointnas_kernels.ops.quant.activations_triton import act_backward_triton, act_forward_triton
from jointnas_kernels.ops.quant.weights import _ste, compute_dtype

ACT_BITS = (2, 3, 4, 5, 6, 7, 8, 16)


# ---- reference ----


def fake_quant_tokens(x: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    """Q_bits of every row of x [..., N] in the compute dtype (not yet rounded to x's); 16 bits return x."""
    wide = compute_dtype(x.dtype)
    if bits == 16:
        return x.to(wide)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    # Tensor divisors: torch turns division by a Python number into a multiplication on CUDA.
    if symmetric:
        s = x.abs().amax(-1, keepdim=True) / x.new_full((), (2**bits - 1) / 2)
        z = None
    else:
        least, most = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        s = (most - least) / x.new_full((), 2.0**bits - 1)
        z = (low - least / s).clamp(low, high).round().nan_to_num(0.0)
    s = torch.where(s == 0, torch.finfo(x.dtype).eps, s)
    v = x / s
    q = (v if z is None else v + z).clamp(low, high).round()
    return (q if z is None else q - z).to(wide) * s.to(wide)


def act_quant_mix_reference(
    x: Tensor, bits: Sequence[int], probs: Tensor, symmetric: bool = False, mask: Tensor | None = None
) -> Tensor:
    """The op in plain differentiable torch."""
    dtype = compute_dtype(x.dtype)
    if mask is not None:
        x = (x.to(dtype) * mask.to(dtype)).to(x.dtype)
    wide = x.to(dtype)
    out = torch.zeros_like(wide)
    for p, width in zip(probs.to(dtype), bits, strict=True):
        out = out + p * _ste(fake_quant_tokens(x.detach(), width, symmetric), wide)
    return out.to(x.dtype)


def act_quant_mix_backward_reference(
    grad: Tensor,
    x: Tensor,
    probs: Tensor,
    mask: Tensor | None,
    bits: Sequence[int],
    symmetric: bool,
    want: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dprobs, dmask) in closed form; an empty tensor for each one not wanted (the flags are in that order)."""
    dtype = compute_dtype(x.dtype)
    g, wide = grad.to(dtype), x.to(dtype)
    total = probs.to(dtype).sum()
    dx, dprobs, dmask = no_grad_slot(x), no_grad_slot(x), no_grad_slot(x)
    if want[0]:
        dx = (g * total if mask is None else g * mask.to(dtype) * total).to(x.dtype)
    if want[1]:
        masked = x if mask is None else (wide * mask.to(dtype)).to(x.dtype)
        sums = [(g * fake_quant_tokens(masked, b, symmetric)).sum() for b in bits]
        dprobs = torch.stack(sums).to(probs.dtype)
    if want[2] and mask is not None:
        dmask = ((g * wide).flatten(0, -2).sum(0) * total).to(mask.dtype)
    return dx, dprobs, dmask


# ---- registration ----


@custom_op(
    "act_quant_mix",
    "(Tensor x, Tensor probs, Tensor? mask, int[] bits, bool symmetric, str? backend) -> (Tensor, Tensor)"
)
def _act_quant_mix(
    x: Tensor, probs: Tensor, mask: Tensor | None, bits: Sequence[int], symmetric: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """(y, the rows' scales and zero points [rows, Q, 2] where the backward of this backend reads them, else zeros)."""
    backend = resolve("act_quant_mix", backend, x)
    if backend == "triton":
        return act_forward_triton(x, probs, mask, bits, symmetric)
    unused = torch.zeros(x.shape[:-1].numel(), len(bits), 2, dtype=torch.float32, device=x.device)
    if backend == "cpu":
        return cpu.act_quant_mix(x, probs, mask, bits, symmetric), unused
    return act_quant_mix_reference(x, bits, probs, symmetric, mask).contiguous(), unused


@_act_quant_mix.register_fake
def _(x, probs, mask, bits, symmetric, backend):
    levels = torch.empty(x.shape[:-1].numel(), len(bits), 2, dtype=torch.float32, device=x.device)
    return torch.empty_like(x, memory_format=torch.contiguous_format), levels


@custom_op(
    "act_quant_mix_backward",
    "(Tensor grad, Tensor x, Tensor probs, Tensor? mask, Tensor? levels, int[] bits, bool symmetric, "
    "bool want_x, bool want_probs, bool want_mask, str? backend) -> (Tensor, Tensor, Tensor)"
)
def _act_quant_mix_backward(
    grad: Tensor,
    x: Tensor,
    probs: Tensor,
    mask: Tensor | None,
    levels: Tensor | None,
    bits: Sequence[int],
    symmetric: bool,
    want_x: bool,
    want_probs: bool,
    want_mask: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    backend = resolve("act_quant_mix", backend, x)
    want = (want_x, want_probs, want_mask)
    if backend == "triton":
        return act_backward_triton(grad, x, probs, mask, levels, bits, symmetric, want)
    if backend == "cpu":
        return cpu.act_quant_mix_backward(grad, x, probs, mask, bits, symmetric, want)
    return act_quant_mix_backward_reference(grad.contiguous(), x.contiguous(), probs, mask, bits, symmetric, want)


@_act_quant_mix_backward.register_fake
def _(grad, x, probs, mask, levels, bits, symmetric, want_x, want_probs, want_mask, backend):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if want_x else no_grad_slot(x)
    dprobs = torch.empty_like(probs) if want_probs else no_grad_slot(x)
    dmask = torch.empty_like(mask) if want_mask and mask is not None else no_grad_slot(x)
    return dx, dprobs, dmask


def _setup_context(ctx, inputs, output):
    x, probs, mask, ctx.bits, ctx.symmetric, ctx.backend = inputs
    read = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]  # dx alone is P · mask ⊙ grad: x need not stay alive
    ctx.save_for_backward(x if read else None, probs, mask, output[1] if read else None)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    want = ctx.needs_input_grad[:3]
    x, *others = ctx.saved_tensors
    dx, dprobs, dmask = _act_quant_mix_backward(
        grad, grad if x is None else x, *others, ctx.bits, ctx.symmetric, *want, ctx.backend
    )
    return dx if want[0] else None, dprobs if want[1] else None, dmask if want[2] else None, None, None, None


_act_quant_mix.register_autograd(_backward, setup_context=_setup_context)


# ---- public ----


def check_precisions(op: str, bits: Sequence[int], probs: Tensor) -> None:
    """Raise unless probs has one entry for each of one to four bit widths."""
    for width in bits:
        if width not in ACT_BITS:
            raise unknown("activation bit width", width, ACT_BITS, where=op)
    if not 1 <= len(bits) <= 4:
        raise JointNASError(f"{op}: mixes one to four bit widths, got {list(bits)}")
    if tuple(probs.shape) != (len(bits),):
        raise JointNASError(
            f"{op}: probs must have one entry per bit width {list(bits)}, got shape {tuple(probs.shape)}"
        )


def act_quant_mix(
    x: Tensor,
    bits: Sequence[int],
    probs: Tensor,
    symmetric: bool = False,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = sum_q probs[q] · Q_q(mask ⊙ x), in the dtype and shape of x."""
    check_precisions("act_quant_mix", bits, probs)
    if mask is not None and tuple(mask.shape) != (x.shape[-1],):
        raise JointNASError(f"act_quant_mix: mask must have shape ({x.shape[-1]},), got {tuple(mask.shape)}")
    return _act_quant_mix(x, probs, mask, list(bits), symmetric, backend)[0]
