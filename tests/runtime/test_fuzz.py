"""Some random cases of the decode step; more of them: python -m tests.runtime.fuzz."""

from __future__ import annotations

import pytest

from tests.runtime.fuzz import run


@pytest.mark.parametrize("first", range(0, 120, 30))
def test_random_models(first: int) -> None:
    assert [text for seed in range(first, first + 30) if (text := run(seed))] == []
