"""Jobs, one after the other, into a file of plans that is whole after each."""

from __future__ import annotations

import datetime
import logging
import math
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from jointnas_kernels import __version__
from jointnas_kernels.errors import JointNASError, writable
from jointnas_kernels.ops.lowbit.choice import Candidate
from jointnas_kernels.progress import Progress
from jointnas_kernels.tuned import Device, Made, Row, Shape, Tuned, misfit, read, write
from jointnas_kernels.tuning.halving import MARGIN, duel, halve
from jointnas_kernels.tuning.shapes import Job

log = logging.getLogger(__name__)


class Contest(Protocol):
    """A product on a device: what could multiply it, and how long that takes."""

    usual: Candidate
    candidates: Sequence[Candidate]

    def wrong(self, candidate: Candidate) -> str:
        """What it computes otherwise than the reference; empty if nothing."""

    def sample(self, candidate: Candidate) -> float:
        """Milliseconds of a call, measured once."""


def made() -> Made:
    """What is measured with, now."""
    return Made(
        package=__version__, commit=_says("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
        torch=torch.__version__, cuda=torch.version.cuda or "",
        driver=_says("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def _says(*command: str) -> str:
    """The first line that a command prints; empty where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip()


def tune(
    jobs: Sequence[Job], contest: Callable[[Shape, int], Contest], out: Path, device: Device, kernels: str, *,
    seconds: float = math.inf, resume: bool = False, progress: bool = True, margin: float = MARGIN,
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:  # fmt: skip
    """Measures jobs in their order, and returns what the file then holds.

    Args:
        jobs: the most important first. What the file has is not measured again.
        contest: makes the product of a shape at so many tokens.
        out: the file; replaced as a whole after each job.
        device: that is measured.
        kernels: the hash of the kernels that are measured (`tuned.kernels_here`).
        seconds: no job is begun after that.
        resume: add to what is in `out`.
        progress: show a bar.
        margin: share of the usual plan's time that another must save to be stored.
        clock: seconds that have passed.

    Raises:
        JointNASError: `out` exists and is not to be, or cannot be, continued.
    """
    begun, found = clock(), read(writable(out, "file"))
    if found is not None and not resume:
        raise JointNASError(f"{out} exists; pass --resume true to add to it, or choose another file")
    reason = "" if found is None else misfit(found, device, kernels)
    if reason:
        raise JointNASError(f"{out} cannot be continued: it is of {reason}; choose another file or remove it")
    rows = {(row.shape, row.tokens): row for row in (found.rows if found else ())}
    todo = [job for job in jobs if (job.shape, job.tokens) not in rows]
    limit = f", in at most {datetime.timedelta(seconds=math.ceil(seconds))} (h:mm:ss)" if seconds < math.inf else ""
    log.info("tune: %d products to measure%s; %d are there", len(todo), limit, len(jobs) - len(todo))
    file, bar = Tuned(device, kernels, made()), Progress("tune", len(todo), enabled=progress)
    for number, job in enumerate(todo):
        if clock() - begun >= seconds:
            log.info("tune: %d of %d products are left; --resume true goes on", len(todo) - number, len(todo))
            break
        row = measure(job, contest, margin)
        if row is not None:
            rows[job.shape, job.tokens] = row
            write(out, replace(file, rows=_ordered(rows.values())))
        bar.step(1, product=str(job))
    bar.close()
    return replace(file, rows=_ordered(rows.values()))


def _ordered(rows: Iterable[Row]) -> tuple[Row, ...]:
    """By shape, then tokens: of two rows that hold for a count, the one measured nearer to it comes first."""
    return tuple(sorted(rows, key=lambda row: (row.shape, row.tokens)))


def measure(job: Job, contest: Callable[[Shape, int], Contest], margin: float = MARGIN) -> Row | None:
    """What is the fastest for a job; None, with a warning, where the usual plan itself does not run."""
    product = contest(job.shape, job.tokens)
    wrong = product.wrong(product.usual)
    if wrong:
        log.warning("tune: %s is left out, for its usual kernel (%s) does not work: %s", job, product.usual, wrong)
        return None
    right = [c for c in product.candidates if c == product.usual or not product.wrong(c)]
    found = halve(right, product.usual, product.sample, margin)
    if not math.isfinite(found.usual_ms):
        log.warning("tune: %s is left out, for there is no memory to measure it", job)
        return None
    least = job.least
    if found.best != product.usual and least < job.tokens and not _holds(found.best, contest(job.shape, least)):
        least = job.tokens
    kernel, plan = (None, None) if found.best == product.usual else found.best
    return Row(**job.shape._asdict(), least=least, tokens=job.tokens, kernel=kernel,
               plan=None if plan is None else tuple(plan), ms=found.ms, usual_ms=found.usual_ms)  # fmt: skip


def _holds(best: Candidate, product: Contest) -> bool:
    """Whether what is the fastest with many tokens still beats the usual plan with few."""
    if best == product.usual:
        return True
    if product.wrong(best) or product.wrong(product.usual):
        return False
    return duel(best, product.usual, product.sample, margin=0.0)[0] == best
