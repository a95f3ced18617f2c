"""Two tables side by side: the fastest row of every operation that both hold, largest change first."""

from __future__ import annotations

import math
from typing import NamedTuple

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency.spec import OpSpec
from jointnas_kernels.latency.table import LatencyTable


class Change(NamedTuple):
    """One operation: its value in both tables and who it was measured on."""

    spec: OpSpec
    before: float
    after: float
    backends: tuple[str, str]

    @property
    def ratio(self) -> float:
        """How many times as much it is afterwards."""
        return self.after / self.before


class Comparison(NamedTuple):
    """What `compare` found."""

    first: LatencyTable
    second: LatencyTable
    changes: list[Change]  # largest first, either way
    only: tuple[list[OpSpec], list[OpSpec]]  # measured in one of them

    def text(self, limit: int = 40) -> str:
        """In words, with the `limit` largest changes."""
        tables = {"a": self.first, "b": self.second}
        lines = [f"{name}: {table.header}; {table.header.created}" for name, table in tables.items()]
        lines += [f"{name}: {table.caution}" for name, table in tables.items() if table.caution]
        if self.changes:
            logs = sorted(math.log(c.ratio) for c in self.changes)
            low, typical, high, mean = map(math.exp, (logs[0], logs[len(logs) // 2], logs[-1], sum(logs) / len(logs)))
            lines.append(
                f"{len(self.changes)} operations in both, b/a: median {typical:.3f}, geometric mean {mean:.3f}, "
                f"from {low:.3f} to {high:.3f}"
            )
            shown, unit = self.changes[:limit], self.first.header.unit
            width = max(len(str(c.spec)) for c in shown)
            for c in shown:
                by = " -> ".join(dict.fromkeys(c.backends))
                lines.append(f"  {c.spec!s:<{width}}  {c.ratio:6.3f}x  {c.before:.5g} -> {c.after:.5g} {unit}  {by}")
            if len(self.changes) > limit:
                lines.append(f"  ... and {len(self.changes) - limit} smaller changes")
        else:
            lines.append("no operation is measured in both")
        for name, specs in zip(tables, self.only, strict=True):
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
    a, b = ({spec: row for spec in t.specs if (row := t.best(spec)) is not None} for t in (first, second))
    changes = [
        Change(spec, row.value, b[spec].value, (row.backend, b[spec].backend))  # type: ignore[arg-type]
        for spec, row in a.items()
        if spec in b
    ]
    changes.sort(key=lambda c: -abs(math.log(c.ratio)))
    return Comparison(first, second, changes, ([s for s in a if s not in b], [s for s in b if s not in a]))
