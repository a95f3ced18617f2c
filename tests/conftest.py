"""Which cases run: all, what `make test` has minutes for, or the rest of them.

`sample`: of every parametrised test SAMPLE cases, always the same, spread by a hash of their names; no test marked
slow. `rest`: the others.
"""

from __future__ import annotations

import zlib
from collections import defaultdict

import pytest

SAMPLE = 2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", choices=["all", "sample", "rest"], default="all", help="which cases to run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("cases")
    if asked == "all":
        return
    families = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        if item.get_closest_marker("slow") is None:
            families[item.nodeid.partition("[")[0]].append(item)
    kept = set[pytest.Item]()
    for family in families.values():
        kept.update(sorted(family, key=lambda item: zlib.crc32(item.nodeid.encode()))[:SAMPLE])
    chosen = [item for item in items if (item in kept) == (asked == "sample")]
    config.hook.pytest_deselected(items=[item for item in items if (item in kept) != (asked == "sample")])
    items[:] = chosen
