"""Random cases of the width-mask ops, each with its mathematical definition in plain differentiable torch.

The definitions are written from the formulas, in the most literal form (loops over choices, explicit masks, softmax
as printed), share nothing with the package, and get their gradients from eager autograd in fp64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jointnas_kernels import ops
from tests.fuzz.check import SUMMED, Bounds, Case, Named, limit
from tests.fuzz.fused import FUSED
from tests.fuzz.norms import mixed_rmsnorm, mixed_rmsnorm_quant
from tests.fuzz.quantizers import QUANTIZERS
from tests.fuzz.source import Source, describe, keep, layouts, sizes_of, structural_size

Builder = Callable[[Source], Case]


# ---- elementwise -----------------------------------------------------------------------------------------------------


def channel_mask(source: Source) -> Case:
    shape = (*source.leading(source.limits.rows), source.size(source.limits.width))
    wanted = source.subset(("x", "mask"))
    return Case(
        describe(shape=shape),
        {"x": source.randn(*shape), "mask": source.mask(shape[-1])},
        lambda t: (ops.channel_mask(t["x"], t["mask"], backend=source.backend),),
        lambda t, _: (t["x"] * t["mask"],),
        wanted=wanted,
        layouts=layouts(source, ("mask",), x=len(shape)),
    )


def masked_swiglu(source: Source) -> Case:
    shape = (*source.leading(source.limits.rows), source.size(source.limits.width))
    wanted = source.subset(("gate", "up", "out_mask", "in_mask"))

    def truth(t: Named, _: object) -> tuple[Tensor, ...]:
        a = t["out_mask"] * t["gate"]
        return (a / (1 + torch.exp(-a)) * (t["out_mask"] * t["up"]) * t["in_mask"],)

    return Case(
        describe(shape=shape),
        {
            "gate": source.randn(*shape), "up": source.randn(*shape),
            "out_mask": source.mask(shape[-1]), "in_mask": source.mask(shape[-1]),
        },
        lambda t: (ops.masked_swiglu(t["gate"], t["up"], t["out_mask"], t["in_mask"], backend=source.backend),),
        truth,
        wanted=wanted,
        layouts=layouts(source, ("out_mask", "in_mask"), gate=len(shape), up=len(shape)),
    )  # fmt: skip


def gated_residual(source: Source) -> Case:
    shape = (*source.leading(source.limits.rows), source.size(source.limits.width))
    masked, gated = source.flag(), source.flag()
    tensors = {"h": source.randn(*shape), "y": source.randn(*shape)}
    if masked:
        tensors["mask"] = source.mask(shape[-1])
    if gated:
        gate = source.free((0.0, 1.0, torch.rand((), generator=source.data).item()))
        tensors |= {"gate": torch.tensor(gate, dtype=source.vector_dtype), "x": source.randn(*shape)}

    def truth(t: Named, _: object) -> tuple[Tensor, ...]:
        z = t["h"] + (t["mask"] * t["y"] if masked else t["y"])
        return (t["x"] + t["gate"] * (z - t["x"]) if gated else z,)

    return Case(
        describe(shape=shape, masked=masked, gated=gated),
        tensors,
        lambda t: (
            ops.gated_residual(t["h"], t["y"], t.get("mask"), t.get("gate"), t.get("x"), backend=source.backend),
        ),
        truth,
        wanted=source.subset(tuple(tensors)),
        layouts=layouts(source, ("mask",), h=len(shape), y=len(shape), x=len(shape)),
    )


def head_rmsnorm(source: Source) -> Case:
    heads, half = source.pick((1, 2, 3, 5)), source.size(min(48, source.limits.width // 2))
    divisors = [2 * d for d in range(1, half + 1) if half % d == 0]
    dims, eps = [source.pick(divisors) for _ in range(source.pick((1, 2, 3)))], source.free((1e-3, 1e-2, 1.0))
    shape = (*source.leading(source.limits.rows), heads, 2 * half)
    tensors = {
        "x": source.randn(*shape),
        "weight": source.randn(2 * half, dtype=source.pick((source.dtype, source.vector_dtype))),
        "mask": source.mask(heads, 2 * half),
        "alpha": source.probs(len(dims)),
    }

    def member(d: int) -> Tensor:
        return (torch.arange(2 * half) % half % (half // (d // 2)) == 0).double()

    def norms(t: Named) -> list[Tensor]:
        p = t["x"] * t["mask"]
        return [((p * member(d)).pow(2).sum(-1, keepdim=True) / d + eps).rsqrt() * member(d) for d in dims]

    def truth(t: Named, _: object) -> tuple[Tensor, ...]:
        scale = sum(a * n for a, n in zip(t["alpha"], norms(t), strict=True))
        return (t["x"] * t["mask"] * scale * t["weight"],)

    def bounds(t: Named, incoming: list[Tensor]) -> Bounds:
        """Every gradient is a difference, as in mixed_rmsnorm."""
        h, p = (incoming[0] * t["weight"]).abs(), (t["x"] * t["mask"]).abs()
        terms = torch.zeros_like(p)
        for a, n, d in zip(t["alpha"], norms(t), dims, strict=True):
            terms += a * n * (h + p * (h * p * member(d)).sum(-1, keepdim=True) * n**2 / d)
        return Bounds(terms={"dx": terms * t["mask"].abs(), "dmask": (terms * t["x"].abs()).flatten(0, -3).sum(0)})

    return Case(
        describe(shape=shape, dims=dims, eps=eps),
        tensors,
        lambda t: (
            ops.head_rmsnorm(t["x"], t["weight"], t["mask"], t["alpha"], dims, eps, backend=source.backend),
        ),
        truth,
        wanted=source.subset(("x", "mask", "alpha")),
        layouts=layouts(source, ("weight", "mask", "alpha"), x=len(shape)),
        bounds=bounds,
    )


def masked_rope(source: Source) -> Case:
    tokens = source.size(source.limits.rows)
    batch = source.free([d for d in (1, 2, 3) if tokens % d == 0])
    length = tokens // batch
    kv = source.pick((1, 2, 3, 4))
    heads, dim = kv * source.pick((1, 2, 3)), 2 * source.size(min(64, source.limits.width) // 2)
    table = source.pick((source.dtype, source.vector_dtype))
    cos_batch, sin_batch = source.free((1, batch)), source.free((1, batch))
    tensors = {
        "q": source.randn(batch, length, heads, dim),
        "k": source.randn(batch, length, kv, dim),
        "cos": source.randn(cos_batch, length, dim, dtype=table),
        "sin": source.randn(sin_batch, length, dim, dtype=table),
        "q_mask": source.mask(heads, dim),
        "k_mask": source.mask(kv, dim),
    }
    if source.flag():
        tensors["v"] = source.randn(batch, length, kv, dim)
    half = dim // 2

    def rotated(t: Named, name: str) -> Tensor:
        x = (t[name] * t[f"{name}_mask"]).transpose(1, 2)  # [B, heads, T, D]
        other = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * t["cos"][:, None] + other * t["sin"][:, None]

    return Case(
        describe(batch=batch, length=length, heads=heads, kv=kv, dim=dim, cos_batch=cos_batch, sin_batch=sin_batch),
        tensors,
        lambda t: ops.masked_rope(
            t["q"], t["k"], t["cos"], t["sin"], t["q_mask"], t["k_mask"], source.backend, t.get("v")
        ),
        lambda t, _: (rotated(t, "q"), rotated(t, "k"), *([t["v"].transpose(1, 2)] if "v" in t else [])),
        wanted=source.subset(tuple(name for name in tensors if name not in ("cos", "sin"))),
        layouts=layouts(source, ("q_mask", "k_mask"), q=4, k=4, v=4, cos=3, sin=3),
    )


def reinmax(source: Source) -> Case:
    shape = (*source.leading(source.limits.rows), source.size(40))
    tau, seed = source.free((1.0, 1.0, 1.3, 2.0)), source.seed()

    def truth(t: Named, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Algorithm 2 of arXiv 2304.08612 with the op's own sample."""
        sample, theta = outputs[0].double(), t["logits"]
        if not ((sample == 1).sum(-1) == 1).all() or not ((sample == 0) | (sample == 1)).all():
            return (torch.full_like(theta, float("nan")) * theta,)  # no one-hot vector: fails
        pi1 = (sample + torch.softmax(theta / tau, -1)) / 2
        pi1 = torch.softmax((pi1.log() - theta).detach() + theta, -1)
        pi2 = 2 * pi1 - torch.softmax(theta, -1) / 2
        return (pi2 - pi2.detach() + sample,)

    def bounds(t: Named, incoming: list[Tensor]) -> Bounds:
        """A softmax's gradient is p (g - <p, g>), zero where g is constant."""
        g, p, q = incoming[0].abs(), torch.softmax(t["logits"], -1), torch.softmax(t["logits"] / tau, -1) + 1
        terms = [r * (g + (r * g).sum(-1, keepdim=True)) for r in (p, q)]
        return Bounds(terms={"dlogits": terms[0] + terms[1]})

    return Case(
        describe(shape=shape, tau=tau),
        {"logits": source.randn(*shape)},
        lambda t: (ops.reinmax(t["logits"], tau, torch.Generator(t["logits"].device).manual_seed(seed)),),
        truth,
        wanted=("logits",),
        layouts=layouts(source, logits=len(shape)),
        bounds=bounds,
    )


