"""What a backend is, the weight it gets, and the check it must pass before it is timed.

Adding a backend is one file next to this one, a class with the members of `Backend`, and its name in
`backends/__init__.py`. `unsupported` declares what it cannot do; `prepare` packs the weight once and returns the
call that is timed. All see the same weight, so nobody can time something that computes another function.
The backend of another library derives from `ThirdParty` and is a few declarations and `prepare`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from jointnas_kernels.latency.spec import DENSE, LINEARS, OpSpec, Workload
from jointnas_kernels.ops.lowbit.weight import LowbitWeight
from jointnas_kernels.ops.quant.spec import PACKED_WEIGHT_BITS, quantize_groups, quantize_tokens

Weight = Tensor | LowbitWeight  # [N, K]: dense in the model's dtype, or in the storage layout with scales in that dtype
Call = Callable[[Tensor], Tensor]
# Relative Frobenius error allowed against the fp64 reference. bf16 inputs, scales and outputs each round by up to
# 2^-9 = 0.002; a wrong scale, zero point or nibble order is off by more than 0.1. Integer products round their output
# alone (seen: 0.0019), and must be told from those of activations that were quantized otherwise (`random_input`).
TOLERANCE, TOLERANCE_INT = 0.01, 0.005
OUTLIER = 30.0
FEW_WEIGHTS = 1 << 18  # whose levels are found together: temporaries stay in a CPU's cache (14336x4096: 0.13 for 0.8 s)
SAMPLE_ROWS, SAMPLE_COLUMNS = 16, 256  # of the output that are compared: keeps the check of 14336x4096 in ms


@dataclass(frozen=True)
class Target:
    """Where an operation runs, and what its `OpSpec` does not say."""

    device: torch.device
    workload: Workload
    kv_heads: int

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and dense weights."""
        dtype: torch.dtype = getattr(torch, self.workload.dtype)
        return dtype


class Backend(Protocol):
    """Times some operations on some devices under a unique ``name``."""

    name: str

    def version(self) -> str:
        """Of the library; a table notes it with every row."""

    def unsupported(self, spec: OpSpec, target: Target) -> str | None:
        """Why it cannot run this; None if it can."""

    def prepare(self, spec: OpSpec, target: Target, weight: Weight | None) -> Call:
        """Packs the weight into storage of its own; the returned function maps the input [M, K] to [M, N] (linear,
        lm_head), or is one of the other parts on inputs of its own. One that runs the operation several times says so
        in an attribute `repeats`; a backend with a method `together(calls)` makes one of several calls."""


class Torch:
    """Backends of torch's own operations."""

    def version(self) -> str:
        return torch.__version__


class LowBit:
    """Backends of low-bit linears, which declare what they take."""

    wbits: tuple[int, ...] = (2, 4, 8)
    abits: tuple[int, ...] = (DENSE,)
    activations = ""  # why no others
    device = ""  # any
    groups: tuple[int, ...] = ()  # any
    whole_rows = True  # as a group, whatever their length
    multiples = (1, 1)  # of n and k

    def unsupported(self, spec: OpSpec, target: Target) -> str | None:
        """What is outside the declarations; None if nothing is."""
        n, k = self.multiples
        if self.device and target.device.type != self.device:
            return f"runs on {self.device} only"
        if spec.op not in LINEARS or spec.wbits not in self.wbits:
            return f"linears with W in {self.wbits} only"
        if spec.abits not in self.abits:
            return f"activations of {' and '.join(map(str, self.abits))} bits only{self.activations}"
        if spec.k % spec.group:
            return f"k must be a multiple of the group, got {spec.k} and {spec.group}"
        if self.groups and spec.group not in self.groups and not (self.whole_rows and spec.group == spec.k):
            return f"groups of {self.groups}{' or whole rows' if self.whole_rows else ''} only, got {spec.group}"
        if spec.n % n or spec.k % k:
            return f"n must be a multiple of {n} and k of {k}, got {spec.n} and {spec.k}"
        return None


