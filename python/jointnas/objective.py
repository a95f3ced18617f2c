"""What the architecture step minimises, and the choice that finally has to satisfy the constraints.

    L = CE + η E[latency] / latency_original + λ(t) (over + under + late) + μ P(infeasible) + κ(t) Σ entropies
    over = E relu(params / B_max - 1)   under = E relu(1 - params / B_min)   late = E relu(latency / target - 1)

All expectations are exact, over all structures under the current probabilities (and, inside the relu, over the bits),
conditional on what is feasible: structures that the space does not exclude, bits that the device can run.
The paper's Eq. 2 has the relu outside, relu(E[params] - B_max) (`penalty: expectation`). That one is 0 for a mixture of
too large and too small models, so the depth of the embedded model stayed undecided between 3 and 6 blocks at its budget
(seen: entropy 0.9 after 240 steps) and no probable choice obeyed the limit; inside, each choice pays for itself.
λ(t) grows linearly from 0 to its final value, so that the first steps are led by quality, not by size. κ(t) is 0 for
the first half of the steps and grows linearly over the second: what the losses hardly tell apart, as most bits of
single blocks, drifts with their noise and would still be undecided at the end.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jointnas.config import RunConfig
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency.bound import Bound
from jointnas_kernels.space import (
    WIDTHS,
    Choice,
    SearchSpace,
    count_params,
    joint,
    keep_probability,
    kept_blocks,
    structure_params,
)

Probs = Mapping[str, Tensor]


class Infeasible(JointNASError):
    """No choice satisfies the limits."""


@dataclass(frozen=True)
class Limits:
    """Hard limits of the final choice; infinite or zero where there is none."""

    params_min: float = 0.0
    params_max: float = math.inf
    latency_max: float = math.inf

    @staticmethod
    def of(config: RunConfig, model_config: Any) -> Limits:
        """Those of a configuration."""
        full, budget = original_params(model_config), config.search
        low = 0.0 if budget.budget_min is None else absolute(budget.budget_min, full)
        high = math.inf if budget.budget_max is None else absolute(budget.budget_max, full)
        if low > high:
            raise JointNASError(f"the budget is empty: budget_min {low:,.0f} exceeds budget_max {high:,.0f}")
        return Limits(low, high, config.target_latency_ms or math.inf)


def absolute(budget: float, original: float) -> float:
    """Parameters of a budget: below 2 it is a share of the original model's."""
    return budget * original if budget < 2 else budget


def original_params(model_config: Any) -> int:
    """Parameters of the original model."""
    return count_params(model_config, SearchSpace.single(model_config).full())


class Objective:
    """L - CE of one run (module docstring), over the structures of its space."""

    def __init__(self, config: RunConfig, model_config: Any, bound: Bound) -> None:
        self.config, self.model_config, self.bound = config.search, model_config, bound
        self.limits = Limits.of(config, model_config)
        self.latency_original = bound.original()
        self.params = structure_params(model_config, bound.space)  # [*WIDTHS, blocks]

    def violation(self, params: Tensor, latency: Tensor) -> Tensor:
        """Relative violations of the limits, added up."""
        limits = self.limits
        total = torch.zeros_like(latency)
        if limits.params_max < math.inf:
            total = total + (params / limits.params_max - 1).relu()
        if limits.params_min > 0:
            total = total + (1 - params / limits.params_min).relu()
        if limits.latency_max < math.inf:
            total = total + (latency / limits.latency_max - 1).relu()
        return total

    def penalty_weight(self, step: int) -> float:
        """λ(t)."""
        ramp = self.config.lambda_ramp * self.config.steps
        return self.config.lambda_budget * (min(1.0, step / ramp) if ramp else 1.0)

    def entropy_weight(self, step: int) -> float:
        """κ(t)."""
        return self.config.entropy_weight * max(0.0, 2 * step / self.config.steps - 1)

    def regularizer(self, probs: Probs, step: int) -> tuple[Tensor, dict[str, float]]:
        """Everything but the CE, on the host, and its parts for the log."""
        p, feasible = joint(self.bound.space, probs)
        latencies, infeasibles = self.bound.structures(probs)
        latency, infeasible = (p * latencies).sum(), 1 - feasible * (1 - (p * infeasibles).sum())
        counts = self.params.to(p.device)
        params = (p * counts).sum()
        if self.config.penalty == "choices":
            penalty = (p * self.violation(counts, latencies)).sum()
        else:
            penalty = self.violation(params, latency)
        weight = self.penalty_weight(step)
        total = self.config.eta * latency / self.latency_original + weight * penalty
        total = total + self.config.mu_infeasible * infeasible
        decide = self.entropy_weight(step)
        if decide:
            total = total + decide * sum(normalised_entropies(probs, self.bound.space, self.bound.rank).values())
        return total, {
            "latency_ms": latency.item(), "latency_share": latency.item() / self.latency_original,
            "params": params.item(), "penalty": penalty.item(), "lambda": weight, "infeasible": infeasible.item(),
        }  # fmt: skip


