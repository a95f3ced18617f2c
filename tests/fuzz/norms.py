"""Random cases of mixed_rmsnorm, alone and with a mixture of activation precisions behind it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jointnas_kernels import ops
from tests.fuzz.check import Bounds, Case, Named
from tests.fuzz.levels import constant, token_levels
from tests.fuzz.source import Source, describe, keep, layouts, sizes_of, structural_size


class Norm:
    """One drawn norm: its tensors, the call and the definition."""

    def __init__(self, source: Source) -> None:
        self.backend = source.backend
        n = structural_size(source, source.limits.width)
        self.sizes, self.masked = sizes_of(source, n), source.flag()
        self.eps = source.free((1e-6, 1e-5, 1e-2))
        self.shape = (*source.leading(source.limits.rows), n)
        self.tensors = {
            "x": source.randn(*self.shape),
            "weight": source.randn(n, dtype=source.pick((source.dtype, source.vector_dtype))),
            "alpha": source.probs(len(self.sizes)),
        }
        if self.masked:
            self.tensors["in_mask"] = source.mask(n)
        self.kept = keep(self.sizes, n)

    def call(self, t: Named, *quantize: object) -> Tensor:
        return ops.mixed_rmsnorm(
            t["x"], t["weight"], t["alpha"], self.sizes, self.eps, t.get("in_mask"), self.backend, *quantize
        )

    def truth(self, t: Named) -> Tensor:
        y = torch.zeros_like(t["x"])
        for i, size in enumerate(self.sizes):
            x = t["x"] * self.kept[i]
            y = y + t["alpha"][i] * x / torch.sqrt(x[..., :size].pow(2).mean(-1, keepdim=True) + self.eps)
        y = y * t["weight"]
        return y * t["in_mask"] if self.masked else y

    def terms(self, t: Named, incoming: Tensor) -> Tensor:
        """dx is the difference of what a scaled x and the scale itself contribute: zero but for eps at one channel."""
        h = (incoming * t["weight"] * t.get("in_mask", torch.ones(()))).abs()
        x, terms = t["x"].abs(), torch.zeros_like(t["x"])
        for i, size in enumerate(self.sizes):
            inv = (x[..., :size].pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()
            along = (h * x * self.kept[i]).sum(-1, keepdim=True) * inv**2 / size
            terms += t["alpha"][i] * inv * self.kept[i] * (h + x * along)
        return terms

    @property
    def text(self) -> str:
        return describe(shape=self.shape, sizes=self.sizes, masked=self.masked, eps=self.eps)


def mixed_rmsnorm(source: Source) -> Case:
    norm = Norm(source)
    return Case(
        norm.text,
        norm.tensors,
        lambda t: (norm.call(t),),
        lambda t, _: (norm.truth(t),),
        wanted=source.subset(tuple(norm.tensors)),
        layouts=layouts(source, ("weight", "alpha", "in_mask"), x=len(norm.shape)),
        bounds=lambda t, incoming: Bounds(terms={"dx": norm.terms(t, incoming[0])}),
    )


def mixed_rmsnorm_quant(source: Source) -> Case:
    """The last bit of the norm's value v decides levels, and fp32 decides that bit: the definition takes v from the op
    without quantization on the same backend (held to its own definition above), the levels from the rule, the gradients
    from the norm in fp64."""
    norm = Norm(source)
    bits = source.pick(([2, 4, 8, 16], [2, 4, 8, 16], [4], [8, 16], [3, 5, 7]))
    symmetric = source.flag()
    tensors = norm.tensors | {"probs": source.probs(len(bits))}
    values: list[Tensor] = []

    def quantized(v: Tensor, width: int) -> Tensor:
        level, s = (v, 1.0) if width == 16 else token_levels(v, width, symmetric, source.dtype)
        return level * s

    def call(t: Named) -> tuple[Tensor, ...]:
        v = norm.call(t).detach().cpu().double()
        values[:] = [quantized(v, width) for width in bits]
        return (norm.call(t, bits, t["probs"], symmetric),)

    def mixture(t: Named, of: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([p * of(value) for p, value in zip(t["probs"], values, strict=True)]).sum(0)

    def truth(t: Named, _: object) -> tuple[Tensor, ...]:
        v = norm.truth(t)
        return (mixture(t, lambda value: constant(value, v)),)

    def bounds(t: Named, incoming: list[Tensor]) -> Bounds:
        terms = norm.terms(t, incoming[0] * t["probs"].sum())
        return Bounds(scale={"out0": mixture(t, Tensor.abs)}, terms={"dx": terms})

    return Case(
        f"{norm.text} {describe(bits=bits, symmetric=symmetric)}",
        tensors,
        call,
        truth,
        wanted=source.subset(tuple(tensors)),
        layouts=layouts(source, ("weight", "alpha", "in_mask", "probs"), x=len(norm.shape)),
        bounds=bounds,
    )
