"""A latency table over one space: what a choice costs, and what one costs in expectation.

The expectation is exact for independent dimensions. For a structure (widths v, number of blocks l) and per-block bits
(w, a) ~ (π_b, ρ_b),

    E(v, l) = fixed + once(v) + Σ_{b kept by l} (per_block + block(v) + Σ_{w,a} π_b(w) ρ_b(a) linears(v, w, a)),
    E = Σ_{v,l} p(v) p(l) E(v, l)

once(v) contains the head, in expectation over its bits where they are searched.

`structures` returns E(v, l) for all of them (15,360 for Llama-3.1-8B), so that limits can be put on each.

Where no backend can run a linear there is no value, and none is made up: choices that need it cannot be predicted, and
the mean over (w, a) is taken over the feasible ones only, i.e. it is conditional on feasibility; the probability that
the condition excludes is returned, for the objective to penalise. Structures that the space excludes are treated alike:
p(v) is conditional on the others, and no operation is needed for them alone.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency.schema import Row
from jointnas_kernels.latency.spec import DENSE, ModelDims, OpSpec, Part, Workload, bit_choices, parts
from jointnas_kernels.layout import WIDTHS
from jointnas_kernels.space import ATTENTION, Choice, SearchSpace, joint, keep_matrix, kept_blocks


class Expected(NamedTuple):
    """An expectation; fp64, a scalar or, of every structure, [*WIDTHS, blocks].

    Attributes:
        latency: over the feasible choices, in the table's unit; a scalar or [*WIDTHS, blocks].
        infeasible: probability of an excluded structure, or else, in the mean over the kept blocks, of infeasible
            bits; likewise.
    """

    latency: Tensor
    infeasible: Tensor


class Bound:
    """A table over one space: dense tensors per part, so that expectations are a few small contractions.

    Args:
        rows: the fastest of every operation, or why there is none.
        overhead: (fixed, per block), in the rows' unit.
        workload, dims: of the table.
        space: whose operations it must hold.
        block_rank: blocks of the model, most important first; None: in their order.

    Raises:
        JointNASError: operations of the space that the table lacks.
    """

    def __init__(
        self, rows: Mapping[OpSpec, Row], overhead: tuple[float, float], workload: Workload, dims: ModelDims,
        space: SearchSpace, block_rank: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.rows, self.space = rows, space
        self.fixed, self.per_block = overhead
        self.rank = tuple(block_rank) if block_rank is not None else tuple(range(space.depth))
        self.keep = keep_matrix(space, self.rank)  # [blocks of the model, depth choices]
        self.wbits, self.abits = bit_choices(space)
        self.parts = parts(workload, dims, space)
        absent: list[OpSpec] = []
        self.values = {part.name: self._tensor(part, absent) for part in self.parts}
        if absent:
            raise JointNASError(
                f"the latency table lacks {len(absent)} operations of this space, first {absent[0]}; "
                "measure them with `jointnas profile --resume`"
            )
        # [*WIDTHS, W, A]: whether all linears of a block exist at these widths and bits; said of allowed ones only
        self.linears = [p for p in self.parts if p.group and p.per_block]
        self.feasible = functools.reduce(operator.and_, (_spread(self.values, p).isfinite() for p in self.linears))
        self.head = next((p for p in self.parts if p.group and not p.per_block), None)  # where its bits are searched
        self._finite = {n: v.nan_to_num(0.0) for n, v in self.values.items()}

    def _tensor(self, part: Part, absent: list[OpSpec]) -> Tensor:
        """fp64, one axis per width of the part, then [W, A] for linears, [P] for a head of searched bits; NaN where
        infeasible or excluded."""
        needed = set(self.space.combinations(part.dims))
        shape, values = [len(self.space.sizes(d)) for d in part.dims], list[float]()
        pairs = part.bits(self.space)
        if part.group:
            shape += [len(self.wbits), len(self.abits)] if part.per_block else [len(pairs)]
        for sizes in itertools.product(*(self.space.sizes(d) for d in part.dims)):
            if sizes not in needed:
                values += [math.nan] * len(pairs)
                continue
            for w, a in pairs:
                spec = part.spec(*sizes).with_bits(w, a, part.group)
                row = self.rows.get(spec)
                if row is None or (row.status != "ok" and not part.group):
                    absent.append(spec)
                values.append(math.nan if row is None or row.value is None else row.value * part.count)
        return torch.tensor(values, dtype=torch.float64).view(shape)

    def to(self, device: torch.device) -> None:
        """Moves the tensors, in place."""
        for store in (self.values, self._finite):
            store.update({name: value.to(device) for name, value in store.items()})
        self.keep, self.feasible = self.keep.to(device), self.feasible.to(device)

    def expected(self, probs: Mapping[str, Tensor]) -> Expected:
        """Latency in expectation over structures and bits, and P(infeasible); fp64 scalars."""
        latency, infeasible = self.structures(probs)
        p, feasible = joint(self.space, probs)
        return Expected((p * latency).sum(), 1 - feasible * (1 - (p * infeasible).sum()))

    def structures(self, probs: Mapping[str, Tensor]) -> Expected:
        """Both values for every structure, [*WIDTHS, blocks], in expectation over the bits alone; of excluded ones
        without meaning."""
        bits = {k: probs[k].double() for k in ("weight_bits", "act_bits") if k in probs}
        device = probs["blocks"].device
        if self.keep.device != device:
            self.to(device)
        certain = self.keep.new_ones(len(self.keep), 1)
        pi, rho = bits.get("weight_bits", certain), bits.get("act_bits", certain)  # [blocks of the model, W or A]
        once, block = (self._sum(per_block) for per_block in (False, True))  # [*WIDTHS], broadcastable
        weight = self.feasible.double()  # [*WIDTHS, W, A]
        cost = sum((_spread(self._finite, p) for p in self.linears), torch.zeros_like(weight))
        allowed = torch.einsum("...wa,bw,ba->...b", weight, pi, rho)  # P(feasible bits) of every block
        linear = torch.einsum("...wa,bw,ba->...b", cost * weight, pi, rho) / allowed.clamp_min(1e-12)
        per_block = block[..., None] + self.per_block + linear  # [*WIDTHS, blocks of the model]
        latency = once[..., None] + self.fixed + per_block @ self.keep
        infeasible = ((1 - allowed).clamp_min(0) @ self.keep) / self.keep.sum(0)
        if self.head is not None:
            p = probs["head_bits"].double() if "head_bits" in probs else certain[0]  # the space's only precision
            possible = _spread(self.values, self.head).isfinite().double() @ p  # [*WIDTHS], broadcastable
            head = _spread(self._finite, self.head) @ p / possible.clamp_min(1e-12)
            latency = latency + head[..., None]
            infeasible = 1 - (1 - infeasible) * possible[..., None]
        return Expected(latency, infeasible)

    def _sum(self, per_block: bool) -> Tensor:
        """Σ of the parts other than linears that run once per block, or once per model."""
        chosen = [_spread(self._finite, p) for p in self.parts if not p.group and p.per_block == per_block]
        return sum(chosen, self.keep.new_zeros(1, 1, 1, 1))

    # ---- one choice -------------------------------------------------------------------------------------------------

    def predict(self, choice: Choice) -> float:
        """Latency of the choice; an error where the space excludes it, or this device cannot run an operation."""
        self.space.check(choice)
        if not self.space.allows(choice):
            raise JointNASError(f"{choice.named(ATTENTION)} are infeasible together: the space excludes them")
        total, linear = self.structure(choice)
        if total != total:
            what = f"a {choice.head_bits}-bit head of {choice.hidden} channels"
            raise JointNASError(f"{what} is infeasible on this device")
        for b in kept_blocks(self.rank, choice.blocks):
            weight_bits, a = choice.bits(b)
            w = weight_bits or DENSE
            value = float(linear[self.wbits.index(w), self.abits.index(a)])
            if value != value:
                raise JointNASError(f"W{w}A{a} linears of {choice.hidden} channels are infeasible on this device")
            total += value
        return total

    def structure(self, choice: Choice) -> tuple[float, Tensor]:
        """(latency of everything but the blocks' linears, latency [W, A] of one block's linears); NaN: infeasible.
        Where the head's bits are searched, those of the choice count."""
        total = self.fixed + self.per_block * choice.blocks
        linear = torch.zeros(len(self.wbits), len(self.abits), dtype=torch.float64)
        for part in self.parts:
            value = self.values[part.name][tuple(self.space.sizes(d).index(getattr(choice, d)) for d in part.dims)]
            if part.group and part.per_block:
                linear = linear + value.cpu()
            elif part.group:
                total += float(value[self.space.sizes("head_bits").index(choice.head_bits)])
            else:
                total += float(value) * (choice.blocks if part.per_block else 1)
        return total, linear

    def extremes(self) -> tuple[float, float]:
        """Latency of the fastest and of the slowest choice of the space that this device runs; (inf, -inf): none."""
        least, most = math.inf, -math.inf
        for sizes, head in itertools.product(self.space.structures(), self.space.head_bits or (None,)):
            fixed, linear = self.structure(replace(sizes, head_bits=head))
            feasible = linear[linear.isfinite()]
            if len(feasible) and math.isfinite(fixed):
                least = min(least, fixed + sizes.blocks * feasible.min().item())
                most = max(most, fixed + sizes.blocks * feasible.max().item())
        return least, most

    def original(self) -> float:
        """The unquantized model with the largest size of every dimension: the objective's unit of latency."""
        full = self.space.full()
        total = self.fixed + self.per_block * full.blocks
        for part in self.parts:
            sizes = [getattr(full, d) for d in part.dims]
            row = self.rows.get(part.spec(*sizes))
            if row is None or row.value is None:
                raise JointNASError(f"the latency table lacks {part.spec(*sizes)}, needed by the original model")
            total += row.value * part.count * (full.blocks if part.per_block else 1)
        return total


def _spread(values: Mapping[str, Tensor], part: Part) -> Tensor:
    """A part's tensor broadcastable over all four widths, bit axes last."""
    return values[part.name][tuple(slice(None) if d in part.dims else None for d in WIDTHS)]
