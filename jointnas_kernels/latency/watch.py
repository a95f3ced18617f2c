"""Whether a measurement can be trusted: `Watch` notices when something else slows the machine down meanwhile.

Three signs, taken for every measurement on its own:

    drift     reference kernels, timed before, between and after the samples, against their times on the quiet machine
    waited    time that threads of this process were ready to run but did not (run queue, and CPU time stolen by a
              hypervisor), as a share of the measurement's
    spread    median / p10 of the samples: two speeds in one measurement

Why so strict: with two threads every parallel region waits for the slower one. On 2 cores another process that took a
tenth of the time made whole models 20 % slower, one busy process single operations up to 20 times slower. And a virtual
machine has states that nothing inside it reports; seen on one of 2 cores, each for seconds to minutes, without any
waiting time: all that computes 70 % slower; only loads slower (a busy sibling of the core: GEMM 5 %, copy by columns
60 % slower); and, most likely, its cores moved to different last-level caches (reads of memory 40 % faster, GEMM 5 %,
whole models 20 to 70 % slower). Hence three reference kernels: a GEMM for the clock, a copy by columns for loads and
caches, and alternating additions to a whole vector and to its second half, a quarter of which so crosses between the
cores every time. The last two vary more by themselves; `SCALE` brings their drift to that of the GEMM.

A measurement that shows one of the signs is repeated, with pauses while the machine stays busy, until `patience` is
used up; what is still disturbed then is marked `contended`.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

log = logging.getLogger(__name__)

# (repeat above, contended above); a quiet virtual machine of 2 cores shows 0.02, 0.02 and 0.02
DRIFT, WAITED = (0.02, 0.08), (0.05, 0.15)
SPREAD = 0.3
SCALE = (1.0, 4.0, 4.0)  # of the reference kernels' drifts: GEMM, copy by columns, crossing
CALLS = 5  # of each kernel in one reading
Reading = tuple[float, ...]  # seconds of every reference kernel


@functools.cache
def warn_once(text: str) -> None:
    """A warning that a process repeats only in other words: several tables of a run share their doubts."""
    log.warning(text)


class Measured(NamedTuple):
    """Milliseconds per call of one operation or model."""

    p10: float
    median: float
    p90: float
    samples: int
    contended: bool = False


class Signs(NamedTuple):
    """What was seen during one attempt; all are 0 on a quiet machine."""

    drift: float = 0.0
    waited: float = 0.0
    spread: float = 0.0

    @property
    def disturbed(self) -> bool:
        """Worth another attempt."""
        return self.drift > DRIFT[0] or self.waited > WAITED[0] or self.spread > SPREAD

    @property
    def contended(self) -> bool:
        """Not to be trusted."""
        return self.drift > DRIFT[1] or self.waited > WAITED[1]

    @property
    def badness(self) -> float:
        """For comparing attempts."""
        return max(self.drift / DRIFT[1], self.waited / WAITED[1], self.spread / (2 * SPREAD))


def waited_seconds() -> float:
    """Seconds that this process's threads waited for a CPU so far, and that the hypervisor took; 0 where unknown."""
    total = 0.0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, IndexError, ValueError):  # the thread has just ended
            total += int(path.read_text().split()[1]) * 1e-9
    with suppress(OSError, IndexError, ValueError):
        stolen = Path("/proc/stat").read_text().split("\n", 1)[0].split()[8]
        total += int(stolen) / os.sysconf("SC_CLK_TCK")
    return total


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done what was launched; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reference_kernels(device: torch.device) -> Callable[[], Reading]:
    """Reads the reference once: median seconds of a few calls of each kernel."""
    # CPU: 34 MFLOP; 1 MiB, half of an L2. GPU: a few tenths of a millisecond each, much longer than a launch
    gemm, copy = (2048, 8192) if device.type == "cuda" else (256, 512)
    a, b = (torch.ones(n, n, device=device) for n in (gemm, copy))
    kernels: list[Callable[[], object]] = [lambda: torch.mm(a, a), lambda: b.t().contiguous()]
    if device.type == "cpu":
        whole = torch.ones(copy, copy)
        half = whole[copy // 2 :]
        kernels.append(lambda: (whole.add_(1), half.sub_(1)))

    def seconds(kernel: Callable[[], object]) -> float:
        synchronize(device)
        start = time.perf_counter()
        kernel()
        synchronize(device)
        return time.perf_counter() - start

    return lambda: tuple(sorted(seconds(kernel) for _ in range(CALLS))[CALLS // 2] for kernel in kernels)


@dataclass
class Watch:
    """One per profile. Everything it looks at can be replaced, so that a busy machine can be played.

    baseline: the reference on the quiet machine; none: read now. It is lowered whenever the reference is read faster.
    patience: seconds that repetitions and pauses may take together.
    """

    reference: Callable[[], Reading]
    baseline: Reading = ()
    patience: float = 10.0
    clock: Callable[[], float] = time.perf_counter
    waited: Callable[[], float] = waited_seconds
    sleep: Callable[[float], None] = time.sleep
    reading: Reading = ()  # of the attempt that `settle` kept
    _readings: list[Reading] = field(default_factory=list)
    _start: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def on(cls, device: torch.device, baseline: Reading = (), patience: float = 10.0) -> Watch:
        """The watch of this machine. A GPU's graphs do not wait for the host's threads."""
        waited = waited_seconds if device.type == "cpu" else lambda: 0.0
        return cls(reference_kernels(device), baseline, patience, waited=waited)

    def __post_init__(self) -> None:
        self.reference()  # warm
        now = _typical([self.reference() for _ in range(9)])
        self.baseline = tuple(map(min, now, self.baseline)) if self.baseline else now

    def begin(self) -> None:
        """Before the samples."""
        self._readings.clear()
        self.tick()
        self._start = (self.clock(), self.waited())

    def tick(self) -> None:
        """Between samples."""
        self._readings.append(self.reference())

    def end(self, spread: float = 0.0) -> Signs:
        """After the samples, which differ by `spread`."""
        seconds, waited = self.clock() - self._start[0], self.waited() - self._start[1]
        self.tick()
        middle = _typical(self._readings)
        # what was read at first may not have been the quiet machine
        self.baseline = tuple(
            m if m * (1 + DRIFT[0] * scale) < b else b
            for m, b, scale in zip(middle, self.baseline, SCALE, strict=False)
        )
        return Signs(self.drift(middle), max(0.0, waited) / max(seconds, 1e-9), spread)

    def drift(self, reading: Reading) -> float:
        """How much slower the machine was than it can be, by the kernel that lost most."""
        return max((r / b - 1) / scale for r, b, scale in zip(reading, self.baseline, SCALE, strict=False))

    def settle(self, attempt: Callable[[], Measured]) -> Measured:
        """`attempt` on a machine as quiet as it gets: repeated while it shows signs of disturbance."""
        best: tuple[float, Signs, Measured] | None = None
        pause = 0.05
        for number in range(1_000):
            started = self.clock()
            self.begin()
            found = attempt()
            signs = self.end(found.median / found.p10 - 1)
            if best is None or signs.badness < best[0]:
                best = (signs.badness, signs, found)
                self.reading = _typical(self._readings)
            if not signs.disturbed or (number >= 2 and not best[1].contended):
                break  # a little disturbed three times: this is how it is here
            if number:  # the first attempt would have been made anyway
                self.patience -= self.clock() - started
            if self.patience <= 0:
                break
            if signs.contended:
                self.sleep(min(pause, self.patience))
                self.patience -= pause
                pause = min(2 * pause, 1.0)
        assert best is not None
        return best[2]._replace(contended=best[1].contended)


def _typical(readings: list[Reading]) -> Reading:
    """The median of every kernel."""
    return tuple(sorted(times)[len(times) // 2] for times in zip(*readings, strict=True))
