"""How long something takes on a machine that others use, too. Every sample is judged, not the measurement as a whole.

waiting  A sample is dropped if threads of this process were ready but did not run while it was taken (run delay in
         Linux's schedstat), or a hypervisor stole time. What remains is what a quiet machine shows: with another
         process spinning on one of 2 cores, a GEMM of 0.26 ms lost 18 % of its samples; the 10 % quantile of the others
         was 1 % above that of a quiet machine, the median of all of them 32 %. Samples longer than a time slice (3 ms)
         are all lost then. With both cores taken, those that are left are 10 to 60 % slow: nothing is measured then.
drift    Virtual machines have states that nothing inside them reports; seen on one of 2 cores, each for seconds to
         minutes: all that computes 20 to 70 % slower; only loads slower (a busy sibling of the core: GEMM 5 %, copy by
         columns 60 % slower); its cores moved to different last-level caches (reads of memory 40 % faster, GEMM 5 %,
         whole models 20 to 70 % slower). Hence three reference kernels, timed before, between and after the samples: a
         GEMM for the clock, a copy by columns for loads and caches, and alternating additions to a whole vector and to
         its second half, a quarter of which so crosses between the cores every time. The last two vary more by
         themselves; `SCALE` brings their drift to that of the GEMM. `Watch.baseline` is the state that counts.

Where too few samples are left, the measurement is repeated with pauses; if that fails for too long, there is no result
but an error (`Busy`) or, for whoever cannot stop, a mark. Drift is marked; whoever measures comes back to it later.
"""

from __future__ import annotations

import bisect
import functools
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from jointnas_kernels.errors import JointNASError

log = logging.getLogger(__name__)

DRIFT = 0.08  # from the baseline, above which a result is marked
SCALE = (1.0, 4.0, 4.0)  # of the reference kernels' drifts: GEMM, copy by columns, crossing
CALLS = 5  # of each kernel in one reading, of which the shortest counts
LATELY = 1.0  # seconds whose readings make up a state of the machine: single ones vary by 15 %
STATE = 0.25  # the quantile of readings that is the state, and of states that is the baseline: the best one that lasts
WAITED = (0.05, 2e-6)  # of a sample that still counts: share, and seconds
LOOK = 0.05  # share of the threads' time that waiting takes before it is looked who else runs
FREE = 0.25  # cores that must be left by others, per thread
TICK = 0.02  # seconds between two readings of the reference kernels
SAMPLES = 2000  # at most, of one measurement
ATTEMPTS = 4  # at what was starved
ENDURANCE = 20.0  # seconds that may be lost to other processes
EARNED = 0.3  # more of them, by one second of undisturbed measuring
Reading = tuple[float, ...]  # seconds of every reference kernel


class Busy(JointNASError):
    """The machine has been taken by something else for so long that nothing can be measured."""


@functools.cache
def warn_once(text: str) -> None:
    """A warning that a process repeats only in other words: several tables of a run share their doubts."""
    log.warning(text)


class Measured(NamedTuple):
    """Milliseconds per call of one operation or model, of undisturbed samples."""

    p10: float
    median: float
    p90: float
    samples: int
    contended: bool = False

    @property
    def value(self) -> float:
        """What counts. Others make a machine slower, never faster: the low quantile."""
        return self.p10


def summary(times: list[float]) -> Measured:
    """Of samples in milliseconds."""
    ordered = sorted(times)
    p10, median, p90 = (max(ordered[min(len(ordered) - 1, int(q * len(ordered)))], 1e-9) for q in (0.1, 0.5, 0.9))
    return Measured(p10, median, p90, len(ordered))


# ---- what this machine says ------------------------------------------------------------------------------------------


class Waiting:
    """Seconds that this process's threads waited for a CPU so far, and that the hypervisor took; 0 where unknown.

    Files stay open, which makes a call about 8 us; `renew` looks for new threads."""

    def __init__(self) -> None:
        self._threads: dict[str, int] = {}
        self._stat = -1
        with suppress(OSError):
            self._stat = os.open("/proc/stat", os.O_RDONLY)
        self.renew()

    def renew(self) -> None:
        """Opens the files of threads that have started since."""
        with suppress(OSError):
            for thread in set(os.listdir("/proc/self/task")).difference(self._threads):
                with suppress(OSError):
                    self._threads[thread] = os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY)

    def __call__(self) -> float:
        """The sum."""
        total = 0
        for thread, file in list(self._threads.items()):
            try:
                total += int(os.pread(file, 96, 0).split()[1])
            except (OSError, IndexError, ValueError):  # it has ended
                os.close(self._threads.pop(thread))
        stolen = 0
        with suppress(OSError, IndexError, ValueError):
            stolen = int(os.pread(self._stat, 256, 0).split(b"\n", 1)[0].split()[8])
        return total * 1e-9 + stolen / os.sysconf("SC_CLK_TCK")

    def __del__(self) -> None:
        for file in (*self._threads.values(), self._stat):
            with suppress(OSError):
                os.close(file)


