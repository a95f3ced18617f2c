"""GPTQ (Frantar et al., arXiv 2210.17323): round a weight column by column, and let the columns that are still to come
make up for the error, as far as the layer's inputs let them.

    minimise |X (Q - W)^T|^2 = tr (Q - W) H (Q - W)^T,     H = X^T X [I, I]  (inputs X [tokens, I], weight W [O, I])

    U upper triangular with U^T U = (H + d mean(diag H) 1)^-1
    for each column j:   e = (w_j - Q(w_j)) / U_jj,   w_k -= e U_jk  for all k > j

The error of a block of columns reaches the columns behind it in one product. Scales are those of the project's weight
quantizer, one per (row, group of inputs), from the weight as it is when the group's first column is reached. With
`act_order` columns go by falling H_jj, so a group's columns are not neighbours: its scales then come from the original
weight. Groups stay groups of neighbouring inputs, so the result is an ordinary grid either way.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from jointnas.initialise.clip import mse_clip
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.core.tensors import compute_dtype
from jointnas_kernels.ops.quant import grid
from jointnas_kernels.ops.quant.grid import Grid
from jointnas_kernels.ops.quant.spec import level_range
from jointnas_kernels.ops.quant.weights import check_quantizers

log = logging.getLogger(__name__)
BLOCK = 128  # columns whose errors are carried on together; rounded up to whole groups


@torch.no_grad()
def accumulate(hessian: Tensor | None, x: Tensor) -> Tensor:
    """hessian + X^T X of inputs x [..., I], in fp32 (fp64 for fp64)."""
    rows = x.detach().to(compute_dtype(x.dtype)).flatten(0, -2)
    return rows.t() @ rows if hessian is None else hessian.addmm_(rows.t(), rows)


@torch.no_grad()
def gptq(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int, *, damping: float = 0.01, act_order: bool = False,
    clip: bool = True, block: int = BLOCK,
) -> tuple[Tensor, Grid]:  # fmt: skip
    """Quantized values [O, I] in the weight's dtype, and their grid, for a weight [O, I] and a Hessian [I, I].

    `clip` searches each group's clip ratio; without, absmax. `block` changes rounding in the last bits only."""
    check_quantizers("gptq", weight, (bits,), group_size, "identity")
    inputs = weight.shape[1]
    if tuple(hessian.shape) != (inputs, inputs):
        raise JointNASError(f"gptq: the Hessian has shape {tuple(hessian.shape)}; the weight needs {(inputs, inputs)}")
    wide = compute_dtype(weight.dtype)
    hessian = hessian.to(wide)
    low, high = level_range(bits)
    order = torch.arange(inputs, device=weight.device)
    scale = weight.new_empty(weight.shape[0], inputs // group_size)  # in the weight's dtype, as the quantizer has it
    importance = hessian.diagonal().clone()
    if act_order:
        order = importance.argsort(descending=True, stable=True)
        scale = _scales(weight, bits, group_size, clip, importance)
    upper = _factor(hessian[order][:, order], damping)
    w, values = weight[:, order].to(wide), torch.empty_like(weight)
    step = -(-block // group_size) * group_size
    for start in range(0, inputs, step):
        stop = min(start + step, inputs)
        part = w[:, start:stop].clone()
        errors = torch.empty_like(part)
        for i, column in enumerate(order[start:stop].tolist()):
            if not act_order and i % group_size == 0:
                span = slice(start + i, start + i + group_size)
                of = part[:, i : i + group_size].to(weight.dtype)
                scale[:, column // group_size] = _scales(of, bits, group_size, clip, importance[span]).squeeze(1)
            s = scale[:, column // group_size].to(wide)
            value = ((part[:, i] / s).round().clamp(low, high) * s).to(weight.dtype)
            error = (part[:, i] - value.to(wide)) / upper[start + i, start + i]
            part[:, i + 1 :].addr_(error, upper[start + i, start + i + 1 : stop], alpha=-1)
            values[:, column], errors[:, i] = value, error
        w[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    return values, Grid(bits, scale)


def _scales(weight: Tensor, bits: int, group_size: int, clip: bool, importance: Tensor) -> Tensor:
    """[O, I / group] in the weight's dtype."""
    ratio = mse_clip(weight, bits, group_size, importance) if clip else None
    return grid.quantize(weight, bits, group_size, clip=ratio)[1].scale


def _factor(hessian: Tensor, damping: float) -> Tensor:
    """U with U^T U = (H + d mean(diag H) 1)^-1. Inputs that were always 0 get a diagonal of 1: their weights go
    to the nearest level."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal.mean().clamp_min(torch.finfo(hessian.dtype).tiny)
    upper: Tensor
    for attempt in range(4):
        damped = hessian + torch.diag(torch.where(dead, torch.ones_like(diagonal), damping * 10**attempt * mean))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            if attempt:
                log.warning("gptq: the Hessian needed a damping of %g instead of %g", damping * 10**attempt, damping)
            return upper
    raise JointNASError(
        f"gptq: the Hessian cannot be factorised with a damping of {damping} to {damping * 1000:g}: its inputs hold "
        "values that are not finite, or calibration needs more tokens"
    )
