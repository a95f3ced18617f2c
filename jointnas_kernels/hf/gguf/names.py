"""What llama.cpp calls the families, their tensors and the numbers of their configs.

llama.cpp computes Mistral as a Llama. Its Llama rotates pairs of neighbours where transformers rotates halves, so rows
of q_proj and k_proj are interleaved; the other architectures keep their order. Those of Qwen2 and Phi-3 want
heads x head_dim = hidden, which few choices of a search have: all others are written as a Llama, which computes the
same once fused linears are taken apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.hf.families import rotary
from jointnas_kernels.layout import original_sizes, sliding_windows

ARCHITECTURES = ("llama", "phi3", "qwen2", "qwen3")
SQUARE = ("phi3", "qwen2")
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # of every released model; files do not say them
LLAMA3_LENGTH = 8192

_PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def library() -> Any:
    """The `gguf` package.

    Raises:
        JointNASError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise JointNASError("GGUF files need the package gguf: pip install 'jointnas-kernels[search]'") from None
    return gguf


def architecture(config: Any) -> str:
    """The one of `ARCHITECTURES` that computes a model of this config."""
    sizes, kind = original_sizes(config), str(config.model_type)
    if kind == "mistral" or (kind in SQUARE and sizes["heads"] * sizes["head_dim"] != sizes["hidden"]):
        return "llama"
    return kind


def tensor_name(parameter: str) -> str:
    """llama.cpp's name of a parameter of any family."""
    module, _, kind = parameter.rpartition(".")
    if module in _WHOLE:
        return f"{_WHOLE[module]}.{kind}"
    _, _, block, part = module.split(".", 3)
    return f"blk.{block}.{_PARTS[part]}.{kind}"


def heads_of(linear: str, arch: str, config: Any) -> int | None:
    """How many heads interleave the rows of a linear in llama.cpp's order; None: the rows stay as they are."""
    if arch != "llama":
        return None
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(linear)


def interleaved(rows: Tensor, heads: int | None) -> Tensor:
    """Rows [heads x (half, pair), ..] as [heads x (pair, half), ..]."""
    return rows if heads is None else rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halved(rows: Tensor, heads: int | None) -> Tensor:
    """Inverse of `interleaved`."""
    return rows if heads is None else rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


# ---- config -> metadata ---------------------------------------------------------------------------------------------


