"""mixed_linear: a linear layer under width masks, with LoRA: the plain GEMM plus rank r, never a mixed weight.

With xm = c * x, u = s xm A^T, z = xm W^T + u B^T + bias, y = r * z; backward, with g = dL/dy, gm = r * g, v = s gm B:

    dxm = gm W + v A        dx = c * dxm      dc = sum over rows of x * dxm      dr = sum over rows of g * z
    dA = (v^T x) * c        dB = gm^T u       dbias = sum over rows of gm        dW = gm^T xm only if W requires it

Saved: x for dA or dc, u [rows, R] for dB, z for dr, each only when that gradient is wanted. GEMMs are the library's;
LoRA is added in place by addmm (beta = 1), so no elementwise pass over [rows, O] is made for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import bad, rows
from jointnas_kernels.ops.width import channel

# ---- shared with mixed_linear_group ----


def lora_operands(
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


def scaled_mm(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling * a @ b in one launch."""
    return torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device).addmm_(a, b, beta=0, alpha=scaling)


def mm_as(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in ``dtype``: fp32 LoRA gradients of half activations leave the GEMM's fp32 accumulator unrounded."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def bias_gradient(grad: Tensor, bias: Tensor) -> Tensor:
    """Sum over rows, in fp32 at least."""
    return grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(bias.dtype)


def in_one_dtype(op: str, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """Both in the dtype a linear runs in here: autocast's where it is on, else x's, which must be the weights', too."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return x.to(dtype), [w.to(dtype) for w in weights]
    for weight in weights:
        if weight.dtype != x.dtype:
            raise bad(op, f"x is {x.dtype} and a weight {weight.dtype}; they must agree outside autocast")
    return x, weights


def check_shapes(
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
        a, (b,) = lora_operands([lora_a], [lora_b], x.dtype)
        u = scaled_mm(xm, a.t(), scaling)
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
            a, (b,) = lora_operands([lora_a], [lora_b], gm.dtype)
            v = scaled_mm(gm, b, scaling)
        if need_b and u is not None:
            db = mm_as(gm.t(), u, lora_b.dtype)
        if need_a and v is not None and flat is not None:
            da = mm_as(v.t(), flat, lora_a.dtype)
            if in_mask is not None:
                da.mul_(in_mask)
    if need_bias and bias is not None:
        dbias = bias_gradient(gm, bias)
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


def _reference(
    x: Tensor, weight: Tensor, in_mask: Tensor | None, out_mask: Tensor | None, lora_a: Tensor | None,
    lora_b: Tensor | None, bias: Tensor | None, scaling: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    return _forward("reference", x, weight, in_mask, out_mask, lora_a, lora_b, bias, scaling)


_op = Op(
    "mixed_linear",
    {"triton": partial(_forward, "triton"), "cpu": partial(_forward, "cpu"), "reference": _reference},
    {how: partial(_backward, how) for how in ("triton", "cpu", "reference")},
    read_for={"x": ("weight", "in_mask", "lora_a"), "saved0": ("lora_b",), "saved1": ("out_mask",)},
)


def mixed_linear(
    x: Tensor,
    weight: Tensor,
    in_mask: Tensor | None = None,
    out_mask: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
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
    check_shapes(op, x, weight, lora_a, lora_b, bias)
    if in_mask is not None and in_mask.shape != weight.shape[1:]:
        raise bad(op, f"in_mask must be [{weight.shape[1]}]")
    if out_mask is not None and out_mask.shape != weight.shape[:1]:
        raise bad(op, f"out_mask must be [{weight.shape[0]}]")
    x, (weight,) = in_one_dtype(op, x, (weight,))
    bias = None if bias is None else bias.to(x.dtype)
    out: Tensor = _op(x, weight, in_mask, out_mask, lora_a, lora_b, bias, scaling, backend)[0]
    return out
