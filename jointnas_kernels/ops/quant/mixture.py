"""The mixture of a weight's precisions, each with its own LoRA pair:

    W~ = sum_p probs[p] · Q_p(W + B'_p A_p),    B'_p = scaling · B_p

Q_p is ``fake_quant_weight`` (signed, symmetric, groups along the input) with bits[p] and the ratios clip[p].

Shapes: weight [O, I], lora_a [P, r, I], lora_b [P, O, r], probs [P], clip [P, O, I / group_size], result [O, I] in the
weight's dtype. B' and A are rounded to the weight's dtype (tensor-core operands, as autocast would); the product, the
quantizer and the mixture are fp32 (fp64 for an fp64 weight), and W~ is rounded once.

Gradients, with G = dL/dW~ and m_p the quantizer's straight-through mask (1 for ``ste="identity"``):
    dB_p = scaling · probs[p] · (m_p ⊙ G) A_pᵀ      dA_p = probs[p] · B'_pᵀ (m_p ⊙ G)      dprobs[p] = ⟨G, Q_p⟩
    dclip[p] = probs[p] · ds/dclip · sum_group G (q - m_p w/s)      (``ste="clip"`` only)
The base weight is frozen: it never gets a gradient. ``quant_lora_linear`` is the fused layer that avoids forming G.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.ops.core import cpu_calls as cpu
from jointnas_kernels.ops.core.dispatch import custom_op, no_grad_slot, resolve, without_autocast
from jointnas_kernels.ops.quant.mixture_cuda import (
    mix_forward_cuda,
    mix_probs_cuda,
    most_columns,
    shared_limit,
    unsupported,
)
from jointnas_kernels.ops.quant.mixture_triton import mix_backward_triton, mix_forward_triton
from jointnas_kernels.ops.quant.weights import _ste, check_clip, check_quantizer, compute_dtype, quantize_levels

MODES = ("weight", "arch", "full")
BACKENDS = ("cuda", "triton", "cpu", "reference")
ROW_TILE = 256  # rows of dW held at once by the reference: 256 x 14336 fp32 is 14 MB


# ---- reference ----


def rounded_lora(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """(A, scaling · B) rounded to the weight's dtype."""
    a = lora_a.to(weight.dtype)
    b = (lora_b.to(compute_dtype(weight.dtype)) * scaling).to(weight.dtype)
    return a, b


def quant_lora_mix_reference(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bits: Sequence[int],
    probs: Tensor,
    group_size: int,
    clip: Tensor | None = None,
    ste: str = "identity",
    scale_dtype: torch.dtype | None = None,
) -> Tensor:
    """The op in plain differentiable torch; ``scale_dtype`` overrides what scales are rounded to (for fp64 tests)."""
    dtype = compute_dtype(weight.dtype)
    base = weight.detach().to(dtype)
    a, b = rounded_lora(weight, lora_a, lora_b, scaling)
    out = torch.zeros_like(base)
    for p, width in enumerate(bits):
        w = (base + b[p].to(dtype) @ a[p].to(dtype)).unflatten(-1, (-1, group_size))
        levels = quantize_levels(w, width, None if clip is None else clip[p], scale_dtype=scale_dtype or weight.dtype)
        q = levels.q * levels.s
        if ste == "identity":
            q = _ste(q, w)
        out = out + probs[p].to(dtype) * q.flatten(-2)
    return out.to(weight.dtype)


class MixGradients:
    """The gradients above in closed form, one row tile of G at a time, so that G never exists as a whole."""

    def __init__(
        self,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        probs: Tensor,
        clip: Tensor | None,
        scaling: float,
        bits: Sequence[int],
        group_size: int,
        ste: str,
        want: tuple[bool, bool, bool],
    ) -> None:
        self.dtype = dtype = compute_dtype(weight.dtype)
        self.weight, self.clip, self.bits, self.group_size, self.ste = weight, clip, bits, group_size, ste
        self.scaling, self.probs = scaling, probs.to(dtype)
        self.a, self.b = (t.to(dtype) for t in rounded_lora(weight, lora_a, lora_b, scaling))
        self.want_lora, self.want_probs, self.want_clip = want
        new = weight.new_zeros
        self.da = new(lora_a.shape, dtype=dtype) if self.want_lora else None
        self.db = new(lora_b.shape, dtype=dtype) if self.want_lora else None
        self.dprobs = new(probs.shape, dtype=dtype) if self.want_probs else None
        self.dclip = new(clip.shape, dtype=dtype) if self.want_clip and clip is not None else None

    def add(self, rows: slice, grad: Tensor) -> None:
        """Take in ``grad`` = G[rows]."""
        grad = grad.to(self.dtype)
        base = self.weight[rows].to(self.dtype)
        groups = (-1, self.group_size)
        for p, width in enumerate(self.bits):
            masked = grad
            if self.want_probs or self.ste == "clip":
                w = (base + self.b[p, rows] @ self.a[p]).unflatten(-1, groups)
                clip = None if self.clip is None else self.clip[p, rows]
                levels = quantize_levels(w, width, clip, scale_dtype=self.weight.dtype)
                g = grad.unflatten(-1, groups)
                if self.dprobs is not None:
                    self.dprobs[p] += (g * levels.q * levels.s).sum()
                if self.dclip is not None:
                    slope = (g * (levels.q - levels.v * levels.inside)).sum(-1)
                    self.dclip[p, rows] = self.probs[p] * slope * levels.unit.squeeze(-1)
                if self.ste == "clip":
                    masked = (g * levels.inside).flatten(-2)
            if self.da is not None and self.db is not None:
                self.db[p, rows] = self.scaling * self.probs[p] * (masked @ self.a[p].T)
                self.da[p] += self.probs[p] * (self.b[p, rows].T @ masked)


