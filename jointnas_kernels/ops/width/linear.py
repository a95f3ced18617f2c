"""mixed_linear and mixed_linear_group: linears under width masks, with LoRA: plain GEMMs plus rank r, no mixed weight.

mixed_linear: xm = c * x, u = s xm A^T, z = xm W^T + u B^T + bias, y = r * z. Backward, with g = dL/dy, gm = r * g and
v = s gm B:

    dxm = gm W + v A        dx = c * dxm      dc = sum over rows of x * dxm      dr = sum over rows of g * z
    dA = (v^T x) * c        dB = gm^T u       dbias = sum over rows of gm        dW = gm^T xm only if W requires it

Saved: x for dA or dc, u [rows, R] for dB, z for dr, each only when that gradient is wanted. GEMMs are the library's;
LoRA is added in place by addmm (beta = 1), so no elementwise pass over [rows, O] is made for it.

mixed_linear_group: two or three LoRA linears of one input (gate/up, q/k/v). [u_1 .. u_k] = s x [A_1; ..; A_k]^T, one
GEMM, y_j = x W_j^T + u_j B_j^T + bias_j. Backward, with g_j = dL/dy_j and v = s [g_1 B_1 .. g_k B_k]:

    dx = sum_j g_j W_j + v [A_1; ..; A_k]         one accumulator (addmm, beta = 1) instead of k tensors and k - 1 adds
    [dA_1; ..; dA_k] = v^T x                      one GEMM          dB_j = g_j^T u_j

For q/k/v it launches 7 GEMMs forward and 11 backward where separate ``mixed_linear`` calls launch 9 and 15 plus two
adds over [rows, I], and it reads x for LoRA once. Masks are left to the neighbouring elementwise ops, which carry them
for free. Tensor lists would cost 200 us of flattening per call: the op takes three of everything, absent ones as None.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import autocast_dtype, bad, rows
from jointnas_kernels.ops.width import channel


def _lora_operands(
    lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Sequence[Tensor]]:
    """[A_1; ..; A_k] and the B_j in ``dtype``. fp32 LoRA beside half weights is cast by one launch for all of them."""
    every = [*lora_as, *lora_bs]
    if all([t.dtype == dtype for t in every]):
        return lora_as[0] if len(lora_as) == 1 else torch.cat([*lora_as]), lora_bs
    memory = torch.empty(sum(t.numel() for t in every), dtype=dtype, device=every[0].device)
    parts = [part.view(t.shape) for part, t in zip(memory.split([t.numel() for t in every]), every, strict=True)]
    torch._foreach_copy_(parts, every)
    rank, width = sum(a.shape[0] for a in lora_as), lora_as[0].shape[1]
    return memory[: rank * width].view(rank, width), parts[len(lora_as) :]


def _scaled_mm(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling * a @ b in one launch."""
    return torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device).addmm_(a, b, beta=0, alpha=scaling)


