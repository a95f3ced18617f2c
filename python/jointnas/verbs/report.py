"""`report`: a run folder, or that of a comparison, as tables and pictures in one static HTML file."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from jointnas import plots
from jointnas.campaign import page
from jointnas.convergence import sentences
from jointnas.markup import document, image, preformatted
from jointnas.metrics import read_metrics
from jointnas.objective import absolute
from jointnas.results import html_table
from jointnas.run_folder import TABLE, read_config, read_json
from jointnas_kernels.errors import JointNASError, writable
from jointnas_kernels.latency import LatencyTable
from jointnas_kernels.space import Choice, SearchSpace


def report(run: str) -> Path:
    """Draws RUN/plots and writes RUN/report.html, with what is there so far.

    Args:
        run: run folder of a search, or campaign folder of a comparison.

    Raises:
        JointNASError: it is neither.
    """
    folder = writable(run, what="run")
    if not (folder / "config.yaml").is_file():
        raise JointNASError(
            f"{folder} is no run folder and no campaign folder: it has no config.yaml; make one with "
            f"`jointnas search --out {folder}` or `jointnas compare --out {folder}`"
        )
    if page.is_campaign(folder):
        return page.write(folder)
    config, environment = read_config(folder), read_json(folder / "env.json") or {}
    pictures = folder / "plots"
    sections: list[str] = []
    rows = read_json(folder / "eval.json")
    if rows:
        sections += ["<h2>Result</h2>", html_table(rows)]
    ends = sentences(folder)
    if ends:
        sections += ["<h2>Convergence</h2>", *(f"<p>{html.escape(line)}</p>" for line in ends)]
    found = read_json(folder / "choice.json")
    if found:
        sections.append(f"<h2>Choice</h2>{preformatted(json.dumps(found['choice']))}")
        sections += [f"<p>The most probable choice was replaced: {html.escape(why)}.</p>" for why in found["repaired"]]
    history = [r for r in read_metrics(folder) if r["phase"] == "search" and "probs" in r]
    if history and "space" in environment:
        space = SearchSpace.from_dict(environment["space"])
        sections += [
            "<h2>Search</h2>",
            image(plots.probabilities(history, space, pictures / "probabilities.png")),
            image(plots.curves(history, pictures / "curves.png", limits(config, environment))),
        ]
        choice = Choice.from_dict(found["choice"]) if found else None
        if choice is not None and (choice.weight_bits or choice.act_bits):
            rank = environment.get("block_rank") or list(range(space.depth))
            sections.append(image(plots.bits_per_block(choice, rank, pictures / "bits.png")))
    sections += latency_section(Path(config.latency.table or folder / TABLE), pictures)
    sections.append(f"<h2>Configuration</h2>{preformatted((folder / 'config.yaml').read_text())}")
    sections.append(f"<h2>Environment</h2>{preformatted(json.dumps(environment, indent=1))}")
    out = folder / "report.html"
    out.write_text(document(folder.name, sections))
    return out


def limits(config: Any, environment: dict[str, Any]) -> dict[str, float]:
    """The finite limits, absolute where the original's size is known."""
    full = environment.get("original_params")
    found: dict[str, float] = {}
    for name, value in (("params_min", config.search.budget_min), ("params_max", config.search.budget_max)):
        if value is not None and (value >= 2 or full):
            found[name] = absolute(value, full or 0)
    if config.target_latency_ms is not None:
        found["latency_max"] = config.target_latency_ms
    return found


def latency_section(path: Path, pictures: Path) -> list[str]:
    """The table's device, its doubts and its calibration; nothing where it is not there any more."""
    try:
        table = LatencyTable.load(path, device=None)
    except JointNASError:
        return []
    lines = [f"<h2>Latency table</h2><p>{html.escape(str(table.header))}</p>"]
    if table.caution:
        lines.append(f"<p>{html.escape(table.caution)}</p>")
    if table.calibration is not None:
        lines.append(image(plots.calibration(table.calibration, pictures / "calibration.png")))
    return lines
