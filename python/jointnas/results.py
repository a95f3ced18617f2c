"""What is known of each model of a run: the rows of its result tables, as text, HTML and points of a Pareto plot."""

from __future__ import annotations

import html
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jointnas.markup import table

BUSY = "measured while the machine was not in the state that its latency table was made in; do not rely on it"
MANY = 4  # models: text has their mean accuracies alone, not a column of each for every task
APART = "measurement and prediction differ by more than the latency table's calibration allows; one of them is wrong"


@dataclass(frozen=True)
class Row:
    """One line of a result table. Bytes: weights on disk, packed integers, everything else in 16 bit. Perplexity: with
    BOS at the beginning of every window of `context` tokens, where the tokenizer has one by default."""

    name: str
    params: int
    bytes: float
    predicted_ms: float | None
    measured_ms: float | None
    perplexity: float
    context: int  # tokens per window of the perplexity
    tasks: dict[str, dict[str, float]]  # by task, `evaluation.accuracy`
    perplexity_without_bos: float | None = None  # where there is one
    decode_ms: float | None = None  # of one more token of one sequence, where the CPU's step runs the model
    contended: bool = False  # measured_ms: disturbed by something else
    apart: bool = False  # measured_ms and predicted_ms: by more than `LatencyTable.tolerance`
    caveat: str = ""  # what must be said of results of this model


def columns(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(header, cells) of result rows."""
    context = f" ({rows[0]['context']} tokens)" if rows and "context" in rows[0] else ""
    both = any(row.get("perplexity_without_bos") is not None for row in rows)
    decodes = any(row.get("decode_ms") is not None for row in rows)
    header = ["model", "parameters", "MB", "measured ms", "predicted ms", *["decode ms"] * decodes]
    header += [f"perplexity{context}", *["without BOS"] * both]
    accuracies = len(rows) >= MANY and any(row["tasks"] for row in rows)
    header += ["accuracy %"] * accuracies
    cells = []
    for row in rows:
        values = [row["name"], f"{row['params']:,}", f"{row['bytes'] / 1e6:.2f}"]
        values += [f"{v:.3f}" if v is not None else "–" for v in (row["measured_ms"], row["predicted_ms"])]
        values[3] += " *" * bool(row.get("contended") or row.get("apart"))
        decode = row.get("decode_ms")
        values += ["–" if decode is None else f"{decode:.3f}"] * decodes
        values.append(f"{row['perplexity']:.2f}")
        without = row.get("perplexity_without_bos")
        values += ["–" if without is None else f"{without:.2f}"] * both
        found = [100 * task["acc"] for task in row["tasks"].values()]
        cells.append([*values, *[f"{statistics.mean(found):.1f}" if found else "–"] * accuracies])
    return header, cells


def task_columns(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(header, cells) of the tasks of result rows: percent, ± one standard error, a line per task."""
    names = dict.fromkeys(name for row in rows for name in row["tasks"])
    header = ["task", "shots", "items", *(f"{row['name']}: {m}" for row in rows for m in ("acc %", "acc_norm %"))]
    cells = []
    for name in names:
        of: list[dict[str, float]] = [row["tasks"].get(name, {}) for row in rows]
        first = next(values for values in of if values)
        cells.append([name, *(f"{first[k]:.0f}" if k in first else "–" for k in ("shots", "items"))])
        for values in of:
            for metric in ("acc", "acc_norm"):
                error = f" ± {100 * values[f'{metric}_stderr']:.1f}" if f"{metric}_stderr" in values else ""
                cells[-1].append(f"{100 * values[metric]:.1f}{error}" if metric in values else "–")
    return header, cells


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as text, and their tasks below."""
    lines = aligned(*columns(rows)) + notes(rows)
    if len(rows) < MANY and any(row["tasks"] for row in rows):
        lines += ["", *aligned(*task_columns(rows))]
    return "\n".join(lines)


def aligned(header: list[str], cells: Sequence[list[str]]) -> list[str]:
    """Lines of a table, names left, numbers right."""
    widths = [max(len(r[i]) for r in [header, *cells]) for i in range(len(header))]
    return [
        "  ".join([r[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(r[1:], widths[1:], strict=True))])
        for r in (header, ["-" * w for w in widths], *cells)
    ]


def html_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as an HTML table, and one of their tasks."""
    below = "".join(f"<p>{html.escape(note)}</p>" for note in notes(rows))
    tables = [columns(rows), *([task_columns(rows)] if any(row["tasks"] for row in rows) else [])]
    found = [table(header, [[html.escape(v) for v in row] for row in cells]) for header, cells in tables]
    return below.join([found[0], "".join(found[1:])])


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What stands below the rows."""
    caveats = dict.fromkeys(r["caveat"] for r in rows if r.get("caveat"))
    marks = {BUSY: any(r.get("contended") for r in rows), APART: any(r.get("apart") for r in rows)}
    return [f"* {text}" for text, shown in marks.items() if shown] + [f"Note: {caveat}" for caveat in caveats]


# ---- Pareto fronts --------------------------------------------------------------------------------------------------


def pareto(points: Iterable[tuple[float, float]]) -> list[int]:
    """Indices of the non-dominated points, both coordinates to be small, sorted by the first."""
    values = list(points)
    front: list[int] = []
    for i in sorted(range(len(values)), key=lambda i: values[i]):
        if not front or values[i][1] < values[front[-1]][1]:
            front.append(i)
    return front


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area dominated by the points below `reference`."""
    area, last = 0.0, reference[1]
    inside = [p for p in points if p[0] < reference[0] and p[1] < reference[1]]
    for i in pareto(inside):
        x, y = inside[i]
        area += (reference[0] - x) * (last - y)
        last = y
    return area
