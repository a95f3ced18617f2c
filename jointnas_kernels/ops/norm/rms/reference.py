"""mixed_rmsnorm in torch: the expectation of RMSNorm over hidden-size choices, and a mixture of precisions behind it.

At one-hot alpha it is RMSNorm over the first N_i channels; full-width statistics would be off by sqrt(N_i / N).

    inv_i = rsqrt(mean_{k < N_i} x_k^2 + eps)           t_k = sum_{i: k < N_i} alpha_i inv_i           y = m w x t

Backward, with g = dL/dy, h = m w g and prefix sums S_i = sum_{k < N_i} h_k x_k:

    dx_k = h_k t_k - x_k sum_{i: k < N_i} alpha_i S_i inv_i^3 / N_i        dalpha_i = sum over rows of inv_i S_i
    P_k = sum over rows of g_k x_k t_k,   dm = w P,   dw = m P             (only when asked for)

inv [rows, K] is the only thing saved beside the inputs. With quantization, v = m w x t rounded to x's dtype and
y = sum_q probs[q] Q_q(v), exactly act_quant_mix of the norm (without a mask: it is in the norm), level by level: v is
computed in the same order on each backend. Backward, straight through (scales and zero points are constants):

    dprobs[q] = <g, Q_q(v)>, v recomputed from x and inv        the others: those above of sum(probs) g in place of g

Saved are also levels [rows, Q, 2], the scale and zero point of every row and precision (here they are computed again);
v is never in memory. The norm's incoming gradient stays in fp32, where the two ops apart round it.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from jointnas_kernels.ops.core.tensors import compute_dtype, rows
from jointnas_kernels.ops.quant.activations import act_quant_mix_reference, probs_gradient

Sizes = Sequence[int]
Gradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # of x, weight, .., probs


def _segments(sizes: Sizes) -> list[tuple[int, int, list[int]]]:
    """(start, end, choices that keep it) for each stretch of channels kept by the same choices."""
    bounds = [0, *sorted(set(sizes))]
    return [(lo, hi, [i for i, size in enumerate(sizes) if size >= hi]) for lo, hi in pairwise(bounds)]


def _prefix_sums(v: Tensor, sizes: Sizes) -> Tensor:
    """[rows, K]: sum of the first sizes[i] channels, each channel read once."""
    out = v.new_zeros(v.shape[0], len(sizes))
    for lo, hi, kept_by in _segments(sizes):
        out[:, kept_by] += v[:, lo:hi].sum(-1, keepdim=True)
    return out


def _spread(value: Tensor, sizes: Sizes, n: int) -> Tensor:
    """[rows, n]: sum of value[:, i] over the choices that keep the channel."""
    parts = [value[:, kept_by].sum(-1, keepdim=True).expand(-1, hi - lo) for lo, hi, kept_by in _segments(sizes)]
    parts.append(value.new_zeros(value.shape[0], n - max(sizes)))
    return torch.cat(parts, dim=-1)


def forward(
    x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, sizes: Sizes, eps: float
) -> tuple[Tensor, Tensor]:
    """y like x and inv [rows, K]."""
    v = rows(x).to(compute_dtype(x.dtype))
    inv = torch.rsqrt(_prefix_sums(v.square(), sizes) / v.new_tensor(sizes) + eps)
    return _normalised(x, weight, alpha, in_mask, inv, sizes), inv


def _normalised(x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, inv: Tensor, sizes: Sizes) -> Tensor:
    acc = compute_dtype(x.dtype)
    t = _spread(inv * alpha.to(acc), sizes, x.shape[-1])
    scale = weight.to(acc) if in_mask is None else weight.to(acc) * in_mask.to(acc)
    return (rows(x).to(acc) * t * scale).to(x.dtype).reshape(x.shape)


def forward_quantized(
    x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, probs: Tensor, sizes: Sizes, eps: float,
    bits: Sequence[int], symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y like x, inv [rows, K] and levels [rows, Q, 2], here zeros."""
    v, inv = forward(x, weight, alpha, in_mask, sizes, eps)
    levels = torch.zeros(inv.shape[0], len(bits), 2, dtype=torch.float32, device=x.device)
    return act_quant_mix_reference(v, bits, probs, symmetric), inv, levels


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, probs: Tensor | None, inv: Tensor,
    levels: Tensor | None, sizes: Sizes, eps: float, bits: Sequence[int], symmetric: bool, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    """Of both; without probs of the norm alone."""
    dx, *others = unrounded(grad, x, weight, alpha, in_mask, probs, inv, levels, sizes, eps, bits, symmetric, need)
    return dx.to(x.dtype), *others  # type: ignore[return-value]


def unrounded(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, probs: Tensor | None, inv: Tensor,
    levels: Tensor | None, sizes: Sizes, eps: float, bits: Sequence[int], symmetric: bool, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    """The same, dx in what it was computed in."""
    acc = compute_dtype(x.dtype)
    n, dalpha, dprobs = x.shape[-1], None, None
    v, g, a = rows(x).to(acc), rows(grad).to(acc), alpha.to(acc)
    if probs is not None:
        if need[4]:
            values = rows(_normalised(x, weight, alpha, in_mask, inv, sizes))
            dprobs = probs_gradient(g, values, probs, bits, symmetric)
        g = g * probs.to(acc).sum()
    h = g * (weight.to(acc) if in_mask is None else weight.to(acc) * in_mask.to(acc))
    prefix = _prefix_sums(h * v, sizes)
    t = _spread(inv * a, sizes, n)
    dx = h * t - v * _spread(a * prefix * inv**3 / v.new_tensor(sizes), sizes, n)
    if need[2]:
        dalpha = (inv * prefix).sum(0).to(alpha.dtype)
    dw, dmask = of_column((g * v * t).sum(0) if need[1] or need[3] else None, weight, in_mask, need)
    return dx.reshape(x.shape), dw, dalpha, dmask, dprobs


def of_column(
    column: Tensor | None, weight: Tensor, in_mask: Tensor | None, need: Sequence[bool], scaled: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """dweight and din_mask from P [N]; ``scaled``: it is w P already."""
    dw = dmask = None
    if column is not None and need[1]:
        dw = (column if in_mask is None else column * in_mask).to(weight.dtype)
    if column is not None and need[3] and in_mask is not None:
        dmask = (column if scaled else column * weight).to(in_mask.dtype)
    return dw, dmask
