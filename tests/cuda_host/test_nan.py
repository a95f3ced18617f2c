"""NaN and infinity in the CUDA kernels, executed on the CPU."""

from __future__ import annotations

import pytest
import torch

from jointnas_kernels.ops.lowbit import choice
from jointnas_kernels.ops.quant.mixture import op
from tests import nan_cases

pytestmark = [
    pytest.mark.usefixtures("on_cpu"),
    pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"]),
]


def test_weights(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op._op, "choose", lambda *args: args[-1])  # which refuses tensors of a CPU
    torch.manual_seed(0)
    nan_cases.weights("cuda", dtype)


@pytest.mark.parametrize("kernel", ["stream", "tile", "wgmma", "int8"])
def test_lowbit(kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "kernel_for", lambda tokens, weight, a_bits: "stream" if a_bits == 16 else kernel)
    nan_cases.lowbit("cuda", dtype, 128, "cuda")
