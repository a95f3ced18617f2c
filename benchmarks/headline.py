"""What a user asks first of a machine, for README: each line one of our times beside the peer's of the same run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

from benchmarks.rows import Row, one_shape, pick, seconds
from benchmarks.sections import chosen_today

Line = list[str]
MOST = 16  # lines per machine


def headline(rows: Mapping[str, list[Row]]) -> list[Line]:
    """[what, ours, peer, ratio] for one device, from its newest rows by topic; what was not measured has no line."""
    lines: list[Line] = []
    for topic, make in (
        ("step", step_lines), ("masks", mask_lines), ("kernels", kernel_lines), ("gemm", gemm_lines),
        ("decode", decode_lines), ("calibration", calibration_lines), ("search", search_lines),
    ):  # fmt: skip
        lines += make(rows.get(topic, []))
    assert len(lines) <= MOST, f"{len(lines)} lines: {[line[0] for line in lines]}"
    return lines


def step_lines(rows: list[Row]) -> Iterable[Line]:
    """Supernet steps over the fastest plain PEFT LoRA step of their panel; captured ones, with eager ratios beside."""
    panels = {panel: ratios(rows, panel) for panel in ("graph", "main")}
    best, eager = panels["graph"] or panels["main"], panels["main"]
    how = "CUDA graphs on both sides" if panels["graph"] else "eager"
    for kind, (row, peer, ratio) in best.items():
        p = peer["params"]
        blocks = f"{p['layers']} block{'s' if p['layers'] > 1 else ''} of Llama-3.1-8B, {p['batch']} × {p['tokens']}"
        beside = f" (eager {eager[kind][2]:.2f}×)" if panels["graph"] and kind in eager else ""
        yield [
            f"`{kind.split()[0]}` {kind.split()[1]} step, {blocks}, {how}", seconds(row["median"]),
            f"PEFT LoRA step {seconds(peer['median'])}", f"{ratio:.2f}×{beside}",
        ]  # fmt: skip


def ratios(rows: list[Row], panel: str) -> dict[str, tuple[Row, Row, float]]:
    """By kind of step: our fastest, the fastest plain PEFT, and ours over PEFT."""
    here = [r for r in rows if r["params"]["panel"] == panel and r["name"].endswith("graph") == (panel == "graph")]
    here = one_shape(here)
    lora = [r for r in here if r["name"].startswith("PEFT") and "dropout" not in r["name"]]
    found = {}
    for kind in ("llama3 weight", "llama3 arch", "qllama3 weight", "qllama3 arch"):
        ours = [r for r in here if r["name"].startswith(f"{kind} step")]
        if ours and lora:
            best, peer = (min(group, key=lambda r: r["median"]) for group in (ours, lora))
            found[kind] = best, peer, best["median"] / peer["median"]
    return found


def mask_lines(rows: list[Row]) -> Iterable[Line]:
    """The best loops and the best masks at the largest space. Each was timed beside LoRA: ratio of ratios."""
    rows = one_shape(rows)
    largest = max((r["params"]["candidates"] for r in rows), default=0)
    here = [r for r in rows if r["params"]["candidates"] == largest]
    ours = min((r for r in here if r["name"].startswith("ours")), key=lambda r: r["extra"]["ratio"], default=None)
    for names in (
        {"loop": "loops over sub-matrices", "loop-best": "improved loops over sub-matrices"},
        {"masks": "stored masks (Eq. 9)", "gemv": "stored masks, best version"},
    ):
        row = min((r for r in here if r["name"] in names), key=lambda r: r["extra"]["ratio"], default=None)
        if ours and row:
            part = f", widths divided by {ours['params']['scale']}" if "scale" in ours["params"] else ""
            own, other = (f"{seconds(r['median'])}, +{r['extra']['memory'] / 1e9:.1f} GB" for r in (ours, row))
            yield [
                f"search iteration, {largest:,} candidates{part} (ratio: over LoRA steps beside each)", own,
                f"{names[row['name']]} {other}", f"{ours['extra']['ratio'] / row['extra']['ratio']:.3f}×",
            ]  # fmt: skip


def kernel_lines(rows: list[Row]) -> Iterable[Line]:
    """The mixture of quantized weights over the fastest other way to compute it."""
    peers = [r for r in rows if r["name"] == "quant_lora_mix_peers"]
    ours = [r for r in peers if r["params"]["contender"] == "ours"]
    others = [r for r in peers if r["params"]["contender"] != "ours"]
    if ours and others:
        peer, t = min(others, key=lambda r: r["median"]), ours[-1]["median"]
        name = f"{peer['params']['contender'].replace('eager', 'eager torch')} {seconds(peer['median'])}"
        what = f"`quant_lora_mix` {peer['params']['shape']}, 3 precisions"
        yield [what, seconds(t), name, f"{t / peer['median']:.2f}×"]


def gemm_lines(rows: list[Row]) -> Iterable[Line]:
    """Ours as chosen automatically over the fastest other library of the same scheme, at one token and at hundreds."""
    smallest = min((r["params"]["n"] for r in rows), default=0)
    rows = [r for r in chosen_today(rows) if r["params"]["n"] == smallest]
    many = max((r["params"]["m"] for r in rows if r["params"]["m"] < 1000), default=0)
    for scheme, m in (("w4a16", 1), ("w4a16", many), ("w8a8", many)):
        here = [r for r in rows if r["params"].get("scheme") == scheme and r["params"]["m"] == m]
        ours = [r for r in here if r["name"] == "ours"]
        others = [r for r in here if not r["name"].startswith("ours") and r["name"] != "plan"]
        if ours and others:
            peer, t = min(others, key=lambda r: r["median"]), ours[-1]["median"]
            shape = f"{peer['params']['n']}×{peer['params']['k']}, M = {m}"
            name = f"{peer['name']} {seconds(peer['median'])}"
            yield [f"{scheme.upper()} linear {shape}", seconds(t), name, f"{t / peer['median']:.2f}×"]


def decode_lines(rows: list[Row]) -> Iterable[Line]:
    """A token of each model, beside llama.cpp's on the same integers."""
    context = min((r["params"]["context"] for r in rows if r["params"]["what"] == "decode"), default=0)
    for model in dict.fromkeys(r["params"]["model"] for r in rows if r["params"]["model"] != "embedded"):
        here = {r["name"]: r for r in pick(rows, model=model, what="decode", context=context)}
        for own, peer in (("ours W4A8", "llama.cpp Q4_0"), ("ours W8A8", "llama.cpp Q8_0")):
            if own in here and "against" in here[own]["extra"]:
                what = f"a token of {model} after {context}, {own.split()[1]}"
                ratio = f"{here[own]['extra']['against']:.2f}×"
                yield [what, seconds(here[own]["median"]), f"{peer} {seconds(here[peer]['median'])}", ratio]


