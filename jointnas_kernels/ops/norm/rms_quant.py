"""mixed_rmsnorm with the mixture of activation precisions behind it, in one read of x and one write of y:

    v = mixed_rmsnorm(x), rounded to x's dtype            y = sum_q probs[q] Q_q(v)

exactly mixed_rmsnorm.py followed by act_quant_mix.py (no mask there: it is in the norm), level by level: v is computed
in the order of the unfused kernel of the same backend. ``ops.mixed_rmsnorm(.., act_bits=.., act_probs=..)`` calls it.

    x [..., N], weight [N], alpha [K], sizes N_1..N_K, in_mask [N] or None, probs [Q] for Q bit widths

Backward, from g = dL/dy with P = sum_q probs[q] (straight through: scales and zero points are constants):

    dprobs[q] = <g, Q_q(v)>, v recomputed from x and inv        dx, dalpha, din_mask, dweight: RMSNorm's, of dv = P g

Beside the inputs it saves inv [rows, K] and levels [rows, Q, 2], the scale and zero point of every row and precision
(the reference computes those again); v is never in memory. dv stays in fp32, where the two ops apart round it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels.ops.core.dispatch import compute_dtype, custom_op, no_grad_slot, resolve
from jointnas_kernels.ops.norm import cpu as cpu_norm
from jointnas_kernels.ops.norm.rms import normalised
from jointnas_kernels.ops.norm.rms import reference as norm_reference
from jointnas_kernels.ops.norm.rms import reference_backward as norm_reference_backward
from jointnas_kernels.ops.norm.rms_quant_triton import launch_backward, launch_forward
from jointnas_kernels.ops.quant.activations import act_quant_mix_reference, check_precisions, probs_gradient

# ---- reference ----


def reference(
    x: Tensor, weight: Tensor, alpha: Tensor, sizes: Sequence[int], eps: float, in_mask: Tensor | None,
    bits: Sequence[int], probs: Tensor, symmetric: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y like x and inv [rows, K]."""
    v, inv = norm_reference(x, weight, alpha, sizes, eps, in_mask)
    return act_quant_mix_reference(v, bits, probs, symmetric), inv


def reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, inv: Tensor, sizes: Sequence[int], in_mask: Tensor | None,
    bits: Sequence[int], probs: Tensor, symmetric: bool, need_weight: bool, need_alpha: bool, need_mask: bool,
    need_probs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dweight, dalpha, din_mask, dprobs; an empty tensor for each one not wanted."""
    acc = compute_dtype(x)
    dprobs = no_grad_slot(x)
    if need_probs:
        v = normalised(x, weight, alpha, inv, sizes, in_mask)
        dprobs = probs_gradient(grad, v, probs, bits, symmetric)
    dv = grad.to(acc) * probs.to(acc).sum()
    others = norm_reference_backward(dv, x, weight, alpha, inv, sizes, in_mask, need_weight, need_alpha, need_mask)
    return *others, dprobs


# ---- registration ----


@custom_op(
    "mixed_rmsnorm_quant",
    "(Tensor x, Tensor weight, Tensor alpha, int[] sizes, float eps, Tensor? in_mask, int[] bits, Tensor probs, "
    "bool symmetric, str? backend) -> (Tensor, Tensor, Tensor)",
)
def _mixed_rmsnorm_quant(
    x: Tensor, weight: Tensor, alpha: Tensor, sizes: Sequence[int], eps: float, in_mask: Tensor | None,
    bits: Sequence[int], probs: Tensor, symmetric: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, inv, levels."""
    how = resolve("mixed_rmsnorm", backend, x)
    if how == "triton":
        return launch_forward(x, weight, alpha, sizes, eps, in_mask, bits, probs, symmetric)
    if how == "cpu":
        return cpu_norm.mixed_rmsnorm_quant(x, weight, alpha, sizes, eps, in_mask, bits, probs, symmetric)
    y, inv = reference(x, weight, alpha, sizes, eps, in_mask, bits, probs, symmetric)
    return y.contiguous(), inv, torch.zeros(inv.shape[0], len(bits), 2, dtype=torch.float32, device=x.device)


@_mixed_rmsnorm_quant.register_fake
def _(x, weight, alpha, sizes, eps, in_mask, bits, probs, symmetric, backend):
    count = x.numel() // x.shape[-1]
    inv = torch.empty(count, len(sizes), dtype=compute_dtype(x), device=x.device)
    levels = torch.empty(count, len(bits), 2, dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), inv, levels


@custom_op(
    "mixed_rmsnorm_quant_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor alpha, Tensor inv, Tensor levels, int[] sizes, Tensor? in_mask, "
    "int[] bits, Tensor probs, bool symmetric, bool need_weight, bool need_alpha, bool need_mask, bool need_probs, "
    "str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _mixed_rmsnorm_quant_backward(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, inv: Tensor, levels: Tensor, sizes: Sequence[int],
    in_mask: Tensor | None, bits: Sequence[int], probs: Tensor, symmetric: bool, need_weight: bool, need_alpha: bool,
    need_mask: bool, need_probs: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    how = resolve("mixed_rmsnorm", backend, x)
    need = (need_weight, need_alpha, need_mask, need_probs)
    if how == "triton":
        return launch_backward(grad, x, weight, alpha, inv, levels, sizes, in_mask, bits, probs, symmetric, *need)
    if how == "cpu":
        return cpu_norm.mixed_rmsnorm_quant_backward(
            grad, x, weight, alpha, inv, levels, sizes, in_mask, bits, probs, *need
        )
    dx, *others = reference_backward(grad, x, weight, alpha, inv, sizes, in_mask, bits, probs, symmetric, *need)
    dw, dalpha, dmask, dprobs = others
    return dx.contiguous(), dw, dalpha, dmask, dprobs


@_mixed_rmsnorm_quant_backward.register_fake
def _(
    grad, x, weight, alpha, inv, levels, sizes, in_mask, bits, probs, symmetric, need_weight, need_alpha, need_mask,
    need_probs, backend,
):  # fmt: skip
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dw = torch.empty_like(weight) if need_weight else no_grad_slot(x)
    dalpha = torch.empty_like(alpha) if need_alpha else no_grad_slot(x)
    dmask = torch.empty_like(in_mask) if need_mask and in_mask is not None else no_grad_slot(x)
    return dx, dw, dalpha, dmask, torch.empty_like(probs) if need_probs else no_grad_slot(x)


def _setup(ctx, inputs, output):
    x, weight, alpha, ctx.sizes, _, in_mask, ctx.bits, probs, ctx.symmetric, ctx.backend = inputs
    _, inv, levels = output
    ctx.save_for_backward(x, weight, alpha, inv, levels if ctx.needs_input_grad[7] else None, in_mask, probs)
    ctx.mark_non_differentiable(inv, levels)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    x, weight, alpha, inv, levels, in_mask, probs = ctx.saved_tensors
    need = [ctx.needs_input_grad[i] for i in (1, 2, 5, 7)]
    dx, dw, dalpha, dmask, dprobs = _mixed_rmsnorm_quant_backward(
        grad, x, weight, alpha, inv, inv if levels is None else levels, ctx.sizes, in_mask, ctx.bits, probs,
        ctx.symmetric, *need, ctx.backend,
    )  # fmt: skip
    dw, dalpha, dmask, dprobs = (
        d if wanted else None for d, wanted in zip((dw, dalpha, dmask, dprobs), need, strict=True)
    )
    return dx, dw, dalpha, None, None, dmask, None, dprobs, None, None


_mixed_rmsnorm_quant.register_autograd(_backward, setup_context=_setup)


def mixed_rmsnorm_quant(
    x: Tensor, weight: Tensor, alpha: Tensor, sizes: Sequence[int], eps: float, in_mask: Tensor | None,
    bits: Sequence[int], probs: Tensor, symmetric: bool, backend: str | None,
) -> Tensor:  # fmt: skip
    """What `mixed_rmsnorm` calls where it is to quantize; it has checked everything but the precisions."""
    check_precisions("mixed_rmsnorm", bits, probs)
    return _mixed_rmsnorm_quant(x, weight, alpha, sizes, eps, in_mask, bits, probs, symmetric, backend)[0]
