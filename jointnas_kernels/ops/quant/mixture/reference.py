"""The mixture of a weight's precisions, each with its own LoRA pair (Eq. 7 of arXiv 2606.04063).

    W~ = sum_p probs[p] Q_p(W + B'_p A_p),    B'_p = scaling B_p

Q_p is the symmetric weight quantizer of spec.py with bits[p] and the ratios clip[p]. B' and A are rounded to the
weight's dtype (tensor-core operands, as autocast would); the product, the quantizer and the mixture are fp32 (fp64 for
an fp64 weight), and W~ is rounded once.

Gradients, with G = dL/dW~ and m_p = [the level was not clamped], or 1 for ``ste="identity"``:

    dB_p = scaling probs[p] (m_p * G) A_p^T        dA_p = probs[p] B'_p^T (m_p * G)        dprobs[p] = <G, Q_p>
    dclip[p] = probs[p] ds/dclip sum_group G (q - m_p w/s)        (``ste="clip"`` only)

The base weight is frozen. G never exists as a whole where it is a product of a layer's gradient and input: some rows of
it are made at a time, or tiles inside a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from jointnas_kernels.ops.core.tensors import compute_dtype, in_dtype_of
from jointnas_kernels.ops.quant.spec import quantize_groups, straight_through

ROW_TILE = 256  # rows of G held at once: 256 x 14336 fp32 is 14 MB


class Mixture(NamedTuple):
    """What defines W~ and its gradients, in the order of the registered operators' arguments."""

    weight: Tensor  # [O, I]
    lora_a: Tensor  # [P, r, I]
    lora_b: Tensor  # [P, O, r]
    probs: Tensor  # [P]
    clip: Tensor | None  # [P, O, I / group_size]
    scaling: float
    bits: Sequence[int]
    group_size: int
    ste: str = "identity"

    def dense(self) -> Mixture:
        """With contiguous tensors."""
        weight, a, b, probs, clip = (None if t is None else t.contiguous() for t in self[:5])
        return Mixture(weight, a, b, probs, clip, *self[5:])  # type: ignore[arg-type]


class Upstream(NamedTuple):
    """G [O, I]: given, or grad^T x of grad [T, O] and x [T, I]."""

    grad: Tensor
    x: Tensor | None = None

    @property
    def height(self) -> int:
        """O."""
        return self.grad.shape[0 if self.x is None else 1]

    def rows(self, tile: slice) -> Tensor:
        """G[tile]."""
        return self.grad[tile] if self.x is None else self.grad[:, tile].T @ self.x


class Want(NamedTuple):
    """Which gradients to compute."""

    lora: bool
    probs: bool
    clip: bool


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # da, db, dprobs, dclip


def rounded_lora(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """(A, B') in the weight's dtype."""
    return lora_a.to(weight.dtype), (lora_b.to(compute_dtype(weight.dtype)) * scaling).to(weight.dtype)


def forward(mix: Mixture, scale_dtype: torch.dtype | None = None) -> Tensor:
    """W~ in differentiable torch; ``scale_dtype``: what scales are rounded to, if not the weight's dtype."""
    if isinstance(mix.weight, FakeTensor):  # shapes alone are wanted, and an operation on fake tensors takes 1 ms
        return torch.empty_like(mix.weight)
    dtype = compute_dtype(mix.weight.dtype)
    base = mix.weight.detach().to(dtype)
    a, b = (t.to(dtype) for t in rounded_lora(mix.weight, mix.lora_a, mix.lora_b, mix.scaling))
    total = torch.zeros_like(base)
    for p, width in enumerate(mix.bits):
        w, clip = base + b[p] @ a[p], None if mix.clip is None else mix.clip[p]
        levels = quantize_groups(w, width, mix.group_size, clip, scale_dtype=scale_dtype or mix.weight.dtype)
        q = levels.values.flatten(-2)
        total = total + mix.probs[p].to(dtype) * (straight_through(q, w) if mix.ste == "identity" else q)
    return total.to(mix.weight.dtype)


def tiles(rows: int, step: int = ROW_TILE) -> list[slice]:
    """The rows, ``step`` at a time."""
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def gradients(mix: Mixture, upstream: Upstream, want: Want) -> Gradients:
    """The closed form above; None for each gradient nobody asked for."""
    dtype, group = compute_dtype(mix.weight.dtype), (-1, mix.group_size)
    a, b = (t.to(dtype) for t in rounded_lora(mix.weight, mix.lora_a, mix.lora_b, mix.scaling))
    probs = mix.probs.to(dtype)
    wanted = (want.lora, want.lora, want.probs, want.clip)
    da, db, dprobs, dclip = (
        like.new_zeros(like.shape, dtype=dtype) if needed and like is not None else None
        for like, needed in zip(mix[1:5], wanted, strict=True)
    )
    for rows in () if isinstance(mix.weight, FakeTensor) else tiles(mix.weight.shape[0]):
        grad, base = upstream.rows(rows).to(dtype), mix.weight[rows].to(dtype)
        for p, width in enumerate(mix.bits):
            masked = grad
            if want.probs or mix.ste == "clip":
                w, clip = base + b[p, rows] @ a[p], None if mix.clip is None else mix.clip[p, rows]
                levels = quantize_groups(w, width, mix.group_size, clip, scale_dtype=mix.weight.dtype)
                g = grad.unflatten(-1, group)
                if dprobs is not None:
                    dprobs[p] += (g * levels.q * levels.s).sum()
                if dclip is not None:
                    slope = (g * (levels.q - levels.v * levels.inside)).sum(-1)
                    dclip[p, rows] = probs[p] * slope * levels.slope.squeeze(-1)
                if mix.ste == "clip":
                    masked = (g * levels.inside).flatten(-2)
            if da is not None and db is not None:
                db[p, rows] = mix.scaling * probs[p] * (masked @ a[p].T)
                da[p] += probs[p] * (b[p, rows].T @ masked)
    found = zip((da, db, dprobs, dclip), mix[1:5], strict=True)
    da, db, dprobs, dclip = (in_dtype_of(total, like) for total, like in found)
    return da, db, dprobs, dclip
