"""The latency backend of the portable Triton kernels, in the interpreter."""

from __future__ import annotations

import pytest

from jointnas_kernels.latency.backends.ours import Ours
from tests.latency.matrix import cases, check


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])  # bf16 is broken in the interpreter
def test_every_width_and_group(dtype: str) -> None:
    check(Ours("triton", "cpu"), dtype, cases(1, 1), lambda spec: True)
