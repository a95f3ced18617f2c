"""`report`: a run folder as tables and pictures in one static HTML file."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jointnas import plots
from jointnas.config import load
from jointnas.logs import read_metrics
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency import LatencyTable
from jointnas_kernels.space import Choice, SearchSpace

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{border-bottom:1px solid #ddd;padding:.3em .8em;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{background:#f6f6f6;padding:1em;overflow:auto}"""

BUSY = "measured while the machine was slower than when its latency table was made; the prediction does not apply"


def report(run: str) -> Path:
    """Draws `plots/*.png` and writes `report.html` of a run folder, with what is there so far."""
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise JointNASError(f"{run} is no run folder: it has no config.yaml")
    config = load(folder / "config.yaml")
    environment = json.loads((folder / "env.json").read_text()) if (folder / "env.json").is_file() else {}
    sections: list[str] = []
    rows = read_json(folder / "eval.json")
    if rows:
        sections += ["<h2>Result</h2>", html_table(rows)]
        points = pareto_points(rows)
        path = plots.pareto_front(
            points, folder / "plots" / "pareto.png", "x", "y", (latency_title(rows), "held-out perplexity")
        )
        sections.append(image(path))
    found = read_json(folder / "choice.json")
    if found:
        sections.append(f"<h2>Choice</h2><pre>{html.escape(json.dumps(found['choice']))}</pre>")
        for line in found["repaired"]:
            sections.append(f"<p>The most probable choice was replaced: {html.escape(line)}.</p>")
    history = [r for r in read_metrics(folder) if r["phase"] == "search" and "probs" in r]
    if history and "space" in environment:
        space = SearchSpace.from_dict(environment["space"])
        sections += [
            "<h2>Search</h2>",
            image(plots.probabilities(history, space, folder / "plots" / "probabilities.png")),
            image(plots.curves(history, folder / "plots" / "curves.png", limits(config, environment))),
        ]
        choice = Choice.from_dict(found["choice"]) if found else None
        if choice is not None and (choice.weight_bits or choice.act_bits):
            rank = environment.get("block_rank") or list(range(space.depth))
            sections.append(image(plots.bits_per_block(choice, rank, folder / "plots" / "bits.png")))
    sections += latency_section(config.latency.table or str(folder / "latency.jsonl"), folder)
    sections.append(f"<h2>Configuration</h2><pre>{html.escape((folder / 'config.yaml').read_text())}</pre>")
    sections.append(f"<h2>Environment</h2><pre>{html.escape(json.dumps(environment, indent=1))}</pre>")
    page = (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(folder.name)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(folder.name)}</h1>" + "\n".join(sections)
    )
    out = folder / "report.html"
    out.write_text(page)
    return out


def limits(config: Any, environment: dict[str, Any]) -> dict[str, float]:
    """The finite limits, absolute where the original's size is known."""
    full = environment.get("original_params")
    found: dict[str, float] = {}
    for name, value in (("params_min", config.search.budget_min), ("params_max", config.search.budget_max)):
        if value is not None and (value >= 2 or full):
            found[name] = value if value >= 2 else value * full
    if config.target_latency_ms is not None:
        found["latency_max"] = config.target_latency_ms
    return found


def latency_section(table: str, folder: Path) -> list[str]:
    try:
        loaded = LatencyTable.load(table, device=None)
    except JointNASError:
        return []
    lines = [f"<h2>Latency table</h2><p>{html.escape(str(loaded.header.device))}, {loaded.header.workload!s}</p>"]
    if loaded.caution:
        lines.append(f"<p>{html.escape(loaded.caution)}</p>")
    if loaded.calibration is not None:
        lines.append(image(plots.calibration(loaded.calibration, folder / "plots" / "calibration.png")))
    return lines


def image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}"></p>'


# ---- result tables --------------------------------------------------------------------------------------------------


def columns(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(header, cells) of result rows."""
    tasks = [t for t in rows[0]["tasks"]] if rows else []
    header = ["model", "parameters", "MB", "measured ms", "predicted ms", "perplexity", *(f"{t} %" for t in tasks)]
    cells = []
    for row in rows:
        values = [row["name"], f"{row['params']:,}", f"{row['bytes'] / 1e6:.2f}"]
        values += [f"{v:.3f}" if v is not None else "–" for v in (row["measured_ms"], row["predicted_ms"])]
        values[3] += " *" * row.get("contended", False)
        values += [f"{row['perplexity']:.2f}", *(f"{100 * row['tasks'].get(t, float('nan')):.1f}" for t in tasks)]
        cells.append(values)
    return header, cells


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    header, cells = columns(rows)
    widths = [max(len(r[i]) for r in [header, *cells]) for i in range(len(header))]
    align = lambda r: "  ".join(  # noqa: E731
        v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(r, widths, strict=True))
    )
    lines = [align(header), "  ".join("-" * w for w in widths), *(align(r) for r in cells)]
    return "\n".join(lines + [f"* {BUSY}"] * any(r.get("contended") for r in rows))


def html_table(rows: Sequence[dict[str, Any]]) -> str:
    header, cells = columns(rows)
    head = "".join(f"<th>{html.escape(h)}" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(v)}" for v in row) for row in cells)
    note = f"<p>* {html.escape(BUSY)}</p>" if any(r.get("contended") for r in rows) else ""
    return f"<table><tr>{head}{body}</table>{note}"


def pareto_points(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points of measured latency and perplexity; predicted latency where it was not measured."""
    measured = all(r["measured_ms"] is not None for r in rows)
    return [
        {
            "name": r["name"],
            "kind": kind_of(r["name"]),
            "x": r["measured_ms"] if measured else r["predicted_ms"],
            "y": r["perplexity"],
            "x_predicted": r["predicted_ms"] if measured else None,
        }
        for r in rows
    ]


def kind_of(name: str) -> str:
    for kind in ("found", "original", "random"):
        if name == kind or (kind == "random" and name.startswith(kind)):
            return kind
    return "baseline"


def latency_title(rows: Sequence[dict[str, Any]]) -> str:
    measured = all(r["measured_ms"] is not None for r in rows)
    return "latency (ms), measured; hollow: predicted" if measured else "predicted latency (ms)"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None
