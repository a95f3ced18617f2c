"""NaN and infinity go in: every backend answers NaN exactly where the reference does, never a number in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jointnas_kernels import ops

NAN, INF = float("nan"), float("inf")


def alike(what: str, backend: str, function: Callable[..., Tensor], *args: Any, numbers: bool = True) -> None:
    """NaN where the reference has NaN, and there only; ``numbers``: the others are close to the reference's."""
    out, expected = (function(*args, backend=how).float() for how in (backend, "reference"))
    nan = expected.isnan()
    assert nan.any(), f"{what}: the reference has only numbers"
    assert torch.equal(out.isnan(), nan), f"{what}: {int((out.isnan() != nan).sum())} of {nan.numel()} differ in NaN"
    assert not numbers or torch.allclose(out[~nan], expected[~nan], 2e-2, 2e-2), what


def activations(dtype: torch.dtype, width: int) -> Iterator[tuple[str, Tensor]]:
    """[5, width] whose second token has a NaN of either sign or an infinity: first, inside, last, beside zeros only."""
    for background in (torch.randn(5, width), torch.zeros(5, width)):
        for at in (0, width // 2, width - 1):
            for value in (NAN, -NAN, INF, -INF):
                x = background.to(dtype)
                x[1, at] = value
                yield f"{value} at {at}", x


def act_quant_mix(backend: str, dtype: torch.dtype) -> None:
    mask, probs = torch.rand(67) + 0.1, torch.rand(4)
    for name, x in activations(dtype, 67):
        for bits, m, symmetric in (((2, 4, 8, 16), mask, False), ((4,), None, False), ((8, 3), mask, True)):
            alike(f"{bits} of {name}", backend, ops.act_quant_mix, x, bits, probs[: len(bits)], symmetric, m)
        if "nan" in name:
            alike(f"16 bits of {name}", backend, ops.act_quant_mix, x, (16,), probs[:1], False)


def mixed_rmsnorm(backend: str, dtype: torch.dtype) -> None:
    """In channels of all sizes, of some, and of none."""
    weight, alpha, mask, probs = torch.rand(67).to(dtype), torch.rand(2), torch.rand(67), torch.rand(2)
    for at in (3, 20, 39, 40, 66):
        x = torch.randn(5, 67).to(dtype)
        x[1, at] = NAN
        for sizes in ((16, 67), (67, 16), (16, 40), (40, 16)):
            what, norm = f"{sizes} at {at}", (x, weight, alpha, sizes, 1e-5, mask)
            alike(what, backend, ops.mixed_rmsnorm, *norm)
            alike(what, backend, partial(ops.mixed_rmsnorm, act_bits=(4, 16), act_probs=probs), *norm)


def elementwise(backend: str, dtype: torch.dtype) -> None:
    """Everything without extremes."""
    x, y = torch.randn(5, 67).to(dtype), torch.randn(5, 67).to(dtype)
    x[1, 40] = NAN
    m, n, gate = torch.rand(67), (torch.rand(67) > 0.5).float(), torch.tensor(0.0)
    alike("channel_mask", backend, ops.channel_mask, x, n)
    alike("gate of masked_swiglu", backend, ops.masked_swiglu, x, y, m, n)
    alike("masked_swiglu", backend, ops.masked_swiglu, y, x, n, m)
    alike("masked_residual", backend, ops.gated_residual, y, x, n)
    alike("gated_residual", backend, ops.gated_residual, y, x, n, gate, y)
    q, cos, mask = torch.randn(2, 3, 2, 8).to(dtype), torch.randn(1, 3, 8), torch.rand(2, 8)
    q[1, 1, 1, 3] = NAN
    alike("masked_rope", backend, lambda *args, backend: ops.masked_rope(*args, backend)[0], q, q, cos, cos, mask, mask)


def head_rmsnorm(backend: str, dtype: torch.dtype) -> None:
    """In dims of the narrowest heads, of whole ones, of none."""
    for at in (0, 1, 2):
        x = torch.randn(3, 2, 8).to(dtype)
        x[1, 1, at] = NAN
        for dims in ((2, 8), (2, 4)):
            rest = torch.rand(8), torch.ones(2, 8), torch.ones(2), dims, 1e-5
            alike(f"{dims} at {at}", backend, ops.head_rmsnorm, x, *rest)


def weights(backend: str, dtype: torch.dtype) -> None:
    """In a weight, or in what LoRA adds to it. (Numbers: one level more or less, by the order of sums.)"""
    probs = torch.rand(2)
    for value in (NAN, -NAN, INF):
        for where, at in ((0, (3, 5)), (0, (3, 127)), (1, (1, 2, 70)), (2, (0, 9, 1))):
            t = [torch.randn(20, 128), torch.randn(2, 8, 128), torch.randn(2, 20, 8)]
            t[where][at] = value
            w, a, b = (v.to(dtype) for v in t)
            for clip in (None, torch.rand(2, 20, 4) * 0.5 + 0.5):
                mix = w, a, b, 0.5, (4, 8), probs, 32, clip
                alike(f"{value} in {where}", backend, ops.quant_lora_mix, *mix, numbers=False)
            if backend == "triton" and where == 0:
                for symmetric in (False, True):
                    alike(f"{value}", backend, ops.fake_quant_weight, w, 4, 32, symmetric)


def lowbit(backend: str, dtype: torch.dtype, group: int, layout: str) -> None:
    """The whole row of a token, and no other."""
    q = torch.randint(-2, 2, (20, 256), dtype=torch.int8)
    for w_bits in (2, 4, 8):
        scale = (torch.rand(20, 256 // group) + 0.5).to(dtype)
        weight = ops.LowbitWeight.pack(q, scale, w_bits, group, layout=layout)
        for name, x in activations(dtype, 256):
            for a_bits in (16, 8, 4, 2) if "nan" in name else (8, 4, 2):
                alike(f"W{w_bits}A{a_bits} of {name}", backend, ops.lowbit_matmul, x, weight, a_bits, False)