def taken(seconds: float = 0.1) -> float:
    """Cores that others use while this process sleeps for so long; 0 where that is unknown."""
    before, began = _idle(), time.perf_counter()
    time.sleep(seconds)
    after, passed = _idle(), time.perf_counter() - began
    if before is None or after is None:
        return 0.0
    cores = os.cpu_count() or 1
    return min(max(cores - (after - before) / passed, 0.0), float(cores))


def _idle() -> float | None:
    """Seconds that all cores were idle so far."""
    with suppress(OSError, IndexError, ValueError):
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")
    return None


def culprit(seconds: float = 0.3) -> str:
    """Who else runs most, in words; empty if nobody is seen."""
    before = _used()
    time.sleep(seconds)
    after = _used()
    found = {pid: used - before[pid][1] for pid, (_, used) in after.items() if pid in before}
    pid = max(found, key=lambda p: found[p], default=0)
    share = found.get(pid, 0.0) / seconds
    return f"`{after[pid][0]}` (process {pid}, {share:.0%} of a core)" if share > 0.1 else ""


def _used() -> dict[int, tuple[str, float]]:
    """Name and seconds on a CPU of every other process."""
    found: dict[int, tuple[str, float]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError, ValueError):
            pid, _, rest = path.read_text().partition(" (")
            name, _, rest = rest.rpartition(") ")
            fields = rest.split()
            found[int(pid)] = (name, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
    found.pop(os.getpid(), None)
    return found


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done what was launched; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reference_kernels(device: torch.device) -> list[Callable[[], object]]:
    """The kernels whose times say in which state the machine is."""
    # CPU: 34 MFLOP; 1 MiB, half of an L2. GPU: a few tenths of a millisecond each, much longer than a launch
    gemm, copy = (2048, 8192) if device.type == "cuda" else (256, 512)
    a, b = (torch.ones(n, n, device=device) for n in (gemm, copy))
    kernels: list[Callable[[], object]] = [lambda: torch.mm(a, a), lambda: b.t().contiguous()]
    if device.type == "cpu":
        whole = torch.ones(copy, copy)
        half = whole[copy // 2 :]
        kernels.append(lambda: (whole.add_(1), half.sub_(1)))

    def complete(kernel: Callable[[], object]) -> None:
        synchronize(device)
        kernel()
        synchronize(device)

    return [functools.partial(complete, kernel) for kernel in kernels]


# ---- measuring -------------------------------------------------------------------------------------------------------


class Attempt(NamedTuple):
    """One series of samples."""

    measured: Measured
    state: Reading  # of the machine
    starved: bool  # too few samples are left


@dataclass
class Watch:
    """One per profile, or per series of whole models. Everything it looks at can be replaced, so that a busy machine
    can be played.

    kernels: the reference.
    baseline: its seconds in the state that counts; none: what is read here decides (`STATE`).
    strict: raises `Busy` when `endurance` is gone and too few samples are left; otherwise such results are `contended`.
    endurance: seconds that may be lost to other processes.
    threads: that are measured with.
    clock, waited, sleep, taken: of this machine.
    """

    kernels: list[Callable[[], object]]
    baseline: Reading = ()
    strict: bool = False
    endurance: float = ENDURANCE
    threads: int = 1
    clock: Callable[[], float] = time.perf_counter
    waited: Callable[[], float] = field(default_factory=Waiting)
    sleep: Callable[[float], None] = time.sleep
    taken: Callable[[], float] = taken
    reading: Reading = ()  # the state of the machine in the latest measurement
    starved: bool = False  # set where a result is of too few samples; never reset here
    since: float = 0.0  # when it began to be disturbed without a break, by `time.time`
    _recent: deque[tuple[float, Reading]] = field(default_factory=deque)  # readings, when they were taken
    _known: list[list[float]] = field(default_factory=list)  # ascending seconds by kernel, of all states

    @classmethod
    def on(cls, device: torch.device, baseline: Reading = (), strict: bool = False) -> Watch:
        """The watch of this machine. A GPU's graphs do not wait for the host's threads."""
        kernels = reference_kernels(device)
        if device.type == "cpu":
            return cls(kernels, baseline, strict, threads=torch.get_num_threads())
        return cls(kernels, baseline, strict, waited=lambda: 0.0, taken=lambda: 0.0)

    def __post_init__(self) -> None:
        self._fixed, self._looked, self._free = bool(self.baseline), -math.inf, math.inf
        for kernel in self.kernels:
            kernel()
        self._known = [[] for _ in self.kernels]
        for _ in range(9):
            self.read()
        self._learn(self.state())

    def read(self) -> None:
        """Times the reference kernels."""

        def shortest(kernel: Callable[[], object]) -> float:
            calls = [self._timed(kernel) for _ in range(CALLS)]
            return min((seconds for seconds, _, fine in calls if fine), default=math.inf)  # all waited

        self._recent.append((self.clock(), tuple(shortest(kernel) for kernel in self.kernels)))
        while self._recent[0][0] < self.clock() - LATELY and len(self._recent) > 1:
            self._recent.popleft()

    def state(self) -> Reading:
        """Seconds of every kernel lately; infinite where most readings had to wait."""
        by_kernel = zip(*(reading for _, reading in self._recent), strict=True)
        return tuple(sorted(times)[int(STATE * len(times))] for times in by_kernel)

    def _timed(self, run: Callable[[], object]) -> tuple[float, float, bool]:
        """(seconds, waited, whether it counts)."""
        before, began = self.waited(), self.clock()
        run()
        seconds = self.clock() - began
        waited = self.waited() - before
        return seconds, waited, waited <= max(WAITED[0] * seconds, WAITED[1])

    def _learn(self, state: Reading) -> None:
        for known, seconds in zip(self._known, state, strict=True):
            if seconds < math.inf or not known:
                bisect.insort(known, seconds)
        if not self._fixed:
            self.baseline = tuple(known[int(STATE * len(known))] for known in self._known)

    def drift(self, state: Reading) -> float:
        """How far it is from the baseline, by the kernel that shows most; infinite if one could not be read."""
        pairs = zip(state, self.baseline, SCALE, strict=False)
        return max((abs(s / b - 1) / scale if s < math.inf else s for s, b, scale in pairs), default=0.0)

    def collect(self, sample: Callable[[], float], seconds: float, least: int) -> Measured:
        """Milliseconds per call, of samples that did not wait: for `seconds`, and at least `least` of them.

        Raises:
            Busy: `strict`, endurance is gone, and too few did not.
        """
        pause = 0.05
        for _ in range(ATTEMPTS):
            began = self.clock()
            attempt = self._attempt(sample, seconds, least)
            if not attempt.starved:
                self.endurance += EARNED * seconds
                self.since = 0.0
                break
            self.since = self.since or time.time() - (self.clock() - began)
            self.sleep(pause)
            pause *= 2
            self._recent.clear()  # of before the pause
            self.endurance -= self.clock() - began
            if self.endurance <= 0:
                if self.strict:
                    raise self.busy()
                break
        self.starved |= attempt.starved
        self.reading = attempt.state
        return attempt.measured._replace(contended=attempt.starved or self.drift(attempt.state) > DRIFT)

    def _attempt(self, sample: Callable[[], float], seconds: float, least: int) -> Attempt:
        if isinstance(self.waited, Waiting):
            self.waited.renew()
        kept, dropped, lost, result = list[float](), list[float](), 0.0, 0.0

        def run() -> None:
            nonlocal result
            result = sample()

        self.read()
        ticked = began = self.clock()
        while len(kept) < least or (self.clock() < began + seconds and len(kept) < SAMPLES):
            _, waited, fine = self._timed(run)
            (kept if fine else dropped).append(result)
            lost += waited
            if len(dropped) > 3 * max(least, len(kept)) and self.clock() > began + 2 * seconds:
                break
            if self.clock() - ticked > TICK:
                self.read()
                ticked = self.clock()
        share = lost / max(self.clock() - began, 1e-9) / self.threads
        self.read()
        state = self.state()
        self._learn(state)
        starved = len(kept) < least or (share > LOOK and self._all_taken())
        measured = summary(kept if len(kept) >= least else kept + dropped)
        return Attempt(measured, state, starved)

    def _all_taken(self) -> bool:
        """Whether others leave no core to most threads; looked at every two seconds."""
        if self.clock() - self._looked > 2:
            self._free = (os.cpu_count() or 1) - self.taken()
            self._looked = self.clock()
        return self._free < FREE * self.threads

    def busy(self) -> Busy:
        """What to say when nothing can be measured."""
        since, who = time.strftime("%H:%M:%S", time.localtime(self.since or time.time())), culprit()
        return Busy(
            f"nothing can be measured: since {since} something else has had the processors that this needs"
            f"{', most of all ' + who if who else ''}. Stop it, or wait for its end, and give the same command again "
            "(`jointnas profile`: with --resume true); what was measured is kept"
        )
