"""act_quant_mix: bit for bit what compressed-tensors executes; gradients; ties, zeros, constant and one-sided rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from jointnas_kernels import ops
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.quant.activations import act_quant_mix_reference
from jointnas_kernels.ops.quant.spec import fake_quant_tokens
from jointnas_kernels.testing import assert_close

BITS = (2, 4, 8, 16)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SYMMETRIC = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tokens(dtype: torch.dtype) -> Tensor:
    """[2, 40, 96] with rows of every kind: of many magnitudes, one-sided, constant, zero, on a coarse grid (ties)."""
    x = torch.randn(2, 40, 96) * torch.logspace(-4, 3, 40).unsqueeze(-1)
    x[0, 0] = 0
    x[0, 1] = 3.0
    x[0, 2] = -0.1
    x[0, 3] = x[0, 3].abs()
    x[0, 4] = -x[0, 4].abs()
    x[0, 5:20] = torch.randint(-15, 16, (15, 96)) / 4
    x[0, 6, 1:] = 0
    return x.to(dtype)


def executed_by_compressed_tensors(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = QuantizationArgs(
        num_bits=bits,
        type=QuantizationType.INT,
        symmetric=symmetric,
        strategy=QuantizationStrategy.TOKEN,
        dynamic=True,
    )
    scale, zero_point = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    return fake_quantize(x, scale, zero_point, args)


@DTYPES
@SYMMETRIC
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_equals_compressed_tensors(backend: str | None, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    probs = torch.tensor([float(b == bits) for b in BITS])
    for x in (tokens(dtype), torch.randn(3, 17, 1024).to(dtype)):
        expected = executed_by_compressed_tensors(x, bits, symmetric)
        assert torch.equal(ops.act_quant_mix(x, BITS, probs, symmetric, backend=backend), expected)


@DTYPES
@SYMMETRIC
def test_gradients_equal_eager_autograd(symmetric: bool, dtype: torch.dtype) -> None:
    x, mask, probs = tokens(dtype), torch.rand(96), torch.rand(4)
    for subset in ("x", "probs", "mask", "x probs mask"):
        leaves = {"x": x.clone(), "probs": probs.clone(), "mask": mask.clone()}
        wanted = [leaves[name].requires_grad_() for name in subset.split()]
        out = ops.act_quant_mix(leaves["x"], BITS, leaves["probs"], symmetric, leaves["mask"])
        reference = act_quant_mix_reference(leaves["x"], BITS, leaves["probs"], symmetric, leaves["mask"])
        assert_close(out, reference)
        grad = torch.randn_like(out)
        got, expected = (torch.autograd.grad(y, wanted, grad) for y in (out, reference))
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype])


def test_mixture_is_linear_in_the_probabilities() -> None:
    """The only smooth direction: gradcheck in fp64."""
    x = torch.randn(3, 11, dtype=torch.float64)
    probs = torch.rand(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: ops.act_quant_mix(x, BITS, p), (probs,))


@DTYPES
def test_zeros_stay_zero_and_identity_is_exact(dtype: torch.dtype) -> None:
    """0 is a level of every asymmetric quantizer; 16 bits change nothing."""
    x = tokens(dtype)
    for bits in range(2, 9):
        quantized = fake_quant_tokens(x, bits)
        assert (quantized[x == 0] == 0).all()
        assert quantized.isfinite().all()
    assert torch.equal(ops.act_quant_mix(x, (16,), torch.ones(1)), x)


def test_shapes_and_strides() -> None:
    probs = torch.rand(4)
    x = torch.randn(6, 5, 40)[:, :, 3:20]
    assert torch.equal(ops.act_quant_mix(x, BITS, probs), ops.act_quant_mix(x.contiguous(), BITS, probs))
    assert ops.act_quant_mix(torch.empty(0, 8), BITS, probs).shape == (0, 8)
    one = torch.randn(7)
    assert torch.equal(ops.act_quant_mix(one, BITS, probs), ops.act_quant_mix(one[None], BITS, probs)[0])


@pytest.mark.parametrize("backend", ["reference", None])
def test_registration(backend: str | None) -> None:
    x, probs, mask = torch.randn(4, 24, requires_grad=True), torch.rand(4, requires_grad=True), torch.rand(24)
    mask.requires_grad_()
    opcheck(torch.ops.jointnas.act_quant_mix.default, (x, probs, mask, list(BITS), False, backend))

    def loss(x: Tensor, probs: Tensor, mask: Tensor) -> Tensor:
        return ops.act_quant_mix(x, BITS, probs, False, mask, backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, probs, mask), (x, probs, mask))
    expected = torch.autograd.grad(loss(x, probs, mask), (x, probs, mask))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_bad_arguments() -> None:
    x, probs = torch.randn(2, 8), torch.rand(2)
    with pytest.raises(JointNASError, match=r"activation bit width '9'.*Allowed: 2"):
        ops.act_quant_mix(x, (4, 9), probs)
    with pytest.raises(JointNASError, match="one entry per bit width"):
        ops.act_quant_mix(x, BITS, probs)
    with pytest.raises(JointNASError, match=r"mask must have shape \(8,\)"):
        ops.act_quant_mix(x, (4, 8), probs, mask=torch.ones(7))
    with pytest.raises(JointNASError, match="cannot run"):
        ops.act_quant_mix(x, (4, 8), probs, backend="triton")
