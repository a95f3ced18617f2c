"""One case: inputs, the op, its definition in fp64; run both, compare values and gradients.

An element passes if   |out - ref| <= limit · max(|ref|, rms(ref), smallest normal of what is stored) + allowance.

``limit`` = (roundings to the storage type) · (its unit round-off) + what fp32 sums lose. Where a result nearly cancels
(a sum of one column, a 1 x 1 product) no such bound can hold against |ref|; then, and only then, the element's
sensitivity to relative changes of the inputs is taken for rms(ref): the root mean square response of the fp64
definition to 16 random relative perturbations, and the size of the formula's terms where those cancel whatever the
inputs are (the gradient of x / |x|). Such comparisons are counted (``cancelled``).

``allowance`` is zero but for levels that fp32 cannot decide: see levels.py. Elements that need it are counted too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jointnas_kernels.testing import poisoned
from tests.fuzz.source import place

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SUMS = {torch.float64: 1e-12, torch.float32: 4e-6}  # fp32 sums of a few thousand terms, exp and rsqrt approximations
SUMMED = 3.0  # roundings that the terms of a sum count for: five standard deviations of u / sqrt(3)
EXACT = 0.0  # as a limit: bit for bit the definition, rounded once to fp32 and once to the storage type
DIRECTIONS, STEP = 16, 1e-6

Named = dict[str, Tensor]


def limit(dtype: torch.dtype, roundings: float = 1.0) -> float:
    """Of a result that passes ``roundings`` roundings to ``dtype`` on its way."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return roundings * UNIT[dtype] + SUMS[wide]


@dataclass
class Bounds:
    """What a quantizer's definition adds to a comparison."""

    scale: Named = field(default_factory=dict)  # element-wise, in place of rms(ref)
    terms: Named = field(default_factory=dict)  # size of terms that cancel
    allowance: Named = field(default_factory=dict)
    undecided: int = 0  # levels that fp32 sums cannot decide


@dataclass
class Case:
    """``call`` runs the op under test; ``truth`` its definition, differentiable, in fp64 (given the op's outputs, for
    samples). Results are named ``out0``, ``out1``, .. and ``d<input>`` for each input in ``wanted``."""

    text: str
    tensors: Named
    call: Callable[[Named], tuple[Tensor, ...]]
    truth: Callable[[Named, tuple[Tensor, ...]], tuple[Tensor, ...]]
    limits: dict[str, float] = field(default_factory=dict)  # "": default; else one rounding to the result's dtype
    wanted: tuple[str, ...] = ()
    layouts: dict[str, str] = field(default_factory=dict)  # "grad" is the incoming gradients'
    bounds: Callable[[Named, list[Tensor]], Bounds] | None = None
    inner: torch.dtype = torch.float32  # the type intermediate results are stored in


@dataclass
class Outcome:
    """Largest error of each result, in units of max(|ref|, ..); what failed."""

    errors: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    cancelled: int = 0
    undecided: int = 0
    flipped: int = 0


def evaluate(case: Case, tensors: Named, incoming: list[Tensor], outputs: tuple[Tensor, ...]) -> Named:
    """The definition's values and gradients."""
    inputs = {name: t.detach().requires_grad_(name in case.wanted) for name, t in tensors.items()}
    values = case.truth(inputs, outputs)
    found = {f"out{i}": v.detach() for i, v in enumerate(values)}
    if case.wanted:
        pairs = [(v, g) for v, g in zip(values, incoming, strict=True) if v.requires_grad]
        wanted = [inputs[name] for name in case.wanted]
        grads = torch.autograd.grad([v for v, _ in pairs], wanted, [g for _, g in pairs])
        found |= {f"d{name}": g for name, g in zip(case.wanted, grads, strict=True)}
    return found


def run(case: Case, device: str, generator: torch.Generator) -> tuple[Named, list[Tensor], tuple[Tensor, ...]]:
    """The op's values and gradients on the CPU, the incoming gradients, its outputs."""
    inputs = {}
    for name, t in case.tensors.items():
        inputs[name] = place(t, case.layouts.get(name, "dense"), device).detach().requires_grad_(name in case.wanted)
    with poisoned():
        outputs = case.call(inputs)
    how = case.layouts.get("grad", "dense")
    incoming = []
    for out in outputs:
        g = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
        incoming.append(torch.full_like(g, g.flatten()[0].item()) if how == "expanded" else g)
    found = {f"out{i}": out.detach().cpu() for i, out in enumerate(outputs)}
    if case.wanted:
        placed = [place(g, how, device) for g in incoming]
        with poisoned():
            grads = torch.autograd.grad(outputs, [inputs[name] for name in case.wanted], placed)
        for name, g in zip(case.wanted, grads, strict=True):
            found[f"d{name}"] = g.cpu()
    return found, incoming, tuple(out.detach().cpu() for out in outputs)


