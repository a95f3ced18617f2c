"""One transformer block of the supernet: RMSNorm, attention, MLP, depth gate; the masks sit in the elementwise kernels.

    h   = x + m * o(value * attend(rope(q_mask * q), rope(k_mask * k), v))      q, k, v of  m * norm(x)
    out = h + m * down(swiglu(f * gate, f * up) * f)                            gate, up of m * norm(h)
    out = x + g (out - x)                                                       g the block's depth gate

m, f: masks of the hidden and intermediate size, norm: the expectation of RMSNorm over hidden sizes. What q, k, v and
gate, up share is quantized once, by the norm that makes it, what down reads by the gate, and o has a quantizer of its
own. The norm in the middle makes h, too. Where queries and keys are normalised, rope sees q_norm(q_mask * q) and
k_norm(k_mask * k): the expectation, over head dims, of RMSNorm of each head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from jointnas_kernels.layout import LINEARS
from jointnas_kernels.nn.choices import BlockSample, Masks
from jointnas_kernels.nn.linear import SupernetLinear
from jointnas_kernels.ops.norm.heads import head_rmsnorm
from jointnas_kernels.ops.norm.rms.op import mixed_rmsnorm
from jointnas_kernels.ops.norm.rms.residual import residual_rmsnorm
from jointnas_kernels.ops.quant.activations import act_quant_mix
from jointnas_kernels.ops.quant.mixture.group import quant_lora_linear_group
from jointnas_kernels.ops.quant.mixture.op import mix_ahead
from jointnas_kernels.ops.quant.mixture.reference import Mixture as WeightMixture
from jointnas_kernels.ops.width.channel import channel_mask
from jointnas_kernels.ops.width.linear import mixed_linear_group
from jointnas_kernels.ops.width.residual import gated_residual
from jointnas_kernels.ops.width.rope import masked_rope
from jointnas_kernels.ops.width.swiglu import masked_swiglu


class Step(NamedTuple):
    """What all blocks share in one forward pass."""

    sizes: tuple[int, ...]  # hidden sizes that the masks' alpha weighs
    cos: Tensor  # [1, T, D]
    sin: Tensor
    attention_mask: Tensor | None = None  # [B, 1, T, T] bool, True where a query may look; None: causal
    sliding_mask: Tensor | None = None  # the same for blocks with a sliding window
    head_dims: tuple[int, ...] = ()  # head dims that the masks' q_norm and k_norm weigh
    rope_masks: tuple[Tensor, Tensor] | None = None  # ones: what rope multiplies queries and keys by behind their norms
    mode: str = "full"  # which gradients: "weight" LoRA, "arch" masks and probabilities, "full" both
    original: bool = False  # the model before conversion: no LoRA, no quantizers


class Mixture(NamedTuple):
    """Activation precisions of one block, to be mixed."""

    bits: tuple[int, ...]
    probs: Tensor  # [Q]
    symmetric: bool


class _Norm(nn.Module):
    def __init__(self, weight: Tensor, eps: float, backend: str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.eps, self.backend = eps, backend


class SupernetNorm(_Norm):
    """RMSNorm with a frozen weight; the IN mask and the activation quantizer of the linears behind it are folded in."""

    def forward(
        self, x: Tensor, masks: Masks, sizes: tuple[int, ...], mixture: Mixture | None = None, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x and y [..., N] -> h = x + m * y, or x itself, and what is made of h, quantized if there is a mixture."""
        alpha, mask, rest = masks.alpha, masks.hidden, (self.backend, *(mixture or (None, None, False)))
        if y is None:
            return x, mixed_rmsnorm(x, self.weight, alpha, sizes, self.eps, mask, *rest)
        return residual_rmsnorm(x, y, self.weight, alpha, sizes, self.eps, mask, *rest)


class HeadNorm(_Norm):
    """RMSNorm of each head with a frozen weight, behind the OUT mask of the linear that makes the heads."""

    def forward(self, x: Tensor, mask: Tensor, alpha: Tensor | None, dims: tuple[int, ...]) -> Tensor:
        """x [..., H, D] -> [..., H, D]."""
        assert alpha is not None  # architecture samples of models with such norms have it
        return head_rmsnorm(x, self.weight, mask, alpha, dims, self.eps, backend=self.backend)


