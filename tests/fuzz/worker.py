"""What a worker process of the campaign runs: some seeds of one (op, backend, dtype), added up."""

from __future__ import annotations

import os
import signal
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch

from jointnas_kernels.errors import JointNASError
from tests.fuzz.cases import OPS
from tests.fuzz.check import Case, check
from tests.fuzz.source import LIMITS, Seeded
from tests.interpreter import quick_reductions

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
if os.environ.get("TRITON_INTERPRET") == "1":
    quick_reductions()

SECONDS_PER_CASE = 60  # of processor time: a case that takes longer hangs


@dataclass(frozen=True)
class Combination:
    op: str
    backend: str
    dtype: str


@dataclass
class Tally:
    """What a number of cases gave."""

    cases: int = 0
    failures: int = 0
    skipped: int = 0  # the op has no such backend for this case
    refused: str = ""  # why
    first: int | None = None
    message: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    cancelled: int = 0
    undecided: int = 0
    flipped: int = 0
    fatal: bool = False  # the process lost its CUDA context

    def add(self, other: Tally) -> None:
        self.cases += other.cases
        self.failures += other.failures
        self.skipped += other.skipped
        self.refused = self.refused or other.refused
        if other.first is not None and (self.first is None or other.first < self.first):
            self.first, self.message = other.first, other.message
        for name, error in other.errors.items():
            self.errors[name] = max(self.errors.get(name, 0.0), error)
        self.cancelled += other.cancelled
        self.undecided += other.undecided
        self.flipped += other.flipped
        self.fatal = self.fatal or other.fatal

    def fail(self, seed: int, message: str) -> None:
        self.failures += 1
        if self.first is None:
            self.first, self.message = seed, message


def build(c: Combination, seed: int, variants: int, limits: str) -> Case:
    """The case of a seed; ``auto`` leaves the backend to the op."""
    backend = None if c.backend == "auto" else c.backend
    return OPS[c.op](Seeded(c.op, seed, variants, DTYPES[c.dtype], backend, LIMITS[limits]).start())


def _expired(*_: object) -> None:
    raise TimeoutError(f"longer than {SECONDS_PER_CASE} s")


def missing(error: JointNASError) -> bool:
    """Whether the op says that it has no such backend, or not for this dtype, shape or machine: no failure."""
    text = str(error)
    return "unknown backend" in text or ("backend" in text and "cannot run" in text)


def run_chunk(c: Combination, seeds: list[int], variants: int, limits: str, device: str) -> Tally:
    """Cases of one combination, in a worker process."""
    torch.set_num_threads(1)
    # the library's GEMMs may otherwise add partial sums in half precision, which no rounding count allows for
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    signal.signal(signal.SIGPROF, _expired)
    tally = Tally()
    for seed in seeds:
        case = None
        signal.setitimer(signal.ITIMER_PROF, SECONDS_PER_CASE)
        try:
            case = build(c, seed, variants, limits)
            outcome = check(case, device, seed)
        except JointNASError as error:
            if missing(error):
                tally.skipped += 1
                tally.refused = str(error)
                continue
            tally.fail(seed, f"{case.text if case else ''}: {error}")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            tally.fail(seed, f"{case.text if case else ''}: {type(error).__name__} at {place}: {error}")
            if "CUDA error" in str(error):  # every later call of this process would fail, too
                tally.fatal = True
                return tally
        else:
            if outcome.failures:
                tally.fail(seed, f"{case.text}: {'; '.join(outcome.failures)}")
            for name, size in outcome.errors.items():
                tally.errors[name] = max(tally.errors.get(name, 0.0), size)
            tally.cancelled += outcome.cancelled
            tally.undecided += outcome.undecided
            tally.flipped += outcome.flipped
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        tally.cases += 1
    return tally
