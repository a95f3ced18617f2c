"""Random cases of the quantizer ops; their definitions are in levels.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from jointnas_kernels import ops
from jointnas_kernels.ops.lowbit import tiles
from tests.fuzz.check import EXACT, SUMMED, Bounds, Case, Named, limit
from tests.fuzz.levels import Mixture, clip_slope, constant, dequantize, quantize, to, token_levels, wide
from tests.fuzz.source import Source


def describe(**values: object) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


# ---- weights ---------------------------------------------------------------------------------------------------------


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
        # the incoming gradient, masked and times probs, may be stored for the matrix units before B'^T G and G A^T
        limits={name: limit(source.dtype, SUMMED + 1) for name in ("dlora_a", "dlora_b")},
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


def act_quant_mix(source: Source) -> Case:
    shape = (*source.leading(source.limits.rows), source.size(source.limits.width))
    bits = source.pick(([2, 4, 8, 16], [2, 4, 8, 16], [4], [8], [8, 16], [3, 5, 6, 7], [16]))
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
        again = tiles.untile_weight(tiles.tile_weight(packed, bits), bits, outputs) if tiled else packed
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
        """Kernels multiply the stored q + 2^(b-1) and subtract the offset; where partial sums of a group are scaled
        before they meet (one per vector lane), the offset cancels in fp32: eight units of round-off of these terms."""
        scale = t["scale"].repeat_interleave(group, dim=1)
        offset = x_hat.abs() @ ((q.abs() + 2 ** (w_bits - 1)) * scale).T
        terms = x_hat.abs() @ (q.abs() * scale).T
        unit = torch.finfo(wide(source.dtype)).eps / 2
        return Bounds(scale={"out0": terms / inputs**0.5}, allowance={"out0": 8 * unit * offset})

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
