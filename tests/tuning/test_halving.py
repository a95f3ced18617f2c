"""Successive halving on costs that are known: what it finds, how sure it is, and how much it measures."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from jointnas_kernels.tuning import halve
from jointnas_kernels.tuning.halving import DUEL, FIRST, MARGIN, uncertainty


class Surface:
    """Candidates 0 .. n - 1 with true costs between 1 and 3; a sample is off by `noise`, sometimes by a lot, and the
    clock drifts."""

    def __init__(self, seed: int, count: int, noise: float) -> None:
        self.random, self.noise = random.Random(seed), noise
        self.costs = [1 + 2 * self.random.random() ** 2 for _ in range(count)]
        self.samples: list[int] = []

    def sample(self, candidate: int) -> float:
        self.samples.append(candidate)
        drift = 1 + 0.05 * math.sin(len(self.samples) / 50)
        outlier = 3 if self.random.random() < 0.01 else 1
        return self.costs[candidate] * drift * outlier * math.exp(self.random.gauss(0, self.noise))


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.04])
def test_finds_the_best_of_random_surfaces(noise: float) -> None:
    regrets = []
    for seed in range(60):
        surface = Surface(seed, random.Random(seed).randint(1, 80), noise)
        usual = seed % len(surface.costs)
        found = halve(range(len(surface.costs)), usual, surface.sample)
        cost, least = surface.costs[found.best], min(surface.costs)
        regrets.append(cost / least - 1)
        assert cost <= surface.costs[usual]
        if found.best != usual:
            assert cost < surface.costs[usual] * (1 - MARGIN / 2), "not worth it"
            assert found.ms == pytest.approx(cost, rel=0.12)
        assert found.usual_ms == pytest.approx(surface.costs[usual], rel=0.12)
        assert found.samples == len(surface.samples)
    assert statistics.mean(regrets) < 0.003 + noise / 4
    assert max(regrets) <= MARGIN + 2.5 * noise


@pytest.mark.parametrize("count", [1, 2, 3, 7, 33, 100, 1000])
def test_samples_are_bounded(count: int) -> None:
    """A rung costs 2n, for each has half as many candidates as the one before, and twice as many samples of each."""
    surface = Surface(0, count, 0.01)
    found = halve(range(count), 0, surface.sample)
    rungs = math.ceil(math.log2(count)) + 1
    assert found.samples == len(surface.samples) <= FIRST * (count + 2**rungs + 2) * rungs + 2 * DUEL


def test_candidates_take_turns() -> None:
    surface = Surface(3, 8, 0.01)
    halve(range(8), 0, surface.sample)
    assert surface.samples[:16] == [*range(8)] * 2


def test_the_same_timer_leads_to_the_same_end() -> None:
    first, second = (halve(range(40), 7, Surface(5, 40, 0.03).sample) for _ in range(2))
    assert first == second


def test_the_usual_candidate_stays_unless_another_is_faster_by_the_margin() -> None:
    """Noise alone, and the best of many lucky ones, do not replace it."""
    for seed in range(100):
        surface = Surface(seed, 60, 0.05)
        surface.costs = [1.0] * 60
        assert halve(range(60), 11, surface.sample).best == 11
    surface.costs = [1 - 0.8 * MARGIN] * 60
    surface.costs[11], surface.noise = 1.0, 0.0
    assert halve(range(60), 11, surface.sample).best == 11


def test_the_usual_candidate_need_not_be_listed() -> None:
    surface = Surface(1, 10, 0.0)
    surface.costs[9] = 0.5
    assert halve(range(9), 9, surface.sample).best == 9
    alone, listed = halve([], 9, surface.sample), halve([9], 9, surface.sample)
    assert (alone.best, alone.samples) == (listed.best, listed.samples) == (9, DUEL)


def test_what_cannot_be_measured_never_wins() -> None:
    found = halve(["none", "slow"], "slow", lambda c: math.inf if c == "none" else 2.0)
    assert (found.best, found.ms) == ("slow", 2.0)
    assert halve(["none", "fast"], "slow", {"none": math.inf, "fast": 1.0, "slow": 2.0}.__getitem__).best == "fast"


def test_uncertainty_of_a_median() -> None:
    generator = random.Random(0)
    medians = [statistics.median(generator.gauss(1, 0.1) for _ in range(DUEL)) for _ in range(2000)]
    spread = statistics.stdev(medians)
    estimates = [uncertainty([generator.gauss(1, 0.1) for _ in range(DUEL)]) for _ in range(500)]
    assert statistics.mean(estimates) == pytest.approx(spread, rel=0.15)
