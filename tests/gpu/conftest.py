"""Tests of this folder need a CUDA device: without one they are skipped, and nothing in them is imported."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from jointnas_kernels.testing import poisoned

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Random but repeatable inputs, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def poison() -> Iterator[None]:
    """Everything ``torch.empty`` hands out is NaN: an output the kernel did not write cannot pass."""
    with poisoned():
        yield


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")
