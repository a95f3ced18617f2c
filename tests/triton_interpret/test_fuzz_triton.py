"""Triton kernels in the interpreter against the ops' fp64 definitions, on cases that hypothesis draws and shrinks.

The same cases in thousands: ``TRITON_INTERPRET=1 python -m tests.fuzz --device cpu --backend triton``.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.cases import LIBRARY, OPS
from tests.fuzz.check import check
from tests.fuzz.shrinking import Shrinking
from tests.fuzz.source import LIMITS


@pytest.mark.parametrize("op", [op for op in OPS if op not in LIBRARY])
def test_values_and_gradients(op: str) -> None:
    @settings(max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from((torch.float32, torch.float16)))
        case = OPS[op](Shrinking(data, dtype, "triton", LIMITS["small"]).start())
        outcome = check(case)
        assert not outcome.failures, f"{dtype} {case.text} layouts {case.layouts} gradients {case.wanted}"

    torch.manual_seed(0)
    run()