def metadata_of(config: Any) -> tuple[dict[str, Any], list[str]]:
    """(values under their keys without the architecture's name, what is said of them to the user).

    Raises:
        JointNASError: something that llama.cpp does not compute.
    """
    sizes, arch, remarks = original_sizes(config), architecture(config), []
    if config.hidden_act != "silu":
        raise JointNASError(f"GGUF: activation {config.hidden_act!r} is not supported; only 'silu' is")
    if arch == "qwen3" and config.attention_bias:
        raise JointNASError("GGUF: llama.cpp has no biases in the attention of Qwen3")
    rotated = int(sizes["head_dim"] * (config.rope_parameters.get("partial_rotary_factor") or 1))
    if arch == "llama" and rotated != sizes["head_dim"]:
        raise JointNASError(
            "GGUF: llama.cpp rotates whole heads of a Llama, and of a Phi-3 with heads x head_dim != hidden"
        )
    length = int(config.max_position_embeddings)
    windows = [w for w in sliding_windows(config) if w is not None]
    if windows and min(windows) < length:
        length = min(windows)
        remarks.append(f"context length {length}: llama.cpp has no sliding window of {arch} models, and none is needed "
                       "up to there")  # fmt: skip
    values = {
        "vocab_size": config.vocab_size, "context_length": length, "embedding_length": sizes["hidden"],
        "block_count": sizes["blocks"], "feed_forward_length": sizes["intermediate"],
        "attention.head_count": sizes["heads"], "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": sizes["head_dim"], "attention.value_length": sizes["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": rotated,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }  # fmt: skip
    return {**values, **_scaling(config, length)}, remarks


def _scaling(config: Any, length: int) -> dict[str, Any]:
    rope = config.rope_parameters
    kind, original = rope["rope_type"], rope.get("original_max_position_embeddings") or length
    if kind == "default":
        return {}
    if kind == "linear":
        return {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "llama3":  # its frequencies are a tensor
        return {"rope.scaling.original_context_length": int(original)}
    if kind == "yarn":
        usual = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None, "mscale_all_dim": None}
        other = [key for key, value in usual.items() if rope.get(key, value) not in (value, None)]
        if not other and rope.get("truncate", True):
            return {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"]),
                    "rope.scaling.original_context_length": int(original)}  # fmt: skip
        raise JointNASError(f"GGUF: yarn with its own {', '.join(other) or 'truncate'} is not supported")
    raise JointNASError(f"GGUF: rope type {kind!r} is not supported; supported: default, linear, llama3, yarn")


def rope_factors(config: Any) -> Tensor | None:
    """fp32 [head_dim / 2]: what llama.cpp divides the frequencies of `rope.freq_base` by; None: nothing."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    scaled: Any = rotary(config)
    frequencies: Tensor = scaled.inv_freq
    pairs = torch.arange(0, 2 * len(frequencies), 2, dtype=torch.float32) / (2 * len(frequencies))
    return 1 / rope["rope_theta"] ** pairs / frequencies


# ---- metadata -> config ---------------------------------------------------------------------------------------------


def config_values(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Attributes of a transformers config from the metadata of a file, without what its tensors say.

    Raises:
        JointNASError: an architecture that is not supported, or a missing or unsupported number.
    """
    arch = values.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise unknown("architecture", arch, ARCHITECTURES, where)

    def get(key: str, *default: Any) -> Any:
        found = values.get(f"{arch}.{key}", *default)
        if found is None and not default:
            raise JointNASError(f"{where}: it has no {arch}.{key}")
        return found

    if get("expert_count", 0):
        raise JointNASError(f"{where}: mixtures of experts are not supported")
    hidden, heads = get("embedding_length"), get("attention.head_count")
    kv_heads = get("attention.head_count_kv", heads)
    if not all(isinstance(v, int) for v in (heads, kv_heads, get("feed_forward_length"))):
        raise JointNASError(f"{where}: its blocks have different sizes, which is not supported")
    head_dim = get("attention.key_length", hidden // heads)
    rotated = get("rope.dimension_count", head_dim)
    if get("attention.value_length", head_dim) != head_dim or (rotated != head_dim and arch != "phi3"):
        raise JointNASError(f"{where}: keys, values and rotated channels of different sizes are not supported")
    rope: dict[str, Any] = {"rope_type": get("rope.scaling.type", "default"), "rope_theta": get("rope.freq_base", 1e4)}
    if rope["rope_type"] == "none":
        rope["rope_type"] = "default"
    if rope["rope_type"] not in ("default", "linear", "yarn"):
        raise JointNASError(f"{where}: rope scaling {rope['rope_type']!r} is not supported")
    if rope["rope_type"] != "default":
        rope["factor"] = get("rope.scaling.factor")
    if rope["rope_type"] == "yarn":
        rope["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
    if rotated != head_dim:
        rope["partial_rotary_factor"] = rotated / head_dim
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {name: values.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {
        "model_type": arch, "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head_dim, "intermediate_size": get("feed_forward_length"), "num_hidden_layers": get("block_count"),
        "max_position_embeddings": get("context_length"), "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope, "sliding_window": get("attention.sliding_window", None) or None, **ids,
    }  # fmt: skip


def llama3_rope(config: Any, factors: Tensor, original: int | None, where: str) -> dict[str, Any]:
    """The rope parameters that have these factors.

    Raises:
        JointNASError: those of released models do not give them.
    """
    rope = {**config.rope_parameters, "rope_type": "llama3", "factor": float(factors.max()), **LLAMA3,
            "original_max_position_embeddings": original or LLAMA3_LENGTH}  # fmt: skip
    found = rope_factors(type(config)(**{**config.to_dict(), "rope_parameters": rope}))
    if found is None or found.shape != factors.shape or not torch.allclose(found, factors, rtol=1e-4):
        raise JointNASError(f"{where}: the frequencies in {ROPE_FACTORS} are not those of a Llama 3 rope")
    return rope
