"""`compare`: does the joint search beat what it should beat? Methods × targets × seeds at one budget."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from jointnas import loading
from jointnas.campaign import measuring, page, records, schedule
from jointnas.campaign.plan import PLAN, check, plan, reference_of, targets_of
from jointnas.campaign.statistics import KINDS, comparison, summary
from jointnas.campaign.variants import check_kept, keep
from jointnas.campaign.worker import Base, ended
from jointnas.checkpoint import write_text
from jointnas.compare_config import CompareConfig
from jointnas.config import build, dump
from jointnas.metrics import flat
from jointnas.pipeline import ready_tasks
from jointnas.preparation import measure_table
from jointnas.results import aligned
from jointnas.run_folder import TABLE, read_json, write_json
from jointnas_kernels.errors import JointNASError, writable
from jointnas_kernels.progress import Progress
from jointnas_kernels.space import read_yaml

log = logging.getLogger(__name__)
# what more may be asked for later
GROWS = ("methods", "variants", "targets_ms", "target_shares", "target_levels", "seeds", "precisions", "randoms")
FREE: Any = {
    "out": True, "resume": True, "progress": True, "tensorboard": True,
    "compare": {*GROWS, "processes", "exhaustive_most", "confidence"}, "data": {"cache"}, "latency": {"force"},
}  # fmt: skip


def compare(config: CompareConfig) -> Path:
    """Finds, fine-tunes, exports and evaluates a model per method, target, precision and seed, all with the same number
    of trained tokens, and measures them all in turns; returns the campaign's folder. Variants of the joint search
    (`compare.variants`) are methods, too: `examples/ablations`.

    It may be killed at any moment; with `resume: auto` what is there is kept, and more methods, variants, targets or
    seeds may be asked for. To go on elsewhere config.yaml, variants.json (where there are variants), latency.jsonl and
    results.jsonl are enough: on a machine of the same kind, or with `latency.force`.

    Args:
        config: of a search, and what is compared.

    Raises:
        JointNASError: bad input, or a folder that holds another campaign or cannot be made.
    """
    out, options = writable(config.out), config.compare
    _check_folder(config)
    config = loading.resolve(config)
    model_config = loading.model_config(config.model)
    loading.check_unquantized(model_config, config.model)
    ready_tasks(config)
    space, _ = loading.space_of(config, model_config)
    check(config, space)
    if config.latency.table is None:
        measure_table(config, space, model_config, out / TABLE)
    base = Base.load(config)
    units = plan(config, base.space, base.table, model_config)
    targets = targets_of(config, base.space, base.table)
    write_text(out / "config.yaml", dump(config))
    keep(config)
    write_json(out / PLAN, {"targets_ms": targets, "units": [unit.name for unit in units]})
    records.restore(out)
    tasks = schedule.ordered(units)
    left = [task for task in tasks if not ended(base, task)]
    log.info("%d models; %d of %d tasks to do, on %d processes", len(units), len(left), len(tasks), options.processes)
    bar = Progress("compare", len(tasks), len(tasks) - len(left), config.progress)
    for task in schedule.run(base, left):
        records.write(out, records.rows_of(out, units))
        bar.step(task=task.name)
    bar.close()
    rows = records.rows_of(out, units)
    found = measuring.measured(base, rows)
    rows = [{**row, **found.get(row["unit"], {})} for row in rows]
    records.write(out, rows)
    write_json(out / "summary.json", summary(rows, targets, reference_of(options.methods), options.confidence))
    page.write(out)
    return out


def text(folder: Path) -> str:
    """What the command prints."""
    found = read_json(folder / "summary.json")
    lines = [f"{found['models']} models, {found['infeasible']} infeasible; {found['latency'].replace('_', ' in ')}"]
    for kind in KINDS:
        if kind in found:
            lines += ["", *aligned(*comparison(found, kind))]
    return "\n".join([*lines, "", f"rows: {folder / 'results.jsonl'}", f"report: {folder / 'report.html'}"])


def _check_folder(config: CompareConfig) -> None:
    """Raises if the folder holds a campaign that this configuration does not continue."""
    path = Path(config.out) / "config.yaml"
    if not path.is_file():
        return
    if config.resume == "never":
        raise JointNASError(f"{config.out} already holds a campaign; pass --resume to continue it, or another --out")
    old = build(CompareConfig, read_yaml(path, "configuration file"), where=str(path))
    check_kept(config, {row["method"] for row in records.read(Path(config.out))})
    before, now = (dict(flat(loading.resolve(c).model_dump(mode="json", exclude=FREE))) for c in (old, config))
    for key in sorted(before):
        if before[key] != now[key]:
            raise JointNASError(
                f"{config.out} holds another campaign: {'.'.join(key)} was {before[key]!r}, is {now[key]!r}"
            )
