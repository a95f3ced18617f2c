"""The model families that can be converted: the classes of transformers that each is made of.

All of them are decoders of the same form under the same names: model.embed_tokens, model.layers[i] of RMSNorm,
attention with rotate-half RoPE and SwiGLU, model.norm, lm_head. `layout` says what is in a layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralForCausalLM, MistralRMSNorm, MistralRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3ForCausalLM, Phi3RMSNorm, Phi3RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2RMSNorm, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3RMSNorm, Qwen3RotaryEmbedding

from jointnas_kernels.errors import JointNASError


class Family(NamedTuple):
    """The classes of transformers that a family is made of."""

    model: type[PreTrainedModel]
    norm: type[nn.Module]
    rotary: type[nn.Module]


FAMILIES = {
    "llama": Family(LlamaForCausalLM, LlamaRMSNorm, LlamaRotaryEmbedding),
    "mistral": Family(MistralForCausalLM, MistralRMSNorm, MistralRotaryEmbedding),
    "qwen2": Family(Qwen2ForCausalLM, Qwen2RMSNorm, Qwen2RotaryEmbedding),
    "qwen3": Family(Qwen3ForCausalLM, Qwen3RMSNorm, Qwen3RotaryEmbedding),
    "phi3": Family(Phi3ForCausalLM, Phi3RMSNorm, Phi3RotaryEmbedding),
}


def family(config: Any, what: str = "model") -> Family:
    """The family of a config, by its model type."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise JointNASError(f"{what} of type {kind!r} is not supported. Supported model types: {', '.join(FAMILIES)}.")
    return FAMILIES[kind]


def build(config: Any) -> PreTrainedModel:
    """A model of this config with random weights."""
    return family(config).model(config)


def rotary(config: Any) -> nn.Module:
    """The rotary embedding of a model of this config."""
    return family(config).rotary(config)