Linears = Mapping[str, SupernetLinear]  # by their names in the layout
Norms = Mapping[str, SupernetNorm | HeadNorm]


class Shared(NamedTuple):
    """Linears that read one input."""

    linears: tuple[SupernetLinear, ...]
    mixes: list[WeightMixture] | None = None  # of their precisions, if those are searched and all alike
    probs: Tensor | None = None
    only: int | None = None  # the one precision to compute
    mixed: Tensor | None = None  # their W~ below each other


class ActQuant(nn.Module):
    """Mixture of activation precisions, per token; 16 bits are the identity."""

    def __init__(self, bits: tuple[int, ...] | None, symmetric: bool = False, backend: str | None = None) -> None:
        super().__init__()
        self.bits, self.symmetric, self.backend = bits, symmetric, backend

    def mixture(self, step: Step, sample: BlockSample, place: int) -> Mixture | None:
        """What to mix at one of the block's four places; None where activations stay as they are."""
        bits = self.bits
        if bits is not None and sample.act_index is not None:
            bits = bits[sample.act_index : sample.act_index + 1]
        if bits is None or step.original or bits == (16,):
            return None
        if sample.act_index is not None:
            one = torch.ones(1, dtype=torch.float32, device=sample.masks[0].alpha.device)
            return Mixture(bits, one, self.symmetric)
        assert sample.act_probs is not None  # a space with act_bits always samples them
        return Mixture(bits, sample.act_probs[place], self.symmetric)

    def forward(self, x: Tensor, mixture: Mixture | None, mask: Tensor | None = None) -> Tensor:
        """sum_q rho_q Q_q(mask * x)."""
        if mixture is None:
            return x if mask is None else channel_mask(x, mask, backend=self.backend)
        return act_quant_mix(x, *mixture, mask=mask, backend=self.backend)


