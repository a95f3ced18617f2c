"""Small models with nothing trivial in them, and the literal definition of the supernet to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.llama import modeling_llama

from jointnas_kernels.hf import Importance, Supernet, convert, extract
from jointnas_kernels.hf.families import build
from jointnas_kernels.layout import sliding_windows
from jointnas_kernels.ops.quant.activations import act_quant_mix_reference
from jointnas_kernels.ops.quant.mixture.reference import Mixture, forward
from jointnas_kernels.ops.quant.weights import fake_quant_weight_reference
from jointnas_kernels.space import SearchSpace, keep_matrix
from tests.ops.naive import strided_pair_index

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
SPACE = SearchSpace((16, 32), (2, 4), (8, 16), (16, 48), (1, 2, 3))
MHA_SPACE = SearchSpace((16, 32), (4,), (8, 16), (16, 48), (1, 2, 3))
HEAD_SPACE = SearchSpace((16, 32), (2, 4), (8, 16), (16, 48), (1, 3), (4, 8), group_size=16, head_bits=(4, 8, 16))
QUANT_SPACE = SearchSpace((16, 32), (2, 4), (8, 16), (16, 48), (1, 2, 3), (2, 4, 8), (4, 8, 16), group_size=16)


def tiny_config(family: str = "llama", **change: Any) -> Any:
    values: dict[str, Any] = {} if family != "mistral" else {"sliding_window": None}
    values |= {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "pad_token_id": None,
    }  # fmt: skip
    return AutoConfig.for_model(family, **{**values, **change})


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0, **change: Any) -> Any:
    """Weights of order one in effect, norm weights away from one, biases away from zero."""
    g = torch.Generator().manual_seed(seed)
    model: Any = build(tiny_config(**change)).to(dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = torch.rand(p.shape, generator=g) if "norm" in name else torch.randn(p.shape, generator=g)
            p.copy_(0.5 + values if "norm" in name else 0.2 * values)
    return model


def random_importance(config: Any, seed: int = 1) -> Importance:
    g = torch.Generator().manual_seed(seed)
    blocks, n_kv, heads = config.num_hidden_layers, config.num_key_value_heads, config.num_attention_heads
    hidden, neurons = config.hidden_size, config.intermediate_size
    shapes = ((hidden,), (blocks, heads), (blocks, n_kv, config.head_dim), (blocks, neurons))
    ranked = (torch.arange(blocks) * 2.0 + 1) % 5  # of three blocks: 1, 0, 2
    return Importance(*(torch.rand(s, generator=g) for s in shapes), ranked)


def randomize_lora(supernet: Supernet, seed: int = 2, scale: float = 0.1) -> Supernet:
    """B away from zero, and clip ratios where there are quantizers."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, linear in supernet.linears():
            linear.lora_a.copy_(scale * torch.randn(linear.lora_a.shape, generator=g))
            linear.lora_b.copy_(scale * torch.randn(linear.lora_b.shape, generator=g))
            if linear.bits is not None:
                shape = (len(linear.bits), linear.out_features, linear.in_features // linear.group_size)
                linear.set_clip(0.7 + 0.3 * torch.rand(shape, generator=g))
        if supernet.head_quantizer is not None:
            clip = supernet.head_quantizer.clip
            clip.copy_(0.7 + 0.3 * torch.rand(clip.shape, generator=g))
    return supernet


def ids(batch: int = 2, length: int = 7, vocab: int = 61, seed: int = 3) -> Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_alphas(supernet: Supernet, seed: int = 4, soft_depth: bool = True) -> dict[str, Tensor]:
    """fp64 leaves: every dimension's probabilities, strictly positive."""
    g = torch.Generator().manual_seed(seed)
    alphas = {}
    for key, logits in supernet.arch.logits.items():
        value = torch.rand(logits.shape, generator=g, dtype=torch.float64) + 0.2
        alphas[key] = value / value.sum(-1, keepdim=True)
    if not soft_depth:
        alphas["blocks"] = torch.zeros_like(alphas["blocks"])
        alphas["blocks"][1] = 1.0
    return {k: v.requires_grad_() for k, v in alphas.items()}


def literal_logits(supernet: Supernet, alphas: Mapping[str, Tensor], input_ids: Tensor) -> Tensor:
    """Eqs. 5-8 of arXiv 2606.04063 as printed: sums over zero-padded sub-matrices and sub-norms; plain torch, fp64."""
    config, space = supernet.config, supernet.space
    heads, n_kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    n, neurons = config.hidden_size, config.intermediate_size

    def hot(index: Tensor, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64).index_fill_(0, index, 1.0)

    def per_head(size: int, count: int) -> Tensor:
        return hot(torch.tensor([h for h in range(count) if h % (heads // n_kv) < size // n_kv]), count)

    keep = {
        "hidden": [hot(torch.arange(s), n) for s in space.hidden],
        "neurons": [hot(torch.arange(s), neurons) for s in space.intermediate],
        "kv_pairs": [hot(strided_pair_index(dim, d), dim).repeat(n_kv) for d in space.head_dim],
        "kv_dims": [hot(torch.arange(d), dim).repeat(n_kv) for d in space.head_dim],
        "q_pairs": [torch.outer(per_head(h, heads), hot(strided_pair_index(dim, d), dim)).flatten()
                    for h in space.heads for d in space.head_dim],
        "o_dims": [torch.outer(per_head(h, heads), hot(torch.arange(d), dim)).flatten()
                   for h in space.heads for d in space.head_dim],
    }  # fmt: skip
    both = torch.outer(alphas["heads"], alphas["head_dim"]).flatten()
    weights = {"hidden": alphas["hidden"], "neurons": alphas["intermediate"], "kv_pairs": alphas["head_dim"],
               "kv_dims": alphas["head_dim"], "q_pairs": both, "o_dims": both}  # fmt: skip

    def linear(x: Tensor, layer: Any, block: int, out: str, into: str) -> Tensor:
        probs = alphas["weight_bits"][block] if layer.bits else None
        base = layer.weight.double()
        if probs is None:
            base = base + layer.scaling * layer.lora_b.double() @ layer.lora_a.double()
        else:
            lora = (p.expand(len(layer.bits), -1, -1) for p in (layer.lora_a, layer.lora_b))  # it may be shared
            mix = (probs, layer.clip_ratio(), layer.scaling, layer.bits, layer.group_size, layer.ste)
            base = forward(Mixture(layer.weight, *lora, *mix))
        mixed, bias = torch.zeros_like(base), torch.zeros(base.shape[0], dtype=torch.float64)
        for a, rows in zip(weights[out], keep[out], strict=True):
            if layer.bias is not None:
                bias = bias + a * rows * layer.bias
            for b, columns in zip(weights[into], keep[into], strict=True):
                mixed = mixed + a * b * base * rows[:, None] * columns
        if space.act_bits:  # Q(c x) of the channels that are there, and the rows of the mixed weight alone
            into_mask = sum(b * c for b, c in zip(weights[into], keep[into], strict=True))
            out_mask = sum(a * r for a, r in zip(weights[out], keep[out], strict=True))
            x = act_quant_mix_reference(x * into_mask, space.act_bits, alphas["act_bits"][block])
            mixed = base * out_mask[:, None]
        return x @ mixed.T + bias

    def norm(x: Tensor, layer: Any) -> Tensor:
        total = torch.zeros_like(x)
        for a, size in zip(alphas["hidden"], space.hidden, strict=True):
            part = x[..., :size]
            part = part * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + layer.eps) * layer.weight[:size]
            total = total + a * nn.functional.pad(part, (0, n - size))
        return total

    def head_norm(x: Tensor, layer: Any) -> Tensor:
        """x [..., D]: every head dim's choice as RMSNorm over its own pairs, zero-padded."""
        total = torch.zeros_like(x)
        for a, d in zip(alphas["head_dim"], space.head_dim, strict=True):
            index = strided_pair_index(dim, d)
            part = x[..., index]
            part = part * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + layer.eps) * layer.weight[index]
            total = total + a * torch.zeros_like(x).index_copy(-1, index, part)
        return total

    head, quantizer = supernet.head, supernet.head_quantizer
    if quantizer is not None:
        parts = [fake_quant_weight_reference(head, b, quantizer.group_size, clip=c)
                 for b, c in zip(quantizer.low, quantizer.clip, strict=True)]  # fmt: skip
        parts += [head] * (len(quantizer.bits) - len(parts))
        head = sum(p * part for p, part in zip(alphas["head_bits"], parts, strict=True))
    hidden_mask = sum(a * m for a, m in zip(alphas["hidden"], keep["hidden"], strict=True))
    x = (head if supernet.lm_head is None else supernet.embedding)[input_ids] * hidden_mask
    length = input_ids.shape[1]
    cos, sin = supernet.rotary(x, torch.arange(length)[None])
    back = torch.arange(length)[:, None] - torch.arange(length)
    windows = sliding_windows(config)
    scale = sum(a / d**0.5 for a, d in zip(alphas["head_dim"], space.head_dim, strict=True))
    gates = keep_matrix(space, supernet.block_rank) @ alphas["blocks"]
    for b, (block, gate) in enumerate(zip(supernet.blocks, gates, strict=True)):
        att, mlp = block.attention, block.mlp
        y = norm(x, block.input_norm)
        q, k, v = (
            linear(y, layer, b, out, "hidden").unflatten(-1, (-1, dim)).transpose(1, 2)
            for layer, out in ((att.q_proj, "q_pairs"), (att.k_proj, "kv_pairs"), (att.v_proj, "kv_dims"))
        )
        for norm_layer, name in zip(att.norms, "qk", strict=False):
            q, k = (head_norm(q, norm_layer), k) if name == "q" else (q, head_norm(k, norm_layer))
        q, k = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
        hidden_from = (back < 0) | (back >= (windows[b] or length))
        causal = torch.zeros(length, length, dtype=torch.float64).masked_fill(hidden_from, float("-inf"))
        k, v = (modeling_llama.repeat_kv(t, heads // n_kv) for t in (k, v))
        y = ((q @ k.transpose(2, 3) * scale + causal).softmax(-1) @ v).transpose(1, 2).flatten(2)
        h = x + linear(y, att.o_proj, b, "hidden", "o_dims")
        y = norm(h, block.post_norm)
        y = nn.functional.silu(linear(y, mlp.gate_proj, b, "neurons", "hidden")) * linear(
            y, mlp.up_proj, b, "neurons", "hidden"
        )
        x = x + gate * (h + linear(y, mlp.down_proj, b, "hidden", "neurons") - x)
    return (norm(x, supernet.norm) * hidden_mask) @ head.T


@torch.no_grad()
def assert_half_precision_is_exact_within_its_rounding(**change: Any) -> None:
    """bf16: the two models round in different places, and are equally far from the same weights in fp32."""
    half, model, x = tiny_model(torch.bfloat16, **change), tiny_model(**change), ids()
    model.load_state_dict(half.state_dict())
    importance = random_importance(model.config)
    supernet, wide = (randomize_lora(convert(m, SPACE, lora_rank=4, importance=importance)) for m in (half, model))
    for choice in list(SPACE)[::5]:
        exact = wide.fix(choice)(x).logits
        own = (supernet.fix(choice)(x).logits - exact).norm() / exact.norm()
        plain = (extract(supernet, choice)(x).logits - exact).norm() / exact.norm()
        assert own <= 0.03  # bf16 rounds at 2^-8 = 0.004
        assert own <= 2 * plain


def check_relaxed(supernet: Supernet, x: Tensor) -> None:
    """Logits and gradients of the relaxed forward (fp64, x [2, 7] of 61 tokens) are those of the definition."""
    weight = torch.randn(2, 7, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    results = []
    for literally in (False, True):
        alphas = random_alphas(supernet)
        supernet.zero_grad()
        logits = literal_logits(supernet, alphas, x) if literally else (supernet.use(alphas), supernet(x).logits)[1]
        (logits * weight).sum().backward()
        leaves = [*alphas.values(), *supernet.lora_parameters()]
        results.append((logits.detach(), [p.grad.clone() for p in leaves if p.grad is not None]))
        assert len(results[-1][1]) == len(leaves)
    (own, own_grads), (ref, ref_grads) = results
    torch.testing.assert_close(own, ref, rtol=0, atol=1e-10)
    for a, b in zip(own_grads, ref_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
