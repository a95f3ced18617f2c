"""The page of a campaign: who won, fronts, tables, bits, calibration, budget, and the rows that the numbers come from.

A number of one model links to the model's row, which stands at the end of the page; one of a method, to its rows.
"""

from __future__ import annotations

import html
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jointnas import plots
from jointnas.baselines.methods import METHODS
from jointnas.campaign import records
from jointnas.campaign.plan import ORIGINAL, PLAN, reference_of
from jointnas.campaign.statistics import KINDS, comparison, latency_of, shown, summary
from jointnas.campaign.worker import ROW
from jointnas.checkpoint import write_text
from jointnas.compare_config import CompareConfig
from jointnas.config import build
from jointnas.markup import document, image, preformatted, table
from jointnas.results import notes
from jointnas.run_folder import read_json
from jointnas_kernels.space import STRUCTURE, Choice, kept_blocks, read_yaml

NAMES = {"cross_entropy": "cross-entropy", "error": "error of the tasks (1 - mean accuracy)"}
# color, marker and the same as a character; text of such colors is readable on white
LOOKS = [
    ("#c0392b", "*", "★"), ("#1f5fa8", "o", "●"), ("#2e7d4f", "^", "▲"), ("#8e44ad", "D", "◆"), ("#a8650c", "v", "▼"),
    ("#00767a", "P", "✚"), ("#b0307a", "<", "◀"), ("#5d6d1e", ">", "▶"), ("#6d4c41", "X", "✖"), ("#37474f", "p", "⬟"),
]  # fmt: skip
STYLE = """
td a{color:inherit;text-decoration-color:#bbb}.bits :is(td,th):not(:first-child){padding:.2em .4em;text-align:center}
details{margin:.3em 0}
[id]{scroll-margin-top:4em}:target{outline:2px solid #c0392b}"""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Campaign:
    """What is known of one."""

    folder: Path
    config: CompareConfig
    rows: list[dict[str, Any]]  # of the units that have ended
    planned: int | None  # units; None: its folder does not say
    found: dict[str, Any]  # `statistics.summary`

    @property
    def done(self) -> list[dict[str, Any]]:
        """Rows with a model."""
        return [row for row in self.rows if row["status"] == "done"]

    @property
    def methods(self) -> list[str]:
        """In the order of the plan."""
        return list(dict.fromkeys(row["method"] for row in self.rows))

    @classmethod
    def load(cls, folder: Path) -> Campaign:
        """From its folder, finished or not."""
        config = build(CompareConfig, read_yaml(folder / "config.yaml", "configuration file"), where=str(folder))
        rows = records.read(folder)
        plan = read_json(folder / PLAN)  # stored ones (benchmarks/results/campaigns) have none
        targets = plan["targets_ms"] if plan else {r["target_ms"] for r in rows if r["target_ms"] is not None}
        options = config.compare
        found = summary(rows, sorted(targets, reverse=True), reference_of(options.methods), options.confidence)
        return cls(folder, config, rows, len(plan["units"]) if plan else None, found)


def is_campaign(folder: Path) -> bool:
    """Whether a folder with a config.yaml is that of a comparison.

    Raises:
        JointNASError: the file is no YAML mapping.
    """
    return "compare" in read_yaml(folder / "config.yaml", "configuration file")


def write(folder: Path) -> Path:
    """Draws FOLDER/plots and writes FOLDER/report.html, with what is there so far.

    Raises:
        JointNASError: its configuration is not one of a comparison.
    """
    campaign = Campaign.load(folder)
    parts = (
        opening, fronts, qualities, models, tasks, bits, calibration, budgets, endings, infeasible, raw, configuration,
    )  # fmt: skip
    write_text(folder / "report.html", document(folder.name, (s for part in parts for s in part(campaign)), STYLE))
    return folder / "report.html"


# ---- links ----------------------------------------------------------------------------------------------------------


def anchor(kind: str, name: str) -> str:
    """The id of a unit's row, or of a method's rows."""
    return f"{kind}-{re.sub(r'[^A-Za-z0-9.-]+', '-', name)}"


def linked(text: str, row: Row) -> str:
    """Text that leads to the row it comes from."""
    return f'<a href="#{anchor("row", row["unit"])}">{html.escape(text)}</a>'


def of_method(text: str, method: str) -> str:
    """Text that leads to the rows of a method."""
    return f'<a href="#{anchor("rows", method)}">{html.escape(text)}</a>'


def look(method: str) -> tuple[str, str, str]:
    """Color, marker and character of a method, the same on all pages."""
    if method not in METHODS:
        return "#222222", "s", "■"
    return LOOKS[list(METHODS).index(method) % len(LOOKS)]


def marked(method: str, text: str) -> str:
    """HTML behind a method's character in its color."""
    color, _, character = look(method)
    return f'<span style="color:{color}">{character}</span> {text}'


