"""Metrics of a run for programs: JSON lines, TensorBoard, and whatever else is asked to track them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jointnas import parallel
from jointnas.checkpoint import write_text
from jointnas_kernels.errors import JointNASError, writing

Tracker = Callable[[str, int, Mapping[str, float]], None]
_trackers: list[Tracker] = []


@contextlib.contextmanager
def tracking(tracker: Tracker) -> Iterator[None]:
    """Within it, every row of metrics that is written goes to a tracker of experiments, too.

    Args:
        tracker: called with the phase ("search", "finetune", ..), the step, and the row's numbers by name, those inside
            of dictionaries as "outer/inner". A resumed run repeats the steps since its last checkpoint.
    """
    _trackers.append(tracker)
    try:
        yield
    finally:
        _trackers.remove(tracker)


class Metrics:
    """`metrics.jsonl` of a run, and TensorBoard next to it, written by one of several ranks. A run resumed at `step`
    first drops what is later."""

    def __init__(self, folder: Path, phase: str, step: int = 0, tensorboard: bool = True) -> None:
        self._path, self._phase = folder / "metrics.jsonl", phase
        self._board: Any = None
        if not parallel.is_main():
            self._file = open(os.devnull, "wb", buffering=0)  # noqa: SIM115
            return
        kept = [r for r in read_metrics(folder) if r["phase"] != phase or r["step"] <= step]
        write_text(self._path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter  # optional
            except ImportError:
                raise JointNASError(
                    "TensorBoard logs need the `tensorboard` package: pip install tensorboard, or set "
                    "--tensorboard=false"
                ) from None
            self._board = SummaryWriter(str(folder / "tensorboard" / phase), purge_step=step + 1)

    def write(self, step: int, **values: Any) -> None:
        """A line; numbers, also those inside dictionaries, go to TensorBoard and to trackers.

        Raises:
            JointNASError: the disk is full.
        """
        if not parallel.is_main():
            return
        line = (json.dumps({"phase": self._phase, "step": step, **values}) + "\n").encode()
        known = ((key, value) for key, value in flat(values) if isinstance(value, (int, float)))
        numbers = {"/".join(key): float(value) for key, value in known if not isinstance(value, bool)}
        with writing(self._path):
            before = self._file.tell()
            try:
                while line:
                    line = line[self._file.write(line) :]
            except OSError:
                self._file.truncate(before)
                raise
            for name, number in numbers.items() if self._board is not None else ():
                self._board.add_scalar(f"{self._phase}/{name}", number, step)
        for tracker in _trackers:
            tracker(self._phase, step, numbers)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def flat(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path of keys, value) of everything in nested dictionaries."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, (*path, key))
        else:
            yield (*path, key), value


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's `metrics.jsonl`; what is none, as a line cut by a kill, is left out."""
    path = folder / "metrics.jsonl"
    rows: list[Any] = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [r for r in rows if isinstance(r, dict) and "phase" in r and isinstance(r.get("step"), int)]
