"""mixed_rmsnorm: the expectation of RMSNorm over hidden-size choices, with the next layers' IN mask folded in.

    x [..., N] any float, weight [N], alpha [K] fp32, sizes N_1..N_K, in_mask m [N] fp32 or None (all ones)
    inv_i = rsqrt(mean_{k < N_i} x_k^2 + eps)           t_k = sum_{i: k < N_i} alpha_i inv_i
    y_k = m_k w_k x_k t_k

At one-hot alpha this is RMSNorm over the first N_i channels; full-width statistics would be off by sqrt(N_i / N).
Backward, with g = dL/dy, h = m w g and prefix sums S_i = sum_{k < N_i} h_k x_k:

    dx_k = h_k t_k - x_k sum_{i: k < N_i} alpha_i S_i inv_i^3 / N_i        dalpha_i = sum over rows of inv_i S_i
    P_k = sum over rows of g_k x_k t_k,   dm = w P,   dw = m P             (only when asked for)

inv [rows, K] is the only thing saved beside the inputs.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from jointnas_kernels.ops._dispatch import check, compute_dtype, no_grad_slot, resolve, rows


def _segments(sizes: Sequence[int]) -> list[tuple[int, int, list[int]]]:
    """(start, end, choices that keep it) for each stretch of channels kept by the same choices."""
    bounds = [0, *sorted(set(sizes))]
    return [
        (lo, hi, [i for i, size in enumerate(sizes) if size >= hi]) for lo, hi in pairwise(bounds)
    ]


def _counts(sizes: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(sizes), dtype=like.dtype, device=like.device)


def _prefix_sums(v: Tensor, sizes: Sequence[int]) -> Tensor:
    """[rows, K]: sum of the first sizes[i] channels, each channel read once."""
    out = v.new_zeros(v.shape[0], len(sizes))
    for lo, hi, kept_by in _segments(sizes):
        out[:, kept_by] += v[:, lo:hi].sum(-1, keepdim=True)
    return out


def _spread(value: Tensor, sizes: Sequence[int], n: int) -> Tensor:
    """[rows, n]: sum of value[:, i] over the choices that keep the channel."""
    parts = [value[:, kept_by].sum(-1, keepdim=True).expand(-1, hi - lo) for lo, hi, kept_by in _segments(sizes)]
    parts.append(value.new_zeros(value.shape[0], n - max(sizes)))
    return torch.cat(parts, dim=-1)


def reference(
    x: Tensor, weight: Tensor, alpha: Tensor, sizes: Sequence[int], eps: float, in_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y like x and inv [rows, K]."""
    acc = compute_dtype(x)
    n = x.shape[-1]
    v = rows(x).to(acc)
    inv = torch.rsqrt(_prefix_sums(v.square(), sizes) / _counts(sizes, v) + eps)
    t = _spread(inv * alpha.to(acc), sizes, n)
    scale = weight.to(acc) if in_mask is None else weight.to(acc) * in_mask.to(acc)
    return (v * t * scale).to(x.dtype).reshape(x.shape), inv


def reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, inv: Tensor, sizes: Sequence[int],
    in_mask: Tensor | None, need_weight: bool, need_alpha: bool, need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = compute_dtype(x)
    n = x.shape[-1]
    v, g = rows(x).to(acc), rows(grad).to(acc)
    w, a = weight.to(acc), alpha.to(acc)
    scale = w if in_mask is None else w * in_mask.to(acc)
    h = g * scale
    prefix = _prefix_sums(h * v, sizes)
    t = _spread(inv * a, sizes, n)
    dx = h * t - v * _spread(a * prefix * inv**3 / _counts(sizes, v), sizes, n)
    dw, dalpha, dmask = (no_grad_slot(x) for _ in range(3))
    if need_alpha:
        dalpha = (inv * prefix).sum(0).to(alpha.dtype)
    if need_weight or need_mask:
        column = (g * v * t).sum(0)
        if need_weight:
            dw = (column if in_mask is None else column * in_mask.to(acc)).to(weight.dtype)
        if need_mask and in_mask is not None:
            dmask = (column * w).to(in_mask.dtype)
    return dx.to(x.dtype).reshape(x.shape), dw, dalpha, dmask