def tiles(rows: int) -> list[slice]:
    """The rows in tiles of ROW_TILE."""
    return [slice(start, min(start + ROW_TILE, rows)) for start in range(0, rows, ROW_TILE)]


# ---- registration ----


def choose(op: str, backend: str | None, weight: Tensor, rank: int, precisions: int, group_size: int) -> str:
    """The backend for these arguments; by itself "cuda" only where its kernel takes them."""
    reason = unsupported(weight, rank, precisions, group_size)
    automatic = backend is None or backend == "auto"
    chosen = resolve(op, backend, weight, available=BACKENDS[1:] if automatic and reason else BACKENDS)
    if chosen == "cuda" and reason:
        raise JointNASError(f"{op}: backend 'cuda' cannot run: {reason}")
    return chosen


@custom_op(
    "quant_lora_mix",
    "(Tensor weight, Tensor lora_a, Tensor lora_b, Tensor probs, Tensor? clip, float scaling, int[] bits, "
    "int group_size, str ste, str mode, str? backend) -> Tensor"
)
def _quant_lora_mix(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    probs: Tensor,
    clip: Tensor | None,
    scaling: float,
    bits: Sequence[int],
    group_size: int,
    ste: str,
    mode: str,
    backend: str | None,
) -> Tensor:
    return mix_forward(weight, lora_a, lora_b, probs, clip, scaling, bits, group_size, backend)


