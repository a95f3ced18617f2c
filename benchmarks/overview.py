"""README's picture: what goes in, what comes out, and the price of a search iteration beside other ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.rows import PLOTS, Row, one_shape, pick

CANDIDATES = 15_360  # of the `llama3` space
BLUE, GREY, RED = "#1f5fa8", "#8a8f98", "#c0392b"
FLOW = [  # what stands in the boxes, left to right
    ("a pre-trained model", "Llama, Mistral,\nQwen2, Qwen3, Phi-3"),
    ("supernet", "every width, depth and\nbits per block, in one"),
    ("search", "latency table of your device,\nparameter budget"),
    ("a smaller model", "distilled, exported; stock\ntransformers loads it"),
]
CONTENDERS = {"loop-best": "loops", "masks": "stored masks (paper)", "gemv": "stored masks, best", "ours": "ours"}


def overview(devices: Mapping[str, Mapping[str, list[Row]]]) -> None:
    """Draws docs/plots/overview.svg from the mask rows of a GPU and of the CPU that has most contenders."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "overview"
    from matplotlib import pyplot

    measured = {d: bars(topics.get("masks", [])) for d, topics in devices.items()}
    shown = sorted((d for d in measured if measured[d]), key=lambda d: (d.endswith("cores"), -len(measured[d]), d))
    shown = [next((d for d in shown if d.endswith("cores") == cpu), "") for cpu in (False, True)]
    figure = pyplot.figure(figsize=(10, 4.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.55])
    flow(top.subplots())
    bottom.suptitle(
        f"one search iteration, {CANDIDATES:,} candidates: time over that of plain LoRA (red), and memory beyond it",
        fontsize=9,
    )
    axes = bottom.subplots(1, 2)
    for axis, device in zip(axes, shown, strict=True):
        axis.axis("on" if device else "off")
        if device:
            draw_bars(axis, device, measured[device])
    PLOTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOTS / "overview.svg", metadata={"Date": None})
    pyplot.close(figure)


def flow(axis: Any) -> None:
    """Four boxes and the arrows between them."""
    axis.set(xlim=(0, len(FLOW)), ylim=(0, 1))
    axis.axis("off")
    for i, (title, text) in enumerate(FLOW):
        ours = 0 < i < len(FLOW) - 1
        box = {"boxstyle": "round,pad=0.5", "facecolor": "#e8f0fa" if ours else "white", "edgecolor": BLUE}
        axis.text(i + 0.5, 0.5, f"{title}\n\n{text}", ha="center", va="center", fontsize=9, bbox=box, linespacing=1.15)
        if i:
            axis.annotate("", (i + 0.09, 0.5), (i - 0.09, 0.5), arrowprops={"arrowstyle": "-|>", "color": BLUE})


def bars(rows: list[Row]) -> dict[str, tuple[float, float]]:
    """Name: (times a LoRA step of the same run, GB beyond LoRA), in the paper's space."""
    here = {r["name"]: r["extra"] for r in pick(one_shape(rows), candidates=CANDIDATES)}
    return {CONTENDERS[n]: (here[n]["ratio"], here[n]["memory"] / 1e9) for n in CONTENDERS if n in here}


def draw_bars(axis: Any, device: str, values: Mapping[str, tuple[float, float]]) -> None:
    """One bar per way to mix weights, as multiples of plain LoRA."""
    names = list(values)
    axis.barh(names, [values[n][0] for n in names], color=[BLUE if n == "ours" else GREY for n in names], height=0.62)
    axis.axvline(1, color=RED, linewidth=1)
    for i, name in enumerate(names):
        ratio, memory = values[name]
        axis.annotate(
            f"{ratio:.1f}×, +{memory:.1f} GB", (ratio, i), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.set_xlim(0, 1.3 * max(ratio for ratio, _ in values.values()))
    axis.set_title(device, fontsize=9)
    axis.tick_params(labelsize=8.5)
    axis.spines[["top", "right"]].set_visible(False)
