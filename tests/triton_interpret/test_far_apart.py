"""Elements more than 2^31 apart: heads of a cache with room for many tokens, seen as [B, T, H, D]. The memory is a file
with a hole; indices that wrap around would read zeros of it, or leave it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from jointnas_kernels import ops
from jointnas_kernels.testing import assert_close

HEADS, DIM, STRIDE = 4, 8, 3 << 29  # the last head starts 4.8e9 elements behind the first one
FIRST = 1 << 31  # in the middle, so that wrapped indices stay inside


@pytest.fixture
def far(tmp_path: Path) -> Tensor:
    """[2 tokens, HEADS, DIM] whose heads are STRIDE apart, with random values."""
    path = tmp_path / "memory"
    count = FIRST + HEADS * STRIDE
    with path.open("wb") as file:
        file.truncate(2 * count)
    memory = torch.from_file(str(path), shared=True, size=count, dtype=torch.float16)
    return memory.as_strided((1, 2, HEADS, DIM), (2 * DIM, DIM, STRIDE, 1), FIRST).copy_(torch.randn(1, 2, HEADS, DIM))


def test_masked_rope(far: Tensor) -> None:
    cos, mask = torch.randn(1, 2, DIM), torch.rand(HEADS, DIM)
    near = far.clone()
    pairs = zip(*(ops.masked_rope(q, q, cos, cos, mask, mask, "triton") for q in (far, near)), strict=True)
    for out, expected in pairs:
        assert torch.equal(out, expected)


def test_head_rmsnorm(far: Tensor) -> None:
    rest = torch.rand(DIM), torch.rand(HEADS, DIM), torch.rand(2), (4, DIM), 1e-5
    assert_close(ops.head_rmsnorm(far, *rest, backend="triton"), ops.head_rmsnorm(far, *rest, backend="reference"))
