"""Operations of the package's products, registered with torch's `FlopCounterMode`, which sees each of them as one op.

Two operations for a multiplication and an addition; elementwise work is left out, as in torch's own counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import jointnas_kernels.nn  # noqa: F401  the ops are registered

Shape = Sequence[int]
OPS = torch.ops.jointnas


def _tokens(x: Shape) -> int:
    return math.prod(x[:-1])


def _product(tokens: int, weight: Shape | None) -> int:
    return 0 if weight is None else 2 * tokens * math.prod(weight)


def _pair(tokens: int, lora_a: Shape | None, lora_b: Shape | None) -> int:
    """x A^T B^T, of one pair or of a stack of them."""
    return 0 if lora_a is None or lora_b is None else 2 * tokens * (math.prod(lora_a) + math.prod(lora_b))


def _mix(weight: Shape, lora_a: Shape) -> int:
    """B A of every precision."""
    return 2 * math.prod(lora_a[:-1]) * math.prod(weight)


@register_flop_formula(OPS.quant_lora_linear)
def quant_lora_linear(x: Shape, bias: Shape | None, weight: Shape, lora_a: Shape, *_: Any, **__: Any) -> int:
    """W~ x."""
    return _product(_tokens(x), weight) + _mix(weight, lora_a)


@register_flop_formula(OPS.quant_lora_linear_backward)
def quant_lora_linear_backward(
    grad: Shape, x: Shape | None, bias: Shape | None, weight: Shape, lora_a: Shape, lora_b: Shape, probs: Shape,
    clip: Shape | None, saved: Shape | None, scaling: float, bits: Any, group_size: int, ste: str, recompute: bool,
    need: Sequence[bool], *_: Any, **__: Any,
) -> int:  # fmt: skip
    """The gradients that are wanted: of x, of LoRA (through rank r, or through that of W~), of the probabilities."""
    tokens = _tokens(grad)
    found = _product(tokens, weight) if need[0] else 0
    adapters = need[2] or need[3]
    found += 2 * _pair(tokens, lora_a, lora_b) if adapters and ste == "identity" else 0
    through_weight = need[4] or need[5] or (adapters and ste != "identity")
    return found + (_product(tokens, weight) + _mix(weight, lora_a) if through_weight else 0)


@register_flop_formula(OPS.quant_lora_linear_group)
def quant_lora_linear_group(x: Shape, probs: Shape, *members: Any, **_: Any) -> int:
    """Up to three of them on one x: weight, A, B and clip ratios each."""
    return sum(_product(_tokens(x), w) + _mix(w, a) for w, a, *_ in _fours(members) if w is not None)


@register_flop_formula(OPS.quant_lora_linear_group_backward)
def quant_lora_linear_group_backward(
    grad0: Shape, grad1: Any, grad2: Any, x: Any, probs: Any, *members: Any, **_: Any
) -> int:  # fmt: skip
    """As of each of them."""
    ste, need, _backend = members[-3:]
    found = 0
    for j, (weight, a, b, _clip) in enumerate(_fours(members)):
        if weight is not None:
            of_pair, of_clip = need[2 + 3 * j : 4 + 3 * j], need[4 + 3 * j]
            need_one = (need[0], False, *of_pair, need[1], of_clip)
            found += quant_lora_linear_backward(grad0, x, None, weight, a, b, probs, None, None, 1.0, None, 1, ste,
                                                False, need_one)  # fmt: skip
    return found


def _fours(members: Sequence[Any]) -> list[Any]:
    return [members[i : i + 4] for i in (0, 4, 8)]


@register_flop_formula(OPS.quant_lora_mix)
def quant_lora_mix(weight: Shape, lora_a: Shape, *_: Any, **__: Any) -> int:
    """B A of every precision."""
    return _mix(weight, lora_a)


@register_flop_formula(OPS.mixed_linear)
def mixed_linear(
    x: Shape, weight: Shape, in_mask: Any, out_mask: Any, lora_a: Shape | None, lora_b: Shape | None, *_: Any, **__: Any
) -> int:
    """W x + B A x."""
    return _product(_tokens(x), weight) + _pair(_tokens(x), lora_a, lora_b)


@register_flop_formula(OPS.mixed_linear_backward)
def mixed_linear_backward(
    grad: Shape, x: Shape | None, weight: Shape, in_mask: Any, out_mask: Any, lora_a: Shape | None,
    lora_b: Shape | None, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Of x and of LoRA."""
    return _product(_tokens(grad), weight) + 2 * _pair(_tokens(grad), lora_a, lora_b)


@register_flop_formula(OPS.mixed_linear_group)
def mixed_linear_group(x: Shape, *members: Any, **_: Any) -> int:
    """Up to three of them on one x: weight, A, B each."""
    return sum(_product(_tokens(x), w) + _pair(_tokens(x), a, b) for w, a, b in _threes(members))


@register_flop_formula(OPS.mixed_linear_group_backward)
def mixed_linear_group_backward(grad0: Shape, grad1: Any, grad2: Any, x: Any, *members: Any, **_: Any) -> int:
    """Of x and of LoRA."""
    tokens = _tokens(grad0)
    return sum(_product(tokens, w) + 2 * _pair(tokens, a, b) for w, a, b in _threes(members))


def _threes(members: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    return [(members[i], members[i + 1], members[i + 2]) for i in (0, 3, 6)]

