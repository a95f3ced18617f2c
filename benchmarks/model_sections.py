"""The tables of docs/results.md on whole models: decoding, searches, quantization, llama.cpp, depth."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.rows import Row, pick, seconds, slug, table, where


def decode(rows: list[Row], device: str) -> str:
    """Tokens of whole models, written and read: ours, llama.cpp, torch; one table per model."""
    return "\n\n".join(_decode_of(pick(rows, model=m)) for m in dict.fromkeys(r["params"]["model"] for r in rows))


def _decode_of(rows: list[Row]) -> str:
    p = rows[-1]["params"]
    columns = sorted({(r["params"]["what"], r["params"]["context"]) for r in rows})
    body = []
    for name in dict.fromkeys(r["name"] for r in rows):
        cells, size = [], 0
        for what, context in columns:
            found = pick(rows, name, what=what, context=context)
            if not found:
                cells.append("")
                continue
            row = found[-1]
            extra, size = row["extra"], row["extra"]["bytes"]
            notes = [f"{extra['share']:.0%} of reading"] if "share" in extra else []
            notes += [f"{extra['against']:.2f}× of llama.cpp"] if "against" in extra else []
            cells.append(seconds(row["median"]) + (f" ({', '.join(notes)})" if notes else ""))
        body.append([name, f"{size / 1e6:,.0f} MB", *cells])
    heads = [f"a token after {c}" if what == "decode" else f"a token of {c} read" for what, c in columns]
    return (
        f"**A token of {p['model']}, batch 1, {p['threads']} threads, ours and torch in {p['dtype']}** "
        f"({where(rows[-1])}; interleaved; heads in 8 bits but for 16 bit; `of reading`: the time of reading weights "
        f"and cache once, of the whole; llama.cpp runs the same integers)\n\n{table(['', 'weights', *heads], body)}"
    )


def search(rows: list[Row], device: str) -> str:
    """Found models against random ones of the same cost, and against all choices of a small space."""
    body = []
    scores = [r for r in rows if r.get("kind") == "score" and r.get("experiment") == "joint"]
    for seed in sorted({r["seed"] for r in scores}):
        here = [r for r in scores if r["seed"] == seed]
        found = [r["ce"] for r in here if r["role"] == "found"]
        others = [r["ce"] for r in here if r["role"] == "random"]
        if found and others:
            values = (found[0], statistics.median(others), min(others))
            body.append([str(seed), *(f"{v:.3f}" for v in values), str(len(others))])
    parts = []
    if body:
        head = ["seed", "found", "median of random", "best of random", "random models"]
        parts.append(
            f"**Joint search, `tiny` space with bits: cross-entropy (nats per token) after the same fine-tuning** "
            f"({where(scores[-1])})\n\n{table(head, body)}"
        )
    truth = [r for r in rows if r.get("kind") == "summary" and (r.get("exhaustive") or {}).get("searches")]
    if truth:
        last = truth[-1]["exhaustive"]
        runs = last["searches"]
        distance, hits = max(f["behind_front"] for f in runs), sum(f["on_front"] for f in runs)
        parts.append(
            f"**Against all {last['of']} choices of a sub-space without bits, each fine-tuned** ({where(truth[-1])}): "
            f"{hits} of {len(runs)} searches ({len({f['seed'] for f in runs})} seeds) ended on the true front; the "
            f"farthest was {distance:.3f} nats behind it; hypervolume {last['hypervolume']['all']:.3f} of the front's."
        )
    return "\n\n".join(parts)


PTQ = {
    "rtn": "RTN", "clip": "RTN, MSE clip", "gptq": "GPTQ", "gptq-order": "GPTQ, act-order", "omniquant": "OmniQuant",
    "reconstruct": "block reconstruction", "supernet": "the same, LoRA in a supernet",
}  # fmt: skip


def ptq(rows: list[Row], device: str) -> str:
    """Perplexity by scheme and method of each model, and what learning does to the error of every block."""
    models: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        params = row["params"]
        models.setdefault((params.get("model", "embedded"), params.get("group", 128)), []).append(row)
    return "\n\n".join(filter(None, (_ptq_of(of, name, group) for (name, group), of in models.items())))


def _ptq_of(rows: list[Row], model: str, group: int) -> str:
    quantized = [r for r in rows if r["name"] in PTQ]
    if not quantized:
        return ""
    names = {n: label for n, label in PTQ.items() if pick(quantized, n)}
    plain, last = pick(rows, "16bit"), quantized[-1]
    schemes = list(dict.fromkeys(r["params"]["scheme"] for r in quantized))
    newest = {(r["params"]["scheme"], r["name"]): r for r in quantized}

    def values(of: Callable[[Row], str]) -> str:
        body = [[s.upper(), *(of(newest[s, n]) if (s, n) in newest else "" for n in names)] for s in schemes]
        return table(["bits", *names.values()], body)

    def base(of: Callable[[Row], str]) -> str:
        return f"; unquantized {of(plain[-1])}" if plain else ""

    def short(value: float) -> str:
        return f"{value:,.2f}" if value < 1e4 else f"{value:.1e}"

    def tokens(row: Row) -> int:
        return int(row["extra"]["samples"] * row["extra"].get("length", row["extra"]["context"]))

    usual = max(sorted(map(tokens, newest.values())), key=[tokens(row) for row in newest.values()].count)

    def perplexity(row: Row) -> str:
        other = row["name"] in PTQ and tokens(row) != usual
        return short(row["median"]) + (f" ({tokens(row):,} tokens)" if other else "")

    extra, what = last["extra"], "the embedded model" if model == "embedded" else model
    parts = [
        f"**Post-training quantization of {what}: perplexity on {last['params']['tokens']:,} held-out tokens** "
        f"({where(last)}; groups of {group}, {usual:,} calibration tokens unless said otherwise"
        f"{base(perplexity)})\n\n{values(perplexity)}"
    ]
    if "fiction" in extra:
        for label, of in (
            ("perplexity on its fiction alone", lambda r: short(r["extra"]["fiction"])),
            ("accuracy in the embedded tasks, %", lambda r: f"{100 * r['extra']['tasks']['acc']:.1f}"),
        ):
            parts.append(f"The same, {label}{base(of)}\n\n{values(of)}")
    if extra.get("caveat"):
        parts.append(extra["caveat"])
    learned = [newest[s, "omniquant"] for s in schemes if (s, "omniquant") in newest]
    keys = (("mse_rtn", "RTN"), ("mse_start", "start"), ("mse", "learned"))
    blocks = [
        [r["params"]["scheme"].upper(), label, *(f"{100 * v:.3g}" for v in r["extra"][key])]
        for r in learned for key, label in keys if key in r["extra"]
    ]  # fmt: skip
    if blocks and len(blocks[0]) <= 12:
        head = ["bits", "OmniQuant", *(f"block {i}" for i in range(len(blocks[0]) - 2))]
        parts.append(
            "Squared error of each block's output, % of the output's energy, on inputs from the OmniQuant blocks "
            f"before it: rounded to nearest, at the start, learned\n\n{table(head, blocks)}"
        )
    return "\n\n".join(parts)


def gguf(rows: list[Row], device: str) -> str:
    """Random choices of a real model: supernet, extracted, reloaded, and in llama.cpp."""
    body = []
    for model in dict.fromkeys(r["params"]["model"] for r in rows):
        own = pick(rows, model=model)
        most = {key: max(r["extra"][key] for r in own) for key in own[0]["extra"] if key != "types"}
        numbers = [most["one_hot"], most["reloaded"], most["rounded"], most["scales"], max(r["median"] for r in own)]
        same = min(r["extra"]["same_tokens"] for r in own)
        body.append([
            model, str(len(own)), *(f"{v:.1e}" if v else "0" for v in numbers), f"{100 * most['perplexity']:.4f}",
            f"{100 * same:.0f}", f"{most['rounding']:.2f}", f"{most['unexplained']:.2f}",
        ])  # fmt: skip
    head = ["model", "choices", "supernet, logits", "reloaded, logits", "scales", "by scales", "llama.cpp fp32",
            "perplexity, %", "same tokens, %", "8-bit inputs", "unexplained"]  # fmt: skip
    return (
        f"**Random choices as GGUF in llama.cpp: largest differences of any choice** ({where(rows[-1])}; logits of the "
        "fixed supernet and of the reloaded export against the extracted model; how much fp16 changes scales, "
        "relatively, and log-probabilities by it; log-probabilities, perplexity and most probable tokens of llama.cpp "
        "against the model of the file, its numbers stored in fp32; then what llama.cpp's rounding of the inputs of "
        "quantized products to 8 bits does, and what torch with the same rounding leaves of it, both medians)\n\n"
        f"{table(head, body)}"
    )


def memory(rows: list[Row], device: str) -> str:
    """What a dry run predicts for every phase, and what a process took."""
    phases = list(dict.fromkeys(r["name"] for r in rows))
    body = []
    for name in dict.fromkeys(r["params"]["configuration"] for r in rows):
        cells = [name]
        for phase in phases:
            row = pick(rows, phase, configuration=name)[-1]
            cells.append(f"{row['extra']['predicted'] / 1e6:,.0f} / {row['median'] / 1e6:,.0f} MB")
            cells[-1] += f" ({row['extra']['ratio'] - 1:+.1%})"
        body.append(cells)
    return (
        f"**Memory of a step, predicted by `search --dry-run` / taken by a process** ({where(rows[-1])}; the "
        f"configurations are in benchmarks/bench_memory.py)\n\n{table(['configuration', *phases], body)}"
    )


def depth(rows: list[Row], device: str) -> str:
    """The paper's Fig. 2, right: cross-entropy over the number of blocks dropped, in both orders."""
    parts = []
    for model in dict.fromkeys(r["params"]["model"] for r in rows):
        own = pick(rows, model=model)
        steps, last = sorted({r["params"]["steps"] for r in own}), own[-1]
        batches = {f"{r['params']['batch']} × {r['params']['seq']} tokens" for r in own if r["params"]["steps"]}
        training = f"; steps of distillation on {', '.join(sorted(batches))}" if batches else ""
        body = []
        for dropped in sorted({r["params"]["dropped"] for r in own}):
            found = [pick(own, order, dropped=dropped, steps=n) for n in steps for order in ("importance", "last")]
            body.append([str(dropped), *(f"{of[-1]['median']:.3f}" if of else "" for of in found)])
        whens = ["untrained" if n == 0 else f"{n} steps" for n in steps]
        head = ["blocks dropped", *(f"{order}, {when}" for when in whens for order in ("by importance", "the last"))]
        caveat = f". {last['extra']['caveat']}" if last["extra"]["caveat"] else ""
        parts.append(
            f"**Blocks of {model} dropped by importance or from the end: nats per token on "
            f"{last['params']['tokens']:,} held-out tokens** ({where(last)}{training}){caveat}\n\n"
            f"{table(head, body)}\n\n![nats per token over blocks dropped](plots/{depth_plot(device, model)})"
        )
    return "\n\n".join(parts)


def depth_plot(device: str, model: str) -> str:
    return f"depth-{slug(device)}-{slug(model)}.png"
