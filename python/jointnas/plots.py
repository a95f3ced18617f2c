"""Figures of a run. Each function draws one and writes a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jointnas.results import pareto
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency import LatencyTable
from jointnas_kernels.latency.schema import Calibration
from jointnas_kernels.latency.spec import LINEARS
from jointnas_kernels.space import BITS, Choice, SearchSpace, kept_blocks

DENSE = (16, 16)
NARROW, READABLE = 4.2, 10  # inches and points: 12 pixels of text where a page is 400 wide
DECADE = 10  # highest over lowest value from which an axis is logarithmic
BLUE, RED, GREY, GREEN = "#1f5fa8", "#c0392b", "#9aa0a6", "#2e8b57"
TITLES = {
    "hidden": "hidden size", "heads": "query heads", "head_dim": "head dim", "intermediate": "MLP size",
    "blocks": "blocks", "weight_bits": "weight bits", "act_bits": "activation bits",
    "head_bits": "head bits",
}  # fmt: skip


def _figure(rows: int = 1, columns: int = 1, width: float = 6.4, height: float = 4.4) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure  # not pyplot, whose state (a notebook's backend) is its user's
    except ImportError:
        raise JointNASError("plots need the `matplotlib` package: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes.ravel()


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def probabilities(rows: Sequence[Mapping[str, Any]], space: SearchSpace, path: Path) -> Path:
    """Heat maps of every dimension's probabilities over the steps; for bits of blocks, their means."""
    steps = [r["step"] for r in rows]
    keys = [k for k in TITLES if k in rows[-1]["probs"] and len(space.sizes(k)) > 1] or ["blocks"]
    columns = min(3, len(keys))
    figure, axes = _figure(-(-len(keys) // columns), columns, 3.6 * columns, 2.4 * -(-len(keys) // columns))
    for axis in axes[len(keys) :]:
        axis.set_visible(False)
    for axis, key in zip(axes, keys, strict=False):
        sizes = space.sizes(key)
        history = [r["probs"][key] for r in rows]
        if key in BITS:
            picture = [[sum(p * s for p, s in zip(b, sizes, strict=True)) for b in step] for step in history]
            low, high, labels = min(sizes), max(sizes), [str(b) for b in range(len(history[0]))]
            axis.set_ylabel("original block", fontsize=8)
            title = f"mean {TITLES[key]}"
        else:
            picture, low, high, labels = history, 0, 1, [str(s) for s in sizes]
            title = f"P({TITLES[key]})"
        image = axis.imshow(
            list(zip(*picture, strict=True)), aspect="auto", origin="lower", vmin=low, vmax=high, cmap="viridis",
            extent=(steps[0], steps[-1] + 1, -0.5, len(labels) - 0.5), interpolation="nearest",
        )  # fmt: skip
        axis.set_yticks(range(len(labels)), labels)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        figure.colorbar(image, ax=axis, fraction=0.05).ax.tick_params(labelsize=7)
    return _save(figure, path)


def curves(rows: Sequence[Mapping[str, Any]], path: Path, limits: Mapping[str, float]) -> Path:
    """Cross-entropy, discretisation gap, entropy, expected latency and parameters over the steps."""
    figure, axes = _figure(2, 2, 8.4, 5.6)
    loss, entropy, latency, params = axes

    def line(axis: Any, of: Mapping[int, float], **style: Any) -> None:
        if of:
            axis.plot(list(of), list(of.values()), **style)

    def values(key: str) -> dict[int, float]:
        return {r["step"]: r[key] for r in rows if key in r}

    line(loss, values("ce_weight"), color=GREY, lw=1, label="weight step")
    line(loss, values("ce_arch"), color=BLUE, lw=1, label="architecture step")
    line(loss, values("ce_argmax"), color=RED, lw=1, marker="o", ms=3, label="most probable choice")
    for key in sorted({k for r in rows for k in r["entropy"] if "." not in k}):
        line(entropy, {r["step"]: r["entropy"].get(key, 0.0) for r in rows}, lw=1, label=TITLES.get(key, key))
    line(entropy, values("entropy_max"), color="black", lw=1.4, label="largest")
    line(latency, values("latency_ms"), color=BLUE, lw=1.2)
    line(params, values("params"), color=BLUE, lw=1.2)
    for name, limit in limits.items():
        (latency if name == "latency_max" else params).axhline(limit, color=RED, lw=0.8, ls="--")
    titles = ("cross-entropy (nats per token)", "normalised entropy", "E[latency] (ms)", "E[parameters]")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
    for axis in (loss, entropy):
        axis.legend(fontsize=7, frameon=False)
    return _save(figure, path)


def calibration(fit: Calibration, path: Path) -> Path:
    """Predicted against measured latency of whole models."""
    figure, (axis,) = _figure(width=4.6, height=4.2)
    measured = [m for _, _, m in fit.points]
    predicted = [fit.fixed + fit.per_block * b + o for o, b, _ in fit.points]
    top = max(*measured, *predicted) * 1.1
    axis.plot([0, top], [0, top], color=GREY, lw=1)
    operations = [o for o, _, _ in fit.points]
    axis.scatter(measured, operations, facecolors="none", edgecolors=GREY, s=26, label="operations only")
    axis.scatter(measured, predicted, color=BLUE, s=26, label=f"with overhead (error {fit.mape:.1%})")
    axis.set(xlabel="measured (ms)", ylabel="predicted (ms)")
    axis.legend(fontsize=8, frameon=False)
    return _save(figure, path)


def table_heatmap(table: LatencyTable, path: Path) -> Path:
    """Speed-up of every (weight bits, activation bits) over 16 bit, one line per linear; losses are red.

    Lines are sorted by size, blank cells are infeasible. Numbers are 16-bit time / time, both of the fastest backend.
    """
    shapes: dict[tuple[int, int, int], dict[tuple[int, int], float]] = {}
    for spec in table.specs:
        row = table.best(spec)
        if spec.op in LINEARS and row is not None and row.value is not None:
            cells = shapes.setdefault((spec.m, spec.n, spec.k), {})
            key = (spec.wbits, spec.abits)
            cells[key] = min(row.value, cells.get(key, math.inf))  # one shape may occur with two groups
    lines = sorted((s for s, cells in shapes.items() if DENSE in cells), key=lambda s: (s[1] * s[2], s))
    pairs = sorted({p for s in lines for p in shapes[s] if p != DENSE}, key=lambda p: (-p[0], -p[1]))
    if not lines or not pairs:
        raise JointNASError("the table holds no quantized linears next to 16-bit ones: nothing to draw")
    picture = [
        [math.log2(shapes[s][DENSE] / shapes[s][p]) if p in shapes[s] else math.nan for p in pairs] for s in lines
    ]
    figure, (axis,) = _figure(width=1.6 + 0.52 * len(pairs), height=1.3 + 0.19 * len(lines))
    limit = max(1.0, max(abs(v) for line in picture for v in line if v == v))
    image = axis.imshow(picture, aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest")
    for y, line in enumerate(picture):
        for x, value in enumerate(line):
            if value == value:
                color = "white" if abs(value) > 0.65 * limit else "black"
                axis.text(x, y, f"{2**value:.2g}", ha="center", va="center", fontsize=6, color=color)
    axis.set_xticks(range(len(pairs)), [f"W{w}\nA{a}" for w, a in pairs], fontsize=7)
    axis.set_yticks(range(len(lines)), [f"{n}×{k}" for _, n, k in lines], fontsize=7)
    axis.set_ylabel("linear, out × in features", fontsize=8)
    work = table.workload
    title = f"16-bit time / time, {work.mode} {work.batch}×{work.seq} {work.dtype}"
    axis.set_title(f"{title}\n{table.header.device}", fontsize=8)
    ticks = [t for t in (-3, -2, -1, 0, 1, 2, 3) if abs(t) <= limit]
    bar = figure.colorbar(image, ax=axis, fraction=0.05, ticks=ticks)
    bar.ax.set_yticklabels([f"{2.0**t:g}×" for t in ticks], fontsize=7)
    return _save(figure, path)


def bits_per_block(choice: Choice, block_rank: Sequence[int], path: Path) -> Path:
    """Weight and activation bits of every original block; removed blocks are crossed out. Blocks carry their rank."""
    figure, (axis,) = _figure(width=max(4.0, 0.6 * len(block_rank) + 1.5), height=2.6)
    kept = set(kept_blocks(block_rank, choice.blocks))
    rank = {b: i + 1 for i, b in enumerate(block_rank)}
    for b in range(len(block_rank)):
        if b not in kept:
            axis.text(b, 1, "×", ha="center", va="center", color=GREY, fontsize=14)
            continue
        for offset, bits, color in ((-0.2, choice.weight_bits, BLUE), (0.2, choice.act_bits, GREEN)):
            if bits is not None:
                axis.bar(b + offset, bits[b], 0.38, color=color)
                axis.text(b + offset, bits[b], str(bits[b]), ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(block_rank)), [f"{b}\nrank {rank[b]}" for b in range(len(block_rank))], fontsize=7)
    axis.set_ylim(0, 18)
    if choice.head_bits is not None:
        axis.set_title(f"head: {choice.head_bits} bits", fontsize=9)
    axis.set_ylabel("bits (blue W, green A)", fontsize=8)
    axis.set_xlabel("original block, importance rank", fontsize=8)
    return _save(figure, path)


def fronts(
    models: Sequence[Mapping[str, Any]], styles: Mapping[str, tuple[str, str]], path: Path, titles: tuple[str, str]
) -> Path:
    """Models with `method`, `x` and `y`, each (lowest, middle, highest) of its seeds, optional `x_predicted` (hollow).

    A method's models that no other of it dominates are joined, the others are grey. `styles`: color and marker of each
    method, in the order of the legend. Drawn for a width of 400 pixels."""
    figure, (axis,) = _figure(width=NARROW, height=5.2)
    for method, (color, marker) in styles.items():
        own = [model for model in models if model["method"] == method]
        places = [(model["x"][1], model["y"][1]) for model in own]
        line = pareto(places)
        if not line:
            continue
        rest = [place for i, place in enumerate(places) if i not in line]
        if rest:
            axis.scatter(*zip(*rest, strict=True), color=GREY, marker=marker, s=12, zorder=1)
        axis.plot(*zip(*(places[i] for i in line), strict=True), color=color, lw=1.2, zorder=2)
        for i in line:
            (x_low, x, x_high), (y_low, y, y_high) = own[i]["x"], own[i]["y"]
            bars = {"xerr": [[x - x_low], [x_high - x]], "yerr": [[y - y_low], [y_high - y]]}
            label = method if i == line[0] else None
            axis.errorbar([x], [y], **bars, color=color, fmt=marker, ms=6, lw=1, label=label, zorder=3)
            predicted = own[i].get("x_predicted")
            if predicted is not None:
                axis.scatter([predicted], [y], edgecolors=color, facecolors="none", marker=marker, s=36, zorder=2)
    for axes, key in ((axis.xaxis, "x"), (axis.yaxis, "y")):
        values = [model[key][1] for model in models]
        if max(values) > DECADE * min(values):
            getattr(axis, f"set_{key}scale")("log")
            axes.get_major_locator().set_params(subs=(1, 2, 5))
            axes.set_major_formatter("{x:g}")
            axes.set_minor_formatter("")
    _label(axis, titles)
    figure.legend(loc="outside lower center", ncols=2, fontsize=READABLE, frameon=False)
    return _save(figure, path)


def agreement(models: Sequence[Mapping[str, Any]], styles: Mapping[str, tuple[str, str]], path: Path) -> Path:
    """Predicted against measured latency: models with `method`, `measured` and `predicted`; `styles` as in `fronts`."""
    figure, (axis,) = _figure(width=NARROW, height=4.8)
    top = 1.1 * max(value for model in models for value in (model["measured"], model["predicted"]))
    axis.plot([0, top], [0, top], color=GREY, lw=1)
    for method, (color, marker) in styles.items():
        own = [(model["measured"], model["predicted"]) for model in models if model["method"] == method]
        if own:
            axis.scatter(*zip(*own, strict=True), color=color, marker=marker, s=26, label=method, zorder=2)
    _label(axis, ("measured (ms)", "predicted (ms)"))
    figure.legend(loc="outside lower center", ncols=2, fontsize=READABLE, frameon=False)
    return _save(figure, path)


def _label(axis: Any, titles: tuple[str, str]) -> None:
    axis.set_xlabel(titles[0], fontsize=READABLE)
    axis.set_ylabel(titles[1], fontsize=READABLE)
    axis.tick_params(which="both", labelsize=READABLE)
