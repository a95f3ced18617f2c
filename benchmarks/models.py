"""Models the benchmarks run: random-weight Llamas, plain PEFT LoRA, and the relaxed supernet in plain torch.

``PlainSupernet`` is the peer: the relaxed forward of the paper as one writes it in PyTorch, without any op of this
package. How its mixed weights come about is the contender:

    loop      Eq. 5 as the paper words the original: slice, scale, pad and add for every (input, output) pair of
              choices, the 15 combinations of heads and head_dim one by one, of W0 and again of the LoRA product B A
    loop-best the same with what can be saved: equal products heads x head_dim once (7 of 15), LoRA in its cheap form
    masks     Eq. 9 as worded: binary G of every pair stored at start-up, 3-D tensor times alpha, summed, times W0
    gemv      the same stored G (in the compute dtype) contracted as a matrix-vector product, no 3-D temporary
    shared    gemv, and the probabilistic mask of a shape made once per step for all blocks instead of once per linear
    factored  the rank-1 form, r ⊙ (W0 (c ⊙ x)), as separate torch ops: what torch.compile is given to fuse

In all but loop, LoRA is applied in its cheap form r ⊙ B(A(c ⊙ x)), which favours the peers: the paper mixes B A too.
Sizes are flat prefixes as the paper's Eq. 5 words them, and equal products heads x head_dim are one choice, which
favours the peers again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# (output axis, input axis) of each linear
AXES = {
    **{"q_proj": ("attn", "hidden"), "k_proj": ("kv", "hidden"), "v_proj": ("kv", "hidden")},
    **{"o_proj": ("hidden", "attn"), "gate_proj": ("inter", "hidden"), "up_proj": ("inter", "hidden")},
    "down_proj": ("hidden", "inter"),
}


# --- Llama with random weights ----------------------------------------------------------------------------------------


def llama_8b(layers: int = 32, vocab: int = 128256, scale: int = 1) -> Any:
    """Llama-3.1-8B's shapes, widths divided by ``scale``. One layer and a small vocabulary make a model that is one
    block."""
    rope: dict[str, Any] = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    sizes: dict[str, Any] = {"vocab_size": vocab, "hidden_size": 4096 // scale}
    sizes |= {"intermediate_size": 14336 // scale}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8}
    sizes |= {"head_dim": 128 // scale}
    rest: dict[str, Any] = {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_parameters": rope}
    rest |= {"tie_word_embeddings": False, "use_cache": False, "bos_token_id": 0, "eos_token_id": 1}
    rest |= {"attn_implementation": "sdpa"}
    return LlamaConfig(**sizes, **rest)


def linear_weights(config: Any) -> int:
    """Weights of the linears of all blocks."""
    heads, inner = config.num_attention_heads + config.num_key_value_heads, config.intermediate_size
    return config.num_hidden_layers * config.hidden_size * (2 * heads * config.head_dim + 3 * inner)


def llama_tiny(layers: int = 2) -> Any:
    """The same structure at a size where everything runs in milliseconds: for smoke tests of the benchmarks."""
    config = llama_8b(layers, vocab=64)
    config.hidden_size, config.intermediate_size, config.num_attention_heads = 256, 512, 4
    config.num_key_value_heads, config.head_dim = 2, 64
    return config


def build_llama(config: Any, device: str, dtype: torch.dtype, like: Any = None) -> Any:
    """A random-weight model made on the device itself; with ``like``, one that shares that model's weights."""
    if like is not None:
        with torch.device("meta"):
            model: Any = LlamaForCausalLM(config)
        model.to(dtype)
        model.load_state_dict(like.state_dict(), assign=True)
        with torch.device(device):  # its buffers are in no state dict
            model.model.rotary_emb = type(model.model.rotary_emb)(config)
    else:
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(default)
        with torch.no_grad():  # norm weights of one would hide a forgotten norm weight from the gates
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
    return model.requires_grad_(False).train()


def peft_lora(model: Any, dropout: float, adapter_fp32: bool) -> nn.Module:
    """Stock PEFT on all seven linears, r 32, alpha 16. Adapters in the model's dtype, or in fp32 (PEFT's default)."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=32, lora_alpha=16, lora_dropout=dropout, target_modules=list(LINEARS), bias="none", task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(model, lora, autocast_adapter_dtype=adapter_fp32)
    with torch.no_grad():  # B starts as zeros, and a GPU multiplies zeros faster
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return wrapped


def random_tokens(config: Any, batch: int, tokens: int, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, config.vocab_size, (batch, tokens), generator=generator).to(device)


def training_step(loss: Callable[[], Tensor], parameters: Sequence[Tensor], lr: float = 1e-5) -> Callable[[], Tensor]:
    """zero_grad, forward, backward, fused AdamW: the same for every contender."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


