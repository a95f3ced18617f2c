"""`finetune`: the distillation of a searched run, again."""

from __future__ import annotations

from pathlib import Path

from jointnas.pipeline import finish
from jointnas.preparation import open_run
from jointnas_kernels.errors import writable


def finetune(run: str) -> Path:
    """Distils (again) the found choice of a run folder and exports it to RUN/final.

    Args:
        run: run folder of a search.

    Raises:
        JointNASError: it is no run folder, or its search has not finished.
    """
    writable(run, what="run")
    return finish(open_run(run))[1]
