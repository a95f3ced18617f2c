"""docs/plan.md: what searches of 8B and 70B models need on GPUs that are not here.

    python -m benchmarks.plan            # the tables, from the rows
    python -m benchmarks.plan --count    # first the rows again: steps on the meta device, minutes

Rows hold what `jointnas.footprint` counts of a whole step on one device; what becomes of it on many of them is
`jointnas.cluster`'s, as in `jointnas search --dry-run --gpus N`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT
from jointnas.cluster import Sharding, share
from jointnas.config import RunConfig
from jointnas.footprint import PHASES, Phase
from jointnas.verbs.dry_run import DEVICES, SPARE, dry_run

ROWS, PAGE = RESULTS / "plan.jsonl", ROOT / "docs" / "plan.md"
BEGIN, END = "<!-- tables:begin -->", "<!-- tables:end -->"
# GPUs and how they share, by model
CLUSTERS = {
    "llama-3.1-8b": (Sharding(1), Sharding(8, "replicate"), Sharding(8, "full")),
    "llama-3.1-70b": (Sharding(8, "full"), Sharding(64, "hybrid"), Sharding(64, "full")),
}
GPUS = ("h100", "h200")
# Of 70B: halves of its sizes, as qllama3 has of 8B. Sizes in between change nothing that is counted here.
SPACES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {"base": "qllama3"},
    "llama-3.1-70b": {
        "base": "qllama3", "hidden": [4096, 8192], "heads": [32, 64], "head_dim": [64, 128],
        "intermediate": [14336, 28672], "blocks": [40, 60, 80],
    },
}  # fmt: skip
SEQUENCES = {"llama-3.1-8b": 4, "llama-3.1-70b": 1}  # a GPU's batch
TOKENS = 2048  # of a sequence


ALL = "distillation, all weights"


def configuration(model: str, train: str = "lora") -> RunConfig:
    """With checkpoints."""
    return RunConfig(
        model={"source": model}, space=SPACES[model], data={"seq_len": TOKENS, "batch_size": SEQUENCES[model]},
        search={"gradient_checkpointing": True}, finetune={"train": train, "gradient_checkpointing": True},
    )  # fmt: skip


def count() -> None:
    """The rows, on the meta device."""
    found = []
    for model in CLUSTERS:
        plan = dry_run(configuration(model), "h100")
        everything = {**plan.phases, ALL: dry_run(configuration(model, "full"), "h100").phases[PHASES[2]]}
        phases = {name: dataclasses.asdict(phase) for name, phase in everything.items()}
        found.append({"model": model, "params": plan.params, "tokens": plan.tokens, "phases": phases})
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in found))


def rows(file: Path = ROWS) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in file.read_text().splitlines()]
    for row in found:
        row["phases"] = {name: Phase(**phase) for name, phase in row["phases"].items()}
    return found


def table(row: dict[str, Any]) -> list[str]:
    """Memory and time of a GPU by cluster."""
    lines = [
        "| step | GPUs | shared | GB of a GPU | fits H100 / H200 | GB sent by a GPU: in a node, between | products, s |"
        " traffic, s | tokens/s of all, at most |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, phase in row["phases"].items():
        for sharding in CLUSTERS[row["model"]]:
            found = share(phase, sharding)
            fits = " / ".join("yes" if found.total <= SPARE * DEVICES[gpu].memory else "no" for gpu in GPUS)
            tokens = row["tokens"][name in (PHASES[2], ALL)] * sharding.gpus
            products = found.flops / DEVICES["h100"].flops
            rate = tokens / max(products, found.seconds)
            sent = f"{found.inside / 1e9:,.2f}, {found.between / 1e9:,.2f}"
            how = sharding.mode if sharding.gpus > 1 else "-"
            cells = [name, sharding.gpus, how, f"{found.total / 1e9:,.1f}", fits, sent, f"{products:.3g}"]
            lines.append(f"| {' | '.join(map(str, [*cells, f'{found.seconds:.3g}', f'{rate:,.0f}']))} |")
    return lines


def tables(found: list[dict[str, Any]]) -> str:
    lines = []
    for row in found:
        batch = f"{SEQUENCES[row['model']]} × {TOKENS} tokens a GPU"
        lines += [f"### {row['model']}, {row['params']:,} parameters, {batch}", "", *table(row), ""]
    return "\n".join(lines)


def render(page: str, found: list[dict[str, Any]]) -> str:
    """The page with these tables."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{tables(found)}{END}{rest.split(END)[1]}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", action="store_true", help="the rows again")
    if parser.parse_args(argv).count:
        count()
    PAGE.write_text(render(PAGE.read_text(), rows()))


if __name__ == "__main__":
    sys.exit(main())
