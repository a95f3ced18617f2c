"""reinmax: a hard categorical sample whose gradient estimate is exact to second order.

Backward, with D the one-hot sample, g = dL/dD, J(p) v = p * (v - <p, v>) the softmax Jacobian, p = softmax(logits) and
q = (D + softmax(logits / tau)) / 2:

    dlogits = J(q) 2g  -  J(p) g / 2

At tau = 1 its expectation is Heun's rule applied to the exact gradient, hence exact when L is quadratic in D.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import bad, compute_dtype


def _softmax_vjp(p: Tensor, v: Tensor) -> Tensor:
    return p * (v - (p * v).sum(-1, keepdim=True))


def _reference(logits: Tensor, index: Tensor, tau: float) -> Tensor:
    return torch.zeros_like(logits).scatter_(-1, index.unsqueeze(-1), 1.0)


def _reference_backward(grad: Tensor, logits: Tensor, index: Tensor, tau: float, need: Sequence[bool]) -> Tensor:
    acc = compute_dtype(logits.dtype)
    g, theta = grad.to(acc), logits.to(acc)
    p = theta.softmax(-1)
    q = 0.5 * (_reference(theta, index, tau) + (theta / tau).softmax(-1))
    return (_softmax_vjp(q, 2.0 * g) - 0.5 * _softmax_vjp(p, g)).to(logits.dtype)


_op = Op("reinmax", {"reference": _reference}, {"reference": _reference_backward}, frozen=("index",))


def reinmax(logits: Tensor, tau: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """A one-hot sample of softmax(logits) along the last dim, its gradient estimated by ReinMax.

    Source: arXiv 2304.08612, Algorithm 2.

    Args:
        logits: [..., K] in any floating dtype.
        tau: temperature of the backward pass only; >= 1 trades bias for variance.
        generator: source of the draw, on the logits' device.

    Returns:
        [..., K] in the dtype of logits: zeros and a one. Gradient to logits, computed in fp32 (fp64 for fp64).

    Raises:
        JointNASError: logits that are no floating-point vectors, or tau <= 0.
    """
    if logits.dim() < 1 or not logits.is_floating_point():
        raise bad("reinmax", f"logits must be floating point [..., K], got {logits.dtype} {tuple(logits.shape)}")
    if tau <= 0:
        raise bad("reinmax", f"tau must be positive, got {tau}")
    probs = logits.detach().to(compute_dtype(logits.dtype)).softmax(-1)
    flat = probs.reshape(-1, probs.shape[-1])
    index = torch.multinomial(flat, 1, generator=generator).reshape(logits.shape[:-1])
    return _op(logits, index, tau, None)
