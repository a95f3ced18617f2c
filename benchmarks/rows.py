"""Rows of results, and the Markdown that all sections are made of."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PLOTS = Path(__file__).resolve().parent.parent / "docs" / "plots"
Row = dict[str, Any]


def append(path: Path, row: Row) -> None:
    """Adds one row, in one write and on a line of its own: whoever is killed loses no row but the one being written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
            file.write(b"\n")  # the line before was cut
        file.write(json.dumps(row).encode() + b"\n")


def read(path: Path) -> list[Row]:
    """The rows of a file; lines that were cut are not rows."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # of JSON, or of half a letter
            continue
    return found


def same(row: Row) -> str:
    """Equal for rows that answer the same: topic, name and parameters."""
    return json.dumps([row["topic"], row["name"], row["params"]], sort_keys=True)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def pick(rows: Iterable[Row], name: str | None = None, **params: Any) -> list[Row]:
    """Rows of one name with these parameter values."""
    return [
        r
        for r in rows
        if (name is None or r["name"] == name) and all(r["params"].get(k) == v for k, v in params.items())
    ]


def table(head: list[str], body: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in body])


def seconds(value: float) -> str:
    if value < 1e-3:
        return f"{value * 1e6:.1f} µs"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


def where(row: Row) -> str:
    return f"{row['device']}, torch {row['torch']}, {row['date'][:10]}, commit {row['commit']}"


def one_shape(rows: list[Row]) -> list[Row]:
    """The rows of steps at the largest shape that was measured: others are not comparable with them."""

    def shape(row: Row) -> tuple[Any, ...]:
        p = row["params"]
        return (-p.get("scale", 1), p["layers"], p["batch"] * p["tokens"], p["dtype"])

    largest = max(map(shape, rows), default=None)
    return [row for row in rows if shape(row) == largest]