def sensitivity(case: Case, tensors: Named, incoming: list[Tensor], outputs: tuple[Tensor, ...], ref: Named) -> Named:
    """Root mean square response of every result to random relative perturbations of all inputs."""
    generator = torch.Generator().manual_seed(0)

    def shake(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        return t * (1 + STEP * torch.randn(t.shape, generator=generator, dtype=torch.float64))

    total = {name: torch.zeros_like(value) for name, value in ref.items()}
    for _ in range(DIRECTIONS):
        moved = evaluate(case, {n: shake(t) for n, t in tensors.items()}, [shake(g) for g in incoming], outputs)
        for name, value in moved.items():
            total[name] += ((value - ref[name]) / STEP) ** 2
    return {name: (value / DIRECTIONS).sqrt() for name, value in total.items()}


def excess(out: Tensor, ref: Tensor, scale: Tensor, allowance: Tensor | None, inner: torch.dtype) -> Tensor:
    """Element-wise error beyond the allowance, in units of the scale; infinite where ``out`` is not finite."""
    difference = (out.double() - ref).abs()
    if allowance is not None:
        difference = (difference - allowance).clamp(min=0)
    smallest = max(torch.finfo(out.dtype).tiny, torch.finfo(inner).tiny)
    error = difference / torch.maximum(ref.abs(), scale).clamp(min=smallest)
    return torch.where(out.double().isfinite(), error, float("inf"))


def check(case: Case, device: str = "cpu", seed: int = 0) -> Outcome:
    """Run and compare one case."""
    outcome = Outcome()
    found, incoming, outputs = run(case, device, torch.Generator().manual_seed(seed))
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in case.tensors.items()}
    incoming = [g.double() for g in incoming]
    ref = evaluate(case, tensors, incoming, outputs)
    bounds = case.bounds(tensors, incoming) if case.bounds is not None else Bounds()
    outcome.undecided = bounds.undecided
    response: Mapping[str, Tensor] | None = None
    for name, out in found.items():
        once = limit(out.dtype) if out.is_floating_point() else EXACT
        allowed, r = case.limits.get(name, case.limits.get("", once)), ref[name]
        if out.shape != r.shape:
            outcome.failures.append(f"{name}: shape {tuple(out.shape)} instead of {tuple(r.shape)}")
            continue
        if allowed == EXACT:
            same = out == (r.float().to(out.dtype) if out.dtype in (torch.float16, torch.bfloat16) else r.to(out.dtype))
            outcome.errors[name] = float("inf") if not same.all() else 0.0
            if not same.all():
                outcome.failures.append(f"{name}: {int((~same).sum())} of {same.numel()} elements differ")
            continue
        scale = bounds.scale.get(name)
        if scale is None:
            scale = r.square().mean().sqrt().expand(r.shape)
        allowance = bounds.allowance.get(name)
        error = excess(out, r, scale, allowance, case.inner)
        if error.numel() and error.max() > allowed and name not in bounds.scale:
            response = response or sensitivity(case, tensors, incoming, outputs, ref)
            size = torch.maximum(scale, response[name]) + bounds.terms.get(name, 0.0)
            error = excess(out, r, size, allowance, case.inner)
            outcome.cancelled += 1
        if allowance is not None:  # report what the error is where it does not need the allowance
            plain = excess(out, r, scale, None, case.inner)
            outcome.flipped += int((plain > allowed).sum())
            error = torch.where(plain <= allowed, plain, error)
        worst = error.max().item() if error.numel() else 0.0
        outcome.errors[name] = worst
        if not worst <= allowed:
            at = int(error.flatten().argmax())
            outcome.failures.append(
                f"{name}: error {worst:.3g} > {allowed:.3g} at {at} of {tuple(r.shape)} "
                f"({out.flatten()[at].item():.8g} instead of {r.flatten()[at].item():.8g}; "
                f"{int((error > allowed).sum())} elements)"
            )
    return outcome