# ---- weights and linears ---------------------------------------------------------------------------------------------


def mixed_weight(impl: str) -> Builder:
    def build(source: Source) -> Case:
        m, n = structural_size(source, source.limits.features), structural_size(source, source.limits.width)
        sizes_in, sizes_out = sizes_of(source, n), sizes_of(source, m)
        stored = impl == "masks" and source.flag()
        tensors = {
            "weight": source.randn(m, n),
            "alpha_in": source.probs(len(sizes_in)),
            "alpha_out": source.probs(len(sizes_out)),
        }
        rows, cols = keep(sizes_out, m), keep(sizes_in, n)

        def call(t: Named) -> tuple[Tensor, ...]:
            masks = None
            if stored:
                masks = ops.choice_masks(sizes_in, sizes_out, (m, n), t["weight"].device, t["weight"].dtype)
            w, a, b = t["weight"], t["alpha_in"], t["alpha_out"]
            return (ops.mixed_weight(w, a, sizes_in, b, sizes_out, impl, source.backend, masks),)

        def truth(t: Named, _: object) -> tuple[Tensor, ...]:
            out = torch.zeros_like(t["weight"])
            for i in range(len(sizes_in)):
                for j in range(len(sizes_out)):
                    out = out + t["alpha_in"][i] * t["alpha_out"][j] * (rows[j][:, None] * cols[i]) * t["weight"]
            return (out,)

        return Case(
            describe(m=m, n=n, sizes_in=sizes_in, sizes_out=sizes_out, stored=stored),
            tensors,
            call,
            truth,
            wanted=source.subset(tuple(tensors)),
            layouts=layouts(source, ("alpha_in", "alpha_out"), weight=2),
        )

    return build


