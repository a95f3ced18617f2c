"""Turn a transformers model of a supported family into a supernet over a search space, sharing its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf.adapters import lora_options
from jointnas_kernels.hf.families import FAMILIES, PATHS, rotary
from jointnas_kernels.hf.importance import Importance, importance_scores
from jointnas_kernels.hf.reorder import identity_order, reorder
from jointnas_kernels.hf.supernet import Supernet
from jointnas_kernels.nn.block import ActQuant, HeadNorm, SupernetAttention, SupernetBlock, SupernetMLP, SupernetNorm
from jointnas_kernels.nn.choices import ArchParameters
from jointnas_kernels.nn.linear import SupernetLinear
from jointnas_kernels.ops.width.masks import strided_pair_index
from jointnas_kernels.space import SearchSpace, extras, original_sizes, sliding_windows

if TYPE_CHECKING:
    from peft import LoraConfig

RUNTIME_ROPES = ("dynamic", "longrope")  # frequencies that change with the length of the input


def convert(
    model: nn.Module,
    space: SearchSpace,
    *,
    lora_rank: int = 32,
    lora_alpha: float = 16,
    lora: LoraConfig | None = None,
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
    """A supernet on the weights of a causal language model: not copied, and reordered in place, so let go of the model.

    Args:
        model: of a supported family (`families.FAMILIES`), on any device, also meta (then without importance).
        space: must fit the model's config.
        lora_rank, lora_alpha: LoRA on all seven linears of a block, scaled by alpha / rank.
        lora: the same as a `peft.LoraConfig`, in place of rank and alpha; see `adapters.lora_options`.
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
    pairs: dict[str, Any] = {"rank": lora_rank, "alpha": lora_alpha} if lora is None else lora_options(lora)
    if lora is not None and (lora_rank, lora_alpha) != (32, 16):
        raise JointNASError("convert: give lora_rank and lora_alpha, or lora=LoraConfig(...), not both.")
    options = {**pairs, "bits": space.weight_bits, "ste": ste, "lora_dtype": lora_dtype, "backend": backend}
    if importance is None and calibration is not None:
        importance = importance_scores(model, calibration)
    order = identity_order(config) if importance is None else reorder(model, importance)

    def linear(module: nn.Linear, group: int = space.group_size) -> SupernetLinear:
        return SupernetLinear(module.weight, module.bias, group_size=group, **options)

    def norm(module: Any) -> SupernetNorm:
        return SupernetNorm(module.weight, module.variance_epsilon, backend)

    head_dim = original_sizes(config)["head_dim"]
    act = ActQuant(space.act_bits, act_symmetric, backend)
    blocks = []
    body: Any = model.get_submodule("model")
    qk_norm = extras(config).qk_norm
    for layer, window in zip(body.layers, sliding_windows(config), strict=True):
        a, m = layer.self_attn, layer.mlp
        attention = SupernetAttention(
            linear(a.q_proj), linear(a.k_proj), linear(a.v_proj), linear(a.o_proj, space.o_proj_group), head_dim, act,
            tuple(HeadNorm(n.weight, n.variance_epsilon, backend) for n in (a.q_norm, a.k_norm)) if qk_norm else (),
            window is not None,
        )  # fmt: skip
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
    """Raise unless this is a plain model of a supported family whose every linear and norm can be replaced."""
    config: Any = getattr(model, "config", None)
    classes = FAMILIES.get(getattr(config, "model_type", ""))
    if classes is None or not isinstance(model, classes.model):
        kind = "" if config is None else f" ({config.model_type!r})"
        names = ", ".join(f"{k} (as {f.model.__name__})" for k, f in FAMILIES.items())
        raise JointNASError(
            f"convert: {type(model).__name__}{kind} is not supported. Supported model types: {names}; merge or remove"
            " adapters first."
        )
    if config.hidden_act != "silu":
        raise JointNASError(f"convert: hidden_act {config.hidden_act!r} is not supported. Allowed: silu.")
    if config.attention_dropout:
        raise JointNASError(f"convert: attention_dropout {config.attention_dropout} is not supported; set it to 0.")
    replaced = 0
    norms = ["input_layernorm", "post_attention_layernorm"]
    if extras(config).qk_norm:
        norms += ["self_attn.q_norm", "self_attn.k_norm"]
    layers: Any = model.get_submodule("model.layers")
    for i, layer in enumerate(layers):
        for name in PATHS.values():
            part = layer.get_submodule(name)
            if type(part) is not nn.Linear:
                raise JointNASError(
                    f"convert: model.layers.{i}.{name} is a {type(part).__name__}, not a plain torch.nn.Linear; load"
                    " the model unquantized and without adapters."
                )
            replaced += 1
        for name in norms:
            part = layer.get_submodule(name)
            if not isinstance(part, classes.norm):
                raise JointNASError(
                    f"convert: model.layers.{i}.{name} is a {type(part).__name__}, not a {classes.norm.__name__}."
                )
            replaced += 1
    if replaced == 0:
        raise JointNASError("convert: nothing to replace: the model has no transformer blocks.")


def check_rotary(config: Any, space: SearchSpace) -> None:
    """Raise unless a plain model with a smaller head_dim has the frequencies that strided pairs keep."""
    full = original_sizes(config)["head_dim"]
    kind = config.rope_parameters["rope_type"]
    own = _frequencies(config, full)
    for d in space.head_dim:
        if d == full:
            continue
        exact = kind not in RUNTIME_ROPES
        if exact:
            small = _frequencies(config, d)
            kept = own[0][strided_pair_index(full, d)[: d // 2]]
            exact = small[1] == own[1] and torch.allclose(small[0], kept, rtol=1e-5, atol=0)
        if not exact:
            raise JointNASError(
                f"convert: rope type {kind!r} changes its frequencies with head_dim, so head_dim {d} of {full} cannot"
                f" be extracted exactly. Allowed for this model: head_dim [{full}]."
            )


def _frequencies(config: Any, head_dim: int) -> tuple[Tensor, float]:
    small = type(config)(**{**config.to_dict(), "head_dim": head_dim})
    with torch.device("cpu"):
        made: Any = rotary(small)
    return made.inv_freq, made.attention_scaling
