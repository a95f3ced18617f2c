"""mixed_linear: a linear layer under width masks, with LoRA: the plain GEMM plus rank r, never a mixed weight.

    x [..., I], weight W [O, I], in_mask c [I], out_mask r [O] fp32 or None, lora_a A [R, I], lora_b B [O, R], bias [O]
    xm = c * x,  u = s xm A^T,  z = xm W^T + u B^T + bias,  y = r * z

which is Eq. 5 of arXiv 2606.04063 exactly: (sum_ij a_i a_j G_ij * (W + s B A)) x = r * ((W + s B A) (c * x)).
Backward, with g = dL/dy, gm = r * g and v = s gm B:

    dxm = gm W + v A        dx = c * dxm      dc = sum over rows of x * dxm      dr = sum over rows of g * z
    dA = (v^T x) * c        dB = gm^T u       dbias = sum over rows of gm        dW = gm^T xm only if W requires it

Saved: x for dA or dc, u [rows, R] for dB, z for dr, each only when that gradient is wanted. GEMMs are the library's;
LoRA is added in place by addmm (beta = 1), so no elementwise pass over [rows, O] is made for it.
"""

import torch
from torch import Tensor

from jointnas_kernels.ops.core.dispatch import bad, custom_op, no_grad_slot, resolve, rows
from jointnas_kernels.ops.width.channel import backward as mask_backward
from jointnas_kernels.ops.width.channel import forward as mask_forward


def reference(
    x: Tensor, weight: Tensor, in_mask: Tensor | None, out_mask: Tensor | None, lora_a: Tensor | None,
    lora_b: Tensor | None, scaling: float, bias: Tensor | None,
) -> Tensor:
    """The definition in differentiable torch, for tests."""
    xm = x if in_mask is None else x * in_mask.to(x.dtype)
    z = xm @ weight.t()
    if lora_a is not None and lora_b is not None:
        z = z + scaling * ((xm @ lora_a.to(x.dtype).t()) @ lora_b.to(x.dtype).t())
    if bias is not None:
        z = z + bias
    return z if out_mask is None else z * out_mask.to(x.dtype)


