"""A pytest plugin that keeps outcomes of tests through a cut: `pytest -p benchmarks.gpu_tests --outcomes FILE`.

Each test's outcome is appended to FILE as soon as it is known; what passed or was skipped by FILE is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.rows import append, read

KNOWN = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", help="JSON lines, one per test")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # of xdist: all must collect the same tests, whenever they start
        config.stash[KNOWN] = config.workerinput["known_tests"]
    elif config.option.outcomes:
        file = Path(config.option.outcomes)
        config.stash[KNOWN] = [row["test"] for row in read(file) if row["outcome"] != "failed"]
        config.pluginmanager.register(Notes(file))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["known_tests"] = node.config.stash.get(KNOWN, [])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = set(config.stash.get(KNOWN, []))
    left_out = [item for item in items if item.nodeid in known]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in known]


class Notes:
    """Writes outcomes."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # set-up and teardown count where they fail, or skip
            row: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
            if report.failed:
                row["message"] = str(getattr(report.longrepr, "reprcrash", report.longrepr))[:300]
            append(self.file, row)
