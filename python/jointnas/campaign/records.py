"""The rows of a campaign as files."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jointnas.campaign.plan import UNITS, Unit, folder_of
from jointnas.campaign.worker import ROW
from jointnas.checkpoint import write_text
from jointnas.run_folder import read_json, write_json
from jointnas_kernels.errors import JointNASError, reading

log = logging.getLogger(__name__)
RESULTS = "results.jsonl"
MEASURED = ("measured_ms", "contended", "apart")  # what the last stage adds to a row


def rows_of(out: Path, units: Sequence[Unit]) -> list[dict[str, Any]]:
    """Of the units that have ended, in the order of the plan."""
    return [row for unit in units if (row := read_json(folder_of(out, unit) / ROW)) is not None]


def read(out: Path) -> list[dict[str, Any]]:
    """What `write` left; nothing where it was not there yet."""
    path = out / RESULTS
    with reading(str(path), "it is damaged: take it from a copy"):
        rows = [dict(json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []
        for row in rows:
            row["unit"], row["method"]  # what every reader looks up
        return rows


def restore(out: Path) -> None:
    """Rows of results.jsonl as those of their units, where these are gone: a campaign goes on from a few files
    (`jointnas.verbs.compare`). Those, too, that are not asked for now: results.jsonl will have no row of them."""
    units = out / UNITS
    for row in read(out):
        file = units / row["unit"] / ROW
        if not file.resolve().is_relative_to(units.resolve()):
            raise JointNASError(f"{out / RESULTS}: {row['unit']!r} is no name of a unit")
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {k: v for k, v in row.items() if k not in MEASURED})


def write(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """results.jsonl, and results.parquet where pyarrow is installed; lists and mappings stand in it as JSON."""
    write_text(out / RESULTS, "".join(json.dumps(row) + "\n" for row in rows))
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        log.info("no results.parquet: it needs the `pyarrow` package")
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    flat = [{name: _plain(row.get(name)) for name in names} for row in rows]
    temporary = out / f".results.parquet.{os.getpid()}.tmp"
    parquet.write_table(pyarrow.Table.from_pylist(flat), temporary)
    os.replace(temporary, out / "results.parquet")


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (dict, list)) else value