def lora_operands(lora_as: list[Tensor], lora_bs: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """[A_1; ..; A_k] and the B_j in ``dtype``. fp32 LoRA beside half weights is cast by one launch for all of them."""
    every = [*lora_as, *lora_bs]
    if all(t.dtype == dtype for t in every):
        return lora_as[0] if len(lora_as) == 1 else torch.cat(lora_as), lora_bs
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


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype a linear runs in here: autocast's where it is on, else x's."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


@custom_op(
    "mixed_linear",
    "(Tensor x, Tensor weight, Tensor? in_mask, Tensor? out_mask, Tensor? lora_a, Tensor? lora_b, "
    "float scaling, Tensor? bias, str? backend) -> (Tensor, Tensor, Tensor)",
)
def _mixed_linear(
    x: Tensor, weight: Tensor, in_mask: Tensor | None, out_mask: Tensor | None, lora_a: Tensor | None,
    lora_b: Tensor | None, scaling: float, bias: Tensor | None, backend: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, u (None without LoRA), z (None without out_mask)."""
    how = resolve("mixed_linear", backend, x)
    flat = rows(x)
    xm = flat if in_mask is None else mask_forward(flat, in_mask, how)
    z = xm @ weight.t() if bias is None else torch.addmm(bias, xm, weight.t())
    u = None
    if lora_a is not None and lora_b is not None:
        a, (b,) = lora_operands([lora_a], [lora_b], x.dtype)
        u = scaled_mm(xm, a.t(), scaling)
        z.addmm_(u, b.t())
    shape = (*x.shape[:-1], weight.shape[0])
    if out_mask is None:
        return z.view(shape), u, None
    return mask_forward(z, out_mask, how).view(shape), u, z


@_mixed_linear.register_fake
def _(
    x: Tensor, weight: Tensor, in_mask: Tensor | None, out_mask: Tensor | None, lora_a: Tensor | None,
    lora_b: Tensor | None, scaling: float, bias: Tensor | None, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    count = x.numel() // x.shape[-1]
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    u = no_grad_slot(x) if lora_a is None else x.new_empty(count, lora_a.shape[0])
    return y, u, no_grad_slot(x) if out_mask is None else x.new_empty(count, weight.shape[0])


@custom_op(
    "mixed_linear_backward",
    "(Tensor grad, Tensor? x, Tensor? u, Tensor? z, Tensor weight, Tensor? in_mask, Tensor? out_mask, "
    "Tensor? lora_a, Tensor? lora_b, float scaling, Tensor? bias, bool[] need, str? backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _mixed_linear_backward(
    grad: Tensor, x: Tensor | None, u: Tensor | None, z: Tensor | None, weight: Tensor, in_mask: Tensor | None,
    out_mask: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, bias: Tensor | None,
    need: list[bool], backend: str | None,
) -> tuple[Tensor | None, ...]:
    """dx, dW, dc, dr, dA, dB, dbias; ``need`` says which, in that order, the others are None."""
    how = resolve("mixed_linear", backend, grad)
    need_x, need_w, need_in, need_out, need_a, need_b, need_bias = need
    dx = dw = din = dout = da = db = dbias = None
    gm = rows(grad)
    flat = None if x is None else rows(x)
    if out_mask is not None:
        gm, dout = mask_backward(gm, gm if z is None else z, out_mask, need_out, how)
    a = v = None
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
        dbias = gm.sum(0, dtype=torch.promote_types(gm.dtype, torch.float32)).to(bias.dtype)
    if need_w and flat is not None:
        dw = gm.t() @ (flat if in_mask is None else mask_forward(flat, in_mask, how))
    if need_x or need_in:
        dxm = gm @ weight
        if v is not None and a is not None:
            dxm.addmm_(v, a)
        if in_mask is None:
            dx = dxm
        else:
            dx, din = mask_backward(dxm, dxm if flat is None else flat, in_mask, need_in, how)
        dx = dx.view((*grad.shape[:-1], weight.shape[1]))
    return dx, dw, din, dout, da, db, dbias


@_mixed_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor | None, u: Tensor | None, z: Tensor | None, weight: Tensor, in_mask: Tensor | None,
    out_mask: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, bias: Tensor | None,
    need: list[bool], backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None, wanted: bool) -> Tensor:
        if tensor is None or not wanted:
            return no_grad_slot(grad)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    need_x, need_w, need_in, need_out, need_a, need_b, need_bias = need
    dx = grad.new_empty((*grad.shape[:-1], weight.shape[1])) if need_x or need_in else no_grad_slot(grad)
    return (dx, like(weight, need_w), like(in_mask, need_in), like(out_mask, need_out), like(lora_a, need_a),
            like(lora_b, need_b), like(bias, need_bias))


def _setup(ctx, inputs, output):
    x, weight, in_mask, out_mask, lora_a, lora_b, scaling, bias, backend = inputs
    _, u, z = output
    # not scaling, and not backend: [x, weight, in_mask, out_mask, lora_a, lora_b, bias]
    ctx.need = [*ctx.needs_input_grad[:6], ctx.needs_input_grad[7]]
    _, need_w, need_in, need_out, need_a, need_b, _ = ctx.need
    ctx.save_for_backward(x if need_w or need_in or need_a else None, u if need_b else None,
                          z if need_out else None, weight, in_mask, out_mask, lora_a, lora_b, bias)
    ctx.scaling, ctx.backend = scaling, backend
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _u, _z):
    if grad is None:
        return (None,) * 9
    x, u, z, weight, in_mask, out_mask, lora_a, lora_b, bias = ctx.saved_tensors
    grads = _mixed_linear_backward(
        grad, x, u, z, weight, in_mask, out_mask, lora_a, lora_b, ctx.scaling, bias, ctx.need, ctx.backend
    )
    dx, dw, din, dout, da, db, dbias = (d if wanted else None for d, wanted in zip(grads, ctx.need, strict=True))
    return dx, dw, din, dout, da, db, None, dbias, None


_mixed_linear.register_autograd(_backward, setup_context=_setup)


def check_shapes(op: str, x: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None,
                 bias: Tensor | None) -> None:
    """Shared by mixed_linear and mixed_linear_group."""
    out_features, in_features = weight.shape
    if x.shape[-1] != in_features:
        raise bad(op, f"x {tuple(x.shape)} does not match weight {tuple(weight.shape)}")
    if (lora_a is None) != (lora_b is None):
        raise bad(op, "lora_a and lora_b go together: give both or neither")
    if lora_a is not None and lora_b is not None:
        rank = lora_a.shape[0]
        if lora_a.shape != (rank, in_features) or lora_b.shape != (out_features, rank):
            raise bad(
                op,
                f"lora_a {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)} must be [r, {in_features}] and "
                f"[{out_features}, r]",
            )
    if bias is not None and bias.shape != (out_features,):
        raise bad(op, f"bias must be [{out_features}]")


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
    """out_mask * ((in_mask * x) (weight + scaling lora_b lora_a)^T + bias).

    Runs in x's dtype (under autocast in its dtype); LoRA may be fp32 beside half weights. Gradients to x, masks, LoRA
    and bias, each only if required; a frozen weight costs nothing.
    """
    op = "mixed_linear"
    check_shapes(op, x, weight, lora_a, lora_b, bias)
    if in_mask is not None and in_mask.shape != weight.shape[1:]:
        raise bad(op, f"in_mask must be [{weight.shape[1]}]")
    if out_mask is not None and out_mask.shape != weight.shape[:1]:
        raise bad(op, f"out_mask must be [{weight.shape[0]}]")
    dtype = autocast_dtype(x)
    if torch.is_autocast_enabled(x.device.type):
        x, weight = x.to(dtype), weight.to(dtype)
    if weight.dtype != dtype:
        raise bad(op, f"x is {x.dtype} and weight {weight.dtype}; they must agree outside autocast")
    bias = None if bias is None else bias.to(dtype)
    return _mixed_linear(x, weight, in_mask, out_mask, lora_a, lora_b, scaling, bias, backend)[0]
