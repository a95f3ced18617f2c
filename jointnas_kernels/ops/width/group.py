"""mixed_linear_group: two or three LoRA linears of one input (gate/up, q/k/v) as one autograd op.

With [u_1 .. u_k] = s x [A_1; ..; A_k]^T, one GEMM, y_j = x W_j^T + u_j B_j^T + bias_j; backward, with g_j = dL/dy_j and
v = s [g_1 B_1 .. g_k B_k]:

    dx = sum_j g_j W_j + v [A_1; ..; A_k]         one accumulator (addmm, beta = 1) instead of k tensors and k - 1 adds
    [dA_1; ..; dA_k] = v^T x                      one GEMM          dB_j = g_j^T u_j

For q/k/v it launches 7 GEMMs forward and 11 backward where separate ``mixed_linear`` calls launch 9 and 15 plus two
adds over [rows, I], and it reads x for LoRA once. Masks are left to the neighbouring elementwise ops, which carry them
for free. Tensor lists would cost 200 us of flattening per call: the op takes three of everything, absent ones as None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import bad, rows
from jointnas_kernels.ops.width.linear import bias_gradient, check_shapes, in_one_dtype, lora_operands, mm_as, scaled_mm

MOST = 3


def _layers(tensors: Sequence[Tensor | None]) -> list[list[Tensor]]:
    """The weights, As and Bs that are present in w0, a0, b0, w1, .."""
    return [[t for t in tensors[i : 3 * MOST : 3] if t is not None] for i in range(3)]


def _reference(
    x: Tensor, w0: Tensor, a0: Tensor, b0: Tensor, w1: Tensor | None, a1: Tensor | None, b1: Tensor | None,
    w2: Tensor | None, a2: Tensor | None, b2: Tensor | None, bias0: Tensor | None, bias1: Tensor | None,
    bias2: Tensor | None, scaling: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """The three y, then u."""
    weights, lora_as, lora_bs = _layers((w0, a0, b0, w1, a1, b1, w2, a2, b2))
    flat = rows(x)
    a, casts = lora_operands(lora_as, lora_bs, x.dtype)
    u = scaled_mm(flat, a.t(), scaling)
    found: list[Tensor | None] = [None] * MOST
    start = 0
    for j, (weight, b, bias) in enumerate(zip(weights, casts, (bias0, bias1, bias2), strict=False)):
        y = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
        y.addmm_(u[:, start : start + b.shape[1]], b.t())
        start += b.shape[1]
        found[j] = y.view(*x.shape[:-1], weight.shape[0])
    return found[0], found[1], found[2], u


def _reference_backward(
    g0: Tensor, g1: Tensor | None, g2: Tensor | None, x: Tensor | None, *rest: Any
) -> tuple[Tensor | None, ...]:
    """dx, then dA_j and dB_j of each layer, then three dbias. ``rest``: the other tensors, u, scaling, need."""
    *layers, u, scaling, need = rest
    need_x, need_a, need_b, need_bias = need[0], any(need[1:7:2]), any(need[2:7:2]), any(need[7:])
    weights, lora_as, lora_bs = _layers(layers)
    grads = [rows(g) for g, w in zip((g0, g1, g2), layers[: 3 * MOST : 3], strict=True) if not (w is None or g is None)]
    dtype, ranks = g0.dtype, [b.shape[1] for b in lora_bs]
    found: list[Tensor | None] = [None] * (1 + 3 * MOST)
    if need_x or need_a:
        a, casts = lora_operands(lora_as, lora_bs, dtype)
        v = torch.empty(grads[0].shape[0], sum(ranks), dtype=dtype, device=g0.device)
        for g, b, part in zip(grads, casts, v.split(ranks, dim=1), strict=True):
            part.addmm_(g, b, beta=0, alpha=scaling)
        if need_x:
            dx = v @ a
            for g, weight in zip(grads, weights, strict=True):
                dx.addmm_(g, weight)
            found[0] = dx.view(*g0.shape[:-1], weights[0].shape[1])
        if need_a and x is not None:
            found[1 : 1 + 2 * len(ranks) : 2] = mm_as(v.t(), rows(x), lora_as[0].dtype).split(ranks)
    if need_b and u is not None:
        for j, (g, part, b) in enumerate(zip(grads, u.split(ranks, dim=1), lora_bs, strict=True)):
            found[2 + 2 * j] = mm_as(g.t(), part, b.dtype)
    if need_bias:
        for j, (g, bias) in enumerate(zip(grads, layers[3 * MOST :], strict=False)):
            found[1 + 2 * MOST + j] = bias_gradient(g, bias)
    return tuple(found)


_op = Op(
    "mixed_linear_group",
    {"reference": _reference},
    {"reference": _reference_backward},
    results=MOST,
    frozen=("w0", "w1", "w2"),
    read_for={"x": ("a0", "a1", "a2"), "saved0": ("b0", "b1", "b2")},
)


def mixed_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scaling: float = 1.0,
    biases: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """(x (W_j + scaling B_j A_j)^T + bias_j for each j). Prefer it wherever linears share an input.

    Args:
        x: [..., I] in any floating dtype.
        weights: one to three W_j, [O_j, I], in the dtype of x; under autocast both are cast. They are frozen.
        lora_as, lora_bs: A_j [R_j, I] and B_j [O_j, R_j], in the dtype of x or fp32.
        scaling: s of LoRA.
        biases: [O_j] each; cast to the dtype of x. None or empty: no biases.

    Returns:
        [..., O_j] each in the dtype of x, under autocast in its dtype. Gradients to x, LoRA and biases.

    Raises:
        JointNASError: shapes, dtypes or counts that do not fit, or a weight that requires a gradient.
    """
    op = "mixed_linear_group"
    k = len(weights)
    biases = [] if biases is None else biases
    if not 0 < k <= MOST:
        raise bad(op, f"{k} weights; a group has 1 to {MOST}")
    if len(lora_as) != k or len(lora_bs) != k or len(biases) not in (0, k):
        raise bad(op, f"{k} weights, {len(lora_as)} lora_as, {len(lora_bs)} lora_bs, {len(biases)} biases: "
                      "counts must agree")
    for j in range(k):
        check_shapes(op, x, weights[j], lora_as[j], lora_bs[j], biases[j] if biases else None)
        if weights[j].requires_grad:
            raise bad(op, f"weight {j} requires a gradient; use mixed_linear for trained weights")
    x, weights = in_one_dtype(op, x, weights)
    absent = [None] * (MOST - k)
    layers = [t for layer in zip(weights, lora_as, lora_bs, strict=True) for t in layer]
    of_bias: Sequence[Tensor | None] = [b.to(x.dtype) for b in biases] or [None] * k
    found: tuple[Tensor, ...] = _op(x, *layers, *absent * 3, *of_bias, *absent, scaling, None)
    return found[:k]
