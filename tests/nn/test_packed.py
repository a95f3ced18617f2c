"""Packed linears: how far they are from what they stand for, and several as one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jointnas_kernels.nn.packed import PackedLinear, stack
from jointnas_kernels.ops.lowbit.pack import pack_weight
from jointnas_kernels.ops.lowbit.weight import LowbitWeight
from jointnas_kernels.testing import assert_close


def weight(rows: int, bits: int, layout: str, inputs: int = 256, dtype: torch.dtype = torch.bfloat16) -> LowbitWeight:
    q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, inputs), dtype=torch.int8)
    return LowbitWeight.pack(q, torch.rand(rows, inputs // 128).to(dtype), bits, 128, layout=layout)


def linear(rows: int, bits: int = 4, act: int = 8, bias: bool = True, backend: str = "reference") -> PackedLinear:
    q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, 64), dtype=torch.int8)
    return PackedLinear(pack_weight(q, bits), torch.rand(rows, 2), torch.randn(rows) if bias else None, bits, act,
                        backend=backend)  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sums_keep_their_bound(bits: int, tokens: int) -> None:
    """fp32, against fp64 on the same levels; of inputs far from zero, whose zero point is as large as can be."""
    torch.manual_seed(bits)
    outputs, inputs, group, e = 70, 640, 64, 2.0**-24
    q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (outputs, inputs), dtype=torch.int8)
    scale, x = torch.rand(outputs, inputs // group), torch.randn(tokens, inputs).abs() + 5
    layer = PackedLinear(pack_weight(q, bits), scale, None, bits, 8, backend="cpu")
    w = q.double() * scale.double().repeat_interleave(group, 1)
    s = x.amax(1, keepdim=True) / 255  # 0 is in every range
    levels, s = (x / s).round().double(), s.double()  # a - z, where z is the lowest level
    want = (s * levels) @ w.T
    limit = 2 * (inputs + inputs // group) * e * (s * levels) @ w.abs().T + 3 * e * want.abs()
    limit = limit + 2 * (inputs // group + 2) * e * 128 * s * w.abs().sum(1)
    assert ((layer(x).double() - want).abs() <= limit).all()


@pytest.mark.parametrize("layout", ["storage", "cuda"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_stand_behind_one_another(bits: int, layout: str) -> None:
    parts = [weight(rows, bits, layout) for rows in (48, 16, 16)]
    whole = LowbitWeight.stack(parts)
    assert whole is not None
    assert (whole.outputs, whole.layout) == (80, layout)
    for found, *want in zip(whole.unpack(), *(part.unpack() for part in parts), strict=True):
        assert torch.equal(found, torch.cat(want))
    again = LowbitWeight.pack(*whole.unpack(), bits, 128, layout=layout)
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors, again.tensors, strict=True))


def test_what_cannot_be_stacked() -> None:
    for parts in (
        [weight(16, 4, "cuda"), weight(16, 2, "cuda")], [weight(24, 4, "cuda"), weight(16, 4, "cuda")],
        [weight(16, 4, "storage"), weight(16, 4, "storage", 384)], [weight(64, 4, "cpu"), weight(64, 4, "cpu")],
        [weight(16, 4, "storage"), weight(16, 4, "storage", dtype=torch.float16)],
    ):  # fmt: skip
        assert LowbitWeight.stack(parts) is None
    for modules in (
        [linear(5), nn.Linear(64, 5)], [linear(5), linear(5, act=4)], [linear(5), linear(5, bias=False)],
        [linear(5), linear(5, 8)], [linear(5, backend="cpu"), linear(5, backend="cpu")],
    ):  # fmt: skip
        assert stack(modules) is None


@pytest.mark.parametrize("bias", [False, True])
def test_one_product_for_several_linears(bias: bool) -> None:
    """Of the same integers: none are held twice."""
    parts, x = [linear(rows, bias=bias) for rows in (6, 3, 5)], torch.randn(4, 64)
    want = torch.cat([part(x) for part in parts], 1)
    whole = stack(parts)
    assert whole is not None
    assert_close(whole(x), want)
    assert torch.equal(torch.cat([part(x) for part in parts], 1), want)
    memory = whole.weight_packed.untyped_storage().data_ptr()
    assert all(part.weight_packed.untyped_storage().data_ptr() == memory for part in parts)
    assert repr(whole) == f"PackedLinear(64, 14, bias={bias}, W4A8, group=32, backend=reference)"
