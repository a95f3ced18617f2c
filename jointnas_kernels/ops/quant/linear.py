"""A linear layer on the precision mixture, y = x W~ᵀ + bias with W~ = quant_lora_mix(...), whose backward never forms
dL/dW~ = gᵀx (64 MB in fp32 for one 4096 x 4096 weight, and 3x that in traffic):

    weight step, ste="identity"   dx = g W~;  with U = x [A_1; ..; A_P]ᵀ and V = g [B'_1 .. B'_P], both [T, P·r]:
                                  dB_p = scaling · probs[p] · gᵀ U_p,   dA_p = probs[p] · V_pᵀ x        (rank P·r only)
    arch step or ste="clip"       one GEMM over gᵀx whose epilogue recomputes Q_p of its tile and keeps only the
                                  reductions of ``quant_lora_mix``: ⟨dW, Q_p⟩, clip slopes, (m ⊙ dW) A_pᵀ,
                                  B'_pᵀ (m ⊙ dW); or some rows of dW at a time through the library's GEMM (the
                                  reference, and "cuda" in arch steps: 16 MB that stay in cache).

W~ (as large as the weight) is kept for dx by default; ``recompute=True`` rebuilds it in backward instead, for models
whose second copy of the weights would not fit and that do not already checkpoint whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.core.dispatch import custom_op, no_grad_slot, without_autocast
from jointnas_kernels.ops.quant.mixture import (
    check_mix,
    compute_dtype,
    fake_gradients,
    mix_backward,
    mix_forward,
    wanted,
)


@custom_op(
    "quant_lora_linear",
    "(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor probs, Tensor? clip, Tensor? bias, "
    "float scaling, int[] bits, int group_size, str ste, str mode, bool recompute, str? backend) -> (Tensor, Tensor)"
)
def _quant_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    probs: Tensor,
    clip: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    bits: Sequence[int],
    group_size: int,
    ste: str,
    mode: str,
    recompute: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """(y, W~ in the dtype of x)."""
    mixed = mix_forward(weight, lora_a, lora_b, probs, clip, scaling, bits, group_size, backend).to(x.dtype)
    with without_autocast(x):
        return F.linear(x, mixed, None if bias is None else bias.to(x.dtype)), mixed


@_quant_lora_linear.register_fake
def _(x, weight, lora_a, lora_b, probs, clip, bias, scaling, bits, group_size, ste, mode, recompute, backend):
    mixed = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
    return x.new_empty((*x.shape[:-1], weight.shape[0])), mixed


@custom_op(
    "quant_lora_linear_backward",
    "(Tensor grad, Tensor? x, Tensor? mixed, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor probs, "
    "Tensor? clip, float scaling, int[] bits, int group_size, str ste, bool want_x, bool want_lora, "
    "bool want_probs, bool want_clip, str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _quant_lora_linear_backward(
    grad: Tensor,
    x: Tensor | None,
    mixed: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    probs: Tensor,
    clip: Tensor | None,
    scaling: float,
    bits: Sequence[int],
    group_size: int,
    ste: str,
    want_x: bool,
    want_lora: bool,
    want_probs: bool,
    want_clip: bool,
    backend: str | None,
) -> tuple[Tensor | None, ...]:
    """(dx, dA, dB, dprobs, dclip); None or empty where not wanted."""
    with without_autocast(grad):
        dx = None
        if want_x:
            if mixed is None:
                mixed = mix_forward(weight, lora_a, lora_b, probs, clip, scaling, bits, group_size, backend)
            dx = grad @ mixed.to(grad.dtype)
        if x is None:  # no other gradient is wanted
            return dx, None, None, None, None
        g2, x2 = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        rank_only = want_lora and ste == "identity"
        want = (want_lora and not rank_only, want_probs, want_clip)
        sums: tuple[Tensor | None, ...] = (None,) * 4
        if any(want):
            sums = mix_backward(
                g2, x2, weight, lora_a, lora_b, probs, clip, scaling, bits, group_size, ste, want, backend
            )
        da, db, dprobs, dclip = sums
        if rank_only:
            da, db = lora_gradients(g2, x2, weight, lora_a, lora_b, probs, scaling)
        return dx, da, db, dprobs, dclip


def lora_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, probs: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """(dA, dB) of ste="identity" from grad [T, O] and x [T, I]: four GEMMs of rank P·r, and as few small kernels as
    possible around them, since each costs about as much as such a GEMM over 1024 tokens."""
    p, r, i = lora_a.shape
    new = weight.new_empty
    beside = new(weight.shape[0], p, r)  # B' rounded to the weight's dtype
    torch.mul(lora_b.permute(1, 0, 2), scaling, out=beside)
    beside = beside.to(x.dtype).view(-1, p * r)
    stacked = lora_a.to(weight.dtype).to(x.dtype).reshape(p * r, i)
    pi = probs.to(compute_dtype(weight.dtype)).view(p, 1, 1)
    da, db = new(lora_a.shape, dtype=lora_a.dtype), new(lora_b.shape, dtype=lora_b.dtype)
    torch.mul(((grad @ beside).T @ x).view(p, r, i), pi, out=da)
    torch.mul((grad.T @ (x @ stacked.T)).view(-1, p, r).permute(1, 0, 2), pi * scaling, out=db)
    return da, db


@_quant_lora_linear_backward.register_fake
def _(
    grad, x, mixed, weight, lora_a, lora_b, probs, clip, scaling, bits, group_size, ste,
    want_x, want_lora, want_probs, want_clip, backend,
):  # fmt: skip
    dx = grad.new_empty((*grad.shape[:-1], weight.shape[1])) if want_x else no_grad_slot(grad)
    return dx, *fake_gradients(weight, lora_a, lora_b, probs, clip, want_lora, want_probs, want_clip)


def _setup_context(ctx, inputs, output):
    x, weight, lora_a, lora_b, probs, clip, bias, *rest = inputs
    ctx.scaling, ctx.bits, ctx.group_size, ctx.ste, ctx.mode, recompute, ctx.backend = rest
    keep = output[1] if ctx.needs_input_grad[0] and not recompute else None
    # dx alone needs W~ but not x
    ctx.save_for_backward(x if any(wanted(ctx, 2)) else None, keep, weight, lora_a, lora_b, probs, clip)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else a zeroed gradient of W~, as large as the weight, is made for nobody


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 14
    lora, probs, clip = want = wanted(ctx, 2)
    want_x = ctx.needs_input_grad[0]
    x, *others = ctx.saved_tensors
    dx, da, db, dprobs, dclip = _quant_lora_linear_backward(
        grad, x, *others, ctx.scaling, ctx.bits, ctx.group_size, ctx.ste, want_x, *want, ctx.backend
    )
    dbias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[6] else None
    return (
        dx if want_x else None,
        None,
        da if lora else None,
        db if lora else None,
        dprobs if probs else None,
        dclip if clip else None,
        dbias,
        *(None,) * 7,
    )


_quant_lora_linear.register_autograd(_backward, setup_context=_setup_context)


def quant_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bits: Sequence[int],
    probs: Tensor,
    group_size: int,
    clip: Tensor | None = None,
    ste: str = "identity",
    mode: str = "full",
    bias: Tensor | None = None,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """x [..., I] -> [..., O] in x's dtype (or autocast's). ``mode`` as in ``quant_lora_mix``, dx always."""
    check_mix("quant_lora_linear", weight, lora_a, lora_b, bits, probs, group_size, clip, ste, mode)
    if x.shape[-1] != weight.shape[1]:
        raise JointNASError(f"quant_lora_linear: x has {x.shape[-1]} channels, the weight takes {weight.shape[1]}")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    options = (float(scaling), list(bits), group_size, ste, mode, recompute, backend)
    return _quant_lora_linear(x, weight, lora_a, lora_b, probs, clip, bias, *options)[0]
