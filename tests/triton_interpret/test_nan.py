"""NaN and infinity in the Triton kernels."""

from __future__ import annotations

import pytest
import torch

from tests import nan_cases

pytestmark = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
CASES = ["act_quant_mix", "mixed_rmsnorm", "elementwise", "head_rmsnorm", "weights"]


@pytest.mark.parametrize("case", CASES)
def test_alike(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    getattr(nan_cases, case)("triton", dtype)


@pytest.mark.slow
def test_lowbit(dtype: torch.dtype) -> None:
    nan_cases.lowbit("triton", dtype, 32, "storage")
