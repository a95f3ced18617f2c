"""`finetune`: the distillation of a searched run, again."""

from __future__ import annotations

from pathlib import Path

from jointnas import parallel
from jointnas.pipeline import finish
from jointnas.preparation import open_run
from jointnas.run_folder import read_config
from jointnas_kernels.errors import writable


def finetune(run: str) -> Path:
    """Distils (again) the found choice of a run folder and exports it to RUN/final. Under torchrun, its processes train
    together.

    Args:
        run: run folder of a search.

    Raises:
        JointNASError: it is no run folder, or its search has not finished.
    """
    writable(run, what="run")
    with parallel.session(read_config(Path(run))):
        return finish(open_run(run))[1]
