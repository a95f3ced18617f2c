"""jointnas: joint search of architecture and precision of LLMs under a latency objective.

Every verb of the command line is a function of the same name here (`eval` is `evaluate`, `bench` is
`jointnas.bench.main`). Names load on first use, so that `import jointnas` costs nothing and `jointnas.train_base` runs
where only torch and transformers are installed.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "SearchSpace": "jointnas_kernels.space",
    "Choice": "jointnas_kernels.space",
    "count_params": "jointnas_kernels.space",
    "expected_params": "jointnas_kernels.space",
    "LatencyTable": "jointnas_kernels.latency",
    "RunConfig": "jointnas.config",
    **dict.fromkeys(("search", "finetune", "export", "evaluate", "compare", "report", "profile"), "jointnas.verbs"),
    **dict.fromkeys(("demo", "doctor", "quantize"), "jointnas.verbs"),
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'jointnas' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
