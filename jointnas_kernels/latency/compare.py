"""Two tables side by side, and sizes between measured ones.

`compare` pairs the fastest row of every operation that both tables hold: largest change first.

`interpolate` fills sizes that a space needs and a table lacks. Kernels work in tiles, so an operation costs what its
size rounded up to the tile costs; between two measured sizes that is linear in the rounded size:

    t(s) = t(lo) + (t(hi) - t(lo)) (ceil(s) - ceil(lo)) / (ceil(hi) - ceil(lo)),   lo < s < hi the nearest measured ones

Only one size (out or in features, heads, head dim) may differ from the measured operations. If one of the two
neighbours is infeasible, or there is none on one side, the size stays missing: nothing is made up across a gap, or
beyond the ends. Such rows are no measurements: a resumed profile takes their place, and a model deployed by the table
runs them on the backend of the lower neighbour.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency.schema import INTERPOLATED, Row
from jointnas_kernels.latency.spec import OpSpec
from jointnas_kernels.latency.table import LatencyTable
from jointnas_kernels.space import SearchSpace

TILE = {"cuda": 128, "cpu": 16}  # widest tile edge of the kernels of a device


class Change(NamedTuple):
    spec: OpSpec
    before: float
    after: float
    backends: tuple[str, str]

    @property
    def ratio(self) -> float:
        return self.after / self.before


class Comparison(NamedTuple):
    first: LatencyTable
    second: LatencyTable
    changes: list[Change]  # largest first, either way
    only: tuple[list[OpSpec], list[OpSpec]]  # measured in one of them

    def text(self, limit: int = 40) -> str:
        a, b = self.first.header, self.second.header
        lines = [f"a: {a.device}; {a.workload!s}; {a.created}", f"b: {b.device}; {b.workload!s}; {b.created}"]
        for name, table in (("a", self.first), ("b", self.second)):
            if table.caution:
                lines.append(f"{name}: {table.caution}")
        if self.changes:
            logs = sorted(math.log(c.ratio) for c in self.changes)
            typical, mean = math.exp(logs[len(logs) // 2]), math.exp(sum(logs) / len(logs))
            lines.append(
                f"{len(self.changes)} operations in both, b/a: median {typical:.3f}, geometric mean {mean:.3f}, "
                f"from {math.exp(logs[0]):.3f} to {math.exp(logs[-1]):.3f}"
            )
            width = max(len(str(c.spec)) for c in self.changes[:limit])
            for c in self.changes[:limit]:
                by = c.backends[0] if c.backends[0] == c.backends[1] else " -> ".join(c.backends)
                lines.append(f"  {c.spec!s:<{width}}  {c.ratio:6.3f}x  {c.before:.5g} -> {c.after:.5g} {a.unit}  {by}")
            if len(self.changes) > limit:
                lines.append(f"  ... and {len(self.changes) - limit} smaller changes")
        else:
            lines.append("no operation is measured in both")
        for name, specs in zip("ab", self.only, strict=True):
            if specs:
                lines.append(f"only in {name}: {len(specs)} operations, first {specs[0]}")
        return "\n".join(lines)


def compare(first: LatencyTable, second: LatencyTable) -> Comparison:
    """What changed from the first table to the second; they may be of different devices, but of one metric.

    Raises:
        JointNASError: of two metrics.
    """
    metrics = [t.header.metric for t in (first, second)]
    if metrics[0] != metrics[1]:
        raise JointNASError(f"a table of {metrics[0]} cannot be compared with one of {metrics[1]}")
    a, b = (dict(_fastest(table)) for table in (first, second))
    changes = [
        Change(spec, row.median, b[spec].median, (row.backend, b[spec].backend))  # type: ignore[arg-type]
        for spec, row in a.items()
        if spec in b
    ]
    changes.sort(key=lambda c: -abs(math.log(c.ratio)))
    return Comparison(first, second, changes, ([s for s in a if s not in b], [s for s in b if s not in a]))


def _fastest(table: LatencyTable) -> Iterator[tuple[OpSpec, Row]]:
    for spec in dict.fromkeys(row.spec for row in table.rows):
        row = table.best(spec)
        if row is not None:
            yield spec, row


def interpolate(table: LatencyTable, space: SearchSpace, config: Any) -> LatencyTable:
    """The table with rows (backend "interpolated") for what the space needs, the table lacks, and can be interpolated.

    The calibration is kept: it describes what lies between the operations.
    """
    found = [row for spec in table.coverage(space, config).missing if (row := between(table, spec)) is not None]
    return LatencyTable(table.header, [*table.rows, *found], table.calibration)


def measured_by(table: LatencyTable, row: Row) -> str:
    """The backend of a row; of an interpolated one its lower neighbour's."""
    if row.backend != INTERPOLATED:
        return row.backend
    axis, sizes = row.backend_version.split()
    size: Any = int(sizes.split("..")[0])
    lower = table.best(row.spec._replace(**{axis: size}))
    if lower is None:
        raise JointNASError(f"the latency table no longer has what {row.spec} was interpolated from")
    return lower.backend


def _measured(table: LatencyTable, spec: OpSpec) -> bool:
    """Whether a row is not interpolated itself: it was measured, or found to be infeasible."""
    row = table.best(spec)
    return row is None or row.backend != INTERPOLATED


def between(table: LatencyTable, spec: OpSpec) -> Row | None:
    """A row for one size from its two measured neighbours along one axis; None where that is not possible."""
    tile = TILE[table.header.device.type]
    for axis in ("n", "k"):
        size = getattr(spec, axis)
        line = {getattr(s, axis): s for s in table.specs if s._replace(**{axis: size}) == spec and _measured(table, s)}
        below, above = [v for v in line if v < size], [v for v in line if v > size]
        if not below or not above:
            continue
        low, high = table.best(line[max(below)]), table.best(line[min(above)])
        if low is None or high is None:  # infeasible: what lies between may be, too
            continue
        edges = [-(-v // tile) * tile for v in (max(below), size, min(above))]
        share = (edges[1] - edges[0]) / (edges[2] - edges[0]) if edges[2] > edges[0] else 1.0

        def mix(name: str, low: Row = low, high: Row = high, share: float = share) -> float:
            return (1 - share) * getattr(low, name) + share * getattr(high, name)

        return Row(
            **spec._asdict(), backend=INTERPOLATED, backend_version=f"{axis} {max(below)}..{min(above)}",
            median=mix("median"), p10=mix("p10"), p90=mix("p90"),
            contended=True if low.contended or high.contended else None,
        )  # fmt: skip
    return None
