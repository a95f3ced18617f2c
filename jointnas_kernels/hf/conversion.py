"""Turn a transformers model of a supported family into a supernet over a search space, sharing its weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf.adapters import lora_options
from jointnas_kernels.hf.families import FAMILIES, rotary
from jointnas_kernels.hf.importance import Importance, importance_scores
from jointnas_kernels.hf.ordering import identity_order, reorder
from jointnas_kernels.hf.parts import supernet_parts
from jointnas_kernels.hf.supernet import Supernet
from jointnas_kernels.layout import PAIRS, all_sizes, block_of, kept, traits
from jointnas_kernels.space import ATTENTION, SearchSpace, subnet_config

if TYPE_CHECKING:
    from peft import LoraConfig

log = logging.getLogger(__name__)
RUNTIME_ROPES = ("dynamic", "longrope")  # frequencies that change with the length of the input


def convert(
    model: nn.Module, space: SearchSpace, *, lora_rank: int = 32, lora_alpha: float = 16,
    lora: LoraConfig | None = None, importance: Importance | None = None,
    calibration: Iterable[Tensor | Mapping[str, Tensor]] | None = None, relaxation: str = "dirichlet",
    bit_relaxation: str = "softmax", tau: float = 1.0, alpha_init: float = 0.0, ste: str = "identity",
    act_symmetric: bool = False, lora_dtype: torch.dtype | None = None, lora_pairs: str = "per-precision",
    base_bits: int | None = None, backend: str | None = None,
) -> Supernet:  # fmt: skip
    """A supernet on the weights of a causal language model: not copied, and reordered in place, so let go of the model.

    Args:
        model: of a supported family (`families.FAMILIES`), on any device, also meta (then without importance).
        space: must fit the model's config. What its class refuses is left out, with a warning; see
            `SearchSpace.feasible`.
        lora_rank, lora_alpha: of LoRA, on all seven linears of a block; it is scaled by alpha / rank.
        lora: the same as a `peft.LoraConfig`, in place of rank and alpha; see `adapters.lora_options`.
        importance: scores to reorder by. None: scored on `calibration`; neither: the original order.
        calibration: batches [B, T] of token ids, or keyword arguments of the model's forward.
        relaxation, bit_relaxation, tau, alpha_init: see `ArchParameters`.
        ste: straight-through estimator of the weight quantizers, "identity" or "clip".
        act_symmetric: activation quantizers without zero point.
        lora_dtype: of the trained parameters, default fp32.
        lora_pairs: where weight bits are searched: of every linear a pair "per-precision", or one "shared" by all.
        base_bits: 8 rounds the frozen weights of the linears and keeps them so between uses: half of bf16's memory, if
            blocks are recomputed in the backward pass (`gradient_checkpointing`), which else keeps what they are
            multiplied by. The rounded model is the original from then on. None: as they are.
        backend: forces one backend of every op; None: by device.

    Raises:
        JointNASError: what of the model or the space does not fit.
    """
    check_model(model)
    config: Any = model.config
    space, removed = feasible_space(config, space)
    for line in removed:
        log.warning("search space: removed %s", line)
    layout = block_of(config)
    pairs: dict[str, Any] = {"rank": lora_rank, "alpha": lora_alpha} if lora is None else lora_options(lora, layout)
    if lora is not None and (lora_rank, lora_alpha) != (32, 16):
        raise JointNASError("convert: give lora_rank and lora_alpha, or lora=LoraConfig(...), not both.")
    if importance is None and calibration is not None:
        importance = importance_scores(model, calibration)
    order = identity_order(config) if importance is None else reorder(model, importance)
    arch = {"relaxation": relaxation, "bit_relaxation": bit_relaxation, "tau": tau, "alpha_init": alpha_init}
    return Supernet(**supernet_parts(
        model, space, order, groups={linear.name: space.group(linear) for linear in layout.linears},
        linear={**pairs, "ste": ste, "lora_dtype": lora_dtype, "lora_pairs": lora_pairs, "base_bits": base_bits},
        arch=arch, act_symmetric=act_symmetric, backend=backend,
    ))  # fmt: skip


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
    for name in traits(config).zeros:
        if getattr(config, name):
            raise JointNASError(f"convert: {name} {getattr(config, name)} is not supported; set it to 0.")
    quantization = getattr(config, "quantization_config", None)
    if quantization or getattr(model, "is_quantized", False):
        raise JointNASError(
            "convert: the model is quantized already, and no longer has the weights that a search starts from; load the"
            " model that it was made from, or call model.dequantize() of transformers first."
        )
    layout = block_of(config)
    layers: Any = model.get_submodule("model.layers")
    for i, layer in enumerate(layers):
        for path in layout.modules:
            part = layer.get_submodule(path)
            if type(part) is not nn.Linear or not isinstance(getattr(part, "weight", None), nn.Parameter):
                raise JointNASError(
                    f"convert: model.layers.{i}.{path} is a {type(part).__name__}, not a plain torch.nn.Linear with a"
                    " weight; load the model unquantized and without adapters."
                )
        for norm in layout.norms:
            part = layer.get_submodule(norm.path)
            if not isinstance(part, classes.norm):
                raise JointNASError(
                    f"convert: model.layers.{i}.{norm.path} is a {type(part).__name__}, not a {classes.norm.__name__}."
                )
    if len(layers) == 0:
        raise JointNASError("convert: nothing to replace: the model has no transformer blocks.")


def feasible_space(config: Any, space: SearchSpace) -> tuple[SearchSpace, list[str]]:
    """`SearchSpace.feasible`: what can be extracted from a model with this config, and one line per removal.

    Raises:
        JointNASError: nothing, or a size that is no sub-network, or whose rotary frequencies are no plain model's.
    """
    feasible, removed = space.feasible(config)
    check_rotary(config, feasible)
    return feasible, removed


def check_rotary(config: Any, space: SearchSpace) -> None:
    """Raise unless a plain model with a smaller head_dim has the frequencies that the pairs it keeps have here."""
    full, kind = all_sizes(config), config.rope_parameters["rope_type"]
    own, scaling = _frequencies(config)
    if len(own) != full["head_dim"] // 2:
        raise JointNASError(f"convert: {2 * len(own)} of {full['head_dim']} dims are rotated; all of them must be.")
    for hidden, heads, d in {sizes[-1]: sizes for sizes in space.combinations(ATTENTION)}.values():
        if d == full["head_dim"]:
            continue
        exact = kind not in RUNTIME_ROPES
        if exact:
            choice = replace(space.full(), hidden=hidden, heads=heads, head_dim=d)
            small, small_scaling = _frequencies(subnet_config(config, choice))
            pairs = kept(PAIRS, full, {"head_dim": d})[: d // 2]
            exact = small_scaling == scaling and torch.allclose(small, own[pairs], rtol=1e-5, atol=0)
        if not exact:
            raise JointNASError(
                f"convert: rope type {kind!r} changes its frequencies with head_dim, so head_dim {d} of"
                f" {full['head_dim']} cannot be extracted exactly. Allowed for this model: head_dim"
                f" [{full['head_dim']}]."
            )


def _frequencies(config: Any) -> tuple[Tensor, float]:
    with torch.device("cpu"):
        made: Any = rotary(config)
    return made.inv_freq, made.attention_scaling
