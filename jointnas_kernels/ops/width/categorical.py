"""ReinMax: a hard categorical sample whose gradient estimate is exact to second order.

Forward: D ~ Cat(p), p = softmax(logits), as a one-hot vector (Liu et al., arXiv 2304.08612, Algorithm 2).
Backward, with g = dL/dD, J(p) v = p * (v - <p, v>) the softmax Jacobian, and q = (D + softmax(logits / tau)) / 2:

    dlogits = J(q) 2g  -  J(p) g / 2

At tau = 1 its expectation is Heun's rule applied to the exact gradient, hence exact when L is quadratic in D.
"""

import torch
from torch import Tensor

from jointnas_kernels.ops.core.dispatch import bad, compute_dtype, custom_op


def _softmax_vjp(p: Tensor, v: Tensor) -> Tensor:
    return p * (v - (p * v).sum(-1, keepdim=True))


@custom_op(
    "reinmax",
    "(Tensor logits, Tensor index, float tau) -> Tensor",
)
def _reinmax(logits: Tensor, index: Tensor, tau: float) -> Tensor:
    return torch.zeros_like(logits).scatter_(-1, index.unsqueeze(-1), 1.0)


@_reinmax.register_fake
def _(logits: Tensor, index: Tensor, tau: float) -> Tensor:
    return torch.empty_like(logits)


@custom_op(
    "reinmax_backward",
    "(Tensor grad, Tensor logits, Tensor index, float tau) -> Tensor",
)
def _reinmax_backward(grad: Tensor, logits: Tensor, index: Tensor, tau: float) -> Tensor:
    acc = compute_dtype(logits)
    g, theta = grad.to(acc), logits.to(acc)
    p = theta.softmax(-1)
    sample = torch.zeros_like(theta).scatter_(-1, index.unsqueeze(-1), 1.0)
    q = 0.5 * (sample + (theta / tau).softmax(-1))
    return (_softmax_vjp(q, 2.0 * g) - 0.5 * _softmax_vjp(p, g)).to(logits.dtype)


@_reinmax_backward.register_fake
def _(grad: Tensor, logits: Tensor, index: Tensor, tau: float) -> Tensor:
    return torch.empty_like(logits)


def _setup(ctx, inputs, output):
    logits, index, tau = inputs
    ctx.save_for_backward(logits, index)
    ctx.tau = tau


def _backward(ctx, grad):
    logits, index = ctx.saved_tensors
    return _reinmax_backward(grad, logits, index, ctx.tau), None, None


_reinmax.register_autograd(_backward, setup_context=_setup)


def reinmax(logits: Tensor, tau: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """One-hot sample of softmax(logits) along the last dim, with the ReinMax gradient to ``logits``.

    Args:
        logits: [..., K].
        tau: temperature of the backward only; >= 1 trades bias for variance.
        generator: source of the draw (on the logits' device).
    """
    if logits.dim() < 1 or not logits.is_floating_point():
        raise bad("reinmax", f"logits must be floating point [..., K], " f"got {logits.dtype} {tuple(logits.shape)}")
    if tau <= 0:
        raise bad("reinmax", f"tau must be positive, got {tau}")
    probs = logits.detach().to(compute_dtype(logits)).softmax(-1)
    flat = probs.reshape(-1, probs.shape[-1])
    index = torch.multinomial(flat, 1, generator=generator).reshape(logits.shape[:-1])
    return _reinmax(logits, index, tau)