def _mm_as(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in ``dtype``: fp32 LoRA gradients of half activations leave the GEMM's fp32 accumulator unrounded."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def _bias_gradient(grad: Tensor, bias: Tensor) -> Tensor:
    """Sum over rows, in fp32 at least."""
    return grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(bias.dtype)


def _in_one_dtype(op: str, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """Both in the dtype a linear runs in here: autocast's where it is on, else x's, which must be the weights', too."""
    dtype = autocast_dtype(x)
    if dtype is not None:
        return x.to(dtype), [w.to(dtype) for w in weights]
    for weight in weights:
        if weight.dtype != x.dtype:
            raise bad(op, f"x is {x.dtype} and a weight {weight.dtype}; they must agree outside autocast")
    return x, weights


def _check_shapes(
    op: str, x: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, bias: Tensor | None
) -> None:
    """Raise unless they fit one linear."""
    out_features, in_features = weight.shape
    if x.shape[-1] != in_features:
        raise bad(op, f"x {tuple(x.shape)} does not match weight {tuple(weight.shape)}")
    if (lora_a is None) != (lora_b is None):
        raise bad(op, "lora_a and lora_b go together: give both or neither")
    if lora_a is not None and lora_b is not None:
        rank = lora_a.shape[0]
        if lora_a.shape != (rank, in_features) or lora_b.shape != (out_features, rank):
            raise bad(op, f"lora_a {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)} must be [r, {in_features}] "
                          f"and [{out_features}, r]")
    if bias is not None and bias.shape != (out_features,):
        raise bad(op, f"bias must be [{out_features}]")


# ---- mixed_linear ----


def _forward(
    how: str, x: Tensor, weight: Tensor, in_mask: Tensor | None, out_mask: Tensor | None, lora_a: Tensor | None,
    lora_b: Tensor | None, bias: Tensor | None, scaling: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """y, u (None without LoRA), z (None without out_mask); ``how`` is the backend of the masks."""
    xm = rows(x)
    if in_mask is not None:
        xm = channel.FORWARD[how](xm, in_mask)
    z = xm @ weight.t() if bias is None else torch.addmm(bias, xm, weight.t())
    u = None
    if lora_a is not None and lora_b is not None:
        a, (b,) = _lora_operands([lora_a], [lora_b], x.dtype)
        u = _scaled_mm(xm, a.t(), scaling)
        z.addmm_(u, b.t())
    shape = (*x.shape[:-1], weight.shape[0])
    if out_mask is None:
        return z.view(shape), u, None
    return channel.FORWARD[how](z, out_mask).view(shape), u, z


def _backward(
    how: str, grad: Tensor, x: Tensor | None, weight: Tensor, in_mask: Tensor | None, out_mask: Tensor | None,
    lora_a: Tensor | None, lora_b: Tensor | None, bias: Tensor | None, u: Tensor | None, z: Tensor | None,
    scaling: float, need: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    need_x, need_w, need_in, need_out, need_a, need_b, need_bias = need
    dx = dw = din = dout = da = db = dbias = v = a = None
    gm, flat = rows(grad), None if x is None else rows(x)
    if out_mask is not None:
        gm, dout = channel.BACKWARD[how](gm, z, out_mask, (True, need_out))
    if lora_a is not None and lora_b is not None:
        if need_x or need_in or need_a:
            a, (b,) = _lora_operands([lora_a], [lora_b], gm.dtype)
            v = _scaled_mm(gm, b, scaling)
        if need_b and u is not None:
            db = _mm_as(gm.t(), u, lora_b.dtype)
        if need_a and v is not None and flat is not None:
            da = _mm_as(v.t(), flat, lora_a.dtype)
            if in_mask is not None:
                da.mul_(in_mask)
    if need_bias and bias is not None:
        dbias = _bias_gradient(gm, bias)
    if need_w and flat is not None:
        dw = gm.t() @ (flat if in_mask is None else channel.FORWARD[how](flat, in_mask))
    if need_x or need_in:
        dx = gm @ weight
        if v is not None and a is not None:
            dx.addmm_(v, a)
        if in_mask is not None:
            dx, din = channel.BACKWARD[how](dx, flat, in_mask, (True, need_in))
        dx = dx.view((*grad.shape[:-1], weight.shape[1]))
    return dx, dw, din, dout, da, db, dbias


_linear = Op(
    "mixed_linear",
    {how: partial(_forward, how) for how in ("triton", "cpu", "reference")},
    {how: partial(_backward, how) for how in ("triton", "cpu", "reference")},
    read_for={"x": ("weight", "in_mask", "lora_a"), "saved0": ("lora_b",), "saved1": ("out_mask",)},
)


def mixed_linear(
    x: Tensor, weight: Tensor, in_mask: Tensor | None = None, out_mask: Tensor | None = None,
    lora_a: Tensor | None = None, lora_b: Tensor | None = None, scaling: float = 1.0, bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """out_mask * ((weight + scaling lora_b lora_a) (in_mask * x) + bias): Eq. 5 of arXiv 2606.04063, exactly.

    With in_mask = c and out_mask = r: (sum_ij a_i a_j G_ij * (W + s B A)) x = r * ((W + s B A) (c * x)).

    Args:
        x: [..., I] in any floating dtype.
        weight: W, [O, I], in the dtype of x; under autocast both are cast. Frozen, it costs nothing in the backward
            pass.
        in_mask, out_mask: [I] and [O], fp32; None: all ones.
        lora_a, lora_b: [R, I] and [O, R], in the dtype of x or fp32; None: no LoRA.
        scaling: s of LoRA.
        bias: [O]; cast to the dtype of x.
        backend: of the masks: "triton", "cpu" or "reference"; None: by device and dtype.

    Returns:
        [..., O] in the dtype of x, under autocast in its dtype. Gradients to all tensors, each only if it requires one.

    Raises:
        JointNASError: shapes or dtypes that do not fit, half a LoRA pair, or a backend that cannot run.
    """
    op = "mixed_linear"
    _check_shapes(op, x, weight, lora_a, lora_b, bias)
    if in_mask is not None and in_mask.shape != weight.shape[1:]:
        raise bad(op, f"in_mask must be [{weight.shape[1]}]")
    if out_mask is not None and out_mask.shape != weight.shape[:1]:
        raise bad(op, f"out_mask must be [{weight.shape[0]}]")
    x, (weight,) = _in_one_dtype(op, x, (weight,))
    bias = None if bias is None else bias.to(x.dtype)
    return _linear(x, weight, in_mask, out_mask, lora_a, lora_b, bias, scaling, backend)[0]


# ---- mixed_linear_group ----

_MOST = 3


def _layers(tensors: Sequence[Tensor | None]) -> list[list[Tensor]]:
    """The weights, As and Bs that are present in w0, a0, b0, w1, .."""
    return [[t for t in tensors[i : 3 * _MOST : 3] if t is not None] for i in range(3)]


def _reference_group(
    x: Tensor, w0: Tensor, a0: Tensor, b0: Tensor, w1: Tensor | None, a1: Tensor | None, b1: Tensor | None,
    w2: Tensor | None, a2: Tensor | None, b2: Tensor | None, bias0: Tensor | None, bias1: Tensor | None,
    bias2: Tensor | None, scaling: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """The three y, then u."""
    weights, lora_as, lora_bs = _layers((w0, a0, b0, w1, a1, b1, w2, a2, b2))
    flat = rows(x)
    a, casts = _lora_operands(lora_as, lora_bs, x.dtype)
    u = _scaled_mm(flat, a.t(), scaling)
    found: list[Tensor | None] = [None] * _MOST
    start = 0
    for j, (weight, b, bias) in enumerate(zip(weights, casts, (bias0, bias1, bias2), strict=False)):
        y = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
        y.addmm_(u[:, start : start + b.shape[1]], b.t())
        start += b.shape[1]
        found[j] = y.view(*x.shape[:-1], weight.shape[0])
    return found[0], found[1], found[2], u


def _group_backward(
    g0: Tensor, g1: Tensor | None, g2: Tensor | None, x: Tensor | None, *rest: Any
) -> tuple[Tensor | None, ...]:
    """dx, then dA_j and dB_j of each layer, then three dbias. ``rest``: the other tensors, u, scaling, need."""
    *layers, u, scaling, need = rest
    need_x, need_a, need_b, need_bias = need[0], any(need[1:7:2]), any(need[2:7:2]), any(need[7:])
    weights, lora_as, lora_bs = _layers(layers)
    grads = [rows(g) for g in (g0, g1, g2)[: len(weights)] if g is not None]
    dtype, ranks = g0.dtype, [b.shape[1] for b in lora_bs]
    found: list[Tensor | None] = [None] * (1 + 3 * _MOST)
    if need_x or need_a:
        a, casts = _lora_operands(lora_as, lora_bs, dtype)
        v = torch.empty(grads[0].shape[0], sum(ranks), dtype=dtype, device=g0.device)
        for g, b, part in zip(grads, casts, v.split(ranks, dim=1), strict=True):
            part.addmm_(g, b, beta=0, alpha=scaling)
        if need_x:
            dx = v @ a
            for g, weight in zip(grads, weights, strict=True):
                dx.addmm_(g, weight)
            found[0] = dx.view(*g0.shape[:-1], weights[0].shape[1])
        if need_a and x is not None:
            found[1 : 1 + 2 * len(ranks) : 2] = _mm_as(v.t(), rows(x), lora_as[0].dtype).split(ranks)
    if need_b and u is not None:
        for j, (g, part, b) in enumerate(zip(grads, u.split(ranks, dim=1), lora_bs, strict=True)):
            found[2 + 2 * j] = _mm_as(g.t(), part, b.dtype)
    if need_bias:
        for j, (g, bias) in enumerate(zip(grads, layers[3 * _MOST :], strict=False)):
            found[1 + 2 * _MOST + j] = _bias_gradient(g, bias)
    return tuple(found)


_group = Op(
    "mixed_linear_group",
    {"reference": _reference_group},
    {"reference": _group_backward},
    results=_MOST,
    frozen=("w0", "w1", "w2"),
    read_for={"x": ("a0", "a1", "a2"), "saved0": ("b0", "b1", "b2")},
)


def mixed_linear_group(
    x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], scaling: float = 1.0,
    biases: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
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
    op, k, biases = "mixed_linear_group", len(weights), biases or []
    if not 0 < k <= _MOST:
        raise bad(op, f"{k} weights; a group has 1 to {_MOST}")
    if len(lora_as) != k or len(lora_bs) != k or len(biases) not in (0, k):
        raise bad(op, f"{k} weights, {len(lora_as)} lora_as, {len(lora_bs)} lora_bs, {len(biases)} biases: "
                      "counts must agree")
    for j in range(k):
        _check_shapes(op, x, weights[j], lora_as[j], lora_bs[j], biases[j] if biases else None)
        if weights[j].requires_grad:
            raise bad(op, f"weight {j} requires a gradient; use mixed_linear for trained weights")
    x, weights = _in_one_dtype(op, x, weights)
    absent = [None] * (_MOST - k)
    layers = [t for layer in zip(weights, lora_as, lora_bs, strict=True) for t in layer]
    of_bias: Sequence[Tensor | None] = [b.to(x.dtype) for b in biases] or [None] * k
    return _group(x, *layers, *absent * 3, *of_bias, *absent, scaling, None)[:k]
