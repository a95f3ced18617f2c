"""lowbit_linear's reference: the dequantised product, the activation quantizer, registration, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops import LowbitWeight, lowbit_linear
from jointnas_kernels.ops.lowbit.cuda import stream_plan, tile_plan
from jointnas_kernels.ops.lowbit.pack import pack_weight
from jointnas_kernels.ops.quant.spec import quantize_tokens
from jointnas_kernels.testing import assert_close

W, A = (2, 4, 8), (2, 4, 8, 16)


def case(rows, inputs, bits, group, dtype):
    q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, inputs), dtype=torch.int8)
    scale = (torch.rand(rows, inputs // group) * 0.02 + 0.01).to(dtype)
    return q, pack_weight(q, bits), scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("a_bits", A, ids=lambda b: f"A{b}")
@pytest.mark.parametrize("w_bits", W, ids=lambda b: f"W{b}")
def test_is_the_dequantised_product(w_bits, a_bits, dtype):
    q, packed, scale = case(17, 192, w_bits, 32, dtype)
    x = torch.randn(2, 3, 192).to(dtype)
    weight = q.double() * scale.double().repeat_interleave(32, 1)
    x_hat = x.double()
    if a_bits < 16:
        a, s, z = quantize_tokens(x, a_bits)
        x_hat = (a.double() - z.double()) * s.double()
        if dtype in (torch.float32, torch.float64):  # half types round x / s + z once more
            assert ((x_hat - x.double()).abs() <= 1.001 * s.double()).all()
    y = lowbit_linear(x, packed, scale, w_bits, a_bits, 32, backend="reference")
    assert y.shape == (2, 3, 17)
    assert y.dtype == dtype
    assert_close(y, x_hat @ weight.t())


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_activations_match_compressed_tensors(symmetric, data):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp

    bits = data.draw(st.sampled_from((2, 4, 8)))
    dtype = data.draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    x = torch.randn(1, data.draw(st.integers(1, 9)), data.draw(st.sampled_from((1, 17, 128, 257))))
    x = ((x + data.draw(st.sampled_from((0.0, 3.0, -20.0)))) * data.draw(st.sampled_from((1.0, 1e-3, 50.0)))).to(dtype)
    arguments = quantization.QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="token", dynamic=True
    )
    scale, zero = compute_dynamic_scales_and_zp(x, arguments, torch.nn.Identity())
    a, s, z = quantize_tokens(x, bits, symmetric)
    assert torch.equal(s, scale)
    assert torch.equal(z.float(), zero.float())
    assert torch.equal((a.to(dtype) - z.to(dtype)) * s, fake_quantize(x, scale, zero, arguments))


def test_a_zero_token_gives_zero():
    _, packed, scale = case(5, 64, 4, 32, torch.float32)
    for a_bits in A:
        assert not lowbit_linear(torch.zeros(2, 64), packed, scale, 4, a_bits, 32).any()


def test_registration():
    _, packed, scale = case(9, 128, 4, 128, torch.float32)
    x = torch.randn(3, 128)
    arguments = (x, *LowbitWeight.stored(packed, scale, 4, 128), 8, False, None)
    torch.library.opcheck(torch.ops.jointnas.lowbit_matmul.default, arguments)
    compiled = torch.compile(lambda x: lowbit_linear(x, packed, scale, 4, 8, 128), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), lowbit_linear(x, packed, scale, 4, 8, 128))


def test_empty():
    _, packed, scale = case(9, 128, 4, 128, torch.float32)
    assert lowbit_linear(torch.randn(0, 128), packed, scale, 4, 8, 128).shape == (0, 9)


def test_bad_input():
    _, packed, scale = case(9, 128, 4, 64, torch.float32)
    x = torch.randn(3, 128)
    for arguments, message in [
        ((x, packed, scale, 3, 16, 64), "w_bits must be one of 2, 4, 8"),
        ((x, packed, scale, 4, 5, 64), "a_bits must be one of 2, 4, 8, 16"),
        ((x[:, :64], packed, scale, 4, 16, 64), "x has 64 inputs"),
        ((x, packed, scale, 4, 16, 48), "group_size must divide"),
        ((x, packed, scale, 4, 16, 128), "scale must be"),
        ((x, packed, scale, 4, 16, 64, "marlin"), "unknown backend"),
        ((x, packed, scale, 4, 16, 64, "cuda"), "cannot run"),
    ]:
        with pytest.raises(JointNASError, match=message):
            lowbit_linear(*arguments)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 64),
    st.integers(1, 30000),
    st.integers(1, 256),
    st.sampled_from((1, 78, 108, 132)),
    st.sampled_from(W),
    st.sampled_from((8, 16)),
)
def test_plans_are_one_wave_where_possible(tokens, rows, groups, sms, bits, a_bits):
    plan = stream_plan(tokens, rows, groups * 128, bits, a_bits, sms)
    assert plan.token_tiles in ((1, 2) if a_bits == 16 else (1, 2, 4))
    assert plan.warp_rows in (1, 2, 4, 8)
    assert plan.splits >= 1
    assert plan.splits == 1 or plan.blocks(tokens, rows) <= sms
    assert plan.splits <= groups
    tiled = tile_plan(tokens, rows, groups * 128, sms)
    assert tiled.token_tiles in (8, 16)
    assert 1 <= tiled.splits <= groups


@pytest.mark.parametrize("a_bits", [16, 4])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autocast_changes_nothing(backend: str, a_bits: int) -> None:
    """The result has x's dtype, and the accuracy of the reference."""
    x, scale = torch.randn(3, 64), torch.rand(5, 2)
    packed = pack_weight(torch.randint(-8, 8, (5, 64)), 4)
    plain = lowbit_linear(x, packed, scale, 4, a_bits, 32, backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lowbit_linear(x, packed, scale, 4, a_bits, 32, backend), plain)
