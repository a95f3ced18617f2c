"""Losses over a large vocabulary, a few tokens at a time.

Cross-entropy of an output projection, without the logits of all tokens in memory:

    logits = x W^T [T, V];  loss = mean over labelled tokens of logsumexp(logits) - logits[label]
    dx = (softmax(logits) - onehot(label)) W / labelled tokens,    dW = (softmax(logits) - onehot(label))^T x / the same

Both gradients (dW where it is wanted: a frozen projection needs none) are computed in the forward pass, chunk by chunk
of tokens, from the same logits (as in Liger-Kernel's fused linear cross-entropy), and only scaled by the incoming
gradient later.
At 1024 tokens x 128k words the fp32 logits, their softmax and its gradient would take 1.5 GB.

Knowledge distillation (Hinton et al., arXiv 1503.02531) from the logits t of a teacher, at temperature T:

    loss = mean over labelled tokens of  kd T^2 sum q (log q - log p_T) + (1 - kd) (logsumexp(z) - z[label])
    dz = (kd T (p_T - q) + (1 - kd) (p_1 - onehot(label))) / labelled tokens;   p_T = softmax(z / T), q = softmax(t / T)

What stays until the backward pass is dz, in the dtype of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100
CHUNK = 1 << 26  # logits held at once by the cross-entropy of a projection: 256 MB in fp32
PARTS = {"cuda": 1 << 24, "cpu": 1 << 18}  # and by distillation, a few times; on a CPU 1 MB, which stays in its cache


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        count = (labels != IGNORE).sum().clamp_min(1) if items is None else items
        total = torch.zeros((), dtype=wide, device=x.device)
        step = max(1, CHUNK // weight.shape[0])
        for start in range(0, x.shape[0], step):
            rows = slice(start, start + step)
            target = labels[rows]
            valid = target != IGNORE
            safe = target.clamp_min(0).unsqueeze(1)
            logits = x[rows] @ weight.t()
            log_probs = logits.log_softmax(-1, dtype=wide)
            picked = log_probs.gather(1, safe)
            total -= (picked.squeeze(1) * valid).sum()
            if dx is None and dw is None:
                continue
            # three passes over the chunk: log_softmax, exp into the logits' memory, GEMM
            grad = torch.exp(log_probs, out=logits)
            grad.scatter_(1, safe, (picked.exp() - 1).to(grad.dtype))  # p - 1 of the label, rounded once
            share = (valid.to(wide) / count).to(x.dtype).unsqueeze(1)
            if dx is not None:
                dx[rows] = (grad @ weight) * share
            if dw is not None:
                dw.addmm_(grad.t(), x[rows] * share)
        ctx.save_for_backward(dx, dw)
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dx, dw = (None if d is None else (d * grads[0]).to(d.dtype) for d in ctx.saved_tensors)
        return dx, dw, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, items: Tensor | int | None = None) -> Tensor:
    """Mean cross-entropy of x [T, N] @ weight [V, N]^T against labels [T] (-100: ignored), 0 where all are ignored, as
    they may be in a batch of prompts.

    Args:
        items: a scalar that the sum is divided by (labelled tokens of all parts of a larger batch); None: the tokens
            that are labelled here.
    """
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, labels, items)  # type: ignore[no-untyped-call]
    return loss


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor | None, labels: Tensor, kd: float, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        learned = (labels != IGNORE).nonzero().squeeze(1)
        count = max(1, len(learned))
        ce, kl = (torch.zeros((), dtype=wide, device=logits.device) for _ in range(2))
        grad = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        part = PARTS.get(logits.device.type, PARTS["cuda"])
        for rows in learned.split(max(1, part // logits.shape[-1])):
            z, label = logits[rows].to(wide), labels[rows].unsqueeze(1)
            p = z.log_softmax(-1)
            picked = p.gather(1, label)
            ce -= picked.sum()
            dz = None
            if grad is not None:
                dz = p.exp_().mul_(1 - kd).scatter_(1, label, (picked.exp() - 1) * (1 - kd))
            if target is not None:
                q = (target[rows].to(wide) / temperature).log_softmax(-1)
                p = z.div_(temperature).log_softmax(-1)
                kl += torch.nn.functional.kl_div(p, q, log_target=True, reduction="sum")
                if dz is not None:
                    dz.add_(p.exp_().sub_(q.exp_()), alpha=kd * temperature)
            if grad is not None and dz is not None:
                grad[rows] = (dz / count).to(grad.dtype)
        ctx.save_for_backward(grad)
        ce, kl = ce / count, kl * (temperature**2 / count)
        ctx.mark_non_differentiable(ce, kl)
        return kd * kl + (1 - kd) * ce, ce, kl

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = ctx.saved_tensors
        return None if grad is None else (grad * grads[0]).to(grad.dtype), None, None, None, None


def distillation(
    logits: Tensor, target: Tensor | None, labels: Tensor, kd: float, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cross-entropy, T^2 KL(teacher || student)) of logits [T, V], in fp32 at least; 0 where no token is
    labelled. The loss alone has a gradient.

    Args:
        target: the teacher's logits [T, V], of which no gradient is taken; None: the cross-entropy alone.
        labels: int64 [T]; -100: the token does not count.
        kd: weight of the divergence, from 0 to 1; the cross-entropy has the rest.
        temperature: T.
    """
    if target is None:
        kd = 0.0
    found: tuple[Tensor, Tensor, Tensor] = _Distillation.apply(logits, target, labels, kd, temperature)  # type: ignore[no-untyped-call]
    return found