def unit_cells(row: Row, values: Sequence[str]) -> list[str]:
    """A line of a table on one unit: its name and values, all linked."""
    return [marked(row["method"], linked(row["unit"], row)), *(linked(value, row) for value in values)]


def number(value: float | None, digits: str = ".3f") -> str:
    """Of a cell; a dash for what there is not."""
    return "–" if value is None else f"{value:{digits}}"


def miss(row: Row) -> float:
    """Relative error of the predicted latency of a model that was measured."""
    return float(row["predicted_ms"] / row["measured_ms"] - 1)


def latency(row: Row) -> str:
    """Measured latency; marked where it cannot be relied on."""
    return number(row.get("measured_ms")) + (" *" if row.get("contended") or row.get("apart") else "")


# ---- parts: each yields HTML, nothing where there is nothing to say --------------------------------------------------


def opening(campaign: Campaign) -> Iterator[str]:
    """Who won, how much of the campaign there is, and what must be said of it."""
    ended, planned, found = len(campaign.rows), campaign.planned, campaign.found
    unfinished = planned is not None and ended < planned
    for kind in KINDS:
        if kind in found:
            yield f"<p><b>{'So far: ' if unfinished else ''}{verdict(found, kind)}</b></p>"
    count = f"{ended}" if planned is None else f"{ended} of {planned}"
    count = f'<a href="#rows">{count}</a>' if ended else count
    column = "measured, all models in turns" if found["latency"] == "measured_ms" else "predicted by the latency table"
    models = f": {found['models']} models, {found['infeasible']} infeasible. Latencies are {column}" if ended else ""
    yield f"<p>{count} units have ended{models}.</p>"
    yield from (f"<p>{html.escape(note)}</p>" for note in notes(campaign.rows))


def verdict(found: Mapping[str, Any], kind: str) -> str:
    """A sentence: the reference's hypervolume against that of the strongest other method, as HTML."""
    own, methods, name = found["reference"], found[kind]["methods"], html.escape(NAMES[kind])
    others = [method for method, of in methods.items() if method != own and method == of["method"]]
    if own not in methods or not others:
        missing = "another method than " * (own in methods) + html.escape(own)
        return f"Nothing to compare in {name}: there is no model of {missing}."
    known = [method for method in others if methods[method]["over_targets"]["hypervolume"]["mean"] is not None]
    part, what = ("over_targets", "over the targets") if known else ("of_all", "of all models")
    rival = max(known or others, key=lambda method: methods[method][part]["hypervolume"]["mean"])
    gap, volumes = methods[rival][part]["reference_minus_it"], [methods[m][part]["hypervolume"] for m in (own, rival)]
    both = " against ".join(of_method(number(of["mean"]), m) for of, m in zip(volumes, (own, rival), strict=True))
    names = f"{html.escape(own)} and {html.escape(rival)}, the strongest other method"
    where = f"hypervolume in latency and {name} {what}, {both}"
    if gap["mean"] is None:
        return f"Undecided between {names}: no seed has models of both ({where})."
    by = of_method(shown(gap), rival)
    if gap["low"] is None:
        return f"Undecided between {names}: one seed gives no interval. They differ by {by} ({where})."
    sure = f"{found['confidence']:.0%} interval over {gap['seeds']} seeds"
    if gap["low"] <= 0 <= gap["high"]:
        return f"Undecided between {names}: the {sure} of the difference, {by}, contains 0 ({where})."
    verb = "beats" if gap["mean"] > 0 else "loses to"
    return f"{html.escape(own)} {verb} {html.escape(rival)}, the strongest other method, by {by}: {where}; {sure}."


def fronts(campaign: Campaign) -> Iterator[str]:
    """One picture of all models, a point per method, precision and target."""
    path = draw(campaign, campaign.folder / "plots" / "fronts.png")
    if path is None:
        return
    yield f"<h2>Fronts</h2>{image(path)}"
    hollow = " Hollow: predicted latency." if latency_of(campaign.done) == "measured_ms" else ""
    yield (
        "<p>A point per method, precision and target: the mean over its seeds (of perplexity, the geometric one), bars "
        "from the lowest to the highest. A line joins a method's points that no other of it dominates; the others are "
        f"grey.{hollow}</p>"
    )
    left = [linked(row["unit"], row) for row in campaign.done if not math.isfinite(row["ce"])]
    if left:
        yield f"<p>Not drawn, as their perplexity is not finite: {', '.join(left)}.</p>"


