"""Random cases of ops that are two, or several, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from jointnas_kernels import ops
from tests.fuzz.check import SUMMED, Bounds, Case, Named, limit
from tests.fuzz.levels import Mixture, constant, token_levels, wide
from tests.fuzz.norms import Norm
from tests.fuzz.quantizers import clip_ratios, draw_mixture, grid, mixture_text
from tests.fuzz.source import Source, describe, layouts


class Levels:
    """Activation precisions behind another op. The last bit of its value v decides levels, and fp32 decides that bit:
    v is taken from the op alone on the same backend (held to a definition of its own), the levels from the rule."""

    def __init__(self, source: Source) -> None:
        self.bits = source.pick(([2, 4, 8, 16], [2, 4, 8, 16], [4], [8, 16], [3, 5, 7]))
        self.symmetric, self.dtype = source.flag(), source.dtype
        self.probs = source.probs(len(self.bits))
        self.values: list[Tensor] = []

    def of(self, v: Tensor) -> None:
        self.values = []
        for width in self.bits:
            value = v.detach().cpu().double()
            level, s = (value, 1.0) if width == 16 else token_levels(value, width, self.symmetric, self.dtype)
            self.values.append(level * s)

    def mixture(self, probs: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([p * of(value) for p, value in zip(probs, self.values, strict=True)]).sum(0)


def masked_swiglu_quant(source: Source) -> Case:
    shape = (*source.leading(source.limits.rows), source.size(source.limits.width))
    levels = Levels(source)
    tensors = {
        "gate": source.randn(*shape), "up": source.randn(*shape), "out_mask": source.mask(shape[-1]),
        "in_mask": source.mask(shape[-1]), "probs": levels.probs,
    }  # fmt: skip

    def call(t: Named) -> tuple[Tensor, ...]:
        vectors = (t["gate"], t["up"], t["out_mask"], t["in_mask"], source.backend)
        levels.of(ops.masked_swiglu(*vectors))
        return (ops.masked_swiglu(*vectors, levels.bits, t["probs"], levels.symmetric),)

    def truth(t: Named, _: object) -> tuple[Tensor, ...]:
        a = t["out_mask"] * t["gate"]
        v = a / (1 + torch.exp(-a)) * (t["out_mask"] * t["up"]) * t["in_mask"]
        return (levels.mixture(t["probs"], lambda value: constant(value, v)),)

    return Case(
        describe(shape=shape, bits=levels.bits, symmetric=levels.symmetric),
        tensors,
        call,
        truth,
        limits={name: limit(source.dtype, 2) for name in ("dgate", "dup", "dout_mask", "din_mask")},  # g once more
        wanted=source.subset(tuple(tensors)),
        layouts=layouts(source, ("out_mask", "in_mask", "probs"), gate=len(shape), up=len(shape)),
        bounds=lambda t, _: Bounds(scale={"out0": levels.mixture(t["probs"], Tensor.abs)}),
    )


def residual_rmsnorm(source: Source) -> Case:
    """The quantizer and the norm see h rounded; all gradients are of sums that nothing rounds."""
    norm, levels = Norm(source), Levels(source) if source.flag() else None
    n = norm.shape[-1]
    tensors = norm.tensors | {"y": source.randn(*norm.shape), "in_mask": source.mask(n)}
    norm.masked = True
    if levels is not None:
        tensors["probs"] = levels.probs
    wanted = source.subset(tuple(name for name in tensors if name != "weight"))

    def stream(t: Named) -> Tensor:
        return t["x"] + t["in_mask"] * t["y"]

    def call(t: Named) -> tuple[Tensor, ...]:
        quantize = () if levels is None else (levels.bits, t["probs"], levels.symmetric)
        h, out = ops.residual_rmsnorm(
            t["x"], t["y"], t["weight"], t["alpha"], norm.sizes, norm.eps, t["in_mask"], source.backend, *quantize
        )
        if levels is not None:
            levels.of(norm.call(t | {"x": h.detach()}))
        return h, out

    def truth(t: Named, _: object) -> tuple[Tensor, ...]:
        h = stream(t)
        v = norm.truth(t | {"x": h})
        return h, v if levels is None else levels.mixture(t["probs"], lambda value: constant(value, v))

    def bounds(t: Named, incoming: list[Tensor]) -> Bounds:
        own = t | {"x": stream(t)}
        terms = norm.terms(own, incoming[1] * (1.0 if levels is None else t["probs"].sum())) + incoming[0].abs()
        found = Bounds(terms={"dx": terms, "dy": terms * t["in_mask"].abs()})
        if levels is not None:
            found.scale["out1"] = levels.mixture(t["probs"], Tensor.abs)
        return found

    text = "" if levels is None else describe(bits=levels.bits, symmetric=levels.symmetric)
    return Case(
        f"{norm.text} {text}",
        tensors,
        call,
        truth,
        limits={"out0": limit(source.dtype), "": limit(source.dtype, SUMMED + 1)},  # h is rounded before all but itself
        wanted=wanted,
        layouts=layouts(source, ("weight", "alpha", "in_mask", "probs"), x=len(norm.shape), y=len(norm.shape)),
        bounds=bounds,
    )


def another(source: Source, first: Mixture) -> Mixture:
    """A weight of the same inputs, precisions and probabilities."""
    t, outputs = first.tensors, source.size(source.limits.features)
    p, rank, inputs = t["lora_a"].shape
    if first.exact:
        weight = grid(source, outputs, inputs, step=2.0**-6, most=63)
        a, b = grid(source, p, rank, inputs, step=0.125, most=4), grid(source, p, outputs, rank, step=0.125, most=4)
    else:
        weight = source.randn(outputs, inputs, dtype=torch.float64)
        a = source.randn(p, rank, inputs, dtype=torch.float64) * 0.2
        b = source.randn(p, outputs, rank, dtype=torch.float64) * 0.2
    lora = t["lora_a"].dtype
    own = {"weight": weight.to(source.dtype), "lora_a": a.to(lora), "lora_b": b.to(lora), "probs": t["probs"]}
    if "clip" in t:
        own["clip"] = clip_ratios(source, p, outputs, inputs // first.group)
    return replace(first, tensors=own)


def quant_lora_linear_group(source: Source) -> Case:
    first, possible = draw_mixture(source, True)
    members = [first, *(another(source, first) for _ in range(source.pick((0, 1, 2))))]
    ahead, biased = source.free((False, True)), source.flag()
    tensors = {
        "x": source.randn(*source.leading(source.limits.rows), first.tensors["weight"].shape[1]),
        "probs": first.tensors["probs"],
    }
    own = [name for name in first.tensors if name != "probs"]
    for j, m in enumerate(members):
        tensors |= {f"{name}{j}": m.tensors[name] for name in own}
        if biased:
            tensors[f"bias{j}"] = source.randn(m.tensors["weight"].shape[0])
    wanted = tuple(n for name in possible for n in ([name] if name in ("x", "probs") else each(name, len(members))))
    reduced = wide(source.dtype) if source.backend == "triton" else source.dtype

    def of(t: Named, j: int) -> Named:
        return {name: t[f"{name}{j}"] for name in own} | {"probs": t["probs"]}

    def call(t: Named) -> tuple[Tensor, ...]:
        parts = [[t[name] for name in each(part, len(members))] for part in ("weight", "lora_a", "lora_b")]
        clips = [t.get(name) for name in each("clip", len(members))]
        mixed = None
        if ahead:
            mixed = torch.cat([
                ops.quant_lora_mix(w, a, b, m.scaling, m.bits, t["probs"], m.group, c, backend=source.backend)
                for m, w, a, b, c in zip(members, *parts, clips, strict=True)
            ]).detach()  # fmt: skip
        return ops.quant_lora_linear_group(
            t["x"], *parts, first.scaling, first.bits, t["probs"], first.group, clips, first.ste, first.mode,
            [t.get(name) for name in each("bias", len(members))], source.backend, mixed,
        )  # fmt: skip

    def truth(t: Named, _: object) -> tuple[Tensor, ...]:
        ys = [t["x"] @ m.value(of(t, j)).T for j, m in enumerate(members)]
        return tuple(y + t[f"bias{j}"] if biased else y for j, y in enumerate(ys))

    def bounds(t: Named, incoming: list[Tensor]) -> Bounds:
        x, found, dx, dprobs = t["x"].flatten(0, -2), Bounds(), [], []
        for j, (m, grad) in enumerate(zip(members, incoming, strict=True)):
            g, spread = grad.flatten(0, -2), m.spread(t["probs"])
            one = m.gradient_bounds(of(t, j), g.T @ x)
            found.undecided += one.undecided
            found.allowance |= {f"{name}{j}": value for name, value in one.allowance.items() if name != "dprobs"}
            found.allowance[f"out{j}"] = (x.abs() @ spread.T).view(grad.shape)
            dx.append((g.abs() @ spread).view(t["x"].shape))
            dprobs.append(one.allowance["dprobs"])
        found.allowance |= {"dx": torch.stack(dx).sum(0), "dprobs": torch.stack(dprobs).sum(0)}
        return found

    count = range(len(members))
    return Case(
        describe(x=tuple(tensors["x"].shape), count=len(members), ahead=ahead, biased=biased, **mixture_text(first)),
        tensors,
        call,
        truth,
        # as of quant_lora_linear; dx is stored after each addition
        limits={f"out{j}": limit(source.dtype, SUMMED + 1) for j in count}
        | {"dx": limit(source.dtype, SUMMED + len(members))}
        | {f"dlora_{part}{j}": limit(source.dtype, SUMMED + 2) for part in "ab" for j in count}
        | {name: limit(reduced, SUMMED) for name in ("dprobs", *each("dclip", len(members)))},
        wanted=wanted,
        layouts={"x": source.layout(), "grad": source.layout(), "probs": source.pick(("dense", "offset", "step"))},
        bounds=bounds,
        inner=source.dtype,
    )


def each(name: str, count: int) -> list[str]:
    return [f"{name}{j}" for j in range(count)]


FUSED: dict[str, Callable[[Source], Case]] = {
    "masked_swiglu_quant": masked_swiglu_quant,
    "quant_lora_linear_group": quant_lora_linear_group,
    "residual_rmsnorm": residual_rmsnorm,
}
