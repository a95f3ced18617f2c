"""mixed_rmsnorm, alone or with the activation quantizer behind it in the same pass: C++ calls and the operators."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from jointnas_kernels.ops.core import cpu
from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import bad
from jointnas_kernels.ops.norm.rms import reference
from jointnas_kernels.ops.norm.rms.kernels import launch, launch_backward
from jointnas_kernels.ops.norm.rms.reference import Gradients, Sizes, of_column
from jointnas_kernels.ops.quant.activations import check_precisions


@lru_cache(maxsize=1024)
def _segments(sizes: tuple[int, ...]) -> tuple[array[int], array[int]]:
    """(where choices end, ascending; for each choice the index of the last segment it keeps)."""
    ends = sorted(set(sizes))
    return cpu.integers(ends, wide=True), cpu.integers([ends.index(size) for size in sizes], wide=True)


def _scale(weight: Tensor, in_mask: Tensor | None) -> Tensor:
    return cpu.vector(weight) if in_mask is None else cpu.vector(weight) * cpu.vector(in_mask)


def on_cpu(
    x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, probs: Tensor | None, sizes: Sizes, eps: float,
    bits: Sequence[int], symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """y, inv and, with probs, levels, by the C++ kernels."""
    x = x.contiguous()
    count, width, per_chunk, _ = cpu.chunking(x)
    ends, kept = _segments(tuple(sizes))
    y, inv = cpu.empty_like(x), cpu.floats(count, len(sizes))
    norm = (x, _scale(weight, in_mask), cpu.vector(alpha), ends, kept)
    sized = (count, width, len(ends), len(sizes))
    tail = (float(eps), per_chunk, cpu.DTYPES[x.dtype])
    if probs is None:
        cpu.call("mixed_rmsnorm", *norm, y, inv, *sized, *tail)
        return y, inv, None
    levels = cpu.floats(count, len(bits), 2)
    cpu.call("mixed_rmsnorm_quant", *norm, cpu.vector(probs), cpu.integers(bits), y, inv, levels, *sized, len(bits),
             symmetric, *tail)
    return y, inv, levels


def backward_on_cpu(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, in_mask: Tensor | None, probs: Tensor | None, inv: Tensor,
    levels: Tensor | None, sizes: Sizes, eps: float, bits: Sequence[int], symmetric: bool, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    """Of both; without probs of the norm alone."""
    mass = 1.0 if probs is None else float(probs.float().sum())
    if probs is not None and not need[4]:  # the norm's backward of P g, P put into the weight
        dx, dw, *others = backward_on_cpu(
            grad, x, cpu.vector(weight) * mass, alpha, in_mask, None, inv, None, sizes, eps, (), False, need
        )  # fmt: skip
        return dx, None if dw is None else (dw * mass).to(weight.dtype), others[0], others[1], None
    g, x = grad.contiguous(), x.contiguous()
    ends, kept = _segments(tuple(sizes))
    need_column = need[1] or (need[3] and in_mask is not None)
    count, width, per_chunk, chunks = cpu.chunking(g, need_column)
    dx, shares = cpu.empty_like(g), cpu.partial_sums(need[2], count, len(sizes))
    dprobs, partial = cpu.partial_sums(need[4], count, len(bits)), cpu.partial_sums(need_column, chunks, width)
    norm = (g, x, _scale(weight, in_mask), cpu.vector(alpha), inv.contiguous(), ends, kept)
    sized, tail = (count, width, len(ends), len(sizes)), (per_chunk, cpu.DTYPES[g.dtype])
    if levels is None:
        cpu.call("mixed_rmsnorm_backward", *norm, dx, shares, partial, *sized, *tail)
    else:
        cpu.call("mixed_rmsnorm_quant_backward", *norm, levels.contiguous(), cpu.integers(bits), dx, shares, dprobs,
                 partial, *sized, len(bits), mass, *tail)
    dw, dmask = of_column(None if partial is None else partial.sum(0), weight, in_mask, need)
    return dx, dw, cpu.total(shares, alpha), dmask, cpu.total(dprobs, probs)


def _alone(run: Callable[..., Any]) -> Callable[..., Any]:
    """The norm without a quantizer, of an implementation of both."""
    return lambda x, weight, alpha, in_mask, *sizes_eps: run(x, weight, alpha, in_mask, None, *sizes_eps, (), False)[:2]


def _alone_backward(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda grad, x, weight, alpha, in_mask, inv, sizes, eps, need: run(
        grad, x, weight, alpha, in_mask, None, inv, None, sizes, eps, (), False, (*need, False)
    )[:4]


_BACKWARD = {"triton": launch_backward, "cpu": backward_on_cpu, "reference": reference.backward}
_norm = Op(
    "mixed_rmsnorm",
    {"triton": _alone(launch), "cpu": _alone(on_cpu), "reference": reference.forward},
    {how: _alone_backward(run) for how, run in _BACKWARD.items()},
)
_quantized = Op(
    "mixed_rmsnorm_quant",
    {"triton": launch, "cpu": on_cpu, "reference": reference.forward_quantized},
    _BACKWARD,
    read_for={"saved1": ("probs",)},
    public="mixed_rmsnorm",
)


def check(
    op: str, n: int, weight: Tensor, alpha: Tensor, sizes: Sequence[int], mask: Tensor | None,
    act_bits: Sequence[int] | None, act_probs: Tensor | None,
) -> None:  # fmt: skip
    """Raise unless they fit rows of n channels."""
    if weight.shape != (n,):
        raise bad(op, f"weight {tuple(weight.shape)} does not match {n} channels")
    if len(sizes) <= 0 or alpha.shape != (len(sizes),):
        raise bad(op, f"alpha {tuple(alpha.shape)} does not match {len(sizes)} sizes")
    if min(sizes) <= 0 or max(sizes) > n:
        raise bad(op, f"sizes {tuple(sizes)} must lie in 1..{n}")
    if mask is not None and mask.shape != (n,):
        raise bad(op, f"the mask must be [{n}]")
    if (act_bits is None) != (act_probs is None):
        raise bad(op, "act_bits and act_probs go together")
    if act_bits is not None and act_probs is not None:
        check_precisions(op, act_bits, act_probs)


def mixed_rmsnorm(
    x: Tensor, weight: Tensor, alpha: Tensor, sizes: Sequence[int], eps: float, in_mask: Tensor | None = None,
    backend: str | None = None, act_bits: Sequence[int] | None = None, act_probs: Tensor | None = None,
    act_symmetric: bool = False,
) -> Tensor:  # fmt: skip
    """in_mask * weight * sum_i alpha_i RMSNorm(x over its first sizes[i] channels), which are 0 beyond.

    With act_bits and act_probs, ``act_quant_mix`` of that in the same pass: sum_q act_probs[q] Q_q(..).

    Args:
        x: [..., N] in any floating dtype.
        weight: [N], any floating dtype.
        alpha: [K], fp32: probabilities of the sizes.
        sizes: K of them, each in 1..N, in any order.
        eps: added to the mean of squares.
        in_mask: [N], fp32: the next layers' IN mask; None: all ones.
        backend: "triton" (N up to 32768), "cpu" or "reference"; None: by device and dtype.
        act_bits: one to four of 2, .., 8 and 16; None: no quantization.
        act_probs: [Q], fp32: one for each of act_bits.
        act_symmetric: whether the quantizer has no zero point.

    Returns:
        [..., N] in the dtype of x; computed in fp32 (fp64 for fp64). Gradients to all tensors, each only if it requires
        one.

    Raises:
        JointNASError: shapes, sizes or bits that do not fit, half of a quantizer, or a backend that cannot run.
    """
    check("mixed_rmsnorm", x.shape[-1], weight, alpha, sizes, in_mask, act_bits, act_probs)
    if act_bits is None or act_probs is None:
        return _norm(x, weight, alpha, in_mask, list(sizes), eps, backend)[0]
    return _quantized(x, weight, alpha, in_mask, act_probs, list(sizes), eps, list(act_bits), act_symmetric, backend)[0]
