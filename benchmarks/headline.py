"""The table README opens its results with: each line one of our times beside the peer's of the same run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

from benchmarks.sections import Row, seconds

Line = list[str]


def headline(rows: Mapping[str, list[Row]]) -> list[Line]:
    """[what, ours, peer, ratio] for one device, from its newest rows by topic; what was not measured has no line."""
    lines: list[Line] = []
    for topic, make in (
        ("step", step_lines), ("masks", mask_lines), ("kernels", kernel_lines), ("gemm", gemm_lines),
        ("decode", decode_lines), ("search", search_lines),
    ):  # fmt: skip
        lines += make(rows.get(topic, []))
    return lines


def step_lines(rows: list[Row]) -> Iterable[Line]:
    """Supernet steps over the fastest plain PEFT LoRA step of their panel; captured ones over captured PEFT."""
    for panel, how in (("graph", ", CUDA graphs on both sides"), ("main", ", eager")):
        here = [r for r in rows if r["params"]["panel"] == panel and r["name"].endswith("graph") == (panel == "graph")]
        lora = [r for r in here if r["name"].startswith("PEFT") and "dropout" not in r["name"]]
        if not lora:
            continue
        peer = min(lora, key=lambda r: r["median"])
        p = peer["params"]
        blocks = f"{p['layers']} block{'s' if p['layers'] > 1 else ''} of Llama-3.1-8B, {p['batch']} × {p['tokens']}"
        for kind in ("llama3 weight", "llama3 arch", "qllama3 weight", "qllama3 arch"):
            found = [r for r in here if r["name"].startswith(f"{kind} step")]
            if found:
                best = min(found, key=lambda r: r["median"])
                ratio = best["median"] / peer["median"]
                what = f"`{kind.split()[0]}` {kind.split()[1]} step, {blocks}{how}"
                yield [what, seconds(best["median"]), f"PEFT LoRA step {seconds(peer['median'])}", f"{ratio:.2f}×"]


def mask_lines(rows: list[Row]) -> Iterable[Line]:
    """At the largest space that ours and the peer were both timed at. Each was timed beside LoRA: ratio of ratios."""
    peers = {
        "loop": "loops over sub-matrices", "loop-best": "improved loops", "masks": "stored masks (Eq. 9)",
        "gemv": "stored masks, best version",
    }  # fmt: skip
    for name, label in peers.items():
        for row in sorted((r for r in rows if r["name"] == name), key=lambda r: -r["params"]["candidates"]):
            count = row["params"]["candidates"]
            ours = [r for r in rows if r["name"].startswith("ours") and r["params"]["candidates"] == count]
            if ours:
                best = min(ours, key=lambda r: r["extra"]["ratio"])
                ratio = best["extra"]["ratio"] / row["extra"]["ratio"]
                own, other = (f"{seconds(r['median'])}, +{r['extra']['memory'] / 1e9:.1f} GB" for r in (best, row))
                yield [
                    f"search iteration, {count:,} candidates (ratio: over LoRA steps beside each)",
                    own,
                    f"{label} {other}",
                    f"{ratio:.3f}×",
                ]
                break


def kernel_lines(rows: list[Row]) -> Iterable[Line]:
    peers = [r for r in rows if r["name"] == "quant_lora_mix_peers"]
    ours = [r for r in peers if r["params"]["contender"] == "ours"]
    for row in peers:
        if row not in ours:
            t = ours[-1]["median"]
            peer = f"{row['params']['contender'].replace('eager', 'eager torch')} {seconds(row['median'])}"
            what = f"`quant_lora_mix` {row['params']['shape']}, 3 precisions"
            yield [what, seconds(t), peer, f"{t / row['median']:.2f}×"]


def gemm_lines(rows: list[Row]) -> Iterable[Line]:
    """Ours as chosen automatically over the fastest other library of the same scheme, at one and at many tokens."""
    smallest = min((r["params"]["n"] for r in rows), default=0)
    rows = [r for r in rows if r["params"]["n"] == smallest]
    counts = sorted({r["params"]["m"] for r in rows})
    for m in [c for c in counts if c == 1] + counts[-2:]:
        for scheme in ("w4a16", "w8a16", "w4a8", "w8a8"):
            here = [r for r in rows if r["params"].get("scheme") == scheme and r["params"]["m"] == m]
            ours = [r for r in here if r["name"] == "ours"]
            others = [r for r in here if not r["name"].startswith("ours") and r["name"] != "plan"]
            if ours and others:
                peer, t = min(others, key=lambda r: r["median"]), ours[-1]["median"]
                shape = f"{peer['params']['n']}×{peer['params']['k']}, M = {m}"
                ratio = f"{t / peer['median']:.2f}×"
                name = f"{peer['name']} {seconds(peer['median'])}"
                yield [f"{scheme.upper()} linear {shape}", seconds(t), name, ratio]


def decode_lines(rows: list[Row]) -> Iterable[Line]:
    """Packed blocks of Llama-3.1-8B over the same blocks in 16 bit."""
    here = {r["name"]: r for r in rows if r["params"]["panel"] == "blocks"}
    dense = here.pop("16 bit", None)
    for name, row in here.items():
        if dense is not None and name in ("W4A16", "W2A16", "W4A8"):
            what = f"decoding one token, two blocks of Llama-3.1-8B, {name}"
            peer = f"16 bit {seconds(dense['median'])}"
            yield [what, seconds(row["median"]), peer, f"{row['median'] / dense['median']:.2f}×"]


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
