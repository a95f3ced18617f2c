"""Progress for people (a bar on a terminal, else plain lines), metrics for programs (JSON lines, TensorBoard)."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jointnas_kernels.errors import JointNASError

LINE_SECONDS = 20.0  # between plain progress lines


class Progress:
    """A step counter with ETA."""

    def __init__(self, what: str, total: int, start: int = 0, enabled: bool = True) -> None:
        self._what, self._total, self._start, self._done = what, total, start, start
        self._began = self._printed = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, desc=what, unit="step") if enabled and terminal else None
        self._lines = enabled and not terminal

    def step(self, **values: float) -> None:
        self._done += 1
        if self._bar is not None:
            if values:
                self._bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
            self._bar.update()
        elif self._lines and time.monotonic() - self._printed > LINE_SECONDS:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        rate = (self._done - self._start) / max(self._printed - self._began, 1e-9)
        left = (self._total - self._done) / rate if rate else float("inf")
        print(f"{self._what}: step {self._done} of {self._total}, {left:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Metrics:
    """`metrics.jsonl` of a run, and TensorBoard next to it. A run resumed at `step` first drops what is later."""

    def __init__(self, folder: Path, phase: str, step: int = 0, tensorboard: bool = True) -> None:
        self._path, self._phase = folder / "metrics.jsonl", phase
        kept = [r for r in read_metrics(folder) if r["phase"] != phase or r["step"] <= step]
        folder.mkdir(parents=True, exist_ok=True)
        self._path.write_text("".join(json.dumps(r) + "\n" for r in kept))
        self._file = open(self._path, "a")  # noqa: SIM115
        self._board = _board(folder / "tensorboard" / phase, step) if tensorboard else None

    def write(self, step: int, **values: Any) -> None:
        self._file.write(json.dumps({"phase": self._phase, "step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in _scalars(values):
                self._board.add_scalar(f"{self._phase}/{key}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise JointNASError(
            "TensorBoard logs need the `tensorboard` package: pip install tensorboard, or set --tensorboard=false"
        ) from None
    return SummaryWriter(str(folder), purge_step=step + 1)


def _scalars(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            found.extend(_scalars(value, f"{prefix}{key}/"))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((prefix + key, float(value)))
    return found


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's `metrics.jsonl`; a line cut by a kill is left out."""
    path = folder / "metrics.jsonl"
    rows: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows
