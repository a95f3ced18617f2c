"""The schema of a comparison: that of a search, and what else is compared with it."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, model_validator

from jointnas.config import RunConfig, Section


class CompareOptions(Section):
    """Which models a comparison is made of: methods and variants of the joint one × targets × precisions × seeds."""

    methods: list[str] = Field(
        default=["joint", "no-bits", "subnet-selection", "pruned", "ilp", "uniform", "random"], min_length=1,
        description="of jointnas.baselines: joint, no-bits, subnet-selection, lonas, tanglenas, pruned, ilp, uniform, "
        "random, exhaustive",
    )  # fmt: skip
    variants: dict[str, dict[str, Any]] = Field(
        default={}, description="more methods: the joint search with other values, as {no-latency: {search.eta: 0}}"
    )
    targets_ms: list[float] = Field(default=[], description="hard limits on the latency, in ms")
    target_shares: list[float] = Field(
        default=[], description="instead: as shares of the latency that the original is predicted at 16 bits"
    )
    target_levels: list[float] = Field(
        default=[], description="instead: how far from the fastest model of the space, 0, to the slowest, 1"
    )
    seeds: list[int] = Field(default=[0], min_length=1)
    precisions: list[str] | None = Field(
        default=None, description="of methods that search no bits, as W4A8, or W4A8H8 with the head's; none: those of "
        "W4A4, W4A16, W8A8, W8A16 that the space and the device have",
    )  # fmt: skip
    processes: int = Field(default=1, ge=1, description="units worked on at once")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of each; none: an equal part of torch's")
    strata: int = Field(default=21, ge=1, description="ranges of parameters that candidates are drawn from")
    candidates: int = Field(default=4, ge=1, description="of each of them")
    batches: int = Field(default=4, ge=1, description="batches that a loss without training is measured on")
    randoms: int = Field(default=1, ge=1, description="random choices per target and seed")
    exhaustive_most: int = Field(default=64, ge=1, description="models of the largest space that is run exhaustively")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="of the intervals")

    @model_validator(mode="after")
    def _is_possible(self) -> CompareOptions:
        if sum(map(bool, (self.targets_ms, self.target_shares, self.target_levels))) > 1:
            raise ValueError("give one of targets_ms, target_shares and target_levels")
        for name in ("methods", "targets_ms", "target_shares", "target_levels", "seeds", "precisions"):
            values: list[Any] = getattr(self, name) or []
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names something twice")
        if min(*self.targets_ms, *self.target_shares, math.inf, math.inf) <= 0:
            raise ValueError("targets must be positive")
        if any(not 0 <= level <= 1 for level in self.target_levels):
            raise ValueError("target_levels must be between 0 and 1")
        if min(self.seeds) < 0:
            raise ValueError("seeds must not be negative")
        return self


class CompareConfig(RunConfig):
    """A search's configuration, and what else is compared with it at its budget."""

    out: str = Field(default="runs/compare", description="the campaign's folder")
    compare: CompareOptions = CompareOptions()

    @model_validator(mode="after")
    def _leaves_it_to_the_units(self) -> CompareConfig:
        if self.target_latency_ms is not None:
            raise ValueError("target_latency_ms: a comparison has compare.targets_ms")
        if "seed" in self.model_fields_set and self.seed:
            raise ValueError("seed: a comparison has compare.seeds")
        return self
