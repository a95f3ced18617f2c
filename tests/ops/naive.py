"""The width ops written a second time, as plainly as possible, for tests: autograd of these is the truth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mixed_rmsnorm(x: Tensor, weight: Tensor, alpha: Tensor, sizes: Sequence[int], eps: float,
                  in_mask: Tensor | None) -> Tensor:
    out = torch.zeros_like(x)
    for a, n in zip(alpha, sizes, strict=True):
        part = x[..., :n] / torch.sqrt((x[..., :n] ** 2).mean(-1, keepdim=True) + eps) * weight[:n]
        out = out + a * torch.nn.functional.pad(part, (0, x.shape[-1] - n))
    return out if in_mask is None else out * in_mask


def head_rmsnorm(x: Tensor, weight: Tensor, mask: Tensor, alpha: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    """Each choice's dims gathered, normalised as a head of their own, and scattered back."""
    full = x.shape[-1]
    out = torch.zeros_like(x)
    for a, d in zip(alpha, dims, strict=True):
        index = torch.tensor([half + i for half in (0, full // 2) for i in range(0, full // 2, full // d)])
        part = (x * mask)[..., index]
        part = part / torch.sqrt((part**2).mean(-1, keepdim=True) + eps) * weight[index]
        out = out + a * torch.zeros_like(x).index_copy(-1, index, part)
    return out


def masked_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_mask: Tensor, k_mask: Tensor) -> tuple[Tensor, ...]:
    """Each pair (i, i + D/2) as a complex number times cos + i sin of its two halves, element by element."""

    def rotate(x: Tensor, mask: Tensor) -> Tensor:
        x, half = (x * mask).transpose(1, 2), x.shape[-1] // 2
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        out = [x[..., i] * c[..., i] - x[..., i + half] * s[..., i] for i in range(half)]
        out += [x[..., i + half] * c[..., i + half] + x[..., i] * s[..., i + half] for i in range(half)]
        return torch.stack(out, dim=-1)

    return rotate(q, q_mask), rotate(k, k_mask)


def masked_swiglu(gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor) -> Tensor:
    a = out_mask * gate
    return a / (1 + torch.exp(-a)) * (out_mask * up) * in_mask


def gated_residual(h: Tensor, y: Tensor, mask: Tensor | None, gate: Tensor | None, x: Tensor | None) -> Tensor:
    z = h + (y if mask is None else mask * y)
    return z if gate is None or x is None else x + gate * (z - x)


def channel_mask(x: Tensor, mask: Tensor) -> Tensor:
    return x * mask


def mixed_linear(
    x: Tensor, weight: Tensor, alpha_in: Tensor, sizes_in: Sequence[int], alpha_out: Tensor, sizes_out: Sequence[int],
    lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, bias: Tensor | None,
) -> Tensor:
    """The paper's Eq. 5: every (input, output) choice as its own sliced layer, weighted and padded."""
    full = weight if lora_a is None or lora_b is None else weight + scaling * lora_b @ lora_a
    out = x.new_zeros(*x.shape[:-1], weight.shape[0])
    for a, n in zip(alpha_in, sizes_in, strict=True):
        for b, m in zip(alpha_out, sizes_out, strict=True):
            part = x[..., :n] @ full[:m, :n].T
            out = out + a * b * torch.nn.functional.pad(part, (0, weight.shape[0] - m))
    if bias is not None:
        for b, m in zip(alpha_out, sizes_out, strict=True):
            out = out + b * torch.nn.functional.pad(bias[:m], (0, weight.shape[0] - m))
    return out


def strided_pair_index(D: int, d: int) -> Tensor:
    """[d]: the dims that a d-wide head keeps of a D-wide one: rotate-half pairs (i, i + D/2), i in multiples of D/d."""
    first = torch.arange(0, D // 2, D // d)
    return torch.cat([first, first + D // 2])


def strided_pair_mask(alpha: Tensor, dims: Sequence[int], D: int) -> Tensor:
    """[D]: the sum of alpha over the head_dims that keep a dim."""
    hot = [torch.zeros(D).index_fill(0, strided_pair_index(D, d), 1.0) for d in dims]
    return (torch.stack(hot, -1) * alpha).sum(-1)
