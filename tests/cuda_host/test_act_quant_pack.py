"""Activation quantization of the CUDA kernels, executed on the CPU (conftest.py), bit for bit."""

from __future__ import annotations

import pytest
import torch

from jointnas_kernels.ops.lowbit import cuda
from tests import packed_tokens

pytestmark = pytest.mark.usefixtures("on_cpu")
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@HALF
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("layout", packed_tokens.LAYOUTS)
def test_exact(layout: str, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    for x in packed_tokens.rows(dtype):
        packed_tokens.check(x, bits, symmetric, layout)


@HALF
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_half(bits: int, dtype: torch.dtype) -> None:
    for i, x in enumerate(packed_tokens.every_half(dtype, 12)):
        packed_tokens.check(x, bits, i % 3 == 0, "stream")


def test_longer_than_what_is_kept() -> None:
    """128 tokens of more than 8 pieces of 8 inputs in 1024 threads."""
    x = torch.zeros(128, 65536 + 384)
    x[1] = torch.randn(x.shape[1])
    packed_tokens.check(x.bfloat16(), 4, False, "int8")


@HALF
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(value: float, dtype: torch.dtype) -> None:
    """Its scale makes NaN of all a token's results; no other token is touched."""
    x = torch.randn(3, 256).to(dtype)
    x[1, 200] = value
    a, scale, _ = cuda.quantize_pack(x, 8)
    assert scale.isnan().tolist() == [False, True, False]
    others = torch.tensor([0, 2])
    alone, *_ = cuda.quantize_pack(x[others], 8)
    assert torch.equal(a[others], alone)
