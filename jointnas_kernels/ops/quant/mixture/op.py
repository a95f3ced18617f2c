"""quant_lora_mix as an operator: its implementations by backend, the choice among them, and the public function."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jointnas_kernels.errors import unknown
from jointnas_kernels.ops.core.backends import resolve
from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import bad, without_autocast
from jointnas_kernels.ops.quant.mixture import cpu, cuda, kernels, reference
from jointnas_kernels.ops.quant.mixture.reference import Gradients, Mixture, Upstream, Want
from jointnas_kernels.ops.quant.weights import check_clip, check_quantizers

IMPLEMENTATIONS = {"cuda": cuda, "triton": kernels, "cpu": cpu, "reference": reference}  # each: forward, gradients
MODES = ("weight", "arch", "full")


def choose(weight: Tensor, *args: Any) -> str:
    """The backend for these arguments of the operator; by itself "cuda" only where its kernel takes them."""
    backend = args[-1]
    reason = cuda.unsupported(Mixture(weight, *args[:-1])) if weight.is_cuda else "it runs on CUDA"
    skipped = 1 if reason and backend in (None, "auto") else 0
    chosen = resolve("quant_lora_mix", backend, weight, [*IMPLEMENTATIONS][skipped:])
    if chosen == "cuda" and reason:
        raise bad("quant_lora_mix", f"backend 'cuda' cannot run: {reason}")
    return chosen


def _forward(
    how: str, weight: Tensor, lora_a: Tensor, lora_b: Tensor, probs: Tensor, clip: Tensor | None, scaling: float,
    bits: Sequence[int], group_size: int, ste: str,
) -> Tensor:  # fmt: skip
    mix = Mixture(weight, lora_a, lora_b, probs, clip, scaling, bits, group_size, ste)
    with without_autocast(weight):
        return IMPLEMENTATIONS[how].forward(mix)


def _backward(how: str, grad: Tensor, *args: Any) -> Gradients:
    *mixture, (a, b, probs, clip) = args
    mix = Mixture(*mixture)
    with without_autocast(mix.weight):
        return IMPLEMENTATIONS[how].gradients(mix, Upstream(grad), Want(a or b, probs, clip))


_op = Op(
    "quant_lora_mix",
    {how: partial(_forward, how) for how in IMPLEMENTATIONS},
    {how: partial(_backward, how) for how in IMPLEMENTATIONS},
    frozen=("weight",),
    choose=choose,
)


def checked(op: str, mix: Mixture, mode: str) -> Mixture:
    """The arguments of a public function if they fit, detached where ``mode`` or ``ste`` leave no gradient."""
    weight, lora_a, lora_b, probs, clip, scaling, bits, group_size, ste = mix
    check_quantizers(op, weight, bits, group_size, ste)
    if mode not in MODES:
        raise unknown("mode", mode, MODES, where=op)
    (o, i), p = weight.shape, len(bits)
    if p < 1 or tuple(probs.shape) != (p,):
        raise bad(op, f"probs needs one entry per bit width {list(bits)}, got shape {tuple(probs.shape)}")
    r = lora_a.shape[1] if lora_a.dim() == 3 else -1
    if tuple(lora_a.shape) != (p, r, i) or tuple(lora_b.shape) != (p, o, r):
        raise bad(op, f"with a weight of shape {(o, i)} and {p} bit widths, lora_a must be [{p}, r, {i}] and "
                      f"lora_b [{p}, {o}, r], got {tuple(lora_a.shape)} and {tuple(lora_b.shape)}")
    check_clip(op, clip, (p, o, i // group_size))
    if mode == "weight":
        probs = probs.detach()
    elif mode == "arch":
        lora_a, lora_b = lora_a.detach(), lora_b.detach()
    if clip is not None and (ste == "identity" or mode == "arch"):
        clip = clip.detach()
    return Mixture(weight, lora_a, lora_b, probs, clip, scaling, bits, group_size, ste)


@torch.no_grad()
def mix_ahead(inputs: Sequence[Sequence[Mixture]], backend: str | None = None) -> list[Tensor | None]:
    """W~ of the linears of each input below each other, [sum of O, I], of all inputs by one launch; without gradients:
    for `quant_lora_linear_group`, which has them. All linears have the same probabilities. None for each where the CUDA
    kernel is not what runs: elsewhere nothing is gained by making them at once."""
    every = [mix for mixes in inputs for mix in mixes]
    alike = {(m.scaling, tuple(m.bits), m.lora_a.shape[1], m.clip is None, m.weight.dtype) for m in every}
    if len(alike) > 1 or any(choose(*mix, backend) != "cuda" for mix in every):
        return [None] * len(inputs)
    found = [mixes[0].weight.new_empty(sum(len(m.weight) for m in mixes), mixes[0].weight.shape[1]) for mixes in inputs]
    parts = [
        part
        for mixes, of in zip(inputs, found, strict=True)
        for part in of.split([len(mix.weight) for mix in mixes])
    ]
    cuda.forward_all(every, parts)
    return [*found]


def quant_lora_mix(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, bits: Sequence[int], probs: Tensor, group_size: int,
    clip: Tensor | None = None, ste: str = "identity", mode: str = "full", backend: str | None = None,
) -> Tensor:  # fmt: skip
    """W~ = sum_p probs[p] Q_p(W + scaling B_p A_p), the mixture of a weight's precisions (Eq. 7 of arXiv 2606.04063).

    Q_p is `fake_quant_weight` (symmetric) at bits[p] and clip[p].

    Args:
        weight: W [O, I] in any floating dtype; it is frozen.
        lora_a, lora_b: A [P, r, I] and B [P, O, r], rounded to the weight's dtype before they are multiplied.
        scaling: of every LoRA product.
        bits: P bit widths of 2 to 8.
        probs: [P], fp32.
        group_size: a divisor of I.
        clip: ratios [P, O, I / group_size] in (0, 1].
        ste: straight-through rule, "identity" or "clip", as in `fake_quant_weight`.
        mode: which gradients exist: "weight" LoRA and clip, "arch" probs, "full" all of them.
        backend: "cuda", "triton", "cpu" or "reference"; None: by device, dtype and sizes.

    Returns:
        [O, I] in the weight's dtype; computed in fp32 (fp64 for fp64) and rounded once.

    Raises:
        JointNASError: shapes, bits or words that do not exist or fit, or a backend that cannot run.
    """
    mix = Mixture(weight, lora_a, lora_b, probs, clip, float(scaling), list(bits), group_size, ste)
    return _op(*checked("quant_lora_mix", mix, mode), backend)
