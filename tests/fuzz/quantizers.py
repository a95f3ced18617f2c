"""Random cases of the quantizer ops with their definitions, and what is exact about them.

A quantizer is discontinuous, so fp64 alone does not define its levels: the rule says in which precision each step is
rounded. Every step here is computed in fp64 from rounded operands and then rounded to the rule's precision, which is
the same as computing it there (53 >= 2 · 24 + 2 bits: double rounding is innocuous for + - · /).

* Levels of given values (``fake_quant_weight``, ``act_quant_mix``, ``lowbit_linear``) must agree exactly.
* ``quant_lora_mix`` quantizes W + B'A, a sum whose fp32 value depends on the order of addition. Half of the cases put
  W, A and B' on a dyadic grid, where every order gives the same fp32 value, ties included: levels must agree exactly.
  In the other half the sum is known to (r + 4) · 2^-23 · (|W| + |B'| |A|) (tensor cores truncate, hence not 2^-24), the
  scale and the quotient are intervals, and a level is *undecided* where the interval holds a rounding boundary. Each
  result may then deviate by what the undecided levels, scales and straight-through masks can change in it, no more.
  (The largest |w| of a group always is undecided if negative: by construction it lies at -(2^b - 1)/2, a tie.)

Levels, scales and masks enter the differentiable definition as constants; eager autograd gives the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jointnas_kernels import ops
from jointnas_kernels.ops import pack
from tests.fuzz.check import EXACT, SUMMED, Bounds, Case, Named, limit
from tests.fuzz.source import Source


def describe(**values: object) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def to(dtype: torch.dtype, x: Tensor) -> Tensor:
    """x (fp64) rounded to ``dtype``, in fp64."""
    return x.to(dtype).double()


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def constant(value: Tensor, like: Tensor) -> Tensor:
    """``value`` with the gradient of ``like``."""
    return value + (like - like.detach())


# ---- weights ---------------------------------------------------------------------------------------------------------


@dataclass
class Groups:
    """Quantized groups [.., G, g] or [.., G, 1]: what the rule gives, and how far fp32 sums may move it."""

    level: Tensor  # level minus zero point
    scale: Tensor
    slope: Tensor  # ds/dclip
    inside: Tensor  # the level needed no clamping
    spread: Tensor  # |Q| can differ by this much
    spread_slope: Tensor  # level - inside · w/s can differ by this much
    mask_undecided: Tensor
    level_undecided: Tensor


def quantize(
    w: Tensor, bits: int, clip: Tensor | None, symmetric: bool, dtype: torch.dtype, slack: Tensor | None
) -> Groups:
    """The rule for w [.., G, g], known to ``slack`` (None: exactly), clip [.., G] and scales stored as ``dtype``."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    acc = wide(dtype)
    w = to(acc, w)
    ratio = None if clip is None else clip.unsqueeze(-1)
    divisor = (2**bits - 1) / 2 if symmetric else 2**bits - 1
    if symmetric:
        unit, least = w.abs().amax(-1, keepdim=True), None
    else:
        least = w.amin(-1, keepdim=True).clamp(max=0)
        unit = to(acc, w.amax(-1, keepdim=True).clamp(min=0) - least)

    def stored(raw: Tensor) -> Tensor:
        s = to(dtype, to(acc, raw))
        return torch.where(s < 2.0**-100, 1.0, s)

    def times(x: Tensor) -> Tensor:
        return x if ratio is None else to(acc, ratio * x)

    s = stored(times(unit) / divisor)
    v = to(acc, w / s)
    if least is None:
        zero = torch.zeros_like(s)
    else:
        zero = to(acc, low - to(acc, times(least) / s)).clamp(low, high).round()
        v = to(acc, v + zero)
    rounded = v.round()
    level, inside = rounded.clamp(low, high) - zero, (rounded >= low) & (rounded <= high)
    none = torch.zeros_like(w)
    if slack is None:
        no = torch.zeros_like(inside)
        return Groups(level, s, unit / divisor, inside, none, none, no, no)
    assert symmetric, "only given weights are quantized asymmetrically"
    eps = 4 * torch.finfo(acc).eps
    smallest, largest = (w.abs() - slack).clamp(min=0).amax(-1, keepdim=True), (w.abs() + slack).amax(-1, keepdim=True)
    s_low, s_high = stored(times(smallest) / divisor * (1 - eps)), stored(times(largest) / divisor * (1 + eps))
    bottom, top = w - slack, w + slack
    v_low = torch.where(bottom > 0, bottom / s_high, bottom / s_low) - eps * v.abs()
    v_high = torch.where(top > 0, top / s_low, top / s_high) + eps * v.abs()
    levels = [x.round().clamp(low, high) for x in (v_low, v_high)]
    corners = torch.stack([q * x for q in levels for x in (s_low, s_high)])
    spread = torch.maximum(corners.amax(0) - level * s, level * s - corners.amin(0))
    sides = [(x.round() >= low) & (x.round() <= high) for x in (v_low, v_high)]
    level_undecided = (levels[0] != levels[1]) | ((s_high - s_low) > 1e-4 * s)
    mask_undecided = (sides[0] != sides[1]) | (sides[0] != inside)
    spread_slope = levels[1] - levels[0] + torch.where(
        mask_undecided, torch.maximum(v_low.abs(), v_high.abs()), torch.where(inside, v_high - v_low, none)
    )
    spread_slope = spread_slope + ((largest - smallest) / unit.clamp(min=1e-300)) * (level - inside * v).abs()
    return Groups(level, s, unit / divisor, inside, spread, spread_slope, mask_undecided, level_undecided)