def entropies(probs: Probs, space: SearchSpace, block_rank: Sequence[int]) -> dict[str, float]:
    """Normalised entropy (0 decided, 1 uniform) per dimension. Bits count in blocks that are probably kept: those of
    removed blocks get no gradient, so they would never be decided."""
    return {key: value.item() for key, value in normalised_entropies(probs, space, block_rank).items()}


def normalised_entropies(probs: Probs, space: SearchSpace, block_rank: Sequence[int]) -> dict[str, Tensor]:
    """As `entropies`, differentiable."""
    keep = keep_probability(space, probs["blocks"].detach(), block_rank)
    found: dict[str, Tensor] = {}
    for key, given in probs.items():
        p = given.double()
        choices = p.shape[-1]
        if choices == 1:
            continue
        entropy = -(p * p.clamp_min(1e-30).log()).sum(-1) / math.log(choices)
        if p.dim() == 1:
            found[key] = entropy
        else:
            found.update({f"{key}.{b}": entropy[b] for b in range(len(p)) if keep[b] > 0.5})
    return found


def stopping_entropy(found: Mapping[str, float], on: str) -> float:
    """What `search.entropy_stop` is compared with, of `entropies`: the largest ("max"), or their mean."""
    values = list(found.values()) or [0.0]
    return max(values) if on == "max" else statistics.fmean(values)


# ---- the final choice -----------------------------------------------------------------------------------------------


