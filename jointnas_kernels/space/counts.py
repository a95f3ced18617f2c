"""Exact sizes of what a choice describes, and their expectations under probabilities.

Sizes are counted from a config alone (any object with the attributes of transformers' LlamaConfig, or of the config of
another supported family) by walking its layout, so no weights are needed.

Expectations are sums over all structures (15,360 for Llama-3.1-8B), so they are exact, and differentiable in the
probabilities. The dimensions are independent but for the combinations that a space excludes: the expectation is
conditional on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jointnas_kernels import layout
from jointnas_kernels.space.choice import Choice
from jointnas_kernels.space.plain import ATTENTION, STRUCTURE
from jointnas_kernels.space.search_space import SearchSpace

Probs = Mapping[str, Tensor]
TINY = 1e-300  # a condition of probability 0 gives 0, not NaN


def kept_blocks(block_rank: Sequence[int], blocks: int) -> tuple[int, ...]:
    """Original indices of the `blocks` most important blocks, in the order they run."""
    return tuple(sorted(block_rank[:blocks]))


def count_params(config: Any, choice: Choice) -> int:
    """Parameters of the extracted model, as transformers counts them (tied embeddings once)."""
    return int(_total(config, choice.widths, choice.blocks, lambda _: choice.blocks))


def structure_params(config: Any, space: SearchSpace) -> Tensor:
    """[*WIDTHS, blocks] fp64: the parameters of every structure, excluded ones included."""
    sizes = _grid(space)
    total: Tensor = _total(config, sizes, sizes["blocks"], lambda _: sizes["blocks"])
    return total


def expected_params(config: Any, space: SearchSpace, probs: Probs) -> Tensor:
    """Exact E[count_params] over the structures of the space; fp64, differentiable in `probs` (keyed by dimension)."""
    p = joint(space, probs).probs
    return (p * structure_params(config, space).to(p.device)).sum()


def model_bytes(
    config: Any, space: SearchSpace, choice: Choice, block_rank: Sequence[int] | None = None, dtype_bytes: int = 2
) -> float:
    """Bytes of the weights: packed integers plus one scale of `dtype_bytes` per group; everything else dense. A matrix
    that is embedding and head counts once, at the head's bits.

    `block_rank` lists blocks most important first and says whose bits count; None means the original order.
    """
    kept = kept_blocks(block_rank or range(space.depth), choice.blocks)

    def of_all(linear: layout.Linear) -> float:
        return sum(_bytes_per_weight(space, linear, choice.bits(b)[0], dtype_bytes) for b in kept)

    head = _bytes_per_weight(space, layout.HEAD, choice.head_bits, dtype_bytes)
    return float(_total(config, choice.widths, choice.blocks, of_all, dtype_bytes, head))


def expected_bytes(
    config: Any, space: SearchSpace, probs: Probs, block_rank: Sequence[int] | None = None, dtype_bytes: int = 2
) -> Tensor:
    """Exact E[model_bytes]; fp64, differentiable in `probs`."""
    p = joint(space, probs).probs
    keep = keep_matrix(space, block_rank).to(p.device)  # [blocks of the model, depth choices]
    sizes = {key: size.to(p.device) for key, size in _grid(space).items()}

    def of_all(linear: layout.Linear) -> Tensor:
        if space.weight_bits is None:
            return sizes["blocks"] * dtype_bytes
        return expected(linear, "weight_bits") @ keep

    def expected(linear: layout.Linear, key: str) -> Tensor:
        """E[bytes per weight] under the probabilities of these bits."""
        cost = [_bytes_per_weight(space, linear, bits, dtype_bytes) for bits in space.sizes(key)]
        return probs[key].double() @ torch.tensor(cost, dtype=torch.float64, device=p.device)

    head = dtype_bytes if space.head_bits is None else expected(layout.HEAD, "head_bits")
    return (p * _total(config, sizes, sizes["blocks"], of_all, dtype_bytes, head)).sum()


def _total(
    config: Any, widths: layout.Sizes, blocks: Any, of_all: Callable[[layout.Linear], Any], unit: int = 1,
    head: Any = 1,
) -> Any:  # fmt: skip
    """Σ of all parameters, in numbers or expectations: `unit` of each; `head` of the head's weights, also where they
    are the embedding's; of a linear's weights `of_all` in all blocks."""
    sizes, block = layout.all_sizes(config, widths), layout.block_of(config)
    outside = layout.size(layout.FINAL_NORM.axis, sizes)
    if not config.tie_word_embeddings:
        outside = outside + layout.EMBEDDING.weights(sizes)
    total = (outside + blocks * block.others(sizes)) * unit + layout.HEAD.weights(sizes) * head
    return total + sum(linear.weights(sizes) * of_all(linear) for linear in block.linears)


def keep_probability(space: SearchSpace, blocks: Tensor, block_rank: Sequence[int] | None = None) -> Tensor:
    """P(block b is kept) = P(number of blocks > rank of b), [depth] fp64, from probabilities blocks [K] of depths."""
    return keep_matrix(space, block_rank).to(blocks.device) @ blocks.double()


def keep_matrix(space: SearchSpace, block_rank: Sequence[int] | None = None) -> Tensor:
    """[number of original blocks, len(space.blocks)] in fp64: 1 where that number of blocks keeps that block."""
    rank = torch.tensor(range(space.depth) if block_rank is None else block_rank).argsort()
    return (torch.tensor(space.blocks) > rank[:, None]).double()


class Joint(NamedTuple):
    """Probabilities of the structures of a space, fp64.

    Attributes:
        probs: [*WIDTHS, blocks], conditional on what is not excluded, 0 for what is.
        feasible: scalar, the probability of that condition.
    """

    probs: Tensor
    feasible: Tensor


def joint(space: SearchSpace, probs: Probs) -> Joint:
    """Of independent dimensions, with `probs` [choices] by dimension; differentiable in them."""
    attention = _product([probs[key] for key in ATTENTION])
    feasible = attention.new_ones(())
    if space.excluded:
        allowed = attention * space.allowed.to(attention.device)
        feasible = allowed.sum()
        attention = allowed / feasible.clamp_min(TINY)
    return Joint(_product([attention, *(probs[key] for key in STRUCTURE[len(ATTENTION) :])]), feasible)


def _product(factors: Sequence[Tensor]) -> Tensor:
    """The outer product, fp64."""
    total = factors[0].double()
    for factor in factors[1:]:
        total = total[..., None] * factor.double()
    return total


def _grid(space: SearchSpace) -> dict[str, Tensor]:
    """The sizes of every dimension along its axis of [*WIDTHS, blocks], fp64."""
    sizes = (torch.tensor(space.sizes(key), dtype=torch.float64, device="cpu") for key in STRUCTURE)
    return dict(zip(STRUCTURE, torch.meshgrid(*sizes, indexing="ij"), strict=True))


def _bytes_per_weight(space: SearchSpace, linear: layout.Linear, bits: int | None, dtype_bytes: int) -> float:
    return float(dtype_bytes) if bits is None or bits == 16 else bits / 8 + dtype_bytes / space.group(linear)