@_quant_lora_mix.register_fake
def _(weight, lora_a, lora_b, probs, clip, scaling, bits, group_size, ste, mode, backend):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@custom_op(
    "quant_lora_mix_backward",
    "(Tensor grad, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor probs, Tensor? clip, float scaling, "
    "int[] bits, int group_size, str ste, bool want_lora, bool want_probs, bool want_clip, str? backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
def _quant_lora_mix_backward(
    grad: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    probs: Tensor,
    clip: Tensor | None,
    scaling: float,
    bits: Sequence[int],
    group_size: int,
    ste: str,
    want_lora: bool,
    want_probs: bool,
    want_clip: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(weight):
        return mix_backward(
            grad, None, weight, lora_a, lora_b, probs, clip, scaling, bits, group_size, ste,
            (want_lora, want_probs, want_clip), backend,
        )  # fmt: skip


@_quant_lora_mix_backward.register_fake
def _(
    grad, weight, lora_a, lora_b, probs, clip, scaling, bits, group_size, ste, want_lora, want_probs, want_clip, backend
):
    return fake_gradients(weight, lora_a, lora_b, probs, clip, want_lora, want_probs, want_clip)


def mix_forward(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    probs: Tensor,
    clip: Tensor | None,
    scaling: float,
    bits: Sequence[int],
    group_size: int,
    backend: str | None,
) -> Tensor:
    """W~ by ``backend``; runs inside the custom ops, below autograd."""
    backend = choose("quant_lora_mix", backend, weight, lora_a.shape[1], len(bits), group_size)
    with without_autocast(weight):
        if backend == "triton":
            return mix_forward_triton(weight, lora_a, lora_b, probs, clip, scaling, bits, group_size)
        if backend == "cuda":
            return mix_forward_cuda(weight, lora_a, lora_b, probs, clip, scaling, bits, group_size)
        if backend == "cpu":
            return cpu.quant_lora_mix(weight, lora_a, lora_b, probs, clip, scaling, bits, group_size)
        return quant_lora_mix_reference(weight, lora_a, lora_b, scaling, bits, probs, group_size, clip).contiguous()


def mix_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    probs: Tensor,
    clip: Tensor | None,
    scaling: float,
    bits: Sequence[int],
    group_size: int,
    ste: str,
    want: tuple[bool, bool, bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(da, db, dprobs, dclip) of dW = gradᵀ x with grad [T, O] and x [T, I], or of dW = grad where x is None."""
    chosen = choose("quant_lora_mix", backend, weight, lora_a.shape[1], len(bits), group_size)
    only_probs = chosen == "cuda" and want == (False, True, False)
    if only_probs and most_columns(group_size, len(bits), clip is not None, True, shared_limit(weight)):
        dprobs = mix_probs_cuda(grad, x, weight, lora_a, lora_b, probs, clip, scaling, bits, group_size)
        return no_grad_slot(weight), no_grad_slot(weight), dprobs, no_grad_slot(weight)
    if chosen in ("cuda", "triton"):
        return mix_backward_triton(grad, x, weight, lora_a, lora_b, probs, clip, scaling, bits, group_size, ste, want)
    if chosen == "cpu":
        return cpu.quant_lora_mix_backward(
            lambda rows: grad[rows] if x is None else grad[:, rows].T @ x,
            weight, lora_a, lora_b, probs, clip, scaling, bits, group_size, ste, want,
        )
    sums = MixGradients(weight, lora_a, lora_b, probs, clip, scaling, bits, group_size, ste, want)
    for rows in tiles(weight.shape[0]):
        sums.add(rows, grad[rows] if x is None else grad[:, rows].T @ x)
    return finish(sums, lora_a, lora_b, probs, clip)


def finish(
    sums: MixGradients, lora_a: Tensor, lora_b: Tensor, probs: Tensor, clip: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums in the dtypes of their inputs; an empty tensor for each gradient nobody asked for."""
    pairs = ((sums.da, lora_a), (sums.db, lora_b), (sums.dprobs, probs), (sums.dclip, clip))
    da, db, dprobs, dclip = (
        no_grad_slot(lora_a) if d is None or like is None else d.to(like.dtype) for d, like in pairs
    )
    return da, db, dprobs, dclip


def fake_gradients(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    probs: Tensor,
    clip: Tensor | None,
    want_lora: bool,
    want_probs: bool,
    want_clip: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of (da, db, dprobs, dclip)."""
    wanted = (want_lora, want_lora, want_probs, want_clip)
    da, db, dprobs, dclip = (
        torch.empty_like(like, memory_format=torch.contiguous_format)
        if want and like is not None
        else no_grad_slot(weight)
        for like, want in zip((lora_a, lora_b, probs, clip), wanted, strict=True)
    )
    return da, db, dprobs, dclip


def wanted(ctx, first: int) -> tuple[bool, bool, bool]:
    """(lora, probs, clip) gradients to compute, with lora_a at input ``first``, lora_b, probs, clip after it."""
    a, b, probs, clip = ctx.needs_input_grad[first : first + 4]
    return (
        (a or b) and ctx.mode != "arch",
        probs and ctx.mode != "weight",
        clip and ctx.mode != "arch" and ctx.ste == "clip",
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.scaling, ctx.bits, ctx.group_size, ctx.ste, ctx.mode, ctx.backend = inputs[5:]


def _backward(ctx, grad):
    lora, probs, clip = want = wanted(ctx, 1)
    none = (None,) * 6
    if not any(want):
        return None, None, None, None, None, *none
    da, db, dprobs, dclip = _quant_lora_mix_backward(
        grad, *ctx.saved_tensors, ctx.scaling, ctx.bits, ctx.group_size, ctx.ste, *want, ctx.backend
    )
    return None, da if lora else None, db if lora else None, dprobs if probs else None, dclip if clip else None, *none


_quant_lora_mix.register_autograd(_backward, setup_context=_setup_context)


# ---- public ----


def check_mix(
    op: str,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bits: Sequence[int],
    probs: Tensor,
    group_size: int,
    clip: Tensor | None,
    ste: str,
    mode: str,
) -> None:
    """Raise JointNASError unless all arguments fit together."""
    for width in bits:
        check_quantizer(op, weight, width, group_size, ste)
    if mode not in MODES:
        raise unknown("mode", mode, MODES, where=op)
    (o, i), p = weight.shape, len(bits)
    if p < 1 or tuple(probs.shape) != (p,):
        raise JointNASError(f"{op}: probs needs one entry per bit width {list(bits)}, got shape {tuple(probs.shape)}")
    r = lora_a.shape[1] if lora_a.dim() == 3 else -1
    if tuple(lora_a.shape) != (p, r, i) or tuple(lora_b.shape) != (p, o, r):
        raise JointNASError(
            f"{op}: with a weight of shape {(o, i)} and {p} bit widths, lora_a must be [{p}, r, {i}] and "
            f"lora_b [{p}, {o}, r], got {tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
        )
    check_clip(op, clip, (p, o, i // group_size))


def quant_lora_mix(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bits: Sequence[int],
    probs: Tensor,
    group_size: int,
    clip: Tensor | None = None,
    ste: str = "identity",
    mode: str = "full",
    backend: str | None = None,
) -> Tensor:
    """W~ [O, I]. ``mode`` says which gradients exist: "weight" LoRA and clip, "arch" probs, "full" all of them."""
    check_mix("quant_lora_mix", weight, lora_a, lora_b, bits, probs, group_size, clip, ste, mode)
    return _quant_lora_mix(
        weight, lora_a, lora_b, probs, clip, float(scaling), list(bits), group_size, ste, mode, backend
    )
