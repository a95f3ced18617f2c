"""Zero tokens: every Triton op returns empty results, and sums over no rows: zeros, not what memory held."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from jointnas_kernels import ops
from tests.comparison import compare

N = 24
BITS = (2, 4, 8, 16)


def act_quant_mix(x: Tensor, probs: Tensor, mask: Tensor, backend: str | None) -> Tensor:
    return ops.act_quant_mix(x, BITS, probs, False, mask, backend)


def mixed_rmsnorm(x: Tensor, w: Tensor, alpha: Tensor, mask: Tensor, backend: str | None) -> Tensor:
    return ops.mixed_rmsnorm(x, w, alpha, (8, N), 1e-5, mask, backend)


def mixed_rmsnorm_quant(x: Tensor, w: Tensor, alpha: Tensor, mask: Tensor, p: Tensor, backend: str | None) -> Tensor:
    return ops.mixed_rmsnorm(x, w, alpha, (8, N), 1e-5, mask, backend, BITS, p)


def masked_swiglu_quant(g: Tensor, u: Tensor, r: Tensor, c: Tensor, p: Tensor, backend: str | None) -> Tensor:
    return ops.masked_swiglu(g, u, r, c, backend, BITS, p)


def residual_rmsnorm(
    x: Tensor, y: Tensor, w: Tensor, alpha: Tensor, mask: Tensor, p: Tensor, backend: str | None
) -> tuple[Tensor, ...]:
    return ops.residual_rmsnorm(x, y, w, alpha, (8, N), 1e-5, mask, backend, BITS, p)


def rope_and_values(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, m: Tensor, n: Tensor, v: Tensor, backend: str | None
) -> tuple[Tensor, ...]:
    return ops.masked_rope(q, k, cos, sin, m, n, backend, v)


def head_rmsnorm(x: Tensor, w: Tensor, mask: Tensor, alpha: Tensor, backend: str | None) -> Tensor:
    return ops.head_rmsnorm(x, w, mask, alpha, (4, 8), 1e-5, backend)


def mixed_linear(x: Tensor, w: Tensor, c: Tensor, r: Tensor, a: Tensor, b: Tensor, backend: str | None) -> Tensor:
    return ops.mixed_linear(x, w, c, r, a, b, 0.5, backend=backend)


def quant_lora_linear(x: Tensor, w: Tensor, a: Tensor, b: Tensor, probs: Tensor, clip: Tensor, backend: str | None
                      ) -> Tensor:  # fmt: skip
    return ops.quant_lora_linear(x, w, a, b, 0.5, (4, 8), probs, 8, clip, "clip", backend=backend)


# op, the tensors beside those of tokens, their shapes
CASES: dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], list[tuple[int, ...]]]] = {
    "channel_mask": (ops.channel_mask, [(0, N), (N,)]),
    "masked_swiglu": (ops.masked_swiglu, [(0, N), (0, N), (N,), (N,)]),
    "masked_swiglu_quant": (masked_swiglu_quant, [(0, N), (0, N), (N,), (N,), (4,)]),
    "residual_rmsnorm": (residual_rmsnorm, [(0, N), (0, N), (N,), (2,), (N,), (4,)]),
    "rope_and_values": (
        rope_and_values, [(2, 0, 3, 8), (2, 0, 1, 8), (1, 0, 8), (1, 0, 8), (3, 8), (1, 8), (2, 0, 1, 8)]
    ),
    "gated_residual": (ops.gated_residual, [(0, N), (0, N), (N,), (), (0, N)]),
    "masked_residual": (ops.gated_residual, [(0, N), (0, N), (N,)]),
    "act_quant_mix": (act_quant_mix, [(0, N), (4,), (N,)]),
    "mixed_rmsnorm": (mixed_rmsnorm, [(0, N), (N,), (2,), (N,)]),
    "mixed_rmsnorm_quant": (mixed_rmsnorm_quant, [(0, N), (N,), (2,), (N,), (4,)]),
    "head_rmsnorm": (head_rmsnorm, [(2, 0, 3, 8), (8,), (3, 8), (2,)]),
    "masked_rope": (ops.masked_rope, [(2, 0, 3, 8), (2, 0, 1, 8), (1, 0, 8), (1, 0, 8), (3, 8), (1, 8)]),
    "mixed_linear": (mixed_linear, [(0, N), (7, N), (N,), (7,), (3, N), (7, 3)]),
    "quant_lora_linear": (quant_lora_linear, [(0, N), (7, N), (2, 3, N), (2, 7, 3), (2,), (2, 7, 3)]),
}
FROZEN = {"head_rmsnorm": (1,), "masked_rope": (2, 3), "mixed_linear": (1,), "quant_lora_linear": (1,),
          "residual_rmsnorm": (2,), "rope_and_values": (2, 3)}  # fmt: skip


@pytest.mark.parametrize("op", CASES)
def test_no_tokens(op: str) -> None:
    call, shapes = CASES[op]
    wanted = [i for i in range(len(shapes)) if i not in FROZEN.get(op, ())]
    for subset in (wanted, wanted[:1], wanted[1:]):
        compare(call, [torch.rand(shape) for shape in shapes], subset, "triton")


@pytest.mark.parametrize("a_bits", [16, 4])
def test_lowbit_linear(a_bits: int) -> None:
    packed = ops.pack_weight(torch.ones(7, 32, dtype=torch.int8), 4)
    y = ops.lowbit_linear(torch.empty(2, 0, 32), packed, torch.ones(7, 2), 4, a_bits, 16, backend="triton")
    assert y.shape == (2, 0, 7)