@torch.library.custom_op(
    "jointnas::mixed_rmsnorm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor alpha, int[] sizes, float eps, Tensor? in_mask, str? backend) "
    "-> (Tensor, Tensor)",
)
def _mixed_rmsnorm(
    x: Tensor, weight: Tensor, alpha: Tensor, sizes: Sequence[int], eps: float, in_mask: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    resolve("mixed_rmsnorm", backend, x, ("reference",))
    y, inv = reference(x, weight, alpha, sizes, eps, in_mask)
    return y.contiguous(), inv


@_mixed_rmsnorm.register_fake
def _(
    x: Tensor, weight: Tensor, alpha: Tensor, sizes: Sequence[int], eps: float, in_mask: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, torch.empty(x.numel() // x.shape[-1], len(sizes), dtype=compute_dtype(x), device=x.device)


@torch.library.custom_op(
    "jointnas::mixed_rmsnorm_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor alpha, Tensor inv, int[] sizes, Tensor? in_mask, "
    "bool need_weight, bool need_alpha, bool need_mask, str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _mixed_rmsnorm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, inv: Tensor, sizes: Sequence[int],
    in_mask: Tensor | None, need_weight: bool, need_alpha: bool, need_mask: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    resolve("mixed_rmsnorm", backend, x, ("reference",))
    dx, dw, dalpha, dmask = reference_backward(
        grad, x, weight, alpha, inv, sizes, in_mask, need_weight, need_alpha, need_mask
    )
    return dx.contiguous(), dw, dalpha, dmask


@_mixed_rmsnorm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, inv: Tensor, sizes: Sequence[int],
    in_mask: Tensor | None, need_weight: bool, need_alpha: bool, need_mask: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dw = torch.empty_like(weight) if need_weight else no_grad_slot(x)
    dalpha = torch.empty_like(alpha) if need_alpha else no_grad_slot(x)
    dmask = torch.empty_like(in_mask) if need_mask and in_mask is not None else no_grad_slot(x)
    return dx, dw, dalpha, dmask


def _setup(ctx, inputs, output):
    x, weight, alpha, sizes, _, in_mask, backend = inputs
    ctx.save_for_backward(x, weight, alpha, output[1], in_mask)
    ctx.set_materialize_grads(False)
    ctx.sizes, ctx.backend = sizes, backend


def _backward(ctx, grad, _):
    x, weight, alpha, inv, in_mask = ctx.saved_tensors
    if grad is None:
        return None, None, None, None, None, None, None
    need_weight, need_alpha = ctx.needs_input_grad[1:3]
    need_mask = ctx.needs_input_grad[5]
    dx, dw, dalpha, dmask = torch.ops.jointnas.mixed_rmsnorm_backward(
        grad, x, weight, alpha, inv, ctx.sizes, in_mask, need_weight, need_alpha, need_mask, ctx.backend
    )
    return (dx, dw if need_weight else None, dalpha if need_alpha else None, None, None,
            dmask if need_mask else None, None)


_mixed_rmsnorm.register_autograd(_backward, setup_context=_setup)


def mixed_rmsnorm(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor,
    sizes: Sequence[int],
    eps: float,
    in_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """in_mask * weight * sum_i alpha_i RMSNorm over the first sizes[i] channels; gradients to x, alpha, in_mask and
    weight, each only if it requires one."""
    n = x.shape[-1]
    check(weight.shape == (n,), "mixed_rmsnorm", f"weight {tuple(weight.shape)} does not match x {tuple(x.shape)}")
    check(len(sizes) > 0 and alpha.shape == (len(sizes),), "mixed_rmsnorm",
          f"alpha {tuple(alpha.shape)} does not match {len(sizes)} sizes")
    check(min(sizes) > 0 and max(sizes) <= n, "mixed_rmsnorm", f"sizes {tuple(sizes)} must lie in 1..{n}")
    check(in_mask is None or in_mask.shape == (n,), "mixed_rmsnorm", f"in_mask must be [{n}]")
    return torch.ops.jointnas.mixed_rmsnorm(x, weight, alpha, list(sizes), eps, in_mask, backend)[0]
