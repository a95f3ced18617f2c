"""Is the search worth it? The found model against random architectures of the same size and latency, and, where a space
is small enough, against every choice in it; all after the same fine-tuning from the same weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jointnas.config import RunConfig
from jointnas.data import Streams, seeded
from jointnas.distillation import bake, distil, trainable
from jointnas.initialise import initialise
from jointnas.quality import perplexity
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import Importance, Supernet, convert
from jointnas_kernels.latency.table import Bound
from jointnas_kernels.space import Choice, SearchSpace, count_params, kept_blocks

RANDOM = 7  # lane of random numbers


@dataclass(frozen=True)
class Scored:
    """One fine-tuned choice. `ce` is the held-out cross-entropy in nats per token."""

    choice: Choice
    params: int
    predicted_ms: float
    ce: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.ce)

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "choice": self.choice.to_dict(), "perplexity": self.perplexity}


def fresh_supernet(
    model: torch.nn.Module, space: SearchSpace, importance: Importance | None, rank: int = 1
) -> Supernet:
    """A supernet on a copy of the original weights, LoRA at zero: the common starting point of a comparison."""
    supernet = convert(copy.deepcopy(model), space, lora_rank=rank, importance=importance)
    initialise(supernet, "clip", progress=False)
    return supernet


def score(
    supernet: Supernet, teacher: Callable[[Tensor], Tensor], choice: Choice, streams: Streams, config: RunConfig,
    bound: Bound, seed: int,
) -> Scored:  # fmt: skip
    """Cuts out the choice, fine-tunes it as configured, and measures its held-out cross-entropy."""
    student = trainable(supernet, choice)
    distil(
        student, teacher, streams.all, config.finetune, batch_size=config.data.batch_size,
        seq_len=config.data.seq_len, seed=seed, progress=False,
    )  # fmt: skip
    value = perplexity(bake(student), streams.held_out, max_tokens=config.eval.tokens)
    return Scored(choice, count_params(supernet.config, choice), bound.predict(choice), math.log(value))


def random_peers(
    found: Choice, bound: Bound, model_config: Any, count: int, seed: int = 0, width: float = 0.1, tries: int = 200_000
) -> list[Choice]:
    """Random choices that cost what `found` costs: latency and parameters each within ± `width` of it, all different.

    Choices are drawn uniformly from the space and kept if they fit. Bits of blocks that a choice removes do not make it
    another one.

    Raises:
        JointNASError: the space has fewer such choices than asked for.
    """
    generator = seeded(seed, RANDOM)
    params, latency = count_params(model_config, found), bound.predict(found)
    peers: dict[Choice, None] = {}
    own = canonical(found, bound)
    for _ in range(tries):
        choice = canonical(bound.space.sample(generator), bound)
        if choice == own or choice in peers:
            continue
        if abs(count_params(model_config, choice) / params - 1) > width:
            continue
        try:
            if abs(bound.predict(choice) / latency - 1) > width:
                continue
        except JointNASError:  # infeasible bits
            continue
        peers[choice] = None
        if len(peers) == count:
            return list(peers)
    raise JointNASError(
        f"only {len(peers)} of {count} random choices have the parameters and latency of the found model within "
        f"{width:.0%}; widen the band or the space"
    )


def canonical(choice: Choice, bound: Bound) -> Choice:
    """The same model with the highest precision written for removed blocks."""
    kept = set(kept_blocks(bound.rank, choice.blocks))

    def highest(bits: tuple[int, ...] | None, sizes: tuple[int, ...]) -> tuple[int, ...] | None:
        return None if bits is None else tuple(b if i in kept else sizes[-1] for i, b in enumerate(bits))

    return replace(
        choice,
        weight_bits=highest(choice.weight_bits, bound.space.sizes("weight_bits")),
        act_bits=highest(choice.act_bits, bound.space.sizes("act_bits")),
    )


def pareto(points: Iterable[tuple[float, float]]) -> list[int]:
    """Indices of the non-dominated points, both coordinates to be small, sorted by the first."""
    values = list(points)
    front: list[int] = []
    for i in sorted(range(len(values)), key=lambda i: values[i]):
        if not front or values[i][1] < values[front[-1]][1]:
            front.append(i)
    return front


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area dominated by the points below `reference`."""
    area, last = 0.0, reference[1]
    inside = [p for p in points if p[0] < reference[0] and p[1] < reference[1]]
    for i in pareto(inside):
        x, y = inside[i]
        area += (reference[0] - x) * (last - y)
        last = y
    return area
