"""quant_lora_linear: y = x W~^T + bias with W~ = quant_lora_mix(...), whose backward never forms dL/dW~ = g^T x.

That would be 64 MB in fp32 for one 4096 x 4096 weight, and 3x that in traffic. With U = x [A_1; ..; A_P]^T and
V = g [B'_1 .. B'_P], both [T, P r]:

    weight step, ste="identity"   dx = g W~        dB_p = scaling probs[p] g^T U_p        dA_p = probs[p] V_p^T x
    arch step or ste="clip"       the reductions of quant_lora_mix over tiles of g^T x: in the epilogue of one GEMM
                                  that recomputes Q_p of its tile (Triton), or some rows at a time through the
                                  library's GEMM (the others; 16 MB that stay in cache)
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import autocast_dtype, bad, compute_dtype, without_autocast
from jointnas_kernels.ops.quant.mixture.op import IMPLEMENTATIONS, checked, choose
from jointnas_kernels.ops.quant.mixture.reference import Gradients, Mixture, Upstream, Want


def _forward(
    how: str, x: Tensor, bias: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, probs: Tensor,
    clip: Tensor | None, scaling: float, bits: Sequence[int], group_size: int, ste: str, recompute: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y, and W~ in the dtype of x where it is kept for dx."""
    mix = Mixture(weight, lora_a, lora_b, probs, clip, scaling, bits, group_size, ste)
    with without_autocast(x):
        mixed = IMPLEMENTATIONS[how].forward(mix).to(x.dtype)
        y = F.linear(x, mixed, None if bias is None else bias.to(x.dtype))
    return y, None if recompute else mixed


def _backward(how: str, grad: Tensor, x: Tensor | None, bias: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
    """(dx, dbias, da, db, dprobs, dclip)."""
    weight, lora_a, lora_b, probs, clip, mixed, scaling, bits, group_size, ste, recompute, need = args
    mix = Mixture(weight, lora_a, lora_b, probs, clip, scaling, bits, group_size, ste)
    need_x, need_bias, need_a, need_b, need_probs, need_clip = need
    dx = dbias = None
    sums: Gradients = (None, None, None, None)
    with without_autocast(grad):
        flat = grad.reshape(-1, grad.shape[-1])
        if need_x:
            dx = grad @ (IMPLEMENTATIONS[how].forward(mix).to(grad.dtype) if recompute else mixed)
        if need_bias and bias is not None:
            dbias = flat.sum(0).to(bias.dtype)
        if x is not None:  # else no other gradient is wanted
            x2 = x.reshape(-1, x.shape[-1])
            rank_only = (need_a or need_b) and ste == "identity"
            want = Want((need_a or need_b) and not rank_only, need_probs, need_clip)
            if any(want):
                sums = IMPLEMENTATIONS[how].gradients(mix, Upstream(flat, x2), want)
            if rank_only:
                sums = (*lora_gradients(flat, x2, mix), *sums[2:])
    return dx, dbias, *sums


def lora_gradients(grad: Tensor, x: Tensor, mix: Mixture) -> tuple[Tensor, Tensor]:
    """(dA, dB) of ste="identity" from grad [T, O] and x [T, I]: four GEMMs of rank P r, and as few small kernels as
    possible around them, since each costs about as much as such a GEMM over 1024 tokens."""
    weight, lora_a, lora_b, scaling = mix.weight, mix.lora_a, mix.lora_b, mix.scaling
    p, r, i = lora_a.shape
    new = weight.new_empty
    beside = new(weight.shape[0], p, r)  # B' rounded to the weight's dtype
    torch.mul(lora_b.permute(1, 0, 2), scaling, out=beside)
    beside = beside.to(x.dtype).view(-1, p * r)
    stacked = lora_a.to(weight.dtype).to(x.dtype).reshape(p * r, i)
    pi = mix.probs.to(compute_dtype(weight.dtype)).view(p, 1, 1)
    da, db = new(lora_a.shape, dtype=lora_a.dtype), new(lora_b.shape, dtype=lora_b.dtype)
    torch.mul(((grad @ beside).T @ x).view(p, r, i), pi, out=da)
    torch.mul((grad.T @ (x @ stacked.T)).view(-1, p, r).permute(1, 0, 2), pi * scaling, out=db)
    return da, db


_op = Op(
    "quant_lora_linear",
    {how: partial(_forward, how) for how in IMPLEMENTATIONS},
    {how: partial(_backward, how) for how in IMPLEMENTATIONS},
    frozen=("weight",),
    read_for={"x": ("lora_a", "lora_b", "probs", "clip"), "saved0": ("x",)},  # dx alone needs W~ but not x
    choose=lambda x, bias, *args: choose(*args[:-2], args[-1]),
)


def quant_lora_linear(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, bits: Sequence[int], probs: Tensor,
    group_size: int, clip: Tensor | None = None, ste: str = "identity", mode: str = "full", bias: Tensor | None = None,
    recompute: bool = False, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """y = x W~^T + bias with W~ = `quant_lora_mix` of the other arguments.

    Args:
        x: [..., I] in any floating dtype.
        weight, lora_a, lora_b, scaling, bits, probs, group_size, clip, ste, backend: as in `quant_lora_mix`: weight
            [O, I], lora_a [P, r, I], lora_b [P, O, r], probs [P], clip [P, O, I / group_size].
        mode: which gradients exist, as there; those of x and bias always do.
        bias: [O].
        recompute: do not keep W~ (as large as the weight) for dx but build it again in the backward pass, for models
            whose second copy of the weights would not fit and that do not already checkpoint whole blocks.

    Returns:
        [..., O] in x's dtype, or autocast's.

    Raises:
        JointNASError: shapes, bits or words that do not exist or fit, or a backend that cannot run.
    """
    mix = Mixture(weight, lora_a, lora_b, probs, clip, float(scaling), list(bits), group_size, ste)
    mix = checked("quant_lora_linear", mix, mode)
    if x.shape[-1] != weight.shape[1]:
        raise bad("quant_lora_linear", f"x has {x.shape[-1]} channels, the weight takes {weight.shape[1]}")
    return _op(x.to(autocast_dtype(x) or x.dtype), bias, *mix, recompute, backend)[0]
