"""quant_lora_linear_group: y_j = x W~_j^T + bias_j of up to three linears that read the same input (q/k/v, gate/up).

W~ of all lie below each other, so that on a GPU one product makes all y. So is dx, and dL/dW~ of all, where their
gradients lie beside each other (masked_rope and masked_swiglu see to that). dA and dB of all are two launches
(lora.py), dprobs, which they share, is one. `mix_ahead` makes the W~ of several inputs at once. Tensor lists would cost
200 us of flattening per call: the op takes three of everything, absent ones as None.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import autocast_dtype, bad, without_autocast
from jointnas_kernels.ops.quant.mixture.linear import Need, bias_gradient, gradients, products
from jointnas_kernels.ops.quant.mixture.lora import MOST
from jointnas_kernels.ops.quant.mixture.op import IMPLEMENTATIONS, checked, choose
from jointnas_kernels.ops.quant.mixture.reference import Mixture

_PARTS = 4  # weight, A, B and clip ratios


def _mixes(tensors: Sequence[Tensor | None], probs: Tensor, *values: Any) -> list[Mixture]:
    """Those that are there, of w0, a0, b0, c0, w1, .."""
    layers = [tensors[i : i + _PARTS] for i in range(0, _PARTS * MOST, _PARTS)]
    return [Mixture(w, a, b, probs, clip, *values) for w, a, b, clip in layers if w is not None]  # type: ignore[arg-type]


def _forward(
    how: str, x: Tensor, probs: Tensor, w0: Tensor, a0: Tensor, b0: Tensor, c0: Tensor | None, w1: Tensor | None,
    a1: Tensor | None, b1: Tensor | None, c1: Tensor | None, w2: Tensor | None, a2: Tensor | None, b2: Tensor | None,
    c2: Tensor | None, bias0: Tensor | None, bias1: Tensor | None, bias2: Tensor | None, mixed: Tensor | None,
    scaling: float, bits: Sequence[int], group_size: int, ste: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The three y, then W~ of all in the dtype of x, where it is not `mixed` itself."""
    layers = (w0, a0, b0, c0, w1, a1, b1, c1, w2, a2, b2, c2)
    mixes = _mixes(layers, probs, scaling, bits, group_size, ste)
    found, multiplied = products(how, x, mixes, (bias0, bias1, bias2)[: len(mixes)], mixed)
    first, second, third = [*found, None, None][:MOST]
    return first, second, third, None if multiplied is mixed else multiplied


def _backward(
    how: str, g0: Tensor, g1: Tensor | None, g2: Tensor | None, x: Tensor | None, probs: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    """dx, dprobs, then dA_j, dB_j and dclip_j of each linear, then three dbias."""
    *tensors, mixed, saved, scaling, bits, group_size, ste, need = rest
    mixed = mixed if saved is None or not saved.numel() else saved
    mixes = _mixes(tensors, probs, scaling, bits, group_size, ste)
    biases = tensors[_PARTS * MOST :]
    of_layers, of_biases = need[2 : 2 + 3 * MOST], need[2 + 3 * MOST :]
    grads = [g for g in (g0, g1, g2)[: len(mixes)] if g is not None]
    wanted = Need(need[0], need[1], any(of_layers[::3]) or any(of_layers[1::3]), any(of_layers[2::3]))
    found: list[Tensor | None] = [None] * len(need)
    with without_autocast(g0):
        found[0], found[1], sums = gradients(how, grads, x, mixes, mixed, wanted)
        for j, (da, db, _, dclip) in enumerate(sums):
            found[2 + 3 * j : 5 + 3 * j] = da, db, dclip
        for j, (grad, bias) in enumerate(zip(grads, biases, strict=False)):
            if bias is not None and of_biases[j]:
                found[2 + 3 * MOST + j] = bias_gradient(grad, bias)
    return tuple(found)


def _choose(x: Tensor, probs: Tensor, w0: Tensor, a0: Tensor, b0: Tensor, c0: Tensor | None, *rest: Any) -> str:
    """That of the first linear: others differ in their outputs alone."""
    return choose(w0, a0, b0, probs, c0, *rest[-5:])


_EACH = [f"{part}{j}" for j in range(MOST) for part in "abc"]
_op = Op(
    "quant_lora_linear_group",
    {how: partial(_forward, how) for how in IMPLEMENTATIONS},
    {how: partial(_backward, how) for how in IMPLEMENTATIONS},
    results=MOST,
    frozen=("w0", "w1", "w2", "mixed"),
    read_for={"x": ("probs", *_EACH), "mixed": ("x",), "saved0": ("x",)},
    choose=_choose,
)


def quant_lora_linear_group(
    x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], scaling: float,
    bits: Sequence[int], probs: Tensor, group_size: int, clips: Sequence[Tensor | None] = (), ste: str = "identity",
    mode: str = "full", biases: Sequence[Tensor | None] = (), backend: str | None = None, mixed: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(`quant_lora_linear` of x for each of one to three linears with the same rank, precisions and probabilities).

    Args:
        x: [..., I] in any floating dtype.
        weights, lora_as, lora_bs, clips, biases: of each linear: [O_j, I], [P, r, I], [P, O_j, r], ratios
            [P, O_j, I / group_size] or None, and [O_j] or None; no clips or biases: none of any.
        probs: [P], fp32: of all.
        scaling, bits, group_size, ste, mode, backend: as in `quant_lora_linear`, of all.
        mixed: [sum of O_j, I], what `mix_ahead` made of them; None: it is made here.

    Returns:
        [..., O_j] each in x's dtype, or autocast's.

    Raises:
        JointNASError: shapes, counts, bits or words that do not exist or fit, or a backend that cannot run.
    """
    op, k = "quant_lora_linear_group", len(weights)
    clips, biases = clips or [None] * k, biases or [None] * k
    if not 0 < k <= MOST or any(len(part) != k for part in (lora_as, lora_bs, clips, biases)):
        raise bad(op, f"it takes one to three linears and as many of each part, got {k} weights, {len(lora_as)} "
                      f"lora_as, {len(lora_bs)} lora_bs, {len(clips)} clips, {len(biases)} biases")
    layers: list[Tensor | None] = []
    for weight, a, b, clip in zip(weights, lora_as, lora_bs, clips, strict=True):
        mix = Mixture(weight, a, b, probs, clip, float(scaling), list(bits), group_size, ste)
        mix = checked(op, mix, mode)
        if x.shape[-1] != weight.shape[1] or a.shape != lora_as[0].shape:
            raise bad(op, f"x has {x.shape[-1]} channels and lora_as[0] is {tuple(lora_as[0].shape)}; they do not fit "
                          f"a weight {tuple(weight.shape)} with a lora_a {tuple(a.shape)}")
        layers += [mix.weight, mix.lora_a, mix.lora_b, mix.clip]
    if mixed is not None and mixed.shape != (sum(len(weight) for weight in weights), x.shape[-1]):
        raise bad(op, f"mixed is {tuple(mixed.shape)}; it must be the rows of all weights by {x.shape[-1]}")
    absent = [None] * (MOST - k)
    x = x.to(autocast_dtype(x) or x.dtype)
    found = _op(x, mix.probs, *layers, *absent * _PARTS, *biases, *absent, mixed, *mix[5:], backend)
    return tuple(found[:k])
