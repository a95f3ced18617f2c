"""Ops that are two in one pass have the values of the two apart, bit for bit; gradients are in tests/fuzz/fused.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jointnas_kernels import ops
from jointnas_kernels.errors import JointNASError
from tests.ops import norm_quant

BITS = (2, 4, 8, 16)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
BACKENDS = pytest.mark.parametrize("backend", [None, "reference"])
SHAPES = pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 5, 129)], ids=str)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def check_swiglu(shape: tuple[int, ...], dtype: torch.dtype, backend: str | None, symmetric: bool) -> None:
    """Also one precision alone."""
    gate, up = torch.randn(*shape).to(dtype), torch.randn(*shape).to(dtype)
    r, c, probs = torch.rand(shape[-1]), torch.rand(shape[-1]), torch.rand(4)
    v = ops.masked_swiglu(gate, up, r, c, backend)
    for bits, p in ((BITS, probs), *(((width,), torch.ones(1)) for width in BITS)):
        fused = ops.masked_swiglu(gate, up, r, c, backend, bits, p, symmetric)
        assert torch.equal(fused, ops.act_quant_mix(v, bits, p, symmetric, backend=backend))


def check_residual(shape: tuple[int, ...], dtype: torch.dtype, backend: str | None, quantized: bool) -> None:
    n = shape[-1]
    x, weight, alpha, mask, probs = norm_quant.inputs(shape, 2, BITS, True, dtype)
    assert x is not None and weight is not None and alpha is not None and mask is not None  # noqa: PT018
    y, sizes = torch.randn(*shape).to(dtype), [max(1, n // 2), n]
    rest = (backend, BITS, probs, False) if quantized else (backend,)
    h, out = ops.residual_rmsnorm(x, y, weight, alpha, sizes, 1e-5, mask, *rest)
    assert torch.equal(h, ops.gated_residual(x, y, mask, backend=backend))
    assert torch.equal(out, ops.mixed_rmsnorm(h, weight, alpha, sizes, 1e-5, mask, *rest))


@DTYPES
@BACKENDS
@SHAPES
@pytest.mark.parametrize("symmetric", [False, True])
def test_swiglu_and_quantizer(
    symmetric: bool, shape: tuple[int, ...], backend: str | None, dtype: torch.dtype
) -> None:
    check_swiglu(shape, dtype, backend, symmetric)


@DTYPES
@BACKENDS
@SHAPES
@pytest.mark.parametrize("quantized", [False, True])
def test_residual_and_norm(quantized: bool, shape: tuple[int, ...], backend: str | None, dtype: torch.dtype) -> None:
    check_residual(shape, dtype, backend, quantized)


def test_a_stream_or_values_without_gradient() -> None:
    """One of the two results alone."""
    x, y, mask = (torch.randn(*s, requires_grad=True) for s in ((3, 8), (3, 8), (8,)))
    weight, alpha = torch.rand(8), torch.rand(1)

    def both() -> tuple[Tensor, Tensor]:
        return ops.residual_rmsnorm(x, y, weight, alpha, [8], 1e-5, mask)

    of_h = torch.autograd.grad(both()[0].square().sum(), (x, y, mask))
    h = x + mask * y
    for a, b in zip(of_h, torch.autograd.grad(h.square().sum(), (x, y, mask)), strict=True):
        torch.testing.assert_close(a, b)
    of_out = torch.autograd.grad(both()[1].square().sum(), (x, y, mask))
    out = ops.mixed_rmsnorm(x + mask * y, weight, alpha, [8], 1e-5, mask)
    for a, b in zip(of_out, torch.autograd.grad(out.square().sum(), (x, y, mask)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_values_go_through_rope() -> None:
    q, k, v = (torch.randn(2, 3, h, 8, requires_grad=True) for h in (4, 2, 2))
    table = torch.randn(1, 3, 8)
    arguments = (q, k, table, table, torch.rand(4, 8), torch.rand(2, 8))
    *with_v, through = ops.masked_rope(*arguments, None, v)
    assert all(torch.equal(a, b) for a, b in zip(with_v, ops.masked_rope(*arguments), strict=True))
    assert torch.equal(through, v.transpose(1, 2))
    grad = torch.randn_like(through)
    assert torch.equal(torch.autograd.grad(through, v, grad)[0], grad.transpose(1, 2))


def test_bad_arguments() -> None:
    x, m = torch.rand(2, 3), torch.rand(3)
    with pytest.raises(JointNASError, match="act_bits and act_probs go together"):
        ops.masked_swiglu(x, x, m, m, None, (4,))
    with pytest.raises(JointNASError, match="must have one entry per bit width"):
        ops.masked_swiglu(x, x, m, m, None, (4,), torch.rand(2))
    with pytest.raises(JointNASError, match=r"x .* and y .* differ"):
        ops.residual_rmsnorm(x, x[1:], m, torch.rand(1), [3], 1e-5, m)
    with pytest.raises(JointNASError, match="the mask must be"):
        ops.residual_rmsnorm(x, x, m, torch.rand(1), [3], 1e-5, m[1:])
    q, table = torch.rand(1, 2, 1, 4), torch.rand(1, 2, 4)
    with pytest.raises(JointNASError, match="must be like k"):
        ops.masked_rope(q, q, table, table, torch.rand(1, 4), torch.rand(1, 4), None, q[:, 1:])
