"""channel_mask: y = x * mask along the last dim.

    x [..., N] any float, mask [N] fp32  ->  y [..., N] in x's dtype
    dx = g * mask          dmask = sum over rows of g * x   (only when asked for)

Used where no other elementwise kernel runs next to the mask: the attention output (V's OUT mask folded with o_proj's
IN mask) and the general masks of ``mixed_linear``.
"""

import torch
from torch import Tensor

from jointnas_kernels.ops._dispatch import check, compute_dtype, no_grad_slot, resolve


def reference(x: Tensor, mask: Tensor) -> Tensor:
    acc = compute_dtype(x)
    return (x.to(acc) * mask.to(acc)).to(x.dtype)


def reference_backward(grad: Tensor, x: Tensor, mask: Tensor, need_mask: bool) -> tuple[Tensor, Tensor]:
    acc = compute_dtype(x)
    g = grad.to(acc)
    dx = (g * mask.to(acc)).to(x.dtype)
    dmask = (g * x.to(acc)).reshape(-1, x.shape[-1]).sum(0).to(mask.dtype) if need_mask else no_grad_slot(x)
    return dx, dmask


def forward(x: Tensor, mask: Tensor, backend: str) -> Tensor:
    return reference(x, mask).contiguous()


def backward(grad: Tensor, x: Tensor, mask: Tensor, need_mask: bool, backend: str) -> tuple[Tensor, Tensor]:
    """dx and dmask (empty unless asked for; then x is not read and any tensor may stand for it)."""
    dx, dmask = reference_backward(grad, x, mask, need_mask)
    return dx.contiguous(), dmask


@torch.library.custom_op(
    "jointnas::channel_mask", mutates_args=(), schema="(Tensor x, Tensor mask, str? backend) -> Tensor"
)
def _channel_mask(x: Tensor, mask: Tensor, backend: str | None) -> Tensor:
    return forward(x, mask, resolve("channel_mask", backend, x))


@_channel_mask.register_fake
def _(x: Tensor, mask: Tensor, backend: str | None) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op(
    "jointnas::channel_mask_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor mask, bool need_mask, str? backend) -> (Tensor, Tensor)",
)
def _channel_mask_backward(
    grad: Tensor, x: Tensor, mask: Tensor, need_mask: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    return backward(grad, x, mask, need_mask, resolve("channel_mask", backend, x))


@_channel_mask_backward.register_fake
def _(grad: Tensor, x: Tensor, mask: Tensor, need_mask: bool, backend: str | None) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, torch.empty_like(mask) if need_mask else no_grad_slot(x)


def _setup(ctx, inputs, output):
    x, mask, backend = inputs
    ctx.need_mask = ctx.needs_input_grad[1]
    # without a mask gradient only x's metadata is needed, so x itself is not kept alive
    ctx.save_for_backward(x if ctx.need_mask else None, mask)
    ctx.backend = backend


def _backward(ctx, grad):
    x, mask = ctx.saved_tensors
    dx, dmask = torch.ops.jointnas.channel_mask_backward(
        grad, grad if x is None else x, mask, ctx.need_mask, ctx.backend
    )
    return dx, dmask if ctx.need_mask else None, None


_channel_mask.register_autograd(_backward, setup_context=_setup)


def channel_mask(x: Tensor, mask: Tensor, backend: str | None = None) -> Tensor:
    """x * mask along the last dim; gradients to x and mask."""
    check(mask.shape == x.shape[-1:], "channel_mask", f"mask {tuple(mask.shape)} does not match x {tuple(x.shape)}")
    return torch.ops.jointnas.channel_mask(x, mask, backend)