# --- the relaxed supernet in plain torch ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """One masked dimension of size ``full``: its choices and which (key, key) products of probabilities make them."""

    full: int
    sizes: tuple[int, ...]
    weights: Tensor | None = None  # [K, heads * head_dim] 0/1: which pairs have this product; None: one key, as is
    pairs: tuple[int, ...] = ()  # the product of every (heads, head_dim) pair, equal ones repeated


def axes(config: Any, space: Mapping[str, tuple[int, ...]], device: str) -> dict[str, Axis]:
    """Flat prefix sizes of the four masked dimensions for ``space`` (keys hidden, heads, head_dim, intermediate)."""
    products = [h * d for h in space["heads"] for d in space["head_dim"]]
    sizes = tuple(sorted(set(products)))
    member = torch.tensor([[float(p == s) for p in products] for s in sizes], device=device)
    kv = config.num_key_value_heads
    return {
        "hidden": Axis(config.hidden_size, tuple(space["hidden"])),
        "attn": Axis(config.num_attention_heads * config.head_dim, sizes, member, tuple(products)),
        "kv": Axis(kv * config.head_dim, tuple(kv * d for d in space["head_dim"])),
        "inter": Axis(config.intermediate_size, tuple(space["intermediate"])),
    }


def fake_quant(w: Tensor, bits: int, group: int, scale_dtype: torch.dtype) -> Tensor:
    """Symmetric group quantizer of fp32 ``w`` with identity straight-through gradient, as eager torch writes it."""
    g = w.unflatten(-1, (-1, group))
    scale = g.detach().abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    scale = torch.where(scale == 0, 1.0, scale).to(scale_dtype).float()
    q = torch.clamp(torch.round(g / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    return w + (q.flatten(-2) - w).detach()


def fake_quant_act(x: Tensor, bits: int) -> Tensor:
    """Asymmetric per-token quantizer, identity straight-through."""
    if bits == 16:
        return x
    f = x.detach().float()
    low, high = f.amin(-1, keepdim=True).clamp(max=0), f.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-9)
    zero = torch.round(torch.clamp(-(2 ** (bits - 1)) - low / scale, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    q = torch.round(torch.clamp(f / scale + zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    return x + ((q - zero) * scale - f).to(x.dtype)


class PlainSupernet(nn.Module):
    """Frozen weights of ``model``, LoRA pairs, width probabilities as softmax of logits, one variant of mixing."""

    def __init__(
        self,
        model: Any,
        space: Mapping[str, tuple[int, ...]],
        variant: str,
        weight_bits: tuple[int, ...] = (),
        act_bits: tuple[int, ...] = (),
        group: int = 128,
        rank: int = 32,
    ) -> None:
        super().__init__()
        self.base, self.config, self.variant = model, model.config, variant
        self.weight_bits, self.act_bits, self.group, self.scaling = weight_bits, act_bits, group, 16 / rank
        weight = model.model.embed_tokens.weight
        device, dtype = weight.device, weight.dtype
        self.axes = axes(model.config, space, str(device))
        self.space = dict(space)
        self.logits = nn.ParameterDict({k: nn.Parameter(torch.randn(len(v), device=device)) for k, v in space.items()})
        self.bit_logits = nn.ParameterDict(
            {
                key: nn.Parameter(torch.randn(model.config.num_hidden_layers, len(bits), device=device))
                for key, bits in (("weight_bits", weight_bits), ("act_bits", act_bits))
                if bits
            }
        )
        pairs = max(1, len(weight_bits))
        self.lora = nn.ParameterList()  # layer-major, then linear: A [P, r, I], B [P, O, r]
        for layer in model.model.layers:
            for name in LINEARS:
                out, inner = _linear(layer, name).weight.shape
                a = torch.randn(pairs, rank, inner, device=device, dtype=dtype) / math.sqrt(inner)
                b = torch.randn(pairs, out, rank, device=device, dtype=dtype) * 0.02
                self.lora += [nn.Parameter(a), nn.Parameter(b)]
        self.stored = self._store(dtype) if variant in ("masks", "gemv", "shared") else {}
        self.block: Callable[..., Tensor] = self._block
        self.once: dict[str, Tensor] = {}  # masks of this step, for "shared"

    # masks ------------------------------------------------------------------------------------------------------------

    def _store(self, dtype: torch.dtype) -> dict[tuple[str, str], Tensor]:
        """Every G_ij of every distinct linear shape: bool [Kout*Kin, M, N] ("masks"), compute dtype otherwise."""
        device = self.logits["hidden"].device
        found = {}
        for out, inner in sorted(set(AXES.values())):
            rows = _member(self.axes[out], device)  # [Kout, M]
            columns = _member(self.axes[inner], device)  # [Kin, N]
            g = torch.empty(len(rows), len(columns), rows.shape[1], columns.shape[1], dtype=torch.bool, device=device)
            torch.logical_and(rows[:, None, :, None], columns[None, :, None, :], out=g)
            found[out, inner] = g.flatten(0, 1) if self.variant == "masks" else g.flatten(0, 1).to(dtype)
        return found

    def stored_bytes(self) -> int:
        return sum(g.numel() * g.element_size() for g in self.stored.values())

    def _alpha(self) -> dict[str, Tensor]:
        p = {k: torch.softmax(v, -1) for k, v in self.logits.items()}
        pairs = torch.outer(p["heads"], p["head_dim"]).flatten()
        member = self.axes["attn"].weights
        assert member is not None
        return {"hidden": p["hidden"], "attn": member @ pairs, "kv": p["head_dim"], "inter": p["intermediate"]} | {
            "head_dim": p["head_dim"], "attn pairs": pairs
        }  # fmt: skip

    def _mixed(self, weight: Tensor, out: str, inner: str, alpha: Mapping[str, Tensor]) -> Tensor:
        """W_mixed [M, N] of Eq. 5 or Eq. 9."""
        if self.variant.startswith("loop"):
            m, n = weight.shape
            total = torch.zeros_like(weight)
            for rows, a_out in self._terms(out, alpha, weight.dtype):
                for columns, a_in in self._terms(inner, alpha, weight.dtype):
                    part = weight[:rows, :columns] * (a_out * a_in)
                    total = total + F.pad(part, (0, n - columns, 0, m - rows))
            return total
        a_out, a_in = alpha[out].to(weight.dtype), alpha[inner].to(weight.dtype)
        pair = torch.outer(a_out, a_in).flatten()
        g = self.stored[out, inner]
        if self.variant == "masks":
            return weight * (g * pair[:, None, None]).sum(0)
        key = f"{out}x{inner}"
        if self.variant == "gemv":
            return weight * (pair @ g.flatten(1)).view_as(weight)
        if key not in self.once:
            self.once[key] = (pair @ g.flatten(1)).view_as(weight)
        return weight * self.once[key]

    def _terms(self, key: str, alpha: Mapping[str, Tensor], dtype: torch.dtype) -> list[tuple[int, Tensor]]:
        """What the loops run over: (size, probability), the combinations of heads and head_dim apart or merged."""
        apart = self.variant == "loop" and self.axes[key].pairs
        sizes, probs = (apart, alpha["attn pairs"]) if apart else (self.axes[key].sizes, alpha[key])
        return list(zip(sizes, probs.to(dtype).unbind(), strict=True))

    # layers -----------------------------------------------------------------------------------------------------------

    def _apply_linear(
        self,
        x: Tensor,
        weight: Tensor,
        pair: tuple[Tensor, Tensor],
        name: str,
        alpha: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        bits: Tensor | None,
    ) -> Tensor:
        out, inner = AXES[name]
        a, b = pair
        r, c = masks[out], masks[inner]
        if bits is not None:
            # o_proj's groups follow the smallest head, so that a mask is constant inside a group
            group = min(self.group, *self.space["head_dim"]) if name == "o_proj" else self.group
            # Σ_p π_p Q_p(W0 + s B_p A_p), masks outside: they commute with group quantization
            merged = [
                bits[p] * fake_quant(weight.float() + self.scaling * (b[p] @ a[p]).float(), n, group, weight.dtype)
                for p, n in enumerate(self.weight_bits)
            ]
            return r * F.linear(c * x, sum(merged[1:], merged[0]).to(x.dtype))
        if self.variant == "loop":
            update = self._mixed(b[0] @ a[0], out, inner, alpha)
            return F.linear(x, self._mixed(weight, out, inner, alpha) + self.scaling * update)
        masked = c * x
        low = F.linear(masked, a[0])
        if self.variant == "factored":
            return r * (F.linear(masked, weight) + self.scaling * F.linear(low, b[0]))
        return F.linear(x, self._mixed(weight, out, inner, alpha)) + self.scaling * (r * F.linear(low, b[0]))

    def _norm(self, x: Tensor, weight: Tensor, alpha: Tensor) -> Tensor:
        """Σ_i α_i RMSNorm over the first N_i channels."""
        f = x.float()
        square = f.square()
        total = torch.zeros_like(f)
        for i, size in enumerate(self.axes["hidden"].sizes):
            inverse = torch.rsqrt(square[..., :size].mean(-1, keepdim=True) + self.config.rms_norm_eps)
            total = total + F.pad(alpha[i] * inverse * f[..., :size], (0, x.shape[-1] - size))
        return (weight * total).to(x.dtype)

    def _block(
        self,
        x: Tensor,
        weights: list[Tensor],
        lora: list[Tensor],
        alpha: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        cos: Tensor,
        sin: Tensor,
        bits: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:
        config = self.config
        pair = {name: (lora[2 * i], lora[2 * i + 1]) for i, name in enumerate(LINEARS)}
        weight = dict(zip(LINEARS, weights, strict=False))
        split = lambda t: t.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)  # noqa: E731

        def linear(name: str, value: Tensor) -> Tensor:
            return self._apply_linear(value, weight[name], pair[name], name, alpha, masks, bits[0])

        def act(value: Tensor) -> Tensor:
            if bits[1] is None:
                return value
            parts = [bits[1][p] * fake_quant_act(value, n) for p, n in enumerate(self.act_bits)]
            return sum(parts[1:], parts[0]).to(value.dtype)

        h = act(self._norm(x, weights[7], alpha["hidden"]))
        q, k, v = split(linear("q_proj", h)), split(linear("k_proj", h)), split(linear("v_proj", h))
        q, k = q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin
        sizes = torch.tensor(self.space["head_dim"], device=x.device, dtype=torch.float32)
        q = q * (alpha["head_dim"] * sizes.rsqrt()).sum().to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)
        x = x + linear("o_proj", act(y.transpose(1, 2).flatten(2)))
        h = act(self._norm(x, weights[8], alpha["hidden"]))
        return x + linear("down_proj", act(F.silu(linear("gate_proj", h)) * linear("up_proj", h)))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Causal language-model loss."""
        model = self.base.model
        dtype = model.embed_tokens.weight.dtype
        alpha = self._alpha()
        self.once = {}
        masks = {
            key: (alpha[key] @ _member(axis, input_ids.device).float()).to(dtype) for key, axis in self.axes.items()
        }
        x = masks["hidden"] * model.embed_tokens(input_ids)
        position = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        cos, sin = (t.unsqueeze(1) for t in model.rotary_emb(x, position))
        probs = {k: torch.softmax(v, -1) for k, v in self.bit_logits.items()}
        for index, layer in enumerate(model.layers):
            weights = [_linear(layer, name).weight for name in LINEARS]
            weights += [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
            bits = tuple(probs[key][index] if key in probs else None for key in ("weight_bits", "act_bits"))
            pairs = list(self.lora[14 * index : 14 * index + 14])
            x = self.block(x, weights, pairs, alpha, masks, cos, sin, bits)
        x = masks["hidden"] * self._norm(x, model.norm.weight, alpha["hidden"])
        logits = self.base.lm_head(x)[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())

    def mode(self, which: str) -> list[Tensor]:
        """Switch gradients to LoRA ("weight") or probabilities ("arch"); returns the parameters that get them."""
        arch = [*self.logits.values(), *self.bit_logits.values()]
        chosen = list(self.lora) if which == "weight" else arch
        for parameter in [*self.lora, *arch]:
            parameter.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        return chosen

    def compile_blocks(self) -> None:
        """Give the block to torch.compile: one graph, used for every layer."""
        self.block = torch.compile(self._block, fullgraph=True, dynamic=False)


def _linear(layer: Any, name: str) -> Any:
    return getattr(layer.self_attn if name in LINEARS[:4] else layer.mlp, name)


def _member(axis: Axis, device: torch.device) -> Tensor:
    """[K, full] bool: channel < size."""
    return torch.arange(axis.full, device=device) < torch.tensor(axis.sizes, device=device)[:, None]


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)