def draw(campaign: Campaign, path: Path) -> Path | None:
    """The picture of `fronts`; None: there is no model to draw."""
    column = latency_of(campaign.done)
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in campaign.done:
        if math.isfinite(row["ce"]):
            groups[row["method"], row["pipeline"], row["target_ms"], row["number"]].append(row)
    if not groups:
        return None
    measured = column == "measured_ms"
    points = [
        {
            "method": method, "x": spread([row[column] for row in rows]),
            "y": tuple(math.exp(value) for value in spread([row["ce"] for row in rows])),
            "x_predicted": statistics.mean(row["predicted_ms"] for row in rows) if measured else None,
        }
        for (method, *_), rows in groups.items()
    ]  # fmt: skip
    titles = (f"{'measured' if measured else 'predicted'} latency (ms)", "held-out perplexity")
    return plots.fronts(points, styles(campaign), path, titles)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(lowest, mean, highest)."""
    return min(values), statistics.mean(values), max(values)


def styles(campaign: Campaign) -> dict[str, tuple[str, str]]:
    """Color and marker by method."""
    return {method: look(method)[:2] for method in campaign.methods}


def qualities(campaign: Campaign) -> Iterator[str]:
    """Hypervolumes, quality at fixed latency and speed-up at fixed quality."""
    for kind in KINDS:
        if kind in campaign.found and campaign.found[kind]["methods"]:
            header, cells = comparison(campaign.found, kind)
            rows = []
            for line in cells:
                method = campaign.found[kind]["methods"][line[0]]["method"]
                name, *values = (of_method(cell, method) for cell in line)
                rows.append([marked(method, name), *values])
            yield f"<h2>Hypervolume and {html.escape(NAMES[kind])}</h2>{table(header, rows)}"
    if any(kind in campaign.found for kind in KINDS):
        yield (
            "<p>Hypervolume: the share of the area between the best and the worst values that a front dominates. "
            f"In brackets: {campaign.found['confidence']:.0%} intervals over seeds; a single seed has none. A method "
            "of several precisions has several models per target; each precision alone has one, as the reference.</p>"
        )


def models(campaign: Campaign) -> Iterator[str]:
    """Latency, quality and structure of every model."""
    if not campaign.done:
        return
    header = ["model", "measured ms", "predicted ms", "error", "of target", "perplexity", "parameters", "MB"]
    lines = []
    for row in campaign.done:
        share = row["predicted_ms"] / row["target_ms"] if row["target_ms"] else None
        choice = row.get("choice") or {}
        sizes = [number(choice.get(name), "d") for name in (*STRUCTURE, "head_bits")]
        error = None if row.get("measured_ms") is None else miss(row)
        values = [latency(row), number(row["predicted_ms"]), number(error, "+.1%"), number(share, ".1%")]
        values.append(number(row["perplexity"], ",.2f"))
        lines.append(unit_cells(row, [*values, f"{row['params']:,}", f"{row['bytes'] / 1e6:.2f}", *sizes]))
    yield f"<h2>Models</h2>{table([*header, *STRUCTURE, 'head bits'], lines)}"
    yield "<p>Error: of the predicted latency. Of target: the share that the predicted latency takes of it.</p>"


def tasks(campaign: Campaign) -> Iterator[str]:
    """Accuracies, ± a standard error."""
    names = list(dict.fromkeys(name for row in campaign.done for name in row["tasks"]))
    if not names:
        return
    lines = []
    for row in campaign.done:
        of = [row["tasks"].get(name, {}) for name in names]
        error = [f" ± {100 * task['acc_stderr']:.1f}" if "acc_stderr" in task else "" for task in of]
        values = [f"{100 * t['acc']:.1f}{e}" if "acc" in t else "–" for t, e in zip(of, error, strict=True)]
        lines.append(unit_cells(row, values))
    yield f"<h2>Accuracy (%)</h2>{table(['model', *names], lines)}"


def bits(campaign: Campaign) -> Iterator[str]:
    """Bits of every block of the reference's models."""
    own = [row for row in campaign.done if row["method"] == campaign.found["reference"] and row.get("choice")]
    own = [row for row in own if row["choice"].get("weight_bits")]
    if not own:
        return
    depth = max(len(row["choice"]["weight_bits"]) for row in own)
    lines = []
    for row in own:
        choice = Choice.from_dict(row["choice"])
        kept = kept_blocks(row["block_rank"], choice.blocks)
        pairs = [choice.bits(block) if block in kept else None for block in range(depth)]
        cells = [linked("×", row) if pair is None else shade(pair[0] or 16, f"{pair[0] or 16}/{pair[1]}", row)
                 for pair in pairs]  # fmt: skip
        head = choice.head_bits or 16
        lines.append([*unit_cells(row, []), *cells, shade(head, str(head), row)])
    blocks = table(["model", *map(str, range(depth)), "head"], lines)
    name = html.escape(campaign.found["reference"])
    yield f"<h2>Bits per block of {name}</h2><div class=bits>{blocks}</div>"
    yield "<p>Weights / activations of every block of the original; × was removed. Darker: fewer bits of weights.</p>"


