"""What a backend is, the weight it gets, and the check it must pass before it is timed.

Adding a backend is one file next to this one: a class with the members of `Backend`, and its name in
`backends/__init__.py`. `unsupported` declares what it cannot do; `prepare` packs the weight once and returns the
call that is timed. Both see the same `LinearWeight`, so nobody can time something that computes another function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from jointnas_kernels.latency.spec import DENSE, OpSpec, Workload
from jointnas_kernels.ops.lowbit_linear import quantize_tokens

T = TypeVar("T")
# Relative Frobenius error allowed against the fp64 reference. bf16 inputs, scales and outputs each round by up to
# 2^-9 = 0.002; a wrong scale, zero point or nibble order is off by more than 0.1.
TOLERANCE = 0.01
SAMPLE_ROWS, SAMPLE_COLUMNS = 16, 256  # of the output that are compared: keeps the check of 14336x4096 in ms


@dataclass(frozen=True)
class Target:
    """Where an operation runs, and what its `OpSpec` does not say."""

    device: torch.device
    workload: Workload
    kv_heads: int

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.workload.dtype)


@dataclass(frozen=True)
class LinearWeight:
    """[N, K] weight: dense, or int8 levels with one fp32 scale per (row, group of K)."""

    dense: Tensor | None = None  # [N, K] in the model's dtype
    levels: Tensor | None = None  # [N, K] int8, in [-2^(b-1), 2^(b-1)-1]
    scale: Tensor | None = None  # [N, K/group] fp32, representable in the model's dtype
    bits: int = DENSE
    group: int = 0
    # what a backend made of it, for its own next `prepare`: a copy of packed weights is much cheaper than packing. All
    # copies that a timing rotates through share it, and so do operations that differ in their activations only.
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def packed(self, name: str, pack: Callable[[], T], copy: Callable[[T], T]) -> T:
        """`pack()` the first time, copies of that afterwards: every call returns storage of its own."""
        if name not in self.memo:
            self.memo[name] = pack()
        return copy(self.memo[name])

    def dequantized(self, rows: Tensor | slice = slice(None), dtype: torch.dtype = torch.float64) -> Tensor:
        if self.dense is not None:
            return self.dense[rows].to(dtype)
        levels, scale = self.quantized()
        return levels[rows].to(dtype) * scale[rows].to(dtype).repeat_interleave(self.group, 1)

    def quantized(self) -> tuple[Tensor, Tensor]:
        """(levels, scale)."""
        if self.levels is None or self.scale is None:
            raise TypeError("this weight is dense")
        return self.levels, self.scale


class Backend(Protocol):
    name: str

    def version(self) -> str: ...

    def unsupported(self, spec: OpSpec, target: Target) -> str | None:
        """Why it cannot run this; None if it can."""
        ...

    def prepare(self, spec: OpSpec, target: Target, weight: LinearWeight | None) -> Callable[[Tensor], Tensor]:
        """Packs the weight; the returned function maps the input [M, K] to [M, N] (linear, lm_head), or is one
        of the other parts on inputs of its own."""
        ...


def quantize_weight(weight: Tensor, bits: int, group: int) -> LinearWeight:
    """Round-to-nearest, symmetric, s = absmax / ((2^bits - 1) / 2), rounded to the weight's dtype."""
    n, k = weight.shape
    w = weight.float().reshape(n, k // group, group)
    scale = (w.abs().amax(-1) / ((2**bits - 1) / 2)).to(weight.dtype).float()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    levels = torch.round(w / scale[..., None]).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return LinearWeight(levels=levels.reshape(n, k).to(torch.int8), scale=scale, bits=bits, group=group)


def random_weight(spec: OpSpec, target: Target, generator: torch.Generator) -> LinearWeight:
    """Gaussian weights at the spec's bits (zeros would run faster than data).

    A million distinct values, repeated: drawing 58 million for every 14336x4096 would cost more than the timing."""
    count = spec.n * spec.k
    values = torch.randn(min(count, 1_000_003), generator=generator).mul_(spec.k**-0.5).to(target.device, target.dtype)
    dense = values.repeat(-(-count // len(values)))[:count].view(spec.n, spec.k)
    if spec.wbits == DENSE:
        return LinearWeight(dense=dense)
    return quantize_weight(dense, spec.wbits, spec.group)


def linear_reference(spec: OpSpec, x: Tensor, weight: LinearWeight, columns: Tensor) -> Tensor:
    """y[:, columns] = Q_a(x) dequantized(W)[columns]^T in fp64."""
    if spec.abits < DENSE:
        levels, scale, zero = quantize_tokens(x, spec.abits)
        x = (levels.double() - zero.double()) * scale.double()
    return x.double() @ weight.dequantized(columns).T


def disagreement(spec: OpSpec, x: Tensor, weight: LinearWeight, got: Tensor) -> str | None:
    """Why `got` = run(x) is not the function of `linear_reference`; None if it is, within TOLERANCE."""
    if got.shape != (spec.m, spec.n):
        return f"output shape {tuple(got.shape)} instead of {(spec.m, spec.n)}"
    rows = torch.linspace(0, spec.m - 1, min(spec.m, SAMPLE_ROWS), device=x.device).long()
    columns = torch.linspace(0, spec.n - 1, min(spec.n, SAMPLE_COLUMNS), device=x.device).long()
    want = linear_reference(spec, x[rows], weight, columns)
    error = (got[rows][:, columns].double() - want).norm() / want.norm().clamp_min(1e-30)
    if not error <= TOLERANCE:  # also catches NaN
        return f"relative error {error.item():.3g} against the dequantised reference, allowed {TOLERANCE}"
    return None


def failure(backend: Backend, spec: OpSpec, target: Target, x: Tensor, weight: LinearWeight) -> str | None:
    """Runs `backend` once on (x, weight): why it must not be used; None if it computes the reference."""
    return verified(backend, spec, target, x, weight)[1]


def verified(
    backend: Backend, spec: OpSpec, target: Target, x: Tensor, weight: LinearWeight
) -> tuple[Callable[[Tensor], Tensor] | None, str | None]:
    """(the prepared call, None) if it computes the reference, else (None, why it must not be used)."""
    try:
        with torch.inference_mode():
            call = backend.prepare(spec, target, weight)
            reason = disagreement(spec, x, weight, call(x))
    except (RuntimeError, ValueError) as error:  # RuntimeError: NotImplementedError, torch's and CUDA's too
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return (call, None) if reason is None else (None, reason)


def random_input(spec: OpSpec, target: Target, generator: torch.Generator) -> Tensor:
    return torch.randn(spec.m, spec.k, generator=generator).to(target.device, target.dtype)
