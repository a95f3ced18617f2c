"""jointnas: joint search of architecture and precision of LLMs under a latency objective.

Every verb of the command line is a function of the same name here (`eval` is `evaluate`; `table` holds its verbs:
`table.merge`, ..). Names load on first use, so that `import jointnas` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_VERBS = (
    "bench", "compare", "demo", "doctor", "dry_run", "evaluate", "export", "fetch", "finetune", "generate", "quantize",
    "report", "search", "tune",
)  # fmt: skip
_WHERE = {
    **dict.fromkeys(("SearchSpace", "Choice", "count_params", "expected_params"), "jointnas_kernels.space"),
    "LatencyTable": "jointnas_kernels.latency",
    "RunConfig": "jointnas.config",
    "Objective": "jointnas.objective",
    "SearchCallback": "jointnas.trainer",
    **{name: f"jointnas.verbs.{name}" for name in _VERBS},
}
__all__ = sorted([*_WHERE, "profile", "table"])


def __getattr__(name: str) -> Any:
    if name == "table":
        return importlib.import_module("jointnas.verbs.table")
    if name == "profile":
        return __getattr__("table").measure
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'jointnas' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
