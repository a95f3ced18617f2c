"""masked_swiglu: the MLP's gate, with the intermediate OUT mask and down_proj's IN mask folded in.

    a = r * gate,  v = r * up,  out = silu(a) * v * c         gate, up [..., I] any float; r, c [I] fp32
    with s = sigmoid(a), f = a s, f' = s (1 + a (1 - s)) and g = dL/dout:
    dgate = g c v f' r      dup = g c f r
    dc = sum g f v          dr = sum g c (v f' gate + f up)    (sums over rows; only when asked for)

Nothing but gate and up is saved: the backward recomputes the sigmoid.
"""

import torch
from torch import Tensor

from jointnas_kernels.ops._dispatch import check, compute_dtype, no_grad_slot, resolve


def reference(gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor) -> Tensor:
    acc = compute_dtype(gate)
    r, c = out_mask.to(acc), in_mask.to(acc)
    return (torch.nn.functional.silu(r * gate.to(acc)) * (r * up.to(acc)) * c).to(gate.dtype)


def reference_backward(
    grad: Tensor, gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, need_out: bool, need_in: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = compute_dtype(gate)
    width = gate.shape[-1]
    g, x, u, r, c = grad.to(acc), gate.to(acc), up.to(acc), out_mask.to(acc), in_mask.to(acc)
    a, v = r * x, r * u
    s = torch.sigmoid(a)
    f, slope = a * s, s * (1 + a * (1 - s))
    gc = g * c
    dgate, dup = (gc * v * slope * r).to(gate.dtype), (gc * f * r).to(up.dtype)
    dr = (gc * (v * slope * x + f * u)).reshape(-1, width).sum(0).to(out_mask.dtype) if need_out else no_grad_slot(gate)
    dc = (g * f * v).reshape(-1, width).sum(0).to(in_mask.dtype) if need_in else no_grad_slot(gate)
    return dgate, dup, dr, dc


@torch.library.custom_op(
    "jointnas::masked_swiglu",
    mutates_args=(),
    schema="(Tensor gate, Tensor up, Tensor out_mask, Tensor in_mask, str? backend) -> Tensor",
)
def _masked_swiglu(gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, backend: str | None) -> Tensor:
    resolve("masked_swiglu", backend, gate, ("reference",))
    return reference(gate, up, out_mask, in_mask).contiguous()


@_masked_swiglu.register_fake
def _(gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, backend: str | None) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@torch.library.custom_op(
    "jointnas::masked_swiglu_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor gate, Tensor up, Tensor out_mask, Tensor in_mask, bool need_out, bool need_in, "
    "str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _masked_swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, need_out: bool, need_in: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    resolve("masked_swiglu", backend, gate, ("reference",))
    dgate, dup, dr, dc = reference_backward(grad, gate, up, out_mask, in_mask, need_out, need_in)
    return dgate.contiguous(), dup.contiguous(), dr, dc


@_masked_swiglu_backward.register_fake
def _(
    grad: Tensor, gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, need_out: bool, need_in: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    dr = torch.empty_like(out_mask) if need_out else no_grad_slot(gate)
    dc = torch.empty_like(in_mask) if need_in else no_grad_slot(gate)
    return dgate, dup, dr, dc


def _setup(ctx, inputs, output):
    gate, up, out_mask, in_mask, backend = inputs
    ctx.save_for_backward(gate, up, out_mask, in_mask)
    ctx.backend = backend


def _backward(ctx, grad):
    gate, up, out_mask, in_mask = ctx.saved_tensors
    need_out, need_in = ctx.needs_input_grad[2:4]
    dgate, dup, dr, dc = torch.ops.jointnas.masked_swiglu_backward(
        grad, gate, up, out_mask, in_mask, need_out, need_in, ctx.backend
    )
    return dgate, dup, dr if need_out else None, dc if need_in else None, None


_masked_swiglu.register_autograd(_backward, setup_context=_setup)


def masked_swiglu(gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, backend: str | None = None) -> Tensor:
    """silu(out_mask * gate) * (out_mask * up) * in_mask along the last dim; gradients to all four."""
    check(gate.shape == up.shape and gate.dtype == up.dtype, "masked_swiglu",
          f"gate {gate.dtype} {tuple(gate.shape)} and up {up.dtype} {tuple(up.shape)} differ")
    for name, mask in (("out_mask", out_mask), ("in_mask", in_mask)):
        check(mask.shape == gate.shape[-1:], "masked_swiglu",
              f"{name} {tuple(mask.shape)} does not match gate {tuple(gate.shape)}")
    return torch.ops.jointnas.masked_swiglu(gate, up, out_mask, in_mask, backend)
