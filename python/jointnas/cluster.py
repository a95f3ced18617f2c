"""What a step needs on many GPUs, from what it needs on one: each has its own batch, weights are shared.

Of data-parallel steps on ``n`` GPUs, ``node`` of them in a machine:

    replicate   all of it on every GPU; gradients are summed over all
    full        weights, adapters, gradients and optimizer in n parts; a block's weights are gathered before it runs,
                forward and backward, and its gradients are summed into parts
    hybrid      as full within a machine, in `node` parts; the parts' gradients are summed over machines

While a block runs, it and the next one are whole, and with them whatever is no block (embedding, head, norms). Rings
move (n-1)/n of a tensor per GPU to gather it or to sum it into parts, twice that to sum it everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jointnas.footprint import ADAPTERS, COPIES, GRADIENTS, OPTIMIZER, WEIGHTS, Phase
from jointnas_kernels.errors import JointNASError, unknown

MODES = ("replicate", "full", "hybrid")
GATHERED = (WEIGHTS, ADAPTERS, COPIES)
SHARED = (*GATHERED, GRADIENTS, OPTIMIZER)
NODE = 8  # GPUs of a machine
# bytes per second that a GPU sends, by data sheets: NVLink of H100 and H200 (half of the 900 GB/s of both directions),
# and one 400 Gbit/s adapter for every GPU
INSIDE, BETWEEN = 450e9, 50e9


@dataclass(frozen=True)
class Sharding:
    """GPUs, and how they share a model.

    Attributes:
        gpus: how many.
        mode: of MODES.
        node: GPUs of one machine.

    Raises:
        JointNASError: another mode, no GPU, or GPUs that are no whole machines.
    """

    gpus: int = 1
    mode: str = "full"
    node: int = NODE

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown("sharding", self.mode, MODES)
        if self.gpus < 1 or (self.gpus > self.node and self.gpus % self.node):
            raise JointNASError(
                f"{self.gpus} GPUs: allowed are 1 to {self.node}, or whole machines of {self.node}; nearest: "
                f"{max(1, round(self.gpus / self.node) * self.node)}"
            )

    @property
    def machines(self) -> int:
        """How many."""
        return -(-self.gpus // self.node)

    @property
    def parts(self) -> int:
        """Into which the weights are cut."""
        return {"replicate": 1, "full": self.gpus, "hybrid": min(self.gpus, self.node)}[self.mode]


@dataclass(frozen=True)
class Share:
    """One GPU's part of a step.

    Attributes:
        kinds: bytes in memory, by kind.
        flops: its operations.
        inside, between: bytes that it sends, to GPUs of its machine and to other machines.
    """

    kinds: Mapping[str, float]
    flops: float
    inside: float
    between: float

    @property
    def total(self) -> float:
        """Bytes in memory."""
        return sum(self.kinds.values())

    @property
    def seconds(self) -> float:
        """At least, of what it sends: both at once."""
        return max(self.inside / INSIDE, self.between / BETWEEN)


def gathering(size: float, count: int) -> float:
    """Bytes that each of `count` sends so that all have, or so that each has its part of the sum of, `size` bytes."""
    return size * (count - 1) / count


def summing(size: float, count: int) -> float:
    """Bytes that each of `count` sends so that all have the sum of `size` bytes: a part of it, then all parts."""
    return 2 * gathering(size, count)


def share(phase: Phase, sharding: Sharding) -> Share:
    """A GPU's part of a step.

    Args:
        phase: the step on one device, with one GPU's batch.
        sharding: how it is shared.
    """
    parts, kinds = sharding.parts, dict(phase.kinds)
    for kind in SHARED if parts > 1 else ():
        whole, block = kinds.get(kind, 0.0), phase.block.get(kind, 0.0)
        kept = 0.0 if kind == OPTIMIZER else _apart(phase, kind) + (2 if kind in GATHERED else 1) * block
        kinds[kind] = min(whole, whole / parts + kept * (parts - 1) / parts)
    weights, gradients = sum(phase.kinds.get(k, 0.0) for k in GATHERED), phase.gradients
    traffic = {True: 0.0, False: 0.0}  # within machines or not
    alone = sharding.machines == 1
    if parts > 1:  # weights twice, gradients once
        ring = 2 * gathering(weights, parts) + gathering(gradients, parts)
        traffic[alone or sharding.mode == "hybrid"] += ring
    if sharding.mode == "replicate":
        traffic[alone] += summing(gradients, sharding.gpus)
    if sharding.mode == "hybrid":
        traffic[False] += summing(gradients / parts, sharding.machines)
    return Share(kinds, phase.flops, traffic[True], traffic[False])


def _apart(phase: Phase, kind: str) -> float:
    """Bytes of what belongs to no block."""
    return max(0.0, phase.kinds.get(kind, 0.0) - phase.blocks * phase.block.get(kind, 0.0))