def shade(weight: int, text: str, row: Row) -> str:
    """A cell's text, on a color that says the bits of its weights."""
    lightness = 62 + 8 * math.log2(weight)
    return f'<span style="background:hsl(28 80% {lightness:.0f}%);padding:.2em .4em">{linked(text, row)}</span>'


def calibration(campaign: Campaign) -> Iterator[str]:
    """Predicted against measured latency."""
    known = [row for row in campaign.done if row.get("measured_ms") is not None]
    if not known:
        return
    yield "<h2>Calibration</h2>"
    points = [{"method": r["method"], "measured": r["measured_ms"], "predicted": r["predicted_ms"]} for r in known]
    yield image(plots.agreement(points, styles(campaign), campaign.folder / "plots" / "calibration.png"))
    errors = [miss(row) for row in known]
    mean, worst = statistics.mean(map(abs, errors)), max(zip(errors, known, strict=True), key=lambda pair: abs(pair[0]))
    yield (
        f'<p>Mean relative error of the prediction: <a href="#rows">{mean:.1%}</a> over {len(known)} models; the '
        f"largest: {linked(f'{worst[0]:+.1%}', worst[1])}.</p>"
    )


def budgets(campaign: Campaign) -> Iterator[str]:
    """Tokens and time of a method's models."""
    lines = []
    for method in campaign.methods:
        rows = [row for row in campaign.done if row["method"] == method]
        if rows and method != ORIGINAL:
            tokens = [statistics.mean(row["tokens"][k] for row in rows) for k in ("search", "finetune", "evaluated")]
            times = [[row.get(key, 0.0) for row in rows] for key in ("seconds", "shared_seconds")]
            values = [str(len(rows)), *(f"{count:,.0f}" for count in tokens)]
            values += [f"{statistics.mean(of):,.0f}" for of in times] + [f"{sum(times[0]):,.0f}"]
            lines.append([marked(method, of_method(method, method)), *(of_method(value, method) for value in values)])
    if lines:
        header = ["method", "models", "tokens of search", "of fine-tuning", "forward only", "seconds", "shared seconds",
                  "seconds of all"]  # fmt: skip
        yield f"<h2>Budget</h2>{table(header, lines)}"
        yield "<p>Means over a method's models. Shared: of what several models start from, counted whole for each.</p>"


def endings(campaign: Campaign) -> Iterator[str]:
    """Whether the searches decided, and why a most probable choice was replaced."""
    lines, reasons = [], []
    for row in campaign.done:
        about = row.get("about") or {}
        if "converged" in about:
            share = row["predicted_ms"] / row["target_ms"] if row["target_ms"] else None
            decided = "converged" if about["converged"] else "undecided"
            lines.append(unit_cells(row, [decided, number(about.get("steps"), ",d"), number(share, ".1%")]))
        if about.get("repaired"):
            reasons.append(f"<li>{linked(row['unit'], row)}: {html.escape('; '.join(about['repaired']))}")
    if lines:
        yield f"<h2>How the searches ended</h2>{table(['model', 'search', 'steps', 'of target'], lines)}"
    if reasons:
        yield f"<p>Most probable choices that broke a limit and were replaced:</p><ul>{''.join(reasons)}</ul>"


def infeasible(campaign: Campaign) -> Iterator[str]:
    """Units without a model."""
    rows = [row for row in campaign.rows if row["status"] == "infeasible"]
    if rows:
        items = "".join(f"<li>{linked(row['unit'], row)}: {html.escape(row.get('reason', ''))}" for row in rows)
        yield f"<h2>Infeasible</h2><ul>{items}</ul>"


def raw(campaign: Campaign) -> Iterator[str]:
    """Every row as it is, by method."""
    if not campaign.rows:
        return
    yield f'<h2 id="rows">Rows</h2><p>All: <a href="{records.RESULTS}">{records.RESULTS}</a></p>'
    for method in campaign.methods:
        rows = [row for row in campaign.rows if row["method"] == method]
        yield f'<section id="{anchor("rows", method)}"><h3>{marked(method, html.escape(method))}</h3>'
        for row in rows:
            path = f"units/{row['unit']}/{ROW}"
            # the id inside: a browser opens what a link leads into
            yield (
                f'<details><summary>{html.escape(row["unit"])}</summary><div id="{anchor("row", row["unit"])}">'
                f'<p><a href="{html.escape(quote(path))}">{html.escape(path)}</a></p>'
                f"{preformatted(json.dumps(row, indent=1, ensure_ascii=False))}</div></details>"
            )
        yield "</section>"


def configuration(campaign: Campaign) -> Iterator[str]:
    """config.yaml."""
    yield f"<h2>Configuration</h2>{preformatted((campaign.folder / 'config.yaml').read_text())}"
