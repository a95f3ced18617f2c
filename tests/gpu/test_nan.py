"""NaN and infinity on the device, and tokens of fp32's smallest numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from jointnas_kernels import _ext, ops
from jointnas_kernels.ops.lowbit import choice
from tests import nan_cases

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
CUDA = pytest.mark.skipif(not (_ext.available() and _ext.load().has_cuda), reason="_C has no CUDA part")


@pytest.fixture(autouse=True)
def _there() -> Iterator[None]:
    with torch.device("cuda"):
        yield


@HALF
@pytest.mark.parametrize("case", ["act_quant_mix", "mixed_rmsnorm", "elementwise", "head_rmsnorm", "weights"])
def test_triton(case: str, dtype: torch.dtype) -> None:
    getattr(nan_cases, case)("triton", dtype)


@CUDA
@HALF
def test_cuda_weights(dtype: torch.dtype) -> None:
    nan_cases.weights("cuda", dtype)


@CUDA
@HALF
@pytest.mark.parametrize("kernel", ["stream", "tile", "wgmma", "int8"])
def test_cuda_lowbit(kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel in ("wgmma", "int8") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs wgmma")
    monkeypatch.setattr(choice, "kernel_for", lambda tokens, weight, a_bits: "stream" if a_bits == 16 else kernel)
    nan_cases.lowbit("cuda", dtype, 128, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_tokens_whose_scale_is_subnormal(symmetric: bool, dtype: torch.dtype) -> None:
    """1/s would be infinite: coarser levels, but numbers within the token's range."""
    x = (torch.randn(20, 64) * torch.logspace(-44, -30, 20)[:, None]).to(dtype)
    y = ops.act_quant_mix(x, (4,), torch.ones(1), symmetric, backend="triton")
    assert ((y - x).abs().amax(-1) <= x.abs().amax(-1) + 2.0**-126).all()


def test_pairs_that_span_two_rows() -> None:
    """Widths for which a thread's pair of values may belong to two tokens."""
    for width in (*range(1, 65), 97, 127):
        for dtype in (torch.float16, torch.bfloat16):
            x = (torch.randn(32, width) + torch.randn(32, 1) * 3).to(dtype)
            y, expected = (ops.act_quant_mix(x, (4,), torch.ones(1), backend=how) for how in ("triton", "reference"))
            assert torch.equal(y, expected), width
