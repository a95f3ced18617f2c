"""Tables and plots from the raw rows. Nothing in them is typed by hand.

    python benchmarks/render.py [--add FILE.jsonl ...] [--check]

All tables go into docs/results.md, what a user would ask first, by machine, between <!-- results:begin --> and
<!-- results:end --> in README.md, counted instructions between the same marks in docs/ops.md, plots into docs/plots. Of
several rows with the same name and parameters the newest counts. ``--add`` first files the rows of a GPU run under
benchmarks/results/<device>; ``--check`` only says whether these files are up to date, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import campaigns, sass
from benchmarks.headline import headline
from benchmarks.instrument_sections import launch_count
from benchmarks.overview import overview
from benchmarks.rows import Row, read, slug, table
from benchmarks.sections import DRAWN, SECTIONS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


# --- rows -------------------------------------------------------------------------------------------------------------


def add(files: Iterable[Path]) -> int:
    """Append rows to the file of their device and topic; returns how many were new."""
    count = 0
    for file in files:
        for row in read(file):
            line = json.dumps(row)
            target = RESULTS / slug(row["device"]) / f"{row['topic']}.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists() and line in target.read_text().splitlines():
                continue
            with open(target, "a") as out:
                out.write(line + "\n")
            count += 1
    return count


def newest(path: Path) -> list[Row]:
    """The rows of one file, one per (name, parameters), in order of first appearance."""
    found: dict[str, Row] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        key = json.dumps([row["name"], row["params"]], sort_keys=True) if "name" in row else line
        if key not in found or row["date"] >= found[key]["date"]:
            found[key] = row
    return list(found.values())


# --- README -----------------------------------------------------------------------------------------------------------


def devices() -> dict[str, dict[str, list[Row]]]:
    """Newest rows of every device folder by topic, GPUs first; by the device's name."""
    found: dict[str, dict[str, list[Row]]] = {}
    for folder in sorted((f for f in RESULTS.iterdir() if f.is_dir()), key=lambda f: ("core" in f.name, f.name)):
        topics = {file.stem: newest(file) for file in sorted(folder.glob("*.jsonl"))}
        topics = {t: rows for t, rows in topics.items() if t in SECTIONS and rows}
        if topics:
            found[next(iter(topics.values()))[0]["device"]] = topics
    return found


def summary() -> str:
    """What README shows: the comparisons, and the GPU and the CPU that most was measured on."""
    parts, found = [campaigns.headline(RESULTS / "campaigns")], devices()
    lines = {device: headline(topics) for device, topics in found.items()}
    kinds = [[device for device in lines if (" cores" in device) == cpu and lines[device]] for cpu in (False, True)]
    for device in (max(kind, key=lambda device: len(lines[device])) for kind in kinds if kind):
        rows = [r for topic in found[device].values() for r in topic]
        dates, torches = sorted({r["date"][:10] for r in rows}), sorted({r["torch"] for r in rows})
        body = table(["what", "ours", "peer, same run", "ours / peer"], lines[device])
        parts.append(f"### {device}\n\ntorch {', '.join(torches)}; {' to '.join(dates)}\n\n{body}")
    return "\n\n".join(filter(None, parts))


def sections() -> str:
    """All tables of all devices."""
    parts = [campaigns.section(RESULTS / "campaigns"), launch_count(RESULTS / "launch_count.jsonl")]
    for device, topics in devices().items():
        texts = [render(topics[t], device) for t, render in SECTIONS.items() if t in topics]
        parts.append(f"## {device}\n\n" + "\n\n".join(t for t in texts if t))
    return "\n\n".join(filter(None, parts))


def draw() -> None:
    """All plots."""
    found = devices()
    for device, topics in found.items():
        for topic, plot in DRAWN.items():
            if topic in topics:
                plot(topics[topic], device)
    overview(found)
    campaigns.draw_all(RESULTS / "campaigns")


def texts() -> dict[Path, str]:
    """The files that hold results, as they should be."""
    readme, ops = ROOT / "README.md", ROOT / "docs" / "ops.md"
    intro = "# Results\n\nWritten by `benchmarks/render.py` from the rows in `benchmarks/results`.\n\n"
    return {
        readme: _between(readme, summary()),
        ops: _between(ops, sass.table()),
        ROOT / "docs" / "results.md": f"{intro}{sections()}\n",
    }


def _between(file: Path, text: str) -> str:
    """The file with this text between its marks."""
    before, begin, rest = file.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{file.name} has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--add", nargs="*", type=Path, default=[], help="rows.jsonl files of other machines")
    parser.add_argument("--check", action="store_true", help="exit 1 if a text is not up to date; write nothing")
    args = parser.parse_args(argv)
    if args.add:
        print(f"{add(args.add)} new rows")
    stale = {path: text for path, text in texts().items() if not path.exists() or path.read_text() != text}
    if args.check:
        for path in stale:
            print(f"{path.name} is not what benchmarks/render.py writes", file=sys.stderr)
        return 1 if stale else 0
    for path, text in stale.items():
        path.write_text(text)
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
