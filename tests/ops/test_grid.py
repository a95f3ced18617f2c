"""Integers and scales behind fake-quantized values: bit for bit, from the values alone."""

import itertools

import pytest
import torch

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.quant import grid
from jointnas_kernels.ops.quant.mixture.op import quant_lora_mix
from jointnas_kernels.ops.quant.weights import fake_quant_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASES = [
    pytest.param(bits, dtype, clip, id=f"W{bits}-{str(dtype)[6:]}-{'clip' if clip else 'absmax'}")
    for bits, dtype, clip in itertools.product((2, 3, 4, 8), DTYPES, (False, True))
]


def weight(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Groups of many magnitudes, one of zeros, one with a single value, ties at the largest."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(37, 96, generator=g) * torch.exp(3 * torch.randn(37, 1, generator=g))
    w[0, :16], w[1, :16], w[2, 0] = 0.0, 0.0, -w[2].abs().max()
    w[1, 3] = 0.7
    return w.to(dtype)


@pytest.mark.parametrize("bits, dtype, clip", CASES)
def test_grid_of_a_fake_quantized_weight(bits: int, dtype: torch.dtype, clip: bool) -> None:
    for seed in range(5):
        w = weight(dtype, seed)
        ratio = torch.rand(37, 6, generator=torch.Generator().manual_seed(seed)) * 0.6 + 0.4 if clip else None
        values = fake_quant_weight(w, bits, 16, clip=ratio)
        again, known = grid.quantize(w, bits, 16, clip=ratio)
        assert torch.equal(again, values)
        found = grid.find(values, bits, 16)
        for of in (known, found):
            q = grid.integers(values, of)
            assert q.dtype == torch.int8
            assert -(2 ** (bits - 1)) <= q.min()
            assert q.max() <= 2 ** (bits - 1) - 1
            product = q.view(37, 6, 16).to(of.scale.dtype) * of.scale.unsqueeze(-1)
            assert torch.equal(product.view(37, 96), values)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grid_of_what_the_lora_kernel_returns(bits: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(7)
    w = torch.randn(64, 256, generator=g).to(dtype)
    a, b = 0.1 * torch.randn(1, 8, 256, generator=g), 0.1 * torch.randn(1, 64, 8, generator=g)
    clip = 0.4 + 0.6 * torch.rand(1, 64, 2, generator=g)
    values = quant_lora_mix(w, a, b, 0.5, (bits,), torch.ones(1), 128, clip=clip)
    grid.integers(values, grid.find(values, bits, 128))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_asymmetric_grid(bits: int, dtype: torch.dtype) -> None:
    w = weight(dtype) + weight(dtype).abs()
    values, of = grid.quantize(w, bits, 16, symmetric=False)
    assert torch.equal(values, fake_quant_weight(w, bits, 16, symmetric=False))
    assert of.zero is not None
    q = grid.integers(values, of)
    steps = q.view(37, 6, 16).to(dtype) - of.zero.unsqueeze(-1).to(dtype)
    assert torch.equal((steps * of.scale.unsqueeze(-1)).view(37, 96), values)


def test_values_off_the_grid() -> None:
    values, of = grid.quantize(weight(torch.float32), 4, 16)
    values[5, 5] *= 1.01
    with pytest.raises(JointNASError, match="1 of 3552 weights are no multiple"):
        grid.integers(values, of)
    with pytest.raises(JointNASError, match="do not hold 4-bit levels"):
        grid.find(weight(torch.float32), 4, 16)
