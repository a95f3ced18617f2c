"""What a campaign consists of: units, each of which ends in one model, and what units of a seed share.

OUT/config.yaml, latency.jsonl                    the configuration, the latency table if none was given
OUT/plan.json                                     targets in ms, and the names of all units
OUT/shared/NAME/seed-0/                           quantizers, and what methods do once for all targets
OUT/units/METHOD[+PRECISION]/TARGET/seed-0[-3]/   picked.json, final/, row.json, in this order; likewise of a variant
OUT/units/original/                               row.json of the model itself
OUT/variants.json                                 what variants of the joint search change
OUT/measured.json                                 latency of all models, measured in turns
OUT/results.jsonl, results.parquet, summary.json  rows, and what follows from them
OUT/report.html                                   all of it as a page
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jointnas.baselines.exhaustive import count
from jointnas.baselines.methods import METHODS, Method
from jointnas.campaign.variants import starts_alike, variant
from jointnas.compare_config import CompareConfig
from jointnas.objective import Infeasible
from jointnas.precision import Precision, precisions
from jointnas.preparation import check_limits
from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.latency import LatencyTable
from jointnas_kernels.space import SearchSpace

ORIGINAL, QUANTIZERS, JOINT = "original", "quantizers", "joint"
PLAN, UNITS = "plan.json", "units"
PAPER = ("W4A4", "W4A16", "W8A8", "W8A16")  # precisions of the paper's sequential pipelines


@dataclass(frozen=True)
class Unit:
    """One model: of a method, at a target and a precision where the method has them, from a seed."""

    method: str
    seed: int
    target_ms: float | None = None
    precision: Precision | None = None
    number: int | None = None  # of several at the same
    variant: str | None = None  # of the method joint
    quantizers: str | None = None  # the variant whose initialised quantizers it has; None: those of all others

    @property
    def pipeline(self) -> str:
        """The method or variant, and the precision that it is followed by."""
        return self.variant or (self.method if self.precision is None else f"{self.method}+{self.precision}")

    @property
    def name(self) -> str:
        """Its folder below units/."""
        if self.method == ORIGINAL:
            return ORIGINAL
        target = "no-target" if self.target_ms is None else f"{self.target_ms:.6g}ms"
        number = "" if self.number is None else f"-{self.number}"
        return f"{self.pipeline}/{target}/seed-{self.seed}{number}"

    @property
    def needs(self) -> list[Shared]:
        """What must be done before it."""
        if self.method == ORIGINAL:
            return []
        method, own = METHODS[self.method], Shared(self.method, self.seed)
        return _quantizers(method, self.seed, self.quantizers) + ([] if method.share is None else [own])


@dataclass(frozen=True)
class Shared:
    """What units of a seed share: initialised quantizers, or a part of a method."""

    what: str
    seed: int
    variant: str | None = None  # whose alone it is

    @property
    def name(self) -> str:
        """Its folder below shared/."""
        return f"{self.what}{f'-{self.variant}' if self.variant else ''}/seed-{self.seed}"

    @property
    def needs(self) -> list[Shared]:
        """What must be done before it."""
        return [] if self.what == QUANTIZERS else _quantizers(METHODS[self.what], self.seed)


def _quantizers(method: Method, seed: int, variant: str | None = None) -> list[Shared]:
    return [Shared(QUANTIZERS, seed, variant)] if method.bits else []


def check(config: CompareConfig, space: SearchSpace) -> dict[str, Method]:
    """The methods, if all that is asked for exists; asked before anything is measured.

    Raises:
        JointNASError: a method, a precision or a key of a variant that there is not, no targets, or a space too large
            for exhaustive.
    """
    options = config.compare
    for name in options.methods:
        if name not in METHODS:
            raise unknown("method", name, METHODS, where="compare.methods")
    chosen = {name: METHODS[name] for name in options.methods}
    for name in options.variants:
        variant(config, name)
    targeted = [METHODS[JOINT]] * len(options.variants) + list(chosen.values())
    asked = options.targets_ms or options.target_shares or options.target_levels
    if not asked and any(method.targeted for method in targeted):
        raise JointNASError("compare.targets_ms, target_shares and target_levels are all empty: give targets")
    if any(method.precise for method in chosen.values()):
        asked_precisions(config, space)
    if "exhaustive" in chosen and (models := count(space)) > options.exhaustive_most:
        raise JointNASError(
            f"compare: the space has {models:,} different models, too many for the method exhaustive; leave it out, "
            f"make the space smaller, or raise compare.exhaustive_most ({options.exhaustive_most})"
        )
    return chosen


def plan(config: CompareConfig, space: SearchSpace, table: LatencyTable, model_config: Any) -> list[Unit]:
    """All units, the original first, then seed by seed: what has ended of a campaign that was cut off can be compared.
    `space`: without what the device cannot run.

    Raises:
        JointNASError: as `check`, or a target that nothing reaches.
    """
    options, chosen = config.compare, check(config, space)
    targets = targets_of(config, space, table)
    for target in targets:
        aimed = config.model_copy(update={"target_latency_ms": target})
        try:
            check_limits(aimed, model_config, table, space)
        except Infeasible as error:
            raise JointNASError(f"compare: target {target:.4g} ms: {error}") from None
    bits = asked_precisions(config, space) if any(method.precise for method in chosen.values()) else []
    numbers: dict[str, list[int | None]] = {"random": list(range(options.randoms))}
    if "exhaustive" in chosen:
        numbers["exhaustive"] = list(range(count(space)))
    variants = {name: variant(config, name) for name in options.variants}
    units = [Unit(ORIGINAL, options.seeds[0])]
    for seed in options.seeds:
        units += [
            Unit(name, seed, target, precision, number)
            for name, method in chosen.items()
            for precision in (bits if method.precise else [None])
            for target in (targets if method.targeted else [None])
            for number in numbers.get(name, [None])
        ]  # fmt: skip
        units += [
            Unit(JOINT, seed, target, variant=name, quantizers=None if starts_alike(config, changed) else name)
            for name, changed in variants.items()
            for target in targets
        ]
    return units


def targets_of(config: CompareConfig, space: SearchSpace, table: LatencyTable) -> list[float]:
    """In ms, largest first."""
    bound, options = table.bind(space), config.compare
    targets = options.targets_ms
    if options.target_shares:
        original = bound.original()
        targets = [share * original for share in options.target_shares]
    if options.target_levels:
        least, most = bound.extremes()
        targets = [least + level * (most - least) for level in options.target_levels]
    return sorted(targets, reverse=True)


def reference_of(methods: Sequence[str]) -> str:
    """The method that all others are compared with: the joint search, or else the first."""
    return JOINT if JOINT in methods else methods[0]


def asked_precisions(config: CompareConfig, space: SearchSpace) -> list[Precision]:
    """Those of the configuration, or of the paper as far as the space has them."""
    asked, where = config.compare.precisions, "compare.precisions"
    if not precisions(space):
        raise JointNASError(f"{where}: the space searches no weight bits, which methods without bits are followed by")
    if asked is not None:
        return [Precision.parse(text, space, where) for text in asked]
    found = []
    for text in PAPER:
        try:
            found.append(Precision.parse(text, space))
        except JointNASError:
            continue
    if not found:
        raise JointNASError(f"{where}: the space has none of {', '.join(PAPER)}; name those that it has")
    return found


def folder_of(out: Path, task: Unit | Shared) -> Path:
    """Where a task leaves its files."""
    return out / (UNITS if isinstance(task, Unit) else "shared") / task.name
