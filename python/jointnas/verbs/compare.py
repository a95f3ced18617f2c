"""`compare`: is the search worth it? The found choice against random ones of its cost."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

from jointnas.baselines.random_choices import random_choices
from jointnas.pipeline import score
from jointnas.preparation import open_run
from jointnas.run_folder import found_choice, write_json
from jointnas_kernels.errors import writable


def compare(run: str, count: int = 8, seed: int = 0, width: float = 0.1) -> dict[str, Any]:
    """Fine-tunes the found choice of a run folder and random ones of its cost, all from the original weights.

    Args:
        run: run folder of a search.
        count: random architectures.
        seed: of the random architectures and of the fine-tuning.
        width: how far their latency and parameters may be from the found model's, as a share.

    Returns:
        Scores (`pipeline.Scored`) of the found and the random choices, also written to RUN/compare.json.

    Raises:
        JointNASError: it is no run folder, or the space has too few such choices.
    """
    writable(run, what="run")
    opened = open_run(run, searched=False)
    found = found_choice(opened.folder)
    others = random_choices(found, opened.bound, opened.model_config, count, seed, width)
    own, *rows = [asdict(score(opened, choice, seed)) for choice in (found, *others)]
    result = {
        "found": own,
        "random": rows,
        "median_random": statistics.median(r["ce"] for r in rows),
        "better_than": sum(own["ce"] < r["ce"] for r in rows),
    }
    write_json(opened.folder / "compare.json", result)
    return result


def text(result: dict[str, Any]) -> str:
    """What the command prints."""
    return (
        f"found: {result['found']['ce']:.4f} nats per token; better than {result['better_than']} of "
        f"{len(result['random'])} random architectures of its cost (median {result['median_random']:.4f})"
    )
