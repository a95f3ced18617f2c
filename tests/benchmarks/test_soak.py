"""Growth and drift of thousands of steps: lines are found, outliers and warm-up are not."""

from __future__ import annotations

import pytest

from benchmarks import bench_soak


def test_growth_is_the_second_halfs() -> None:
    warming = [float(i) for i in range(50)]
    assert bench_soak.slope([*warming, *[50.0] * 50]) == 0
    growing = [50 + 0.5 * i for i in range(50)]
    growing[7] = 900.0  # another program
    assert bench_soak.slope([*warming, *growing]) == pytest.approx(0.5, rel=0.05)


def test_every_step_is_run_once_and_measured_in_parts() -> None:
    seen: list[int] = []
    memory, seconds = bench_soak.curves(seen.append, 12, 4)
    assert seen == list(range(12))
    assert (len(memory), len(seconds)) == (3, 3)
    assert min(memory) > 1e6
    assert min(seconds) >= 0
