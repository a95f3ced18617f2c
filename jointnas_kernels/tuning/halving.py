"""Successive halving: a little time for every candidate, more for those that remain.

    rung 1       all candidates            2 samples each
    rung 2       the faster half           4 more
    ...                                    twice as many each time
    last         the fastest and the usual 32 new ones each

In a rung candidates take turns, so that a clock that changes slows all of them alike; a candidate's time is the median
of its samples so far. The usual candidate stays to the end, whatever it takes. Who is the fastest of many on the same
samples was lucky, too: only new ones say whether it is faster than the usual one. For n candidates these are about
2 n log2(n) samples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

C = TypeVar("C", bound=Hashable)
FIRST, GROWTH = 2, 2  # samples of the first rung; how many times more the next has, of so many times fewer candidates
DUEL = 32
MARGIN = 0.03  # shares of a usual candidate's time that another must save


@dataclass(frozen=True)
class Found(Generic[C]):
    """The end of a search.

    best: the usual candidate, unless another is faster by more than margin and noise. ms, usual_ms: milliseconds of
    both. samples: how many were taken.
    """

    best: C
    ms: float
    usual_ms: float
    samples: int


def halve(candidates: Sequence[C], usual: C, sample: Callable[[C], float], margin: float = MARGIN) -> Found[C]:
    """The fastest of `candidates` and `usual`, by milliseconds that `sample` measures, one sample a call."""
    times: dict[C, list[float]] = {usual: [], **{c: [] for c in candidates}}
    alive, repeats = list(times), FIRST
    while len(alive) > 2:
        for _ in range(repeats):
            for candidate in alive:
                times[candidate].append(sample(candidate))
        ranked = sorted((c for c in alive if c != usual), key=lambda c: statistics.median(times[c]))
        alive = [usual, *ranked[: math.ceil(len(ranked) / GROWTH)]] if len(ranked) > 1 else alive
        repeats *= GROWTH
    if len(alive) == 1:
        ms = statistics.median([sample(usual) for _ in range(DUEL)])
        return Found(usual, ms, ms, DUEL)
    best, ms, usual_ms = duel(alive[1], usual, sample, margin)
    return Found(best, ms, usual_ms, sum(map(len, times.values())) + 2 * DUEL)


def duel(other: C, usual: C, sample: Callable[[C], float], margin: float = MARGIN) -> tuple[C, float, float]:
    """(the faster of two, its milliseconds, those of the usual one), by new samples in turns, each pair compared."""
    pairs = [(sample(other), sample(usual)) for _ in range(DUEL)]
    ms, usual_ms = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [mine / theirs for mine, theirs in pairs]
    faster = statistics.median(ratios) < 1 - max(margin, 3 * uncertainty(ratios)) and ms < usual_ms
    return (other, ms, usual_ms) if faster else (usual, usual_ms, usual_ms)


def uncertainty(samples: Sequence[float]) -> float:
    """The standard error of the median of samples about 1, by their quartiles."""
    low, _, high = statistics.quantiles(samples, n=4)
    return 1.25 * (high - low) / 1.35 / math.sqrt(len(samples)) if math.isfinite(high) else math.inf
