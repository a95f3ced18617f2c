"""Every op on the CPU against its fp64 definition, on cases that hypothesis draws and shrinks.

The same cases in thousands, for every backend and device: ``python -m tests.fuzz``.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jointnas_kernels import _ext
from tests.fuzz.cases import LIBRARY, OPS
from tests.fuzz.check import check
from tests.fuzz.source import LIMITS, Shrinking

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CPU_KERNELS = (
    "mixed_weight_factored", "mixed_rmsnorm", "masked_rope", "masked_swiglu", "gated_residual", "channel_mask",
    "quant_lora_mix", "quant_lora_linear", "act_quant_mix", "lowbit_linear",
)  # fmt: skip
CASES = [pytest.param(op, "reference", id=f"{op}-{'torch' if op in LIBRARY else 'reference'}") for op in OPS]
CASES += [pytest.param(op, "cpu", id=f"{op}-cpu") for op in CPU_KERNELS]


@pytest.mark.parametrize("op, backend", CASES)
def test_values_and_gradients(op: str, backend: str) -> None:
    if backend == "cpu" and not _ext.available():
        pytest.skip("the extension is not built")

    @settings(
        max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )  # fmt: skip
    @given(st.data())
    def run(data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from(DTYPES[:2] if backend == "cpu" else DTYPES))
        case = OPS[op](Shrinking(data, dtype, backend, LIMITS["medium"]).start())
        outcome = check(case)
        assert not outcome.failures, f"{dtype} {case.text} layouts {case.layouts} gradients {case.wanted}"

    torch.manual_seed(0)
    run()
