"""`table`: latency tables, measured, put together, compared, completed, described and drawn.

Tables are files. One of another device than this machine's `device` (cpu, cuda, or auto: whichever the table is of) is
refused unless `force`; to look at what changed between two, no device is needed. Whatever is written is a new file.
"""

from __future__ import annotations

import logging
from pathlib import Path

from jointnas import loading, plots
from jointnas.config import LatencyConfig, ModelConfig, RunConfig, SpaceConfig
from jointnas.preparation import measure_table
from jointnas.run_folder import new
from jointnas_kernels.errors import JointNASError, writable
from jointnas_kernels.hf import feasible_space
from jointnas_kernels.latency import Comparison, Coverage, LatencyTable, compare, interpolate

log = logging.getLogger(__name__)


def measure(
    out: str,
    space: SpaceConfig = SpaceConfig(), model: ModelConfig = ModelConfig(),  # noqa: B008
    latency: LatencyConfig = LatencyConfig(),  # noqa: B008
    device: str = "auto", resume: bool = False, progress: bool = True,
) -> LatencyTable:
    """Measures the latency table of a space on this machine.

    Args:
        out: table file.
        space: search space; `--space NAME` is short for `--space.base NAME`.
        model: whose sizes. The embedded model stands for Llama-3.1-8B where the space is `llama3` or `qllama3`.
        latency: workload and how to measure.
        device: cpu, cuda, or auto: that of the model, cuda where there is one.
        resume: continue an unfinished or smaller table in `out`; what a busy machine disturbed is measured again, and
            backends that were installed since are tried.
        progress: show a progress bar.

    Raises:
        JointNASError: bad input, or `out` exists and is not to be, or cannot be, continued.
    """
    path, model = writable(out, "file"), loading.sized(space, model)
    model = model.model_copy(update={"device": model.device if device == "auto" else device})
    run = loading.resolve(RunConfig(model=model, space=space, latency=latency, progress=progress))
    config = loading.model_config(run.model)
    built, removed = feasible_space(config, space.build())
    for line in removed:
        log.warning("search space: removed %s", line)
    if path.exists() and not resume:
        raise JointNASError(f"{out} exists; pass --resume true to continue or complete it, or choose another file")
    return measure_table(run, built, config, path, renew=True)


def merge(tables: list[str], out: str, device: str = "auto", force: bool = False) -> LatencyTable:
    """Puts two or more tables of one device and workload together; of rows they share the last file's are taken.

    Raises:
        JointNASError: fewer than two tables, or they do not belong together, or `out` exists.
    """
    if len(tables) < 2:
        raise JointNASError(f"merge takes two or more table files, got {len(tables)}")
    path = new(out, "file")
    merged, *others = (LatencyTable.load(table, device, force) for table in tables)
    for other in others:
        merged = merged.merge(other)
    merged.save(path)
    return merged


def diff(first: str, second: str) -> Comparison:
    """What changed from the first table to the second, largest change first.

    Raises:
        JointNASError: they hold different metrics.
    """
    return compare(*(LatencyTable.load(table, None) for table in (first, second)))


def fill(
    table: str, out: str,
    space: SpaceConfig = SpaceConfig(), model: ModelConfig = ModelConfig(),  # noqa: B008
    device: str = "auto", force: bool = False,
) -> Coverage:
    """Writes a table with those sizes of a space that lie between measured ones, interpolated.

    Returns what of the space the new table holds; `model` is as in `measure`.

    Raises:
        JointNASError: `out` exists, or the table cannot be used.
    """
    path, config = new(out, "file"), loading.model_config(loading.sized(space, model))
    built, _ = feasible_space(config, space.build())
    completed = interpolate(LatencyTable.load(table, device, force), built, config)
    completed.save(path)
    return completed.coverage(built, config)


def show(
    table: str,
    space: SpaceConfig = SpaceConfig(), model: ModelConfig = ModelConfig(),  # noqa: B008
    device: str = "auto", force: bool = False,
) -> str:
    """Which operations and precisions of a space a table, unfinished or not, holds, lacks, and why.

    `model` is as in `measure`.

    Raises:
        JointNASError: the table cannot be read.
    """
    config = loading.model_config(loading.sized(space, model))
    loaded = LatencyTable.load(table, device, force, recover=True)
    built, removed = feasible_space(config, space.build())
    left_out = "".join(f"\n  not in it: {line}" for line in removed)
    return f"{loaded.summary()}\nfor this space: {loaded.coverage(built, config)}{left_out}"


def draw(table: str, out: str, device: str = "auto", force: bool = False) -> Path:
    """Draws the speed-ups of a table's precisions over 16 bit into a PNG.

    Raises:
        JointNASError: the table cannot be used, or holds nothing to draw.
    """
    path = writable(out, "file")
    return plots.table_heatmap(LatencyTable.load(table, device, force), path)


def text(result: LatencyTable | Comparison | Coverage | Path | str) -> str:
    """What the command prints."""
    if isinstance(result, Comparison):
        return result.text()
    if isinstance(result, Coverage):
        return f"{result.interpolated} operations interpolated, {len(result.missing)} still missing"
    if not isinstance(result, LatencyTable):
        return str(result)
    lines, fit = [str(result.header), result.summary()], result.calibration
    if fit is not None:
        lines.append(
            f"whole models: error {fit.mape:.1%}, {fit.mape_before:.1%} before adding {fit.fixed:.3f} ms and "
            f"{fit.per_block:.3f} ms per block"
        )
    return "\n".join(lines)