def mixed_linear(source: Source) -> Case:
    inputs, outputs, rank = source.size(source.limits.width), source.size(source.limits.features), source.size(33)
    shape = (*source.leading(source.limits.rows), inputs)
    lora = source.pick((source.dtype, source.vector_dtype))
    tensors = {"x": source.randn(*shape), "weight": source.randn(outputs, inputs)}
    if source.flag():
        tensors["in_mask"] = source.mask(inputs)
    if source.flag():
        tensors["out_mask"] = source.mask(outputs)
    if source.flag():
        tensors |= {"lora_a": source.randn(rank, inputs, dtype=lora), "lora_b": source.randn(outputs, rank, dtype=lora)}
    if source.flag():
        tensors["bias"] = source.randn(outputs)
    scaling = source.free((0.5, 1.0, 2.0))

    def truth(t: Named, _: object) -> tuple[Tensor, ...]:
        weight = t["weight"] + scaling * t["lora_b"] @ t["lora_a"] if "lora_a" in t else t["weight"]
        y = (t["x"] * t["in_mask"] if "in_mask" in t else t["x"]) @ weight.T
        y = y + t["bias"] if "bias" in t else y
        return (y * t["out_mask"] if "out_mask" in t else y,)

    return Case(
        describe(shape=shape, outputs=outputs, rank=rank, given=tuple(tensors), lora=lora),
        tensors,
        lambda t: (
            ops.mixed_linear(
                t["x"], t["weight"], t.get("in_mask"), t.get("out_mask"), t.get("lora_a"), t.get("lora_b"), scaling,
                t.get("bias"), backend=source.backend,
            ),
        ),
        truth,
        # the masked input and the rank-r product are stored before they are summed over; then the base product, its sum
        # with LoRA, and the masked output
        limits={"": limit(source.dtype, 2 * SUMMED + 3)},
        wanted=source.subset(tuple(tensors)),
        layouts=layouts(source, ("in_mask", "out_mask", "bias"), x=len(shape), weight=2, lora_a=2, lora_b=2),
        inner=source.dtype,
    )  # fmt: skip


