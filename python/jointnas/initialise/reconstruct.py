"""Block reconstruction (BRECQ, arXiv 2102.05426; Block-AP of EfficientQAT, arXiv 2407.11062): learn what is rounded,
and the clip ratios, so that the quantized block returns what the original block returned.

    min  E_tokens log(1 + |block(x'; Q(W + D; clip)) - y|^2 / |y|^2)

x' are the inputs behind quantized blocks, y the outputs of the original model on its own inputs, so that a block also
makes up for the blocks before it. Gradients pass the rounding straight through (the `clip` rule). D is the weight's own
change in a plain model, and s B A, the LoRA pair of the precision, in a supernet, whose weights are frozen.
`blocks.relative_error` says why the error is not a plain mean.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from jointnas.config import InitOptions
from jointnas.initialise.blocks import relative_error
from jointnas.initialise.descent import descend
from jointnas.initialise.problem import Clips, Parameters, Problem
from jointnas_kernels.nn.linear import SupernetLinear
from jointnas_kernels.ops.quant.mixture.op import quant_lora_mix

log = logging.getLogger(__name__)
EPOCHS = 1  # of the option's none: what is learned twice misleads the blocks behind (benchmarks/LOG.md)
SOME = 32  # windows are enough to know the inputs' energies
LARGEST = 0.999  # ratio at most: at 1 a sigmoid has no gradient


@dataclass(frozen=True)
class Pair:
    """LoRA of one linear and precision: A [r, I], B [O, r], s."""

    a: Tensor
    b: Tensor
    scaling: float

    @classmethod
    def of(cls, linear: SupernetLinear, bits: int) -> Pair:
        """A supernet linear's pair of a precision, copied."""
        a, b = linear.pair(linear.index_of(bits))
        return cls(a.detach().clone(), b.detach().clone(), linear.scaling)

    def groups(self, step: float, rate: float) -> list[dict[str, Any]]:
        """Parameter groups of Adam that move s B A by about `rate` steps of the quantizer, and A by that of itself."""
        size = float(self.a.square().mean().sqrt())  # of one element of A
        each = self.scaling * size * math.sqrt(len(self.a))  # of an element of s B A, for each 1 in B
        return [{"params": [self.a], "lr": rate * size}, {"params": [self.b], "lr": rate * step / each}]

    def quantized(self, weight: Tensor, bits: int, group_size: int, clip: Tensor) -> Tensor:
        """Q(W + s B A) [O, I], differentiable in A, B and the ratios."""
        one = torch.ones(1, dtype=torch.float32, device=weight.device)
        return quant_lora_mix(
            weight, self.a[None], self.b[None], self.scaling, (bits,), one, group_size, clip=clip[None], ste="clip",
            mode="weight",
        )  # fmt: skip


@dataclass(frozen=True)
class Solution:
    """What methods that round to nearest find: a block's parameters before quantization, clip ratios, LoRA pairs."""

    parameters: Parameters
    clips: Clips
    pairs: Mapping[str, Pair] = field(default_factory=dict)

    def quantized(self, problem: Problem) -> Parameters:
        """The parameters that the block is run with."""
        if not self.pairs:
            return problem.quantized(self.parameters, self.clips)
        return {
            f"{path}.weight": pair.quantized(
                self.parameters[f"{path}.weight"], problem.bits, problem.groups[path], self.clips[path]
            )
            for path, pair in self.pairs.items()
        }


@dataclass(frozen=True)
class Reconstructed:
    """What was found, and relative errors: of rounding to nearest, where learning started, and at the end."""

    solution: Solution
    rtn: float
    start: float
    end: float


def reconstruct(
    problem: Problem, options: InitOptions, pairs: Mapping[str, Pair] | None = None, seed: int = 0
) -> Reconstructed:
    """Learns a block's weights (no `pairs`) or its LoRA pairs, by module path, and its clip ratios.

    An eighth of the windows is not learned from, and decides: on the start, absmax or the ratios of least error weighed
    by the inputs' energy, and on whether what was learned is better than it. The result is never worse than rounding to
    nearest there."""
    assert problem.x is not None
    assert problem.y is not None
    train, held = problem.on(slice(divided(len(problem.x)))), judged(problem)
    pairs = dict(pairs or {})
    weights = {k: v.clone() for k, v in problem.weights.items()}

    def quantized(clips: Mapping[str, Tensor]) -> Parameters:
        return Solution(weights, dict(clips), pairs).quantized(problem)

    energies = train.on(slice(SOME)).energies(problem.weights)
    starts = [problem.unclipped(), problem.searched(problem.weights, energies)]
    with torch.no_grad():
        errors = [held.error(quantized(clips), relative=True) for clips in starts]
    start, clips = min(zip(errors, starts, strict=True), key=lambda found: found[0])
    before = {k: v.clone() for k, v in weights.items()}, {k: _copy(v) for k, v in pairs.items()}
    logits = {path: ratio.clamp_max(LARGEST).logit() for path, ratio in clips.items()}
    groups: list[dict[str, Any]] = [{"params": list(logits.values()), "lr": options.lr_ratio}]
    for path, step in problem.steps(clips).items():
        if pairs:
            groups += pairs[path].groups(step, options.lr_weight)
        else:
            groups.append({"params": [weights[f"{path}.weight"]], "lr": options.lr_weight * step})
    x, y = train.x, train.y
    assert x is not None
    assert y is not None

    def loss(chosen: Tensor) -> Tensor:  # in units of the start: errors go down to 1e-7, where Adam's epsilon counts
        out = problem.blocks.run(problem.b, x[chosen], quantized(_ratios(logits)))
        return relative_error(out, y[chosen]).mean() / max(start, 1e-30)

    epochs, seeds = options.epochs or EPOCHS, (seed, problem.b, problem.bits)
    descend(loss, groups, len(x), problem.blocks.batch, epochs, x.device, *seeds)
    with torch.no_grad():
        ratios = _ratios(logits)
        end = held.error(quantized(ratios), relative=True)
    if end < start:
        return Reconstructed(Solution(_detached(weights), ratios, pairs), errors[0], start, end)
    log.warning("reconstruct: block %d at %d bits did not improve on its start (%.3g to %.3g), which is kept",
                problem.b, problem.bits, start, end)  # fmt: skip
    return Reconstructed(Solution(before[0], clips, before[1]), errors[0], start, start)


def judged(problem: Problem) -> Problem:
    """The problem on the windows that are not learned from."""
    assert problem.x is not None
    return problem.on(slice(divided(len(problem.x)) % len(problem.x), None))


def divided(count: int) -> int:
    """How many windows are learned from; the others, an eighth, decide. A single one does both."""
    return count if count == 1 else count - max(1, count // 8)


def _ratios(logits: Mapping[str, Tensor]) -> Clips:
    return {path: value.sigmoid() for path, value in logits.items()}


def _copy(pair: Pair) -> Pair:
    return Pair(pair.a.clone(), pair.b.clone(), pair.scaling)


def _detached(parameters: Parameters) -> Parameters:
    return {k: v.detach() for k, v in parameters.items()}