class ThirdParty(LowBit):
    """Backends of other libraries: looked for at run time, imported only where they run.

    Whatever such a library raises is reported and excludes it (`excuse`): it may not fit this machine, or have another
    interface than the one its adapter was written for.
    """

    name: str
    package: str  # what is imported
    distribution: str  # what pip installs
    groups = (32, 64, 128)
    device = "cuda"
    capability = (8, 0)

    def version(self) -> str:
        """Of the installed distribution."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:  # importable, but not installed by pip
            return ""

    def unsupported(self, spec: OpSpec, target: Target) -> str | None:
        """The same, and whether library and device are there."""
        if importlib.util.find_spec(self.package) is None:
            return f"not installed ({self.device} only; pip install {self.distribution})"
        reason = super().unsupported(spec, target)
        if reason is None and target.workload.dtype not in ("float16", "bfloat16"):
            return f"float16 and bfloat16 only, got {target.workload.dtype}"
        if reason is None and torch.cuda.get_device_capability(target.device) < self.capability:
            return f"needs compute capability {self.capability[0]}.{self.capability[1]}"
        return reason


def stored(weight: Weight | None) -> tuple[Tensor, Tensor]:
    """(packed int32 [N, K bits / 32], scale [N, K / group]) of a low-bit weight, in storage of their own."""
    assert isinstance(weight, LowbitWeight)
    packed, scale = weight.clone().unpack()
    return packed, scale


def quantize_weight(weight: Tensor, bits: int, group: int) -> LowbitWeight:
    """The levels of [N, K] by the project's symmetric quantizer (ops/quant/spec.py), in the storage layout.

    Widths that are not packed (3, 5, 6, 7) or do not fill whole words are stored in the next one that is and does; an
    error where none does, because K is no multiple of 4."""
    some = weight.split(max(1, FEW_WEIGHTS // weight.shape[1]))
    q, scale, _ = map(torch.cat, zip(*(quantize_groups(rows, bits, group).integers() for rows in some), strict=True))
    wide = next((b for b in PACKED_WEIGHT_BITS if b >= bits and weight.shape[1] * b % 32 == 0), 8)
    return LowbitWeight.pack(q.flatten(-2), scale.squeeze(-1).to(weight.dtype), wide, group, layout="storage")


def random_weight(spec: OpSpec, target: Target, generator: torch.Generator) -> Weight:
    """Gaussian weights at the spec's bits (zeros would run faster than data).

    A million distinct values, repeated: drawing 58 million for every 14336x4096 would cost more than the timing."""
    count = spec.n * spec.k
    values = torch.randn(min(count, 1_000_003), generator=generator).mul_(spec.k**-0.5).to(target.device, target.dtype)
    dense = values.repeat(-(-count // len(values)))[:count].view(spec.n, spec.k)
    return dense if spec.wbits == DENSE else quantize_weight(dense, spec.wbits, spec.group)


def linear_reference(spec: OpSpec, x: Tensor, weight: Weight, columns: Tensor) -> Tensor:
    """y[:, columns] = Q_a(x) dequantized(W)[columns]^T in fp64."""
    if spec.abits < DENSE:
        levels, scale, zero = quantize_tokens(x, spec.abits)
        x = (levels.double() - zero.double()) * scale.double()
    w = weight[columns].double() if isinstance(weight, Tensor) else weight.dequantized(columns)
    return x.double() @ w.T


def disagreement(spec: OpSpec, x: Tensor, weight: Weight, got: Tensor) -> str | None:
    """Why `got` = run(x) is not the function of `linear_reference`; None if it is, within the tolerance."""
    if got.shape != (spec.m, spec.n):
        return f"output shape {tuple(got.shape)} instead of {(spec.m, spec.n)}"
    rows = torch.linspace(0, spec.m - 1, min(spec.m, SAMPLE_ROWS), device=x.device).long()
    columns = torch.linspace(0, spec.n - 1, min(spec.n, SAMPLE_COLUMNS), device=x.device).long()
    want = linear_reference(spec, x[rows], weight, columns)
    error = (got[rows][:, columns].double() - want).norm() / want.norm().clamp_min(1e-30)
    allowed = TOLERANCE if spec.abits == DENSE else TOLERANCE_INT
    if not error <= allowed:  # also catches NaN
        return f"relative error {error.item():.3g} against the dequantised reference, allowed {allowed}"
    return None


def failure(backend: Backend, spec: OpSpec, target: Target, x: Tensor, weight: Weight) -> str | None:
    """Runs `backend` once on (x, weight): why it must not be used; None if it computes the reference."""
    return verified(backend, spec, target, x, weight)[1]


def verified(
    backend: Backend, spec: OpSpec, target: Target, x: Tensor, weight: Weight
) -> tuple[Call | None, str | None]:
    """(the prepared call, None) if it computes the reference, else (None, why it must not be used)."""
    try:
        with torch.inference_mode():
            call = backend.prepare(spec, target, weight)
            reason = disagreement(spec, x, weight, call(x))
    except Exception as error:
        return None, excuse(backend, error)
    return (call, None) if reason is None else (None, reason)


def excuse(backend: Backend, error: Exception) -> str:
    """Why `backend`, which raised `error`, must not be used. RuntimeErrors (torch's, CUDA's, NotImplementedError) and
    ValueErrors may be the machine's fault, any error a third party's. The others are mistakes in a backend: raised."""
    if not isinstance(error, (RuntimeError, ValueError)) and not isinstance(backend, ThirdParty):
        raise error
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def random_input(spec: OpSpec, target: Target, generator: torch.Generator) -> Tensor:
    """Gaussian [m, k]; where it is quantized, with an outlier in every token.

    Without one, 8-bit rounding changes the product by 0.4 to 1 % only: a backend that does not quantize x at all passed
    for A8. With it that is 0.8 (64 inputs) to 4 % (4096), and symmetric rounding 1.7 to 8 %."""
    x = torch.randn(spec.m, spec.k, generator=generator)
    if spec.abits < DENSE:
        rows = torch.arange(spec.m)
        x[rows, 7 * rows % spec.k] = OUTLIER
    return x.to(target.device, target.dtype)