def dequantize(w: Tensor, clip: Tensor | None, groups: Groups, ste: str) -> Tensor:
    """Q(w) with its straight-through gradients; w [.., G, g], clip [.., G]."""
    if ste == "identity":
        return constant(groups.level * groups.scale, w)
    s = groups.scale if clip is None else constant(groups.scale, clip.unsqueeze(-1) * groups.slope)
    v = w / s
    return (groups.level + groups.inside * (v - v.detach())) * s


def clip_slope(size: Tensor, w: Tensor, groups: Groups, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of dclip = ds/dclip · sum G (level - inside · w/s) with |G| = size: the sum of |terms|, and the error of level
    and quotient (each rounded once as a factor and once as a product), which are far larger than their difference."""
    v, slope = groups.inside * (w / groups.scale), groups.slope.squeeze(-1)
    rounding = torch.finfo(wide(dtype)).eps * (size * (groups.level.abs() + v.abs())).sum(-1) * slope
    return (size * (groups.level - v).abs()).sum(-1) * slope, rounding


def clip_ratios(source: Source, *shape: int) -> Tensor:
    """Clipping ratios in (0, 1], many of them 1 (where max|w| / s is a tie) or a simple fraction."""
    ratios = 0.4 + 0.6 * torch.rand(shape, generator=source.data, dtype=torch.float64)
    if source.free((False, True)):
        ratios = (ratios * 8).ceil() / 8
    return ratios.to(source.vector_dtype)


def grid(source: Source, *shape: int, step: float, most: int) -> Tensor:
    """Small integers times a power of two: sums of products of these are exact in fp32."""
    values = torch.randint(-most, most + 1, shape, generator=source.data).double() * step
    if source.free((False, False, False, True)):
        values[..., 0, :] = 0
    return values


def group_shape(source: Source) -> tuple[int, int]:
    """(group size, groups) within the limits; group sizes are compiled in."""
    sizes = [g for g in (1, 3, 8, 16, 24, 32, 64, 100, 128) if g <= source.limits.width]
    size = source.pick(sizes)
    return size, source.size(max(1, source.limits.width // size))


def fake_quant_weight(source: Source) -> Case:
    group, count = group_shape(source)
    outputs, inputs = source.size(source.limits.features), group * count
    bits, symmetric = source.pick((2, 3, 4, 5, 6, 7, 8)), source.flag()
    ste = source.pick(("identity", "clip"))
    weight = grid(source, outputs, inputs, step=2.0**-5, most=31).to(source.dtype)
    if source.free((False, True)):
        weight = source.randn(outputs, inputs)
    tensors = {"weight": weight}
    clip = clip_ratios(source, outputs, count) if source.flag() else None
    if clip is not None:
        tensors["clip"] = clip
    split = weight.double().unflatten(-1, (-1, group))
    groups = quantize(split, bits, None if clip is None else clip.double(), symmetric, source.dtype, None)

    def truth(t: Named, _: object) -> tuple[Tensor, ...]:
        return (dequantize(t["weight"].unflatten(-1, (-1, group)), t.get("clip"), groups, ste).flatten(-2),)

    def bounds(t: Named, incoming: list[Tensor]) -> Bounds:
        found = Bounds()
        if clip is not None and ste == "clip":
            terms, rounding = clip_slope(incoming[0].unflatten(-1, (-1, group)).abs(), split, groups, source.dtype)
            found.scale["dclip"], found.allowance["dclip"] = terms, rounding
        return found

    return Case(
        describe(
            outputs=outputs, inputs=inputs, group=group, bits=bits, symmetric=symmetric, ste=ste, clip=clip is not None
        ),
        tensors,
        lambda t: (
            ops.fake_quant_weight(t["weight"], bits, group, symmetric, t.get("clip"), ste, backend=source.backend),
        ),
        truth,
        limits={"out0": EXACT} | ({} if source.dtype == torch.float64 else {"dweight": EXACT}),
        wanted=("weight", "clip") if clip is not None and ste == "clip" and source.flag() else ("weight",),
        layouts={"weight": source.layout(), "clip": source.layout(), "grad": source.layout()},
        bounds=bounds,
    )  # fmt: skip


# ---- mixture of precisions with LoRA ---------------------------------------------------------------------------------


@dataclass
class Mixture:
    """One drawn mixture: its tensors, its constants and its definition."""

    tensors: Named
    bits: list[int]
    group: int
    scaling: float
    ste: str
    mode: str
    dtype: torch.dtype
    exact: bool

    def __post_init__(self) -> None:
        t = {name: value.double() for name, value in self.tensors.items()}
        acc = wide(self.dtype)
        self.round_a = to(self.dtype, t["lora_a"]) - t["lora_a"]
        self.round_b = to(self.dtype, to(acc, t["lora_b"] * self.scaling)) - t["lora_b"] * self.scaling
        self.groups: list[Groups] = []
        a, b = self.lora(t)
        for p, bits in enumerate(self.bits):
            w = t["weight"] + b[p] @ a[p]
            slack = None
            if not self.exact:
                units = (a.shape[1] + 4) * (2.0**-23 if acc == torch.float32 else 2.0**-52)
                slack = self.split(units * (t["weight"].abs() + b[p].abs() @ a[p].abs()))
            clip = t["clip"][p] if "clip" in t else None
            self.groups.append(quantize(self.split(w), bits, clip, True, self.dtype, slack))

    def split(self, w: Tensor) -> Tensor:
        return w.unflatten(-1, (-1, self.group))

    def lora(self, t: Named) -> tuple[Tensor, Tensor]:
        """(A, scaling · B) rounded to the weight's dtype, with straight-through gradients."""
        return t["lora_a"] + self.round_a, t["lora_b"] * self.scaling + self.round_b

    def value(self, t: Named) -> Tensor:
        """W~ [O, I], differentiable."""
        a, b = self.lora(t)
        out = torch.zeros_like(t["weight"])
        for p, groups in enumerate(self.groups):
            w = self.split(t["weight"] + b[p] @ a[p])
            clip = t["clip"][p] if "clip" in t else None
            out = out + t["probs"][p] * dequantize(w, clip, groups, self.ste).flatten(-2)
        return out

    def spread(self, probs: Tensor) -> Tensor:
        """How far W~ may move with the undecided levels."""
        return torch.stack([p.abs() * g.spread.flatten(-2) for p, g in zip(probs, self.groups, strict=True)]).sum(0)

    def terms(self, probs: Tensor) -> Tensor:
        """sum_p |probs_p Q_p|."""
        q = [(p * g.level * g.scale).abs().flatten(-2) for p, g in zip(probs, self.groups, strict=True)]
        return torch.stack(q).sum(0)

    def undecided(self) -> int:
        return sum(int(g.level_undecided.sum()) for g in self.groups)

    def gradient_bounds(self, t: Named, g: Tensor) -> Bounds:
        """Of everything but the output, for g = dL/dW~."""
        a, b = (x.abs() for x in self.lora(t))
        size, probs = g.abs(), t["probs"].abs()
        found = Bounds(undecided=self.undecided())
        grouped = self.split(size)
        da, db, dprobs, dclip, clip_terms = [], [], [], [], []
        for p, groups in enumerate(self.groups):
            lost = (grouped * groups.mask_undecided).flatten(-2) if self.ste == "clip" else torch.zeros_like(size)
            da.append(probs[p] * b[p].T @ lost)
            db.append(self.scaling * probs[p] * lost @ a[p].T)
            dprobs.append((grouped * groups.spread).sum())
            w = self.split(t["weight"] + self.lora(t)[1][p] @ self.lora(t)[0][p])
            terms, rounding = clip_slope(grouped, w, groups, self.dtype)
            clip_terms.append(probs[p] * terms)
            undecided = (grouped * groups.spread_slope).sum(-1) * groups.slope.squeeze(-1)
            dclip.append(probs[p] * (rounding + undecided))
        stacked = {"dlora_a": da, "dlora_b": db, "dprobs": dprobs, "dclip": dclip}
        found.allowance = {name: torch.stack(values) for name, values in stacked.items()}
        found.scale["dclip"] = torch.stack(clip_terms)
        return found


def draw_mixture(source: Source, with_x: bool) -> tuple[Mixture, tuple[str, ...]]:
    """A mixture and the inputs that may get gradients under its mode."""
    group, count = group_shape(source)
    outputs, rank = source.size(source.limits.features), source.size(33)
    if source.backend == "cuda":  # what the CUDA kernel takes; anything else it refuses
        group, rank = source.pick((32, 64, 128)), rank + rank % 2
        count = 128 // group * source.size(max(1, source.limits.width // 128))
    inputs = group * count
    bits = source.pick(([2, 4, 8], [2, 4, 8], [4], [8], [2, 3], [3, 4, 6, 8], [2, 2]))
    lora = source.pick((source.dtype, source.vector_dtype))
    exact, p = source.free((False, True)), len(bits)
    if exact:
        weight = grid(source, outputs, inputs, step=2.0**-6, most=63)
        a, b = grid(source, p, rank, inputs, step=0.125, most=4), grid(source, p, outputs, rank, step=0.125, most=4)
        scaling = source.free((0.5, 1.0, 2.0))
    else:
        weight = source.randn(outputs, inputs, dtype=torch.float64)
        a, b = source.randn(p, rank, inputs, dtype=torch.float64), source.randn(p, outputs, rank, dtype=torch.float64)
        a, b = a * 0.2, b * 0.2
        scaling = source.free((0.5, 1.0, 0.3, 2.0))
    if source.free((False, False, False, True)):
        b = torch.zeros_like(b)  # how LoRA starts
    tensors = {
        "weight": weight.to(source.dtype), "lora_a": a.to(lora), "lora_b": b.to(lora), "probs": source.probs(p),
    }  # fmt: skip
    if source.flag():
        tensors["clip"] = clip_ratios(source, p, outputs, count)
    ste, mode = source.pick(("identity", "clip")), source.pick(("weight", "arch", "full"))
    possible = ["x"] if with_x else []
    if mode != "arch":
        possible += ["lora_a", "lora_b"] + (["clip"] if "clip" in tensors and ste == "clip" else [])
    if mode != "weight":
        possible.append("probs")
    mixture = Mixture(tensors, bits, group, scaling, ste, mode, source.dtype, exact)
    return mixture, source.subset(possible)


def mixture_layouts(source: Source) -> dict[str, str]:
    names = ("weight", "lora_a", "lora_b", "clip", "x", "grad")
    vectors = {n: source.pick(("dense", "dense", "offset", "step")) for n in ("probs", "bias")}
    return {name: source.layout() for name in names} | vectors


def mixture_text(m: Mixture) -> dict[str, object]:
    shapes = {name: tuple(t.shape) for name, t in m.tensors.items()}
    return {"group": m.group, "bits": m.bits, "ste": m.ste, "mode": m.mode, "exact": m.exact, "shapes": shapes}


def quant_lora_mix(source: Source) -> Case:
    m, wanted = draw_mixture(source, False)

    def bounds(t: Named, incoming: list[Tensor]) -> Bounds:
        found = m.gradient_bounds(t, incoming[0])
        found.allowance["out0"], found.scale["out0"] = m.spread(t["probs"]), m.terms(t["probs"])
        return found

    return Case(
        describe(**mixture_text(m)),
        m.tensors,
        lambda t: (
            ops.quant_lora_mix(
                t["weight"], t["lora_a"], t["lora_b"], m.scaling, m.bits, t["probs"], m.group, t.get("clip"), m.ste,
                m.mode, backend=source.backend,
            ),
        ),
        lambda t, _: (m.value(t),),
        # the incoming gradient, masked or not, may be stored for the tensor cores before B'^T G and G A^T
        limits={"dlora_a": limit(source.dtype, 2), "dlora_b": limit(source.dtype, 2)},
        wanted=wanted,
        layouts=mixture_layouts(source),
        bounds=bounds,
    )  # fmt: skip


def quant_lora_linear(source: Source) -> Case:
    m, wanted = draw_mixture(source, True)
    outputs, inputs = m.tensors["weight"].shape
    tensors = m.tensors | {"x": source.randn(*source.leading(source.limits.rows), inputs)}
    if source.flag():
        tensors["bias"] = source.randn(outputs)
        wanted = (*wanted, "bias") if source.flag() else wanted
    recompute = source.free((False, True))
    reduced = wide(source.dtype) if source.backend == "triton" else source.dtype

    def truth(t: Named, _: object) -> tuple[Tensor, ...]:
        y = t["x"] @ m.value(t).T
        return (y + t["bias"] if "bias" in t else y,)

    def bounds(t: Named, incoming: list[Tensor]) -> Bounds:
        g, x, spread = incoming[0].flatten(0, -2), t["x"].flatten(0, -2), m.spread(t["probs"])
        found = m.gradient_bounds(t, g.T @ x)
        found.scale.pop("dclip")  # here dL/dW~ is itself a sum: its cancellation is left to the sensitivity
        found.allowance["out0"] = (x.abs() @ spread.T).view(incoming[0].shape)
        found.allowance["dx"] = (g.abs() @ spread).view(t["x"].shape)
        return found

    return Case(
        describe(x=tuple(tensors["x"].shape), bias="bias" in tensors, recompute=recompute, **mixture_text(m)),
        tensors,
        lambda t: (
            ops.quant_lora_linear(
                t["x"], t["weight"], t["lora_a"], t["lora_b"], m.scaling, m.bits, t["probs"], m.group, t.get("clip"),
                m.ste, m.mode, t.get("bias"), recompute, backend=source.backend,
            ),
        ),
        truth,
        # W~ is stored, then the product; U, V or the masked tile of dW are stored, then dA, dB, then those times probs.
        # Triton keeps dW in fp32 for the other reductions, torch on the CPU cannot.
        limits={name: limit(source.dtype, SUMMED + 1) for name in ("out0", "dx")}
        | {name: limit(source.dtype, SUMMED + 2) for name in ("dlora_a", "dlora_b")}
        | {name: limit(reduced, SUMMED) for name in ("dprobs", "dclip")},
        wanted=wanted,
        layouts=mixture_layouts(source),
        bounds=bounds,
        inner=source.dtype,
    )  # fmt: skip


# ---- activations -----------------------------------------------------------------------------------------------------


def token_levels(x: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(level - zero point, scale) per row of x, every step rounded to ``dtype``."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    least, most = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    tiny = torch.finfo(dtype).eps
    if symmetric:
        s = to(dtype, torch.maximum(-least, most) / ((2**bits - 1) / 2))
        zero = torch.zeros_like(s)
        s = torch.where(s == 0, tiny, s)
    else:
        s = to(dtype, to(dtype, most - least) / (2**bits - 1))
        s = torch.where(s == 0, tiny, s)
        zero = to(dtype, low - to(dtype, least / s)).clamp(low, high).round()
    v = to(dtype, x / s)
    v = v if symmetric else to(dtype, v + zero)
    return v.clamp(low, high).round() - zero, s


def act_quant_mix(source: Source) -> Case:
    shape = (*source.leading(source.limits.rows), source.size(source.limits.width))
    bits = source.pick(([2, 4, 8, 16], [2, 4, 8, 16], [4], [8], [8, 16], [2, 3, 5, 6, 7], [16]))
    symmetric, masked = source.flag(), source.flag()
    tensors = {"x": source.randn(*shape), "probs": source.probs(len(bits))}
    if masked:
        tensors["mask"] = source.mask(shape[-1])
    x = tensors["x"].double()
    x = to(source.dtype, x * tensors["mask"].double()) if masked else x
    values = []
    for width in bits:
        level, s = (x, 1.0) if width == 16 else token_levels(x, width, symmetric, source.dtype)
        values.append(level * s)

    def truth(t: Named, _: object) -> tuple[Tensor, ...]:
        product = t["x"] * t["mask"] if masked else t["x"]
        out = torch.zeros_like(product)
        for p, value in zip(t["probs"], values, strict=True):
            out = out + p * constant(value, product)
        return (out,)

    def bounds(t: Named, incoming: list[Tensor]) -> Bounds:
        terms = torch.stack([(p * v).abs() for p, v in zip(t["probs"], values, strict=True)]).sum(0)
        return Bounds(scale={"out0": terms})

    return Case(
        describe(shape=shape, bits=bits, symmetric=symmetric, masked=masked),
        tensors,
        lambda t: (ops.act_quant_mix(t["x"], bits, t["probs"], symmetric, t.get("mask"), backend=source.backend),),
        truth,
        wanted=source.subset(tuple(tensors)),
        layouts={
            "x": source.layout(), "mask": source.pick(("dense", "dense", "step")),
            "probs": source.pick(("dense", "step")), "grad": source.layout(),
        },
        bounds=bounds,
    )  # fmt: skip


# ---- packed weights --------------------------------------------------------------------------------------------------


def draw_packed(source: Source, outputs: int, inputs: int, bits: int) -> Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (outputs, inputs), generator=source.data)


def pack_weight(source: Source) -> Case:
    """Packing against numpy's bits, and the ways back; also the tiled layout of the CUDA kernels."""
    bits = source.pick((2, 4, 8))
    outputs = source.size(source.limits.features)
    tiled = source.pick((False, False, True))
    inputs = 128 * source.size(3) if tiled else 32 // bits * source.size(max(1, source.limits.width * bits // 32))
    q = draw_packed(source, outputs, inputs, bits)
    kind = source.pick((torch.int8, torch.int32, torch.int64))
    fields = (q.numpy() + 2 ** (bits - 1)).astype(np.uint64).reshape(outputs, -1, 32 // bits)
    words = (fields << (np.arange(32 // bits, dtype=np.uint64) * bits)).sum(-1).astype(np.uint32).view(np.int32)

    def call(t: Named) -> tuple[Tensor, ...]:
        packed = ops.pack_weight(t["q"], bits)
        again = pack.untile_weight(pack.tile_weight(packed, bits), bits, outputs) if tiled else packed
        return packed, ops.unpack_weight(packed, bits, (outputs, inputs)), again

    expected = (torch.from_numpy(words), q.to(torch.int8), torch.from_numpy(words))
    return Case(
        describe(outputs=outputs, inputs=inputs, bits=bits, tiled=tiled, kind=kind),
        {"q": q.to(kind)},
        call,
        lambda t, _: expected,
        layouts={"q": source.layout()},
    )


def lowbit_linear(source: Source) -> Case:
    w_bits, a_bits, symmetric = source.pick((2, 4, 8)), source.pick((2, 4, 8, 16)), source.flag()
    group = 128 if source.backend == "cuda" else source.pick((16, 32, 64, 128))
    count = source.size(max(1, source.limits.width // group))
    outputs, inputs = source.size(source.limits.features), group * count
    scale_type = source.dtype if source.backend == "cuda" else source.pick((source.dtype, source.vector_dtype))
    scale = (0.05 + torch.rand(outputs, count, generator=source.data, dtype=torch.float64)).to(scale_type)
    q = draw_packed(source, outputs, inputs, w_bits)
    tensors = {
        "x": source.randn(*source.leading(source.limits.rows), inputs),
        "packed": ops.pack_weight(q, w_bits),
        "scale": scale,
    }
    x = tensors["x"].double()
    level, s = (x, 1.0) if a_bits == 16 else token_levels(x, a_bits, symmetric, source.dtype)
    x_hat = level * s

    def truth(t: Named, _: object) -> tuple[Tensor, ...]:
        weight = (q.double().unflatten(-1, (-1, group)) * t["scale"].unsqueeze(-1)).flatten(-2)
        return ((t["x"] if a_bits == 16 else x_hat) @ weight.T,)

    def bounds(t: Named, _: list[Tensor]) -> Bounds:
        weight = (q.double().unflatten(-1, (-1, group)).abs() * t["scale"].unsqueeze(-1)).flatten(-2)
        terms = (x_hat.abs() @ weight.T) / inputs**0.5
        return Bounds(scale={"out0": terms})

    return Case(
        describe(x=tuple(x.shape), outputs=outputs, group=group, w_bits=w_bits, a_bits=a_bits, symmetric=symmetric,
                 scale=scale_type),
        tensors,
        lambda t: (
            ops.lowbit_linear(
                t["x"], t["packed"], t["scale"], w_bits, a_bits, group, backend=source.backend, symmetric=symmetric
            ),
        ),
        truth,
        layouts={"x": source.layout(), "packed": source.pick(("dense", "padded")), "scale": source.layout()},
        bounds=bounds,
    )  # fmt: skip


QUANTIZERS: dict[str, Callable[[Source], Case]] = {
    "fake_quant_weight": fake_quant_weight,
    "quant_lora_mix": quant_lora_mix,
    "quant_lora_linear": quant_lora_linear,
    "act_quant_mix": act_quant_mix,
    "pack_weight": pack_weight,
    "lowbit_linear": lowbit_linear,
}
