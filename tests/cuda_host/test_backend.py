"""The latency backend of the CUDA kernels, executed on the CPU."""

from __future__ import annotations

import pytest

from jointnas_kernels.latency.backends.ours import Ours
from tests.latency.matrix import cases, check


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_width(dtype: str) -> None:
    """Groups of 128 are the only ones it claims."""
    check(Ours("cuda", "cpu"), dtype, cases(outputs=1), lambda spec: spec.group == 128)
