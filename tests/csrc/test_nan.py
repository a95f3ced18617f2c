"""NaN and infinity in the compiled CPU kernels, per instruction set."""

from __future__ import annotations

import pytest
import torch

from tests import nan_cases

pytestmark = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.mark.parametrize("case", ["act_quant_mix", "mixed_rmsnorm", "elementwise", "weights"])
def test_alike(case: str, dtype: torch.dtype, kernels: int) -> None:
    torch.manual_seed(0)
    getattr(nan_cases, case)("cpu", dtype)


def test_lowbit(dtype: torch.dtype, lowbit_kernels: int) -> None:
    nan_cases.lowbit("cpu", dtype, 32, "cpu")
