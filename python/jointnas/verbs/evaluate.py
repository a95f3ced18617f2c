"""`eval`: what the original and the found model of a run are worth."""

from __future__ import annotations

from typing import Any

from jointnas.pipeline import evaluate_found
from jointnas.preparation import open_run
from jointnas.results import text_table
from jointnas_kernels.errors import writable


def evaluate(run: str) -> list[dict[str, Any]]:
    """Measures size, latency and quality of the original and the found model of a run folder.

    Args:
        run: run folder of a search.

    Returns:
        One row per model (`results.Row`), also written to RUN/eval.json.

    Raises:
        JointNASError: it is no run folder, or has no finished model.
    """
    writable(run, what="run")
    return evaluate_found(open_run(run, searched=False))


text = text_table
