"""quant_lora_linear: y = x W~^T + bias with W~ = quant_lora_mix(...), whose backward never forms dL/dW~ = g^T x.

That would be 64 MB in fp32 for one 4096 x 4096 weight, and 3x that in traffic. With U = x [A_1; ..; A_P]^T and
V = g [B'_1 .. B'_P], both [T, P r]:

    weight step, ste="identity"   dx = g W~        dB_p = scaling probs[p] g^T U_p        dA_p = probs[p] V_p^T x
                                  (on a GPU in two launches: lora.py)
    arch step or ste="clip"       the reductions of quant_lora_mix over tiles of g^T x: in the epilogue of one GEMM
                                  that recomputes Q_p of its tile (Triton), or some rows at a time through the
                                  library's GEMM (the others; on a GPU 128 MB at most)
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jointnas_kernels.ops.core import cpu
from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import autocast_dtype, bad, compute_dtype, without_autocast
from jointnas_kernels.ops.quant.mixture import cuda, lora
from jointnas_kernels.ops.quant.mixture.op import IMPLEMENTATIONS, checked, choose
from jointnas_kernels.ops.quant.mixture.reference import Gradients, Mixture, Upstream, Want

ON_GPU = ("cuda", "triton")


def _mixed(how: str, mixes: Sequence[Mixture]) -> Tensor:
    """The W~ of linears below each other, [sum of O, I]."""
    run, first = IMPLEMENTATIONS[how].forward, mixes[0].weight
    if len(mixes) == 1:
        return run(mixes[0])
    sizes = [len(mix.weight) for mix in mixes]
    found = cpu.empty_like(first, sum(sizes)) if how == "cpu" else first.new_empty(sum(sizes), first.shape[1])
    parts = found.split(sizes)
    if how == "cuda" and len({mix.clip is None for mix in mixes}) == 1:
        cuda.forward_all(mixes, parts)
        return found
    for mix, part in zip(mixes, parts, strict=True):
        if how == "reference":
            part.copy_(run(mix))
        else:
            run(mix, out=part)
    return found


def products(
    how: str, x: Tensor, mixes: Sequence[Mixture], biases: Sequence[Tensor | None], mixed: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """The y of each linear, and W~ in the dtype of x; `mixed`: it is there. On a GPU one product: the y are views of
    its result."""
    with without_autocast(x):
        mixed = (_mixed(how, mixes) if mixed is None else mixed).to(x.dtype)
        sizes = [len(mix.weight) for mix in mixes]
        if how in ON_GPU and all(b is None for b in biases):
            return list(F.linear(x, mixed).split(sizes, dim=-1)), mixed
        parts = zip(mixed.split(sizes), biases, strict=True)
        return [F.linear(x, part, None if bias is None else bias.to(x.dtype)) for part, bias in parts], mixed


def beside(grads: Sequence[Tensor]) -> list[Tensor]:
    """Matrices [T, O_j]; those that lie beside each other in memory are one."""
    found = [grads[0]]
    for grad in grads[1:]:
        last = found[-1]
        at, width = last.storage_offset(), last.shape[1]
        together = grad.untyped_storage()._cdata == last.untyped_storage()._cdata and grad.stride() == last.stride()
        if together and grad.stride(1) == 1 and grad.storage_offset() == at + width <= at + grad.stride(0):
            found[-1] = last.as_strided((len(last), width + grad.shape[1]), last.stride())
        else:
            found.append(grad)
    return found


class Need(NamedTuple):
    """Which gradients to compute of any linear of a group."""

    x: bool
    probs: bool
    lora: bool
    clip: bool


def gradients(
    how: str, grads: Sequence[Tensor], x: Tensor | None, mixes: Sequence[Mixture], mixed: Tensor | None, need: Need
) -> tuple[Tensor | None, Tensor | None, list[Gradients]]:
    """dx, dprobs, and (dA, dB, None, dclip) of each linear."""
    dx = dprobs = None
    sums: list[Gradients] = [(None, None, None, None)] * len(mixes)
    flat = [g.reshape(-1, g.shape[-1]) for g in grads]
    joined = beside(flat)
    if need.x and mixed is not None:
        for g, part in zip(joined, mixed.split([g.shape[1] for g in joined]), strict=True):
            dx = g @ part if dx is None else dx.addmm_(g, part)
        assert dx is not None
        dx = dx.view(*grads[0].shape[:-1], mixed.shape[1])
    if x is not None:  # else no other gradient is wanted
        x2, rank_only = x.reshape(-1, x.shape[-1]), need.lora and mixes[0].ste == "identity"
        want = Want(need.lora and not rank_only, need.probs, need.clip)
        if how == "cuda" and want == (False, True, False) and all(map(cuda.reduces, mixes)):
            dprobs = cuda.probs_gradient(mixes, [Upstream(g, x2) for g in joined])
        elif any(want):
            pairs = zip(mixes, flat, strict=True)
            sums = [IMPLEMENTATIONS[how].gradients(mix, Upstream(g, x2), want) for mix, g in pairs]
            for _, _, one, _ in sums:
                dprobs = one if dprobs is None or one is None else dprobs + one
        if rank_only:
            of_lora = (
                lora.gradients(flat, x2, mixes)
                if how in ON_GPU and lora.fits(mixes)
                else [lora_gradients(g, x2, mix) for g, mix in zip(flat, mixes, strict=True)]
            )
            sums = [(*pair, *rest[2:]) for pair, rest in zip(of_lora, sums, strict=True)]
    return dx, dprobs, sums


def bias_gradient(grad: Tensor, bias: Tensor) -> Tensor:
    """Sum over tokens."""
    return grad.reshape(-1, grad.shape[-1]).sum(0).to(bias.dtype)


def _forward(
    how: str, x: Tensor, bias: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, probs: Tensor,
    clip: Tensor | None, scaling: float, bits: Sequence[int], group_size: int, ste: str, recompute: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y, and W~ in the dtype of x where it is kept for dx."""
    mix = Mixture(weight, lora_a, lora_b, probs, clip, scaling, bits, group_size, ste)
    (y,), mixed = products(how, x, [mix], [bias])
    return y, None if recompute else mixed


def _backward(how: str, grad: Tensor, x: Tensor | None, bias: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
    """(dx, dbias, da, db, dprobs, dclip)."""
    weight, lora_a, lora_b, probs, clip, mixed, scaling, bits, group_size, ste, recompute, need = args
    mix = Mixture(weight, lora_a, lora_b, probs, clip, scaling, bits, group_size, ste)
    need_x, need_bias, need_a, need_b, need_probs, need_clip = need
    with without_autocast(grad):
        if recompute and need_x:
            mixed = IMPLEMENTATIONS[how].forward(mix).to(grad.dtype)
        wanted = Need(need_x, need_probs, need_a or need_b, need_clip)
        dx, dprobs, ((da, db, _, dclip),) = gradients(how, [grad], x, [mix], mixed, wanted)
        dbias = bias_gradient(grad, bias) if need_bias and bias is not None else None
    return dx, dbias, da, db, dprobs, dclip


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