def calibration_lines(rows: list[Row]) -> Iterable[Line]:
    """How far a latency table is off for random choices that it was not fitted to."""
    for row in pick(rows, "mape", set="random", mode="decode"):
        extra = row["extra"]
        what = f"latency table, decode {extra['batch']} × {extra['seq']} of {row['params']['model']}: error"
        models = f"{extra['models']} whole models measured"
        yield [what, f"{row['median']:.1%}", models, f"worst {extra['worst']:.1%}"]


def search_lines(rows: list[Row]) -> Iterable[Line]:
    scores = [r for r in rows if r.get("kind") == "score" and r.get("experiment") == "joint"]
    found, medians, counts = [], [], set()
    for seed in sorted({r["seed"] for r in scores}):
        here = [r for r in scores if r["seed"] == seed]
        own, others = ([r["ce"] for r in here if r["role"] == role] for role in ("found", "random"))
        if own and others:
            found += own
            medians.append(statistics.median(others))
            counts.add(len(others))
    if found:
        a, b = statistics.mean(found), statistics.mean(medians)
        yield [
            f"joint search on the small model, {len(found)} seeds: nats per token", f"{a:.3f}",
            f"median of {min(counts)} random models of its cost {b:.3f}", f"−{b - a:.3f}",
        ]  # fmt: skip
    truth = [
        r["exhaustive"] for r in rows if r.get("kind") == "summary" and (r.get("exhaustive") or {}).get("searches")
    ]
    if truth:
        runs, volume = truth[-1]["searches"], truth[-1]["hypervolume"]["all"]
        yield [
            f"searches without bits, {len({r['seed'] for r in runs})} seeds, that end on the true front",
            f"{sum(r['on_front'] for r in runs)} of {len(runs)}", f"all {truth[-1]['of']} choices fine-tuned",
            f"hypervolume {volume:.3f}",
        ]  # fmt: skip
