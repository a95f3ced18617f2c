"""Sizes between measured ones.

`interpolate` fills sizes that a space needs and a table lacks. Kernels work in tiles, so an operation costs what its
size rounded up to the tile costs; between two measured sizes that is linear in the rounded size:

    t(s) = t(lo) + (t(hi) - t(lo)) (ceil(s) - ceil(lo)) / (ceil(hi) - ceil(lo)),   lo < s < hi the nearest measured ones

Only one size (out or in features, heads, head dim) may differ from the measured operations. If one of the two
neighbours is infeasible, or there is none on one side, the size stays missing: nothing is made up across a gap, or
beyond the ends. Such rows are no measurements: a resumed profile takes their place, and a model deployed by the table
runs them on the backend of the lower neighbour.
"""

from __future__ import annotations

from typing import Any

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency.schema import INTERPOLATED, Row
from jointnas_kernels.latency.spec import OpSpec
from jointnas_kernels.latency.table import LatencyTable
from jointnas_kernels.space import SearchSpace

TILE = {"cuda": 128, "cpu": 16}  # widest tile edge of the kernels of a device


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


def between(table: LatencyTable, spec: OpSpec) -> Row | None:
    """A row for one size from its two measured neighbours along one axis; None where that is not possible."""
    tile = TILE[table.header.device.type]
    for axis in ("n", "k"):
        size = getattr(spec, axis)
        line = {getattr(s, axis): table.best(s) for s in table.specs if s._replace(**{axis: size}) == spec}
        # infeasible neighbours (None) count: what lies between may be infeasible, too; interpolated ones do not
        line = {at: row for at, row in line.items() if row is None or row.backend != INTERPOLATED}
        below, above = [v for v in line if v < size], [v for v in line if v > size]
        if not below or not above:
            continue
        low, high = line[max(below)], line[min(above)]
        if low is None or high is None:
            continue
        edges = [-(-v // tile) * tile for v in (max(below), size, min(above))]
        share = (edges[1] - edges[0]) / (edges[2] - edges[0]) if edges[2] > edges[0] else 1.0
        times = {n: (1 - share) * getattr(low, n) + share * getattr(high, n) for n in ("median", "p10", "p90")}
        return Row(
            **spec._asdict(), **times, backend=INTERPOLATED, backend_version=f"{axis} {max(below)}..{min(above)}",
            contended=True if low.contended or high.contended else None,
        )  # fmt: skip
    return None
