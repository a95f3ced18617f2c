"""Fixtures of the latency tests."""

from __future__ import annotations

import pytest

from jointnas_kernels.latency import LatencyTable
from tests.latency.tables import synthetic


@pytest.fixture
def table() -> LatencyTable:
    return synthetic()
