"""GPTQ against its definition, one column at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jointnas.initialise.clip import mse_clip
from jointnas.initialise.gptq import accumulate, gptq
from jointnas_kernels.ops.quant import grid
from jointnas_kernels.ops.quant.weights import fake_quant_weight
from tests.jointnas.tiny import random

G = 64


def correlated(tokens: int, channels: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs with a few common causes and channels of unlike size, as activations have them."""
    common = random(tokens, 5, seed=seed) @ random(5, channels, seed=seed + 1)
    return ((common + 0.3 * random(tokens, channels, seed=seed + 2)) * random(channels, seed=seed + 3).exp()).to(dtype)


def naive_gptq(weight: Tensor, hessian: Tensor, bits: int, group: int, order: Tensor, static: bool) -> Tensor:
    """One column at a time: optimal update of all columns that are left, inverse Hessian by elimination; fp64."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    n = weight.shape[1]
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(n, dtype=torch.float64))
    w, out = weight.clone(), torch.zeros_like(weight)
    scale = weight.view(weight.shape[0], -1, group).abs().amax(-1) / ((2**bits - 1) / 2)
    left = torch.ones(n, dtype=torch.float64)
    for j in order.tolist():
        if not static and j % group == 0:
            scale[:, j // group] = w[:, j : j + group].abs().amax(-1) / ((2**bits - 1) / 2)
        s = scale[:, j // group]
        out[:, j] = (w[:, j] / s).round().clamp(low, high) * s
        error = (w[:, j] - out[:, j]) / inverse[j, j]
        left[j] = 0
        w = w - error[:, None] * (inverse[j] * left)
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    return out


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize(("rows", "inputs", "group", "block"), [(5, 96, 32, 128), (7, 128, 16, 48), (1, 66, 11, 1)])
def test_gptq_is_its_definition(rows: int, inputs: int, group: int, block: int, act_order: bool) -> None:
    weight, x = random(rows, inputs, seed=9), correlated(300, inputs)
    hessian = accumulate(accumulate(None, x[:100]), x[100:].view(2, 100, inputs))
    assert torch.allclose(hessian, x.t() @ x)
    values, of = gptq(weight, hessian, 4, group, clip=False, act_order=act_order, block=block)
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(inputs)
    want = naive_gptq(weight, hessian, 4, group, order, act_order)
    # levels are the same; values differ by the rounding of different, equal expressions
    assert torch.allclose(values, want, rtol=1e-9, atol=1e-12)
    assert torch.equal(grid.integers(values, of).double() * of.scale.repeat_interleave(group, 1), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("clip", [False, True], ids=["absmax", "clip"])
@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
def test_gptq_of_uncorrelated_inputs_is_rounding(dtype: torch.dtype, clip: bool, act_order: bool) -> None:
    weight = random(6, 192, dtype=dtype)
    ratio = mse_clip(weight, 3, 64) if clip else None
    want = grid.quantize(weight, 3, 64, clip=ratio)
    got = gptq(weight, 8 * torch.eye(192), 3, 64, clip=clip, act_order=act_order)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1].scale, want[1].scale)


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_beats_rounding_on_correlated_inputs(bits: int, act_order: bool) -> None:
    weight, x = random(16, 256, dtype=torch.float32), correlated(1000, 256, dtype=torch.float32)
    values, _ = gptq(weight, accumulate(None, x), bits, G, act_order=act_order)
    rounded = fake_quant_weight(weight, bits, G)

    def error(q: Tensor) -> float:
        return float((x @ (q - weight).t()).square().mean())

    assert error(values) < 0.6 * error(rounded)


def test_gptq_survives_inputs_that_are_always_zero() -> None:
    weight, x = (
        random(4, 128, dtype=torch.float32),
        correlated(40, 128, dtype=torch.float32),
    )  # fewer tokens than inputs
    x[:, 3] = 0
    values, of = gptq(weight, accumulate(None, x), 4, G)
    assert torch.isfinite(values).all()
    assert torch.equal(values[:, 3], (weight[:, 3] / of.scale[:, 0]).round().clamp(-8, 7) * of.scale[:, 0])
    assert torch.isfinite(gptq(weight, torch.zeros(128, 128), 4, G)[0]).all()
