"""The tables and plots of docs/results.md: one function per topic, rows of one device in, Markdown out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from statistics import fmean
from typing import Any

from benchmarks.instrument_sections import ceilings, launches, ncu
from benchmarks.model_sections import decode, depth, depth_plot, gguf, memory, ptq, search
from benchmarks.rows import PLOTS, Row, gigabytes, one_shape, pick, seconds, slug, table, where
from jointnas import plots
from jointnas_kernels.latency.schema import Calibration
from jointnas_kernels.ops.lowbit.choice import STREAM_TOKENS, STRIPE_TOKENS


def masks(rows: list[Row], device: str) -> str:
    """Fig. 3: one line per size of the search space."""
    rows = one_shape(rows)
    names = {
        "loop": "loops", "loop-best": "loops, improved", "masks": "stored masks (Eq. 9)", "gemv": "stored, best",
        "shared": "stored, shared",
    }  # fmt: skip
    counts = sorted({r["params"]["candidates"] for r in rows})
    body = []
    for count in counts:
        here = {r["name"]: r for r in pick(rows, candidates=count)}
        if "ours" not in here:
            continue
        ours = here["ours"]
        cells = [f"{count:,}", seconds(ours["extra"]["lora"]), seconds(ours["median"])]
        for name in names:
            row = here.get(name)
            # both were timed beside LoRA in their own interleaved run: the ratio of ratios cancels drift in between
            cells.append(
                f"{seconds(row['median'])} ({row['extra']['ratio'] / ours['extra']['ratio']:.1f}×)" if row else ""
            )
        extra = [here[n]["extra"]["memory"] if n in here else None for n in ("ours", "masks", "gemv")]
        cells.append(" / ".join("–" if e is None else gigabytes(e) for e in extra))
        body.append(cells)
    if not body:
        return ""
    sizes = rows[0]["params"]
    part = f", widths divided by {sizes['scale']}" if "scale" in sizes else ""
    head = ["candidates", "2 LoRA steps", "ours", *names.values(), "extra memory ours / Eq. 9 / best"]
    return (
        f"**Mixing weights: one search iteration (weight + arch step), {sizes['layers']} Llama-3.1-8B block"
        f"{'s' if sizes['layers'] > 1 else ''}{part}, batch {sizes['batch']} × {sizes['tokens']}, {sizes['dtype']}** "
        f"({where(rows[-1])}; × = times slower than ours)\n\n{table(head, body)}\n\n"
        f"![time and memory over the number of candidates](plots/masks-{slug(device)}.png)"
    )


def chosen_today(rows: list[Row]) -> list[Row]:
    """GPU rows of "ours" whose kernel would not be chosen any more give way to those of the kernel that is, or go.

    Rows name their kernel in `extra`; older ones, of 16-bit activations, follow the rule of their day.
    """
    found = []
    for row in rows:
        p = row["params"]
        if row["name"] != "ours" or row["device"].endswith("cores") or not p["scheme"].startswith("w"):
            found.append(row)
            continue
        bits, tokens = int(p["scheme"].split("a")[1]), p["m"]
        if bits == 16:
            few = "stream" if tokens <= STREAM_TOKENS[16] else "stripe"
            today: tuple[str, ...] = ("half", few if tokens <= STRIPE_TOKENS else "dense")
        else:
            today = ("stream",) if tokens <= STREAM_TOKENS[bits] else ("int8", "wgmma", "tile")
        of_its_day = "stream" if tokens <= 32 else "dense" if tokens >= 2048 else "wgmma"
        timed = row["extra"].get("kernel", of_its_day if bits == 16 else today[0])
        if timed in today:
            found.append(row)
        else:
            found += [{**r, "name": "ours"} for name in today for r in pick(rows, f"ours, {name}", **p)]
    return found


def steps(rows: list[Row], device: str) -> str:
    """Every contender of every panel, with its ratio to PEFT LoRA in the same interleaved run."""
    body = []
    for row in sorted(rows, key=lambda r: (r["params"]["layers"], r["params"]["tokens"], r["params"]["panel"])):
        p, extra = row["params"], row["extra"]
        shape = f"{p['layers']} × ({p['batch']} × {p['tokens']}) {p['dtype']}"
        ratio = f"{extra['ratio']:.2f}×" if "ratio" in extra else ""
        body.append([p["panel"], shape, row["name"], seconds(row["median"]), ratio, gigabytes(extra["peak"])])
    head = ["panel", "blocks × tokens", "step", "median", "of PEFT LoRA", "peak in the step"]
    note = (
        "panel main: eager; panel graph: the fastest PEFT is captured in CUDA graphs, and rows ending in *graph* "
        "replay theirs, whose peak comes on top of what the graphs hold"
    )
    return f"**Training steps** ({where(rows[-1])}; {note})\n\n{table(head, body)}" if body else ""


def gemm(rows: list[Row], device: str) -> str:
    """Time over the number of tokens: ours as chosen automatically, and every other library."""
    shown = ("ours, popcount", "ours, quantize x")
    rows = [r for r in chosen_today(rows) if r["name"] in shown or not r["name"].startswith(("plan", "ours, "))]
    parts = []
    for n, k in sorted({(r["params"]["n"], r["params"]["k"]) for r in rows}):
        here = pick(rows, n=n, k=k)
        tokens = sorted({r["params"]["m"] for r in here})
        kinds = {(r["params"]["scheme"], r["params"]["dtype"], r["name"]) for r in here}
        body = []
        for scheme, dtype, name in sorted(kinds, key=lambda kind: (kind[0][-2:] != "16", kind)):
            found = [pick(here, name, scheme=scheme, m=m, dtype=dtype) for m in tokens]
            label = scheme.upper() if scheme != "16" else "32 bit" if dtype == "float32" else "16 bit"
            share = next((f"{r['extra']['share']:.0%}" for r in found[0] if "share" in r["extra"]), "")
            body.append([label, name, *(seconds(f[-1]["median"]) if f else "" for f in found), share])
        head = ["bits", "by", *(f"M = {m}" for m in tokens), f"of the bandwidth at M = {tokens[0]}"]
        parts.append(
            f"**Linear {n}×{k}, weights rotated past the caches** ({where(here[-1])}; activation quantization included "
            f"in ours)\n\n{table(head, body)}"
        )
    return "\n\n".join(parts)


def kernels(rows: list[Row], device: str) -> str:
    """Share of the copy bandwidth, forward / backward of a weight step / of an arch step."""
    whats = ("forward", "backward, weight step", "backward, arch step")
    names = list(dict.fromkeys(r["name"] for r in rows if "share" in r["extra"] and "tokens" in r["params"]))
    tokens = sorted({r["params"]["tokens"] for r in rows if "tokens" in r["params"]})
    body = []
    for name in [n for n in names if n != "quant_lora_linear"]:
        cells = [f"`{name}`"]
        for count in tokens:
            here = [pick(rows, name, tokens=count, what=what) for what in whats]
            cells.append(
                " / ".join(f"{h[-1]['extra']['share']:.0%}" if h else "–" for h in here)
                + (f" ({seconds(here[0][-1]['median'])})" if here[0] else "")
            )
        body.append(cells)
    parts = []
    copy = pick(rows, "copy")
    if body:
        rate = f" of {copy[-1]['median'] / 1e12:.3g} TB/s" if copy else ""
        title = f"**Fused ops, share of the measured copy bandwidth{rate}**"
        head = ["op: forward / weight backward / arch backward", *(f"{t:,} tokens" for t in tokens)]
        parts.append(f"{title} ({where(rows[-1])})\n\n{table(head, body)}")
    mix = [
        [r["params"]["shape"], r["params"]["backend"], seconds(r["median"]), f"{r['extra']['share']:.0%}"]
        for r in pick(rows, "quant_lora_mix")
    ]
    if mix:
        parts.append("`quant_lora_mix`, 3 precisions, rank 32, bf16, forward\n\n" + table(
            ["weight", "backend", "median", "of copy bandwidth"], mix
        ))  # fmt: skip
    peers = [
        [r["params"]["contender"], r["params"]["shape"], seconds(r["median"]), f"{r['extra']['ratio']:.2f}×"]
        for r in pick(rows, "quant_lora_mix_peers")
    ]
    if peers:
        parts.append(table(["`quant_lora_mix` by", "weight", "median", "of ours"], peers))
    fused = [
        [
            *(str(r["params"][k]) for k in ("shape", "tokens", "what")),
            seconds(r["median"]),
            f"{r['extra']['share']:.0%}",
        ]
        for r in pick(rows, "quant_lora_linear")
    ]
    if fused:
        head = ["`quant_lora_linear`", "tokens", "", "median", "of the library's GEMMs"]
        parts.append(table(head, fused))
    return "\n\n".join(parts)


KINDS = {
    "random": "random choices", "bits": "random bits, whole architecture", "depth": "number of blocks, 16 bit and W4A8",
    "precision": "one precision, whole architecture",
}  # fmt: skip


def calibration(rows: list[Row], device: str) -> str:
    """Predicted against measured whole models that the overhead was not fitted to, and speed-ups over 16 bits."""
    body, speedups, pictures = [], [], []
    schemes = list(dict.fromkeys(r["params"]["scheme"] for r in pick(rows, "speed-up")))
    for model, mode in dict.fromkeys((r["params"]["model"], r["params"]["mode"]) for r in pick(rows, "mape")):
        for row in pick(rows, "mape", model=model, mode=mode):
            extra = row["extra"]
            what = f"{model}, {mode} {extra['batch']} × {extra['seq']}, {extra['dtype']}"
            body.append([
                what, KINDS[row["params"]["set"]], f"{extra['models']} (fitted on {extra['fitted_on']} others)",
                f"{row['median']:.1%} ({row['p10']:.1%} to {row['p90']:.1%} in {row['n']} rounds)",
                f"{extra['worst']:.1%}", f"{extra['operations_only']:.1%}",
                f"{extra['fixed_ms']:.3f} ms + {extra['per_block_ms']:.4f} ms per block",
            ])  # fmt: skip
        found = {r["params"]["scheme"]: r for r in pick(rows, "speed-up", model=model, mode=mode)}
        speedups.append([what, *(
            f"{r['median']:.2f}× ({r['extra']['error']:+.1%})" if (r := found.get(scheme)) else "" for scheme in schemes
        )])  # fmt: skip
        pictures.append(f"![{model}, {mode}](plots/{calibration_plot(device, model, mode)})")
    if not body:
        return ""
    head = ["workload", "which", "whole models", "mean error", "worst", "operations alone", "fitted overhead"]
    title = f"**Latency table: predictions of whole models that it was not fitted to** ({where(rows[-1])})"
    faster = "Speed-up of one precision over 16 bits as measured, and how far the prediction is off:"
    tables = [title, table(head, body), faster, table(["workload", *schemes], speedups)]
    return "\n\n".join([*tables, *pictures])


def calibration_plot(device: str, model: str, mode: str) -> str:
    return f"calibration-{slug(device)}-{slug(model)}-{mode}.png"


def fuzz(rows: list[Row], device: str) -> str:
    """Random cases against independent fp64 definitions; the error is the largest over values and gradients."""
    body = []
    for row in sorted(rows, key=lambda r: (r["name"], r["params"]["backend"], r["params"]["dtype"])):
        p, extra = row["params"], row["extra"]
        backend = f"{p['backend']}, interpreter" if p.get("interpreter") else p["backend"]
        counts = [f"{extra['cases']:,}", str(extra["failures"])]
        body.append([f"`{row['name']}`", backend, p["dtype"], *counts, f"{row['median']:.1e}"])
    total, failed = (sum(r["extra"][k] for r in rows) for k in ("cases", "failures"))
    head = ["op", "backend", "dtype", "cases", "failures", "largest relative error"]
    title = f"**Random cases against fp64 definitions, values and gradients: {total:,} cases, {failed} failures**"
    return f"{title} ({where(rows[-1])})\n\n{table(head, body)}"


SECTIONS: dict[str, Callable[[list[Row], str], str]] = {
    "step": steps,
    "masks": masks,
    "gemm": gemm,
    "decode": decode,
    "calibration": calibration,
    "search": search,
    "ptq": ptq,
    "memory": memory,
    "depth": depth,
    "gguf": gguf,
    "kernels": kernels,
    "launches": launches,
    "ncu": ncu,
    "ceilings": ceilings,
}


# --- plots ------------------------------------------------------------------------------------------------------------


def plot_masks(rows: list[Row], device: str) -> None:
    """Time per training sample and extra memory over the number of candidate networks: the paper's Fig. 3, right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {
        "loop": ("loops (TangleNAS)", "tab:red", "s"),
        "loop-best": ("loops, improved", "tab:pink", "P"),
        "masks": ("stored masks (Eq. 9)", "tab:orange", "^"),
        "gemv": ("stored masks, best", "tab:olive", "v"),
        "shared": ("stored masks, shared", "tab:brown", "D"),
        "ours": ("ours", "tab:blue", "o"),
    }
    rows = one_shape(rows)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, (label, color, marker) in styles.items():
        here = sorted(pick(rows, name), key=lambda r: r["params"]["candidates"])
        if not here:
            continue
        x = [r["params"]["candidates"] for r in here]
        batch = here[0]["params"]["batch"]
        options: dict[str, Any] = {"label": label, "color": color, "marker": marker, "markersize": 4}
        left.plot(x, [r["median"] / batch * 1e3 for r in here], **options)
        right.plot(x, [r["extra"]["memory"] / 1e9 for r in here], **options)
    ours = sorted(pick(rows, "ours"), key=lambda r: r["params"]["candidates"])
    x = [r["params"]["candidates"] for r in ours]
    left.plot(x, [r["extra"]["lora"] / r["params"]["batch"] * 1e3 for r in ours], "k--", label="plain LoRA, two steps")
    for axis, what in ((left, "ms per sample and search iteration"), (right, "GB beyond LoRA")):
        axis.set_xscale("log")
        axis.set_xlabel("candidate networks")
        axis.set_ylabel(what)
        axis.grid(alpha=0.3)
    left.set_yscale("log")
    left.legend(fontsize=7)
    figure.suptitle(device, fontsize=9)
    PLOTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOTS / f"masks-{slug(device)}.png", dpi=130)
    pyplot.close(figure)


