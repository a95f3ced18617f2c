"""`LatencyTable`: what every operation costs on one device and workload, and what follows from it.

    predict(choice)         fixed + per_block · L + Σ operations of the choice
    expected(space, probs)  the same in expectation, differentiable in the probabilities

Where no backend can run a linear there is no value, and none is made up: `coverage` reports it. `bind` gives the table
over one space (bound.py), with the formulas.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency.bound import Bound, Expected
from jointnas_kernels.latency.schema import INTERPOLATED, Calibration, Device, Header, Row, read, save
from jointnas_kernels.latency.spec import ModelDims, OpSpec, Workload, bit_choices, enumerate_ops
from jointnas_kernels.latency.timing import describe, pinned_threads
from jointnas_kernels.latency.watch import Watch, warn_once
from jointnas_kernels.space import Choice, SearchSpace


class Coverage(NamedTuple):
    """What of a space a table holds, in operations."""

    needed: int
    measured: int
    infeasible: dict[str, int]  # "W2A4" -> operations nobody can run
    missing: list[OpSpec]  # never tried
    reasons: dict[str, str]  # "W2A4" -> why, from one of them
    interpolated: int = 0  # between measured sizes

    def __str__(self) -> str:
        lines = [f"{self.measured} of {self.needed} operations measured, {len(self.missing)} not yet tried"]
        if self.interpolated:
            lines.append(f"  {self.interpolated} interpolated between measured sizes")
        for bits, count in sorted(self.infeasible.items()):
            lines.append(f"  {bits}: {count} infeasible ({self.reasons[bits]})")
        return "\n".join(lines)


class LatencyTable:
    """Measured rows of one device, workload and model, and what follows from them (module docstring)."""

    def __init__(
        self, header: Header, rows: Sequence[Row], calibration: Calibration | None = None, finished: bool = True
    ) -> None:
        self.header, self.rows, self.calibration, self.finished = header, list(rows), calibration, finished
        self._best: dict[OpSpec, Row] = {}
        for row in self.rows:
            known = self._best.get(row.spec)
            if known is None or _rank(row) < _rank(known):
                self._best[row.spec] = row
        self._bound: dict[tuple[SearchSpace, tuple[int, ...] | None], Bound] = {}

    # ---- files ------------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls, path: str | Path, device: str | Device | None = "cpu", force: bool = False, recover: bool = False
    ) -> LatencyTable:
        """Reads a finished table.

        Args:
            path: the file.
            device: what it is going to be used for ("cpu", "cuda", "auto": the device of this machine that is of the
                table's type, or an identity); a table from another device is refused unless `force`. None: no check,
                for looking at or merging tables of other machines.
            force: take it whatever device it is from.
            recover: also an unfinished one, as far as it goes, for looking at it.

        Raises:
            JointNASError: missing, truncated, edited or invalid file; another device; a table of what models no longer
                do.
        """
        contents = read(path, recover)
        if device == "auto":
            device = contents.header.device.type if torch.cuda.is_available() else "cpu"
        if device is not None and not force:
            here = describe(device, contents.header.device.threads) if isinstance(device, str) else device
            if here != contents.header.device:
                raise JointNASError(
                    f"latency table {path} was measured on {contents.header.device}, this device is {here}; profile it "
                    "here, or force its use"
                )
            if why := contents.header.outdated:
                raise JointNASError(f"latency table {path} {why}; profile it anew, or force its use")
        return cls(contents.header, contents.rows, contents.calibration, contents.complete)

    def save(self, path: str | Path) -> None:
        """Writes a finished table file."""
        save(path, self.header, self.rows, self.calibration)

    def merge(self, other: LatencyTable) -> LatencyTable:
        """Both tables' rows; where both have one, `other`'s. The calibration is dropped: it fits one set of rows.

        Raises:
            JointNASError: they differ in metric, device, workload or model.
        """
        difference = self.header.differs_from(other.header)
        if difference:
            raise JointNASError(f"latency tables cannot be merged: different {difference}")
        rows = {(r.spec, r.backend): r for r in (*self.rows, *other.rows)}
        return LatencyTable(self.header, list(rows.values()))

    def doubted(self, keep_calibration: bool = False) -> LatencyTable:
        """The table with all that was measured marked as disturbed, to be measured anew; without the calibration,
        unless it is to be used all the same."""
        mark = {"contended": True}
        rows = [row.model_copy(update=mark) if row.status == "ok" else row for row in self.rows]
        kept = self.calibration.model_copy(update=mark) if self.calibration and keep_calibration else None
        return LatencyTable(self.header, rows, kept)

    # ---- looking up -------------------------------------------------------------------------------------------------

    @property
    def workload(self) -> Workload:
        """What was timed."""
        return self.header.workload

    @property
    def dims(self) -> ModelDims:
        """Sizes of the model that the space does not say."""
        return self.header.model

    @property
    def specs(self) -> Iterable[OpSpec]:
        """Every operation that was tried."""
        return self._best.keys()

    @property
    def caution(self) -> str:
        """Why the table should not be trusted, and what to do; empty if it can be."""
        used = [r for r in self._best.values() if r.contended]
        whole = self.calibration is not None and bool(self.calibration.contended)
        if not used and not whole:
            return ""
        what = [f"{len(used)} of {len(self._best)} operations"] * bool(used) + ["its whole models"] * whole
        load = f" (load average {self.header.load:g} at its start)" if self.header.load else ""
        return (
            f"the latency table is not reliable: {' and '.join(what)} were measured while the machine was busy with "
            f"something else{load}; stop other processes and run `jointnas profile --resume` on the same file"
        )

    def watch(self, strict: bool = False) -> Watch:
        """Notices when this device is slower than it was when the table was measured."""
        with pinned_threads(self.header.device.threads):
            baseline = tuple(r / 1e3 for r in self.header.reference or ())
            return Watch.on(torch.device(self.header.device.type), baseline, strict)

    def best(self, spec: OpSpec) -> Row | None:
        """The fastest backend's row, None where the operation is infeasible or was never tried."""
        row = self._best.get(spec)
        return row if row is not None and row.status == "ok" else None

    def coverage(self, space: SearchSpace, config: Any) -> Coverage:
        """What of a space the table holds."""
        needed = enumerate_ops(space, config, self.workload)
        rows = [row for spec in needed if (row := self._best.get(spec)) is not None]
        missing = [spec for spec in needed if spec not in self._best]
        infeasible = [row for row in rows if row.status != "ok"]
        interpolated = sum(row.backend == INTERPOLATED for row in rows)
        reasons = {row.bits: row.reason for row in reversed(infeasible)}  # of the first of each
        measured = len(rows) - len(infeasible) - interpolated
        counts = Counter(row.bits for row in infeasible)
        return Coverage(len(needed), measured, dict(counts), missing, reasons, interpolated)

    def summary(self) -> str:
        """How much was measured, which bits are infeasible, which backends were rejected, and why."""
        best = self._best.values()
        measured = sum(r.status == "ok" and r.backend != INTERPOLATED for r in best)
        lines = [f"{measured} of {len(best)} operations measured"]
        if not self.finished:
            lines.append("the table is unfinished; run `jointnas profile --resume` on the same file")
        if self.caution:
            lines.append(self.caution)
        infeasible = (f"  {row.bits} infeasible: {row.reason}" for row in best if row.status == "infeasible")
        lines += dict.fromkeys(infeasible)
        rejected: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            if row.status == "rejected":
                kind = re.sub(r"[\d.]+", "#", row.reason)  # the same but for its numbers
                rejected.setdefault((row.backend, kind), []).append(row)
        for (backend, _), rows in rejected.items():
            first = f"first {rows[0].spec}: {rows[0].reason}"
            lines.append(f"  {backend} rejected for {len(rows)} operations, {first}")
        return "\n".join(lines)

    @property
    def overhead(self) -> tuple[float, float]:
        """(fixed, per block) of the calibration, in the header's unit; zero without one."""
        return (self.calibration.fixed, self.calibration.per_block) if self.calibration else (0.0, 0.0)

    @property
    def tolerance(self) -> float:
        """Relative error that a prediction may have: twice the largest of the calibration's models, at least 5 %;
        infinite without a calibration."""
        if self.calibration is None:
            return math.inf
        fixed, per_block = self.overhead
        errors = (abs((fixed + per_block * b + ops) / ms - 1) for ops, b, ms in self.calibration.points)
        return max(0.05, 2 * max(errors))

    def predict(self, choice: Choice, space: SearchSpace, block_rank: Sequence[int] | None = None) -> float:
        """Latency of one choice. `block_rank` (most important first) says whose bits count."""
        return self.bind(space, block_rank).predict(choice)

    def expected(
        self, space: SearchSpace, probs: Mapping[str, Tensor], block_rank: Sequence[int] | None = None
    ) -> Expected:
        """Differentiable expectation under independent `probs`: by dimension [choices], of bits [blocks, choices]."""
        return self.bind(space, block_rank).expected(probs)

    def bind(self, space: SearchSpace, block_rank: Sequence[int] | None = None) -> Bound:
        """The table as tensors over one space; cached."""
        key = (space, tuple(block_rank) if block_rank is not None else None)
        if key not in self._bound:
            if self.caution and not self._bound:
                warn_once(self.caution)
            self._bound[key] = Bound(self._best, self.overhead, self.workload, self.dims, space, block_rank)
        return self._bound[key]

    def restrict(self, space: SearchSpace) -> tuple[SearchSpace, list[str]]:
        """The space without bit values that no feasible combination uses, and one line per removal.

        Raises:
            JointNASError: the table lacks operations of the space, or nothing is left.
        """
        wbits, abits = bit_choices(space)
        bound = self.bind(space)
        feasible = bound.feasible[space.allowed].flatten(0, -3).all(0)  # [W, A]: at every width
        keep_w = [w for w, ok in zip(wbits, feasible.any(1).tolist(), strict=True) if ok]
        keep_a = [a for a, ok in zip(abits, feasible.any(0).tolist(), strict=True) if ok]
        if not keep_w:
            why = {row.bits: f"{row.bits}: {row.reason}" for row in self._best.values() if row.status != "ok"}
            raise JointNASError("the latency table has no feasible bits for this space: " + "; ".join(why.values()))
        values = space.to_dict()
        removed = [f"weight_bits {w}: infeasible on this device" for w in wbits if w not in keep_w]
        removed += [f"act_bits {a}: infeasible on this device" for a in abits if a not in keep_a]
        if space.weight_bits:
            values["weight_bits"] = keep_w
        if space.act_bits:
            values["act_bits"] = keep_a
        if bound.head is not None:
            used = [space.hidden.index(size) for (size,) in space.combinations(bound.head.dims)]
            feasible = bound.values[bound.head.name][used].isfinite().all(0)  # at every width
            values["head_bits"] = [b for b, ok in zip(space.sizes("head_bits"), feasible.tolist(), strict=True) if ok]
            lost = [b for b in space.sizes("head_bits") if b not in values["head_bits"]]
            removed += [f"head_bits {b}: infeasible on this device" for b in lost]
            if not values["head_bits"]:
                raise JointNASError(f"the latency table has no feasible head_bits for this space: {'; '.join(removed)}")
        return SearchSpace.from_dict(values), removed


def _rank(row: Row) -> tuple[bool, bool, float]:
    """Smallest first. A profile that takes the place of interpolated rows leaves both until it has finished."""
    return (row.status != "ok", row.backend == INTERPOLATED, row.value if row.value is not None else 0.0)
