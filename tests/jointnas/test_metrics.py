"""Rows of metrics for programs, and for trackers of experiments."""

from __future__ import annotations

from pathlib import Path

import pytest

from jointnas.metrics import Metrics, read_metrics, tracking

ROW = {"ce_weight": 2.5, "entropy": {"hidden": 0.5}, "probs": [0.1, 0.9], "converged": True, "at": "start"}
NUMBERS = {"ce_weight": 2.5, "entropy/hidden": 0.5}


def test_trackers_get_the_numbers(tmp_path: Path) -> None:
    seen: list[object] = []
    metrics = Metrics(tmp_path, "search", tensorboard=False)
    with tracking(lambda *row: seen.append(row)), tracking(lambda phase, step, values: seen.append(len(values))):
        metrics.write(5, **ROW)
    metrics.write(6, **ROW)
    metrics.close()
    assert seen == [("search", 5, NUMBERS), 2]
    assert [r["step"] for r in read_metrics(tmp_path)] == [5, 6]
    assert read_metrics(tmp_path)[0]["probs"] == [0.1, 0.9]


def test_accelerates_tracker_takes_them(tmp_path: Path) -> None:
    """As docs/jointnas.md shows it."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.tracking import GeneralTracker

    class Tracker(GeneralTracker):
        name, requires_logging_directory = "list", False
        logged: list[object] = []  # noqa: RUF012

        @property
        def tracker(self) -> object:
            return self.logged

        def store_init_configuration(self, values: dict[str, object]) -> None: ...

        def log(self, values: dict[str, float], step: int | None = None, **_: object) -> None:
            self.logged.append((step, values))

    accelerator = accelerate.Accelerator(cpu=True, log_with=Tracker())
    accelerator.init_trackers("compression")
    metrics = Metrics(tmp_path, "finetune", tensorboard=False)
    with tracking(lambda phase, step, values: accelerator.log({f"{phase}/{k}": v for k, v in values.items()}, step)):
        metrics.write(1, **ROW)
    metrics.close()
    assert Tracker.logged == [(1, {f"finetune/{k}": v for k, v in NUMBERS.items()})]