def plot_calibration(rows: list[Row], device: str) -> None:
    """Predicted over measured latency of whole models that nothing was fitted to."""
    for model, mode in dict.fromkeys((r["params"]["model"], r["params"]["mode"]) for r in pick(rows, "mape")):
        extra = pick(rows, "mape", model=model, mode=mode)[-1]["extra"]
        models = [r for r in pick(rows, "model", model=model, mode=mode) if r["params"]["set"] != "fit"]
        sums = ("operations", "predicted")
        errors = {of: fmean(abs(r["extra"][of] / r["median"] - 1) for r in models) for of in sums}
        fit = Calibration(
            fixed=extra["fixed_ms"], per_block=extra["per_block_ms"], mape_before=errors["operations"],
            mape=errors["predicted"],
            points=[(r["extra"]["operations"] * 1e3, r["extra"]["blocks"], r["median"] * 1e3) for r in models],
        )  # fmt: skip
        plots.calibration(fit, PLOTS / calibration_plot(device, model, mode))


def plot_depth(rows: list[Row], device: str) -> None:
    """Cross-entropy over blocks dropped in both orders: the paper's Fig. 2, right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    orders = {"importance": ("by importance", "tab:blue", "o"), "last": ("the last", "tab:red", "s")}
    for model in dict.fromkeys(r["params"]["model"] for r in rows):
        own = pick(rows, model=model)
        figure, axis = pyplot.subplots(figsize=(5.2, 3.6), layout="constrained")
        for steps, style in zip(sorted({r["params"]["steps"] for r in own}), itertools.cycle(("-", "--", ":"))):
            for order, (name, color, marker) in orders.items():
                here = sorted(pick(own, order, steps=steps), key=lambda r: r["params"]["dropped"])
                label = f"{name}, {f'{steps} steps' if steps else 'untrained'}"
                x, y = [r["params"]["dropped"] for r in here], [r["median"] for r in here]
                axis.plot(x, y, style, color=color, marker=marker, markersize=4, label=label)
        axis.set_xlabel(f"blocks of {model} dropped")
        axis.set_ylabel("nats per token")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
        PLOTS.mkdir(parents=True, exist_ok=True)
        figure.savefig(PLOTS / depth_plot(device, model), dpi=130)
        pyplot.close(figure)


DRAWN: dict[str, Callable[[list[Row], str], None]] = {
    "masks": plot_masks, "calibration": plot_calibration, "depth": plot_depth,
}  # fmt: skip