class Feasibility:
    """Exact check of a choice against the limits, and all structures of the space with their sizes."""

    def __init__(self, model_config: Any, bound: Bound, limits: Limits) -> None:
        self.model_config, self.bound, self.limits, self.space = model_config, bound, limits, bound.space
        self.structures = bound.space.structures()

    def violations(self, choice: Choice) -> list[str]:
        """What the choice breaks, in words; empty if nothing."""
        found = []
        params = count_params(self.model_config, choice)
        if params > self.limits.params_max:
            found.append(f"{params:,} parameters exceed {self.limits.params_max:,.0f}")
        if params < self.limits.params_min:
            found.append(f"{params:,} parameters are below {self.limits.params_min:,.0f}")
        try:
            latency = self.bound.predict(choice)
        except JointNASError as error:
            return [*found, str(error)]
        if latency > self.limits.latency_max:
            found.append(f"{latency:.3f} ms exceed {self.limits.latency_max:.3f} ms")
        return found

    def repair(self, probs: Probs) -> Choice:
        """The most probable choice that satisfies every limit.

        Structures (widths and depth), each with every precision of the head, are tried from the most probable on, until
        none that is left can be it. Each takes the most probable bits that fit into its latency (`knapsack`).

        Raises:
            Infeasible: there is none.
        """
        p = {k: v.detach().double().clamp_min(1e-12).log() for k, v in probs.items()}
        total = p["hidden"]
        heads = self.space.head_bits or (None,)
        head = p.get("head_bits", torch.zeros(1, dtype=torch.float64))
        for score_of in (*(p[key] for key in (*WIDTHS[1:], "blocks")), head):
            total = total[..., None] + score_of
        none = torch.zeros(self.space.depth, 1, dtype=torch.float64)
        bits = p.get("weight_bits", none)[:, :, None] + p.get("act_bits", none)[:, None, :]  # [blocks, W, A]
        most = bits.flatten(1).amax(1).sum().item()  # of any bits
        best: tuple[float, Choice] | None = None
        values, order = total[self.space.allowed].flatten().sort(descending=True)  # as `structures`
        for score, index in zip(values.tolist(), order.tolist(), strict=True):
            if best is not None and score + most <= best[0]:
                break
            structure = replace(self.structures[index // len(heads)], head_bits=heads[index % len(heads)])
            params = count_params(self.model_config, structure)
            if not self.limits.params_min <= params <= self.limits.params_max:
                continue
            found = self._fit_bits(structure, bits)
            if found is not None and (best is None or score + found[0] > best[0]):
                best = (score + found[0], found[1])
        if best is None:
            raise Infeasible(self._nothing())
        return best[1]

    def _nothing(self) -> str:
        sizes = {structure: count_params(self.model_config, structure) for structure in self.structures}
        smallest = min(sizes, key=sizes.__getitem__)
        text = (
            f"no choice of the space satisfies the limits (parameters {self.limits.params_min:,.0f} to "
            f"{self.limits.params_max:,.0f}, latency up to {self.limits.latency_max:g} ms); the space spans "
            f"{sizes[smallest]:,} to {max(sizes.values()):,} parameters"
        )
        heads = [self.bound.structure(replace(smallest, head_bits=b)) for b in self.space.head_bits or (None,)]
        fixed = min((fixed for fixed, _ in heads if fixed == fixed), default=math.inf)
        linear = heads[0][1]
        finite = linear[linear.isfinite()]
        if not len(finite) or fixed == math.inf:
            return text
        fastest = fixed + smallest.blocks * finite.min().item()
        return f"{text} and its fastest choice takes {fastest:.3f} ms"

    def _fit_bits(self, structure: Choice, bits: Tensor) -> tuple[float, Choice] | None:
        """(log-probability, choice) with the structure's best feasible bits, None if none is fast enough."""
        fixed, linear = self.bound.structure(structure)
        feasible = linear.isfinite().flatten()
        if not feasible.any() or math.isnan(fixed):
            return None
        scores = bits.flatten(1).masked_fill(~feasible, -math.inf)  # [blocks, W·A]
        cost = linear.flatten()
        current = scores.argmax(1)
        kept = list(kept_blocks(self.bound.rank, structure.blocks))
        room = self.limits.latency_max - fixed
        if cost[current[kept]].sum().item() > room:
            fitted = knapsack(scores[kept], cost, room)
            if fitted is None:
                return None
            current[kept] = fitted
        total = scores.gather(1, current[:, None]).sum().item()
        indices = [divmod(i, linear.shape[1]) for i in current.tolist()]  # of weight and activation bits
        weight = tuple(self.space.weight_bits[w] for w, _ in indices) if self.space.weight_bits else None
        act = tuple(self.space.act_bits[a] for _, a in indices) if self.space.act_bits else None
        return total, replace(structure, weight_bits=weight, act_bits=act)


def knapsack(scores: Tensor, cost: Tensor, room: float, units: int = 4000) -> Tensor | None:
    """One option per row with the largest Σ scores and Σ cost <= room; None if even the cheapest options are too much.

    scores [rows, options], -inf where not allowed; cost [options]. Dynamic programme over the room in `units`; costs
    are rounded up to them, so at most rows / units of the room stays unused."""
    if room <= 0:
        return None
    weights = (cost / (room / units)).nan_to_num(math.inf).ceil()
    best = torch.zeros(units + 1, dtype=torch.float64)  # best[u]: score of the rows so far within u units
    taken = []
    for row in scores:
        options = torch.full((len(cost), units + 1), -math.inf, dtype=torch.float64)
        for o, weight in enumerate(weights.tolist()):
            if weight <= units and row[o] > -math.inf:
                options[o, int(weight) :] = best[: units + 1 - int(weight)] + row[o]
        best, choice = options.max(0)
        taken.append(choice)
    if best[units] == -math.inf:
        return None
    left, found = units, []
    for choice in reversed(taken):
        option = int(choice[left])
        found.append(option)
        left -= int(weights[option])
    return torch.tensor(found[::-1])
