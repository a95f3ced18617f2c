"""Turn a transformers Llama into a supernet over a search space, sharing its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from ..errors import JointNASError
from ..nn.block import ActQuant, SupernetAttention, SupernetBlock, SupernetMLP, SupernetNorm
from ..nn.choices import ArchParameters
from ..nn.linear import SupernetLinear
from ..ops.masks import strided_pair_index
from ..space import SearchSpace, original_sizes
from .importance import Importance, importance_scores
from .reorder import identity_order, reorder
from .supernet import Supernet

FAMILIES = ("llama",)


def convert(
    model: nn.Module,
    space: SearchSpace,
    *,
    lora_rank: int = 32,
    lora_alpha: float = 16,
    importance: Importance | None = None,
    calibration: Iterable[Tensor | Mapping[str, Tensor]] | None = None,
    relaxation: str = "dirichlet",
    bit_relaxation: str = "softmax",
    tau: float = 1.0,
    alpha_init: float = 0.0,
    ste: str = "identity",
    act_symmetric: bool = False,
    lora_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Supernet:
    """A supernet on the weights of a LlamaForCausalLM: not copied, and reordered in place, so let go of the model.

    Args:
        model: on any device, also meta (then without importance).
        space: must fit the model's config.
        lora_rank, lora_alpha: LoRA on all seven linears of a block, scaled by alpha / rank.
        importance: scores to reorder by. None: scored on `calibration` batches; neither: the original order.
        relaxation, bit_relaxation, tau, alpha_init: see `ArchParameters`.
        ste: straight-through estimator of the weight quantizers, "identity" or "clip".
        act_symmetric: activation quantizers without zero point.
        lora_dtype: of the trained parameters, default fp32.
        backend: forces one backend of every op; None: by device.

    Raises:
        JointNASError: what of the model or the space does not fit.
    """
    check_model(model)
    config: Any = model.config
    space.validate(config)
    check_rotary(config, space)
    if importance is None and calibration is not None:
        importance = importance_scores(model, calibration)
    order = identity_order(config) if importance is None else reorder(model, importance)

    options = {"rank": lora_rank, "alpha": lora_alpha, "bits": space.weight_bits, "ste": ste,
               "lora_dtype": lora_dtype, "backend": backend}

    def linear(module: nn.Linear, group: int = space.group_size) -> SupernetLinear:
        return SupernetLinear(module.weight, module.bias, group_size=group, **options)  # type: ignore[arg-type]

    def norm(module: Any) -> SupernetNorm:
        return SupernetNorm(module.weight, module.variance_epsilon, backend)

    head_dim = original_sizes(config)["head_dim"]
    act = ActQuant(space.act_bits, act_symmetric, backend)
    blocks = []
    body: Any = model.get_submodule("model")
    for layer in body.layers:
        a, m = layer.self_attn, layer.mlp
        attention = SupernetAttention(
            linear(a.q_proj), linear(a.k_proj), linear(a.v_proj), linear(a.o_proj, space.o_proj_group), head_dim, act
        )
        mlp = SupernetMLP(linear(m.gate_proj), linear(m.up_proj), linear(m.down_proj), act)
        blocks.append(SupernetBlock(norm(layer.input_layernorm), attention, norm(layer.post_attention_layernorm), mlp))
    arch = ArchParameters(
        space, config, order.block_rank, relaxation=relaxation, bit_relaxation=bit_relaxation, tau=tau,
        alpha_init=alpha_init,
    )
    embedding, head = body.embed_tokens.weight, model.get_submodule("lm_head").weight
    return Supernet(
        config, space, order, arch, embedding, blocks, norm(body.norm), None if head is embedding else head,  # type: ignore[arg-type]
        body.rotary_emb, backend, getattr(model, "generation_config", None),
    )


def check_model(model: nn.Module) -> None:
    """Raise unless this is a plain Llama whose every linear and norm can be replaced."""
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    if not isinstance(model, LlamaForCausalLM):
        raise JointNASError(
            f"convert: {type(model).__name__} ({family!r}) is not supported. Supported model types:"
            f" {', '.join(FAMILIES)} (as LlamaForCausalLM; merge or remove adapters first)."
        )
    if config.hidden_act != "silu":
        raise JointNASError(f"convert: hidden_act {config.hidden_act!r} is not supported. Allowed: silu.")
    if config.attention_dropout:
        raise JointNASError(f"convert: attention_dropout {config.attention_dropout} is not supported; set it to 0.")
    replaced = 0
    for i, layer in enumerate(model.model.layers):
        parts = {f"self_attn.{n}": getattr(layer.self_attn, n) for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        parts |= {f"mlp.{n}": getattr(layer.mlp, n) for n in ("gate_proj", "up_proj", "down_proj")}
        for name, part in parts.items():
            if type(part) is not nn.Linear:
                raise JointNASError(
                    f"convert: model.layers.{i}.{name} is a {type(part).__name__}, not a plain torch.nn.Linear; load"
                    " the model unquantized and without adapters."
                )
            replaced += 1
        for name in ("input_layernorm", "post_attention_layernorm"):
            if not isinstance(getattr(layer, name), LlamaRMSNorm):
                raise JointNASError(f"convert: model.layers.{i}.{name} is a {type(getattr(layer, name)).__name__}.")
            replaced += 1
    if replaced == 0:
        raise JointNASError("convert: nothing to replace: the model has no transformer blocks.")


def check_rotary(config: Any, space: SearchSpace) -> None:
    """Raise unless a plain model with a smaller head_dim has the frequencies that strided pairs keep."""
    full = original_sizes(config)["head_dim"]
    own = _frequencies(config, full)
    for d in space.head_dim:
        small = _frequencies(config, d)
        kept = own[0][strided_pair_index(full, d)[: d // 2]]
        if small[1] != own[1] or not torch.allclose(small[0], kept, rtol=1e-5, atol=0):
            kind = config.rope_parameters["rope_type"]
            raise JointNASError(
                f"convert: rope type {kind!r} changes its frequencies with head_dim, so head_dim {d} of {full} cannot"
                f" be extracted exactly. Allowed for this model: head_dim [{full}]."
            )


def _frequencies(config: Any, head_dim: int) -> tuple[Tensor, float]:
    small = type(config)(**{**config.to_dict(), "head_dim": head_dim})
    with torch.device("cpu"):
        rotary = LlamaRotaryEmbedding(small)
    return rotary.inv_freq, rotary.attention_scaling
