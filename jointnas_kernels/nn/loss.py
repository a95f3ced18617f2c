"""Cross-entropy of an output projection, without the logits of all tokens in memory.

    logits = x W^T [T, V];  loss = mean over labelled tokens of logsumexp(logits) - logits[label]
    dx = (softmax(logits) - onehot(label)) W / labelled tokens,    dW = (softmax(logits) - onehot(label))^T x / the same

Both gradients (dW where it is wanted: a frozen projection needs none) are computed in the forward pass, chunk by chunk
of tokens, from the same logits (as in Liger-Kernel's fused linear cross-entropy), and only scaled by the incoming
gradient later.
At 1024 tokens x 128k words the fp32 logits, their softmax and its gradient would take 1.5 GB.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100
CHUNK = 1 << 26  # logits held at once: 256 MB in fp32


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
