"""`report`: a run folder as tables and pictures in one static HTML file."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from jointnas import plots
from jointnas.convergence import sentences
from jointnas.metrics import read_metrics
from jointnas.objective import absolute
from jointnas.results import html_table, pareto_points
from jointnas.run_folder import read_config, read_json
from jointnas_kernels.errors import JointNASError, writable
from jointnas_kernels.latency import LatencyTable
from jointnas_kernels.space import Choice, SearchSpace

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{border-bottom:1px solid #ddd;padding:.3em .8em;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{background:#f6f6f6;padding:1em;overflow:auto}"""


def report(run: str) -> Path:
    """Draws RUN/plots and writes RUN/report.html, with what is there so far.

    Args:
        run: run folder of a search.

    Raises:
        JointNASError: it is no run folder.
    """
    folder = writable(run, what="run")
    config, environment = read_config(folder), read_json(folder / "env.json") or {}
    pictures = folder / "plots"
    sections: list[str] = []
    rows = read_json(folder / "eval.json")
    if rows:
        points, what = pareto_points(rows)
        path = plots.pareto_front(points, pictures / "pareto.png", (what, "held-out perplexity"))
        sections += ["<h2>Result</h2>", html_table(rows), image(path)]
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
    sections += latency_section(Path(config.latency.table or folder / "latency.jsonl"), pictures)
    sections.append(f"<h2>Configuration</h2>{preformatted((folder / 'config.yaml').read_text())}")
    sections.append(f"<h2>Environment</h2>{preformatted(json.dumps(environment, indent=1))}")
    name, out = html.escape(folder.name), folder / "report.html"
    head = f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{STYLE}</style><h1>{name}</h1>"
    out.write_text(head + "\n".join(sections))
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


def image(path: Path) -> str:
    """A picture inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}"></p>'


def preformatted(text: str) -> str:
    """Text as it is."""
    return f"<pre>{html.escape(text)}</pre>"