class SupernetAttention(nn.Module):
    """Grouped-query attention; every key-value head is kept, query heads and head dims are masked."""

    def __init__(self, linears: Linears, norms: Norms, act: ActQuant, head_dim: int, sliding: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linears[name] for name in LINEARS[:4])
        self.act = act
        self.norms = nn.ModuleList(norm for norm in norms.values() if isinstance(norm, HeadNorm))
        self.head_dim, self.sliding = head_dim, sliding
        self.gqa = self.q_proj.out_features != self.k_proj.out_features

    def forward(self, x: Tensor, step: Step, sample: BlockSample, qkv: Shared, o: Shared) -> Tensor:
        """x [B, T, N], masked, normalised and quantized -> [B, T, N], to be masked."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = apply_shared(x, qkv, step)
        q, k, masks = q.view(heads), k.view(heads), sample.masks[0]
        rope_masks = (masks.q, masks.k)
        if len(self.norms) > 0:
            q = self.norms[0](q, masks.q, masks.q_norm, step.head_dims)
            k = self.norms[1](k, masks.k, masks.k_norm, step.head_dims)
            assert step.rope_masks is not None
            rope_masks = step.rope_masks
        q, k, v = masked_rope(q, k, step.cos, step.sin, *rope_masks, self.act.backend, v.view(heads))
        look = step.sliding_mask if self.sliding else step.attention_mask
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=look, is_causal=look is None, scale=1.0, enable_gqa=self.gqa
        )  # [B, H, T, D]; the scale is in the query mask, or in q_norm
        y = self.act(y.transpose(1, 2).flatten(2), self.act.mixture(step, sample, 1), masks.value)
        return apply_shared(y, o, step)[0]


class SupernetMLP(nn.Module):
    """SwiGLU MLP with masked neurons."""

    def __init__(self, linears: Linears, act: ActQuant) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (linears[name] for name in LINEARS[4:])
        self.act = act

    def forward(self, x: Tensor, step: Step, sample: BlockSample, gate_up: Shared, down: Shared) -> Tensor:
        """x [B, T, N], masked, normalised and quantized -> [B, T, N], to be masked."""
        gate, up = apply_shared(x, gate_up, step)
        out_mask, in_mask = (masks.intermediate for masks in sample.masks[:2])
        bits, probs, symmetric = self.act.mixture(step, sample, 3) or (None, None, False)
        y = masked_swiglu(gate, up, out_mask, in_mask, self.act.backend, bits, probs, symmetric)
        return apply_shared(y, down, step)[0]


class SupernetBlock(nn.Module):
    """One decoder block.

    Args:
        linears, norms: by their names in the layout; they stay attributes, too.
        act: may be shared with other blocks.
        sliding: whether it looks through the model's sliding window.
    """

    def __init__(self, linears: Linears, norms: Norms, act: ActQuant, head_dim: int, sliding: bool) -> None:
        super().__init__()
        self.linears, self.norms = dict(linears), dict(norms)
        self.input_norm = norms["input_norm"]
        self.attention = SupernetAttention(linears, norms, act, head_dim, sliding)
        self.post_norm = norms["post_norm"]
        self.mlp = SupernetMLP(linears, act)

    def forward(self, x: Tensor, step: Step, sample: BlockSample) -> Tensor:
        """x [B, T, N] -> [B, T, N]."""
        h, y = self._sums(x, step, sample)
        gated = None if sample.gate is None else x
        return gated_residual(h, y, sample.masks[2].hidden, sample.gate, gated, backend=self.mlp.act.backend)

    def skipped(self, x: Tensor, step: Step, sample: BlockSample) -> Tensor:
        """The identity on x, with the exact gradient of a gate that is 0: the block runs without a graph of its own,
        because everything behind the gate is multiplied by 0."""
        with torch.no_grad():
            h, y = self._sums(x, step, sample)
        hidden = sample.masks[2].hidden.detach()
        return gated_residual(h, y, hidden, sample.gate, x, backend=self.mlp.act.backend)

    def _sums(self, x: Tensor, step: Step, sample: BlockSample) -> tuple[Tensor, Tensor]:
        """What attention leaves in the residual stream, and what the MLP adds to it."""
        act, (beginning, middle, _) = self.mlp.act, sample.masks
        _, normed = self.input_norm(x, beginning, step.sizes, act.mixture(step, sample, 0))
        qkv, o, gate_up, down = self._shared(step, sample)
        y = self.attention(normed, step, sample, qkv, o)
        h, normed = self.post_norm(x, middle, step.sizes, act.mixture(step, sample, 2), y)
        return h, self.mlp(normed, step, sample, gate_up, down)

    def _shared(self, step: Step, sample: BlockSample) -> list[Shared]:
        """What multiplies the block's four inputs; where their bits are searched, on a GPU by one launch."""
        a, m = self.attention, self.mlp
        inputs = ((a.q_proj, a.k_proj, a.v_proj), (a.o_proj,), (m.gate_proj, m.up_proj), (m.down_proj,))
        found = []
        for place, linears in enumerate(inputs):
            probs, mixes, first = sample.weight_probs and sample.weight_probs[place], None, linears[0]
            if first.bits is not None and not step.original:
                mixes = [linear.mixture(step.mode, probs, sample.weight_index) for linear in linears]
                mixes = mixes if all(linear.kind == first.kind for linear in linears) else None
            found.append(Shared(linears, mixes, probs, sample.weight_index))
        every = [of.mixes for of in found if of.mixes is not None]
        if len(every) < len(found):
            return found
        return [of._replace(mixed=mixed) for of, mixed in zip(found, mix_ahead(every, m.act.backend), strict=True)]


def apply_shared(x: Tensor, shared: Shared, step: Step) -> list[Tensor]:
    """The linears of one input, as one op, which reads x once."""
    linears, mixes, probs, only, mixed = shared
    if step.original:
        return [linear.original(x) for linear in linears]
    first, mode = linears[0], step.mode
    if mixes is not None:
        w, a, b, _, clips = zip(*(mix[:5] for mix in mixes), strict=True)
        _, _, _, pi, _, scaling, bits, group_size, ste = mixes[0]
        return list(quant_lora_linear_group(
            x, w, a, b, scaling, bits, pi, group_size, clips, ste, mode, [linear.bias for linear in linears],
            first.backend, mixed,
        ))  # fmt: skip
    if len(linears) == 1 or any(linear.kind != first.kind for linear in linears):
        return [linear(x, mode, probs, only) for linear in linears]
    pairs = [linear.lora(mode) for linear in linears]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    a, b = [a for a, _ in pairs], [b for _, b in pairs]
    return list(mixed_linear_group(x, [linear.weight for linear in linears], a, b, first.scaling, biases))
