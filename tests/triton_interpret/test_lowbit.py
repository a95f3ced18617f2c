"""The portable Triton low-bit kernels in the interpreter against the fp64 product of the dequantised weights."""

from __future__ import annotations

import pytest
import torch

from jointnas_kernels.ops.lowbit.linear import lowbit_linear
from jointnas_kernels.ops.lowbit.pack import pack_weight
from jointnas_kernels.ops.lowbit.reference import reference
from jointnas_kernels.ops.quant.spec import quantize_tokens
from jointnas_kernels.testing import assert_close, poisoned

DTYPES = [torch.float16, torch.float32]  # bf16 is broken in the interpreter


def case(tokens, rows, inputs, bits, group, dtype):
    q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, inputs), dtype=torch.int8)
    scale = (torch.rand(rows, inputs // group) * 0.02 + 0.01).to(dtype)
    return torch.randn(tokens, inputs).to(dtype), pack_weight(q, bits), scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("a_bits", [16, 8, 4, 2], ids=lambda b: f"A{b}")
@pytest.mark.parametrize("w_bits", [2, 4, 8], ids=lambda b: f"W{b}")
def test_every_width(w_bits, a_bits, dtype):
    x, packed, scale = case(3, 17, 256, w_bits, 128, dtype)
    check(x, packed, scale, w_bits, a_bits, 128)


@pytest.mark.parametrize("group", [16, 32, 48, 64, 96, 256, 24, 384])
@pytest.mark.parametrize("a_bits", [16, 4], ids=lambda b: f"A{b}")
def test_every_group_size(group, a_bits):
    x, packed, scale = case(17, 70, 768, 4, group, torch.float32)
    check(x, packed, scale, 4, a_bits, group)


@pytest.mark.parametrize("shape", [(1, 1, 32), (63, 65, 160), (33, 129, 96)], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_odd_shapes(shape, symmetric):
    x, packed, scale = case(*shape, 8, 32, torch.float16)
    x = x[:, None, :].expand(-1, 1, -1)  # a batch dimension
    check(x, packed, scale, 8, 8, 32, symmetric)
    check(torch.zeros_like(x), packed, scale, 8, 8, 32, symmetric)


def check(x, packed, scale, w_bits, a_bits, group, symmetric=False):
    with poisoned():
        y = lowbit_linear(x, packed, scale, w_bits, a_bits, group, backend="triton", symmetric=symmetric)
    exact = x.double()
    if a_bits < 16:
        a, s, z = quantize_tokens(x, a_bits, symmetric)
        exact = (a.double() - z.double()) * s.double()
    assert_close(y, reference(exact, packed, scale.double(), w_bits, 16, group, False))
