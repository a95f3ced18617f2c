"""What docs/results.md says of instruments: ceilings, the launches of a step, hardware counters of kernels."""

from __future__ import annotations

from pathlib import Path

from benchmarks.rows import Row, pick, read, seconds, table, where


def ceilings(rows: list[Row], device: str) -> str:
    clocked = any("per_clock" in r["extra"] for r in rows)
    body = []
    for row in rows:
        what = row["params"].get("instruction")
        cells = [what or f"{row['name']} " + "×".join(str(v) for v in row["params"].values())]
        cells.append(f"{row['median'] / 1e12:.3g} T{row['unit']}")
        if clocked:
            cells.append(f"{row['extra']['per_clock']:.4g}" if "per_clock" in row["extra"] else "")
        body.append(cells)
    head = ["what", "rate", *(["per clock and SM"] if clocked else [])]
    return f"**Ceilings** ({where(rows[-1])})\n\n{table(head, body)}" if body else ""


def launches(rows: list[Row], device: str) -> str:
    """One line per step, and below it where its time goes."""
    body, parts = [], []
    for row in pick(rows, "step"):
        p, extra = row["params"], row["extra"]
        shape = f"{p['layers']} × ({p['batch']} × {p['tokens']}) {p['dtype']}"
        shares = [f"{extra[k]:.0%}" if k in extra else "–" for k in ("busy_share", "host_share")]
        body.append([p["step"], shape, seconds(row["median"]), str(extra["launches"]), seconds(extra["busy"]), *shares])
        kernels = sorted(pick(rows, "kernel", **p), key=lambda r: -r["median"])[:12]
        of = [
            [
                f"`{r['params']['kernel']}`", str(r["extra"]["launches"]), seconds(r["median"]),
                f"{r['extra']['share']:.0%}", f"{r['extra']['floor_share']:.0%}" if "floor_share" in r["extra"] else "",
            ]
            for r in kernels
        ]  # fmt: skip
        if of:
            head = [f"{p['step']}: kernel", "launches", "time", "of the busy time", "floor / time"]
            parts.append(table(head, of))
    if not body:
        return ""
    head = ["step", "blocks × tokens", "median", "launches", "kernels", "busy", "waits for the host"]
    title = (
        f"**Launches of one eager training step** ({where(rows[-1])}; busy: kernels' time over the step's, timed "
        "without the profiler; waits for the host: of the profiled step, which the profiler slows down; the floor is "
        "that of bytes and operations at this machine's copy and GEMM rates, where they are known)"
    )
    return "\n\n".join([title, table(head, body), *parts])


def launch_count(file: Path) -> str:
    """What one block launches; rows of no device."""
    body, parts = [], ("forward", "backward")
    for row in read(file):
        p = row["params"]
        numbers = [str(row["parts"][part][what]) for what in ("launches", "operators", "reads") for part in parts]
        shape = f"{p['batch']} × {p['tokens']} tokens, {p['adapters']} adapters"
        body.append([f"{p['space']} {p['mode']} step, {shape}", *numbers])
    if not body:
        return ""
    head = ["a block of a", *(f"{part}: {what}" for what in ("launches", "operators", "reads") for part in parts)]
    title = (
        "**Launches of a block**, counted without a GPU by `benchmarks/launch_count.py` at Llama-3.1-8B's shapes "
        "(operators: of this package; reads: of the device by the host, which waits for it)"
    )
    return f"{title}\n\n{table(head, body)}"


def ncu(rows: list[Row], device: str) -> str:
    """Counters of every kernel of the chosen ops."""
    shares = {
        "dram_share": "DRAM", "sm_share": "SM", "tensor_share": "tensor cores", "issue_share": "issue slots",
        "occupancy": "occupancy",
    }  # fmt: skip
    body = []
    for row in rows:
        p, extra = row["params"], row["extra"]
        stalls = sorted(extra.get("stalls", {}).items(), key=lambda item: -item[1])[:3]
        body.append([
            f"`{p['op']}`, {p['tokens']:,} tokens", f"`{p['kernel']}`", seconds(row["median"]),
            f"{extra['dram_bytes'] / 1e6:.4g} MB" if "dram_bytes" in extra else "",
            *(f"{extra[k]:.0%}" if k in extra else "" for k in shares), ", ".join(f"{k} {v:.2g}" for k, v in stalls),
        ])  # fmt: skip
    head = ["op", "kernel", "time", "DRAM traffic", *shares.values(), "stalled warps per issue"]
    title = f"**Hardware counters of kernels, launched alone with cold caches** ({where(rows[-1])})" if body else ""
    return f"{title}\n\n{table(head, body)}" if body else ""
