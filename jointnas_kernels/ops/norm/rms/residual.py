"""residual_rmsnorm: what attention adds to the residual stream, and the norm behind it, in one pass.

    h = x + m y                 y' = mixed_rmsnorm(h) under the mask m, quantized if there are precisions

The hidden size's mask m is the OUT mask of the linear that made y and the IN mask of those that read y'. Backward, with
G = dL/dh from elsewhere, N the norm's dx of dL/dy', and P, w as in the norm:

    dx = dh = G + N        dy = m dh        dm = w P + sum over rows of dh y

All sums are fp32; h is rounded once, and the norm reads it rounded, as the two ops apart do. On a CPU they stay two.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import bad, rows
from jointnas_kernels.ops.norm.rms import reference
from jointnas_kernels.ops.norm.rms.kernels import launch_sum, launch_sum_backward
from jointnas_kernels.ops.norm.rms.op import backward_on_cpu, check, on_cpu
from jointnas_kernels.ops.norm.rms.reference import Sizes
from jointnas_kernels.ops.width import channel, residual

Gradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # dx, dy, dalpha, dm, dprobs


def _reference(
    x: Tensor, y: Tensor, weight: Tensor, alpha: Tensor, mask: Tensor, probs: Tensor | None, sizes: Sequence[int],
    eps: float, bits: Sequence[int], symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """h and y'; then inv, levels and h once more, for the backward pass."""
    h = residual.FORWARD["reference"](x, y, mask)
    if probs is None:
        return h, *reference.forward(h, weight, alpha, mask, sizes, eps), None, h.detach()
    return h, *reference.forward_quantized(h, weight, alpha, mask, probs, sizes, eps, bits, symmetric), h.detach()


def _reference_backward(
    of_h: Tensor, grad: Tensor, x: Tensor | None, y: Tensor | None, weight: Tensor, alpha: Tensor, mask: Tensor,
    probs: Tensor | None, inv: Tensor, levels: Tensor | None, h: Tensor, sizes: Sizes, eps: float, bits: Sequence[int],
    symmetric: bool, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    dh, _, dalpha, dmask, dprobs = reference.unrounded(
        grad, h, weight, alpha, mask, probs, inv, levels, sizes, eps, bits, symmetric,
        (True, False, need[2], need[3], need[4]),
    )  # fmt: skip
    dh = dh + of_h.to(dh.dtype)
    if need[3] and dmask is not None and y is not None:
        dmask = dmask + rows(dh * y.to(dh.dtype)).sum(0).to(mask.dtype)
    return dh.to(h.dtype), (mask.to(dh.dtype) * dh).to(h.dtype), dalpha, dmask, dprobs


def _launch(
    x: Tensor, y: Tensor, weight: Tensor, alpha: Tensor, mask: Tensor, probs: Tensor | None, sizes: Sizes, eps: float,
    bits: Sequence[int], symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    found = launch_sum(x, y, weight, alpha, mask, probs, sizes, eps, bits, symmetric)
    return *found, found[0].detach()


def _launch_backward(
    of_h: Tensor, grad: Tensor, x: Tensor | None, y: Tensor | None, weight: Tensor, alpha: Tensor, mask: Tensor,
    probs: Tensor | None, inv: Tensor, levels: Tensor | None, h: Tensor, sizes: Sizes, eps: float, bits: Sequence[int],
    symmetric: bool, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    return launch_sum_backward(
        of_h, grad, h, y, weight, alpha, mask, probs, inv, levels, sizes, eps, bits, symmetric, need
    )


def _cpu(
    x: Tensor, y: Tensor, weight: Tensor, alpha: Tensor, mask: Tensor, probs: Tensor | None, sizes: Sizes, eps: float,
    bits: Sequence[int], symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    h = residual.FORWARD["cpu"](x, y, mask)
    return h, *on_cpu(h, weight, alpha, mask, probs, sizes, eps, bits, symmetric), h.detach()


def _cpu_backward(
    of_h: Tensor, grad: Tensor, x: Tensor | None, y: Tensor | None, weight: Tensor, alpha: Tensor, mask: Tensor,
    probs: Tensor | None, inv: Tensor, levels: Tensor | None, h: Tensor, sizes: Sizes, eps: float, bits: Sequence[int],
    symmetric: bool, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    of_norm = (True, False, need[2], need[3], need[4])
    dh, _, dalpha, dmask, dprobs = backward_on_cpu(
        grad, h, weight, alpha, mask, probs, inv, levels, sizes, eps, bits, symmetric, of_norm
    )
    dh += of_h
    dy, more = channel.BACKWARD["cpu"](dh, y, mask, (True, need[3]))
    return dh, dy, dalpha, more if dmask is None or more is None else dmask + more, dprobs


_op = Op(
    "residual_rmsnorm",
    {"triton": _launch, "cpu": _cpu, "reference": _reference},
    {"triton": _launch_backward, "cpu": _cpu_backward, "reference": _reference_backward},
    results=2,
    frozen=("weight",),
    read_for={"x": (), "y": ("mask",), "saved1": ("probs",)},
)


def residual_rmsnorm(
    x: Tensor, y: Tensor, weight: Tensor, alpha: Tensor, sizes: Sequence[int], eps: float, mask: Tensor,
    backend: str | None = None, act_bits: Sequence[int] | None = None, act_probs: Tensor | None = None,
    act_symmetric: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h = x + mask * y, and `mixed_rmsnorm` of it under the same mask.

    Args:
        x, y: [..., N] in any floating dtype, both alike.
        weight: [N], any floating dtype; it is frozen.
        alpha, sizes, eps, backend, act_bits, act_probs, act_symmetric: as in `mixed_rmsnorm`: alpha [K], fp32,
            act_probs [Q], fp32.
        mask: [N], fp32: the hidden size's.

    Returns:
        Both [..., N] in the dtype of x, each computed in fp32 (fp64 for fp64) and rounded once. Gradients to all
        tensors but the weight.

    Raises:
        JointNASError: shapes, dtypes, sizes or bits that do not fit, half of a quantizer, or a backend that cannot run.
    """
    op = "residual_rmsnorm"
    if x.shape != y.shape or x.dtype != y.dtype:
        raise bad(op, f"x {x.dtype} {tuple(x.shape)} and y {y.dtype} {tuple(y.shape)} differ")
    check(op, x.shape[-1], weight, alpha, sizes, mask, act_bits, act_probs)
    found = _op(x, y, weight, alpha, mask, act_probs, list(sizes), eps, list(act_bits or ()), act_symmetric, backend)
    return found[0], found[1]
