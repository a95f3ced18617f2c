"""What to measure for a search space: the low-bit products that its models have, in order of worth."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from jointnas_kernels import layout
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.layout import WIDTHS
from jointnas_kernels.ops.lowbit.choice import shape_of
from jointnas_kernels.ops.lowbit.tiles import INPUTS
from jointnas_kernels.ops.quant.spec import PACKED_ACT_BITS, PACKED_WEIGHT_BITS
from jointnas_kernels.runtime.step import STAGES
from jointnas_kernels.space import SearchSpace
from jointnas_kernels.tuned import Shape


class Job(NamedTuple):
    """A shape to be measured at `tokens` tokens, for `least` to that many."""

    shape: Shape
    least: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.shape} {self.tokens} tokens"


def jobs(space: SearchSpace, config: Any, tokens: Sequence[int], dtype: str, planes: bool = False) -> list[Job]:
    """All jobs of a space: its linears, and those that run as one because they read the same; on packed weights.

    A count holds for smaller ones, too, down to the next that is measured, or half of itself if that is more than the 8
    tokens of a product of the tensor cores. First those of the largest model, for all counts in their order; of one
    count the largest weights first.

    Args:
        space: sizes and bits; the head's, too.
        config: of the model, for what the space does not say.
        tokens: counts, the most important first.
        dtype: of activations and scales, "float16" or "bfloat16".
        planes: weights of 2 and 4 bits as bit-planes, for activations of 8 bits and less, instead.

    Raises:
        JointNASError: counts below 1, or a space without low-bit products that these kernels take.
    """
    if not tokens or min(tokens) < 1:
        raise JointNASError(f"tokens must be one or more positive counts, got {list(tokens)}")
    full = [getattr(space.full(), name) for name in WIDTHS]
    whole, found = (set(_shapes(space, config, dtype, planes, s)) for s in ([full], space.combinations(WIDTHS)))
    if not found:
        raise JointNASError(
            f"the space has no products that the CUDA kernels take: of weights with bits in {PACKED_WEIGHT_BITS}"
            f"{' as bit-planes' if planes else ''}, in groups of {INPUTS} inputs"
        )
    ends = sorted(set(tokens))
    least = {end: max(end // 2 if end > 8 else 0, before) + 1 for before, end in itertools.pairwise((0, *ends))}
    return [
        Job(shape, least[count], count)
        for shapes in (whole, found - whole)
        for count in dict.fromkeys(tokens)
        for shape in sorted(shapes, key=lambda s: (-s.outputs * s.inputs, s))
    ]


def _shapes(
    space: SearchSpace, config: Any, dtype: str, planes: bool, combinations: Iterable[Sequence[int]]
) -> Iterator[Shape]:
    """Of models with these widths."""
    block, bits = layout.block_of(config), list(itertools.product(space.weight_bits or (), space.act_bits or (16,)))
    own = {"kv_heads": config.num_key_value_heads, "vocab": config.vocab_size}
    for widths in combinations:
        sizes = {**own, **dict(zip(WIDTHS, widths, strict=True))}
        products = [([layout.HEAD], list(itertools.product(space.head_bits or (), (16,))))]
        products += [([linear for linear in block.linears if linear.name in names], bits) for names in STAGES]
        for linears, pairs in products:
            if space.group(linears[0]) != INPUTS:
                continue
            rows = [layout.size(linear.rows, sizes) for linear in linears]
            apart = rows if len({linear.module for linear in linears}) == len(linears) else []
            inputs = layout.size(linears[0].columns, sizes)
            for (w, a), outputs in itertools.product(pairs, {*apart, sum(rows)}):
                fits = (w < 8 and a < 16) if planes else w in PACKED_WEIGHT_BITS
                if fits and a in PACKED_ACT_BITS and inputs % INPUTS == 0:
                    yield shape_of(w, a, outputs, inputs, getattr(torch, dtype), planes)
