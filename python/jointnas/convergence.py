"""How far from converged a search or a distillation ended, by a plain rule on its losses, and what to raise.

A line is fitted by least squares to the losses of the last quarter of the steps (at least 8). Along it the loss changes
by c, known to ± m, two standard errors of the slope (steps taken as independent). With t = 1 % of the mean loss:

    diverged   a loss is not finite
    short      fewer than 8 steps
    falling    c < -t and |c| > m
    rising     c > t and |c| > m
    flat       |c| <= t and m <= t
    noisy      everything else: the noise hides a change that would matter
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jointnas.metrics import read_metrics
from jointnas.run_folder import read_json, write_json
from jointnas_kernels.errors import reading

LEAST = 8  # steps from which a slope is fitted
MATTERS = 0.01  # of the mean loss: a change over a quarter of the steps that is worth more steps
FAR = 1.5  # times the original's perplexity: worth saying even where the loss is flat
FILE = "convergence.json"
Part = Mapping[str, Any]


@dataclass(frozen=True)
class Trend:
    """The end of a loss curve. Losses in nats."""

    verdict: str
    steps: int  # of the last quarter
    change: float | None = None  # over these steps, along the fitted line
    margin: float | None = None  # two standard errors of it
    mean: float | None = None


def trend(losses: Sequence[float]) -> Trend:
    """What the end of a loss curve, one loss per step, says (see the module's docstring)."""
    count = min(len(losses), max(LEAST, len(losses) // 4))
    last = list(losses)[len(losses) - count :]
    if not all(map(math.isfinite, losses)):
        return Trend("diverged", count)
    if count < LEAST:
        return Trend("short", count)
    mean, middle = sum(last) / count, (count - 1) / 2
    squares = count * (count**2 - 1) / 12  # of the distances from the middle step
    slope = sum((i - middle) * loss for i, loss in enumerate(last)) / squares
    rest = sum((loss - mean - slope * (i - middle)) ** 2 for i, loss in enumerate(last))
    change = slope * (count - 1)
    margin = 2 * math.sqrt(rest / (count - 2) / squares) * (count - 1)
    limit = MATTERS * abs(mean)
    if abs(change) > max(limit, margin):
        verdict = "falling" if change < 0 else "rising"
    else:
        verdict = "flat" if margin <= limit else "noisy"
    return Trend(verdict, count, change, margin, mean)


def record(
    folder: Path, phase: str, *, steps: int, tokens: int, trained: int, total: int,
    undecided: Mapping[str, float] | None = None, perplexity: tuple[float, float] | None = None,
) -> Part:  # fmt: skip
    """Judges a phase of a run, "search" or "finetune", by the losses in its metrics; writes it to convergence.json.

    Args:
        folder: of the run.
        phase: whose metrics.
        steps: all of the phase.
        tokens: seen by the trained weights.
        trained: parameters that were trained.
        total: parameters of the model.
        undecided: search: normalised entropies of the dimensions above `search.entropy_stop`.
        perplexity: finetune: held out, of the original and of the found model.

    Returns:
        These numbers, the `trend`, and `advice`: what to change, empty if nothing.
    """
    losses = [loss for row in read_metrics(folder) if row["phase"] == phase for loss in row.get("losses", ())]
    end = trend(losses)
    part: dict[str, Any] = {
        "phase": phase, "steps": steps, "tokens": tokens, "trained": trained, "total": total,
        "tokens_per_trained": tokens / max(1, trained), "tokens_per_parameter": tokens / max(1, total),
        "trend": asdict(end),
    }  # fmt: skip
    if undecided is not None:
        part |= {"decided": not undecided, "undecided": dict(undecided)}
    if perplexity is not None:
        part |= {"original_perplexity": perplexity[0], "perplexity": perplexity[1]}
    part["advice"] = advice(part)
    write_json(folder / FILE, {**(read_json(folder / FILE) or {}), phase: part})
    return part


def advice(part: Part) -> list[str]:
    """What to change, from a recorded part."""
    found, phase, verdict = [], part["phase"], part["trend"]["verdict"]
    rate = "search.lr_weight" if phase == "search" else "finetune.lr"
    if part.get("undecided"):
        found.append("dimensions are undecided: raise search.steps or search.lr_arch")
    if part["steps"] == 0:
        found.append(f"nothing was trained: raise {phase}.steps")
    elif verdict == "falling":
        found.append(f"the loss is still falling: raise {phase}.steps, or {rate}")
    elif verdict in ("rising", "diverged"):
        shrinking = ", unless it rises because the expected model still shrinks" if phase == "search" else ""
        found.append(f"the loss {'rises' if verdict == 'rising' else 'is not finite'}: lower {rate}{shrinking}")
    elif verdict in ("short", "noisy"):
        why = "too few steps" if verdict == "short" else "too much noise"
        batch = "data.batch_size" if phase == "search" else "finetune.batch_size"
        found.append(f"{why} to see whether the loss still falls: raise {phase}.steps, or {batch}")
    if "perplexity" in part and not part["perplexity"] <= FAR * part["original_perplexity"]:
        found.append("perplexity is far above the original's: raise finetune.steps or finetune.lr, or the budget")
    return found


def sentence(part: Part) -> str:
    """One line for people."""
    name = "search" if part["phase"] == "search" else "distillation"
    parts = [
        f"{part['steps']:,} steps, {part['tokens']:,} tokens ({part['tokens_per_trained']:.2g} per trained parameter, "
        f"{part['tokens_per_parameter']:.2g} per parameter of the model)"
    ]
    if "decided" in part:
        worst = sorted(part["undecided"].items(), key=lambda item: -item[1])
        names = ", ".join(f"{k} (entropy {v:.2f})" for k, v in worst[:8])
        parts.append(f"THE SEARCH DID NOT CONVERGE, undecided: {names}" if names else "every dimension is decided")
    end = part["trend"]
    if end["change"] is not None:
        parts.append(
            f"loss {end['mean']:.3f}, {end['verdict']}: {end['change']:+.3f} ± {end['margin']:.3f} over the last "
            f"{end['steps']} steps"
        )
    if "perplexity" in part:
        own, original = part["perplexity"], part["original_perplexity"]
        parts.append(f"perplexity {own:,.2f} beside the original's {original:,.2f} ({own / original:.2f}×)")
    todo = "; ".join(part["advice"])
    return f"{name}: {'; '.join(parts)}. " + (f"To do: {todo}." if todo else "Nothing says that more steps would help.")


def sentences(folder: Path) -> list[str]:
    """What is recorded of a run, a line per phase."""
    recorded = read_json(folder / FILE) or {}
    with reading(str(folder / FILE), "it is damaged: remove it"):
        return [sentence(recorded[phase]) for phase in ("search", "finetune") if phase in recorded]