def mixed_linear_group(source: Source) -> Case:
    inputs, count = source.size(source.limits.width), source.pick((1, 2, 3))
    shape = (*source.leading(source.limits.rows), inputs)
    lora, biased = source.pick((source.dtype, source.vector_dtype)), source.flag()
    tensors, wanted = {"x": source.randn(*shape)}, ["x"]
    for j in range(count):
        outputs, rank = source.size(source.limits.features), source.size(33)
        tensors |= {
            f"weight{j}": source.randn(outputs, inputs),
            f"lora_a{j}": source.randn(rank, inputs, dtype=lora),
            f"lora_b{j}": source.randn(outputs, rank, dtype=lora),
        }
        wanted += [f"lora_a{j}", f"lora_b{j}"]
        if biased:
            tensors[f"bias{j}"] = source.randn(outputs)
            wanted.append(f"bias{j}")
    scaling = source.free((0.5, 1.0, 2.0))

    def per(t: Named, name: str) -> list[Tensor]:
        return [t[f"{name}{j}"] for j in range(count)]

    def truth(t: Named, _: object) -> tuple[Tensor, ...]:
        results = []
        for j in range(count):
            y = t["x"] @ (t[f"weight{j}"] + scaling * t[f"lora_b{j}"] @ t[f"lora_a{j}"]).T
            results.append(y + t[f"bias{j}"] if biased else y)
        return tuple(results)

    return Case(
        describe(shape=shape, count=count, biased=biased, lora=lora),
        tensors,
        lambda t: ops.mixed_linear_group(
            t["x"], per(t, "weight"), per(t, "lora_a"), per(t, "lora_b"), scaling, per(t, "bias") if biased else None
        ),
        truth,
        # the rank-r product is stored before it is summed over, dx after each addition
        limits={"": limit(source.dtype, SUMMED + 2), "dx": limit(source.dtype, SUMMED + 1 + count)},
        wanted=source.subset(wanted),
        layouts=layouts(source, (), x=len(shape), **{f"weight{j}": 2 for j in range(count)}),
        inner=source.dtype,
    )


OPS: dict[str, Builder] = {
    "mixed_weight_factored": mixed_weight("factored"),
    "mixed_weight_masks": mixed_weight("masks"),
    "mixed_weight_loop": mixed_weight("loop"),
    "mixed_linear": mixed_linear,
    "mixed_linear_group": mixed_linear_group,
    "mixed_rmsnorm": mixed_rmsnorm,
    "mixed_rmsnorm_quant": mixed_rmsnorm_quant,
    "head_rmsnorm": head_rmsnorm,
    "masked_rope": masked_rope,
    "masked_swiglu": masked_swiglu,
    "gated_residual": gated_residual,
    "channel_mask": channel_mask,
    "reinmax": reinmax,
    **QUANTIZERS,
    **FUSED,
}

# Ops whose one implementation torch provides: they take no backend and run on either device.
LIBRARY = ("mixed_linear_group", "reinmax", "pack_weight")

# Ops that have a C++ kernel.
CPU_KERNELS = (
    "mixed_weight_factored", "mixed_rmsnorm", "masked_rope", "masked_swiglu", "gated_residual", "channel_mask",
    "quant_lora_mix", "quant_lora_linear", "act_quant_mix", "mixed_rmsnorm_quant", "lowbit_linear",
    "masked_swiglu_quant", "quant_lora_linear_group", "residual_rmsnorm",
)  # fmt: skip
