"""The supernet's LoRA pairs as PEFT adapters of the original model, and PEFT's configuration as its options.

One adapter per searched weight precision, `w2`, `w4`, `w8`; `default` where bits are not searched. Each is a folder
that stock PEFT loads onto the original model, whose channels are in their original order:

    PeftModel.from_pretrained(model, "adapters/w4", adapter_name="w4").load_adapter("adapters/w2", adapter_name="w2")

In the reordered supernet W' = W[rows][:, columns], so of a pair (A', B') the original layer has A[:, columns] = A' and
B[rows] = B'. PEFT's merge of an adapter is then `SupernetLinear.adapted`, in the original order, bit for bit: both
compute W + s (B A) with one rounding, and a dot product over the rank does not depend on where in the matrix it stands
(seen for ranks up to 64). What is quantized is that sum. Architecture parameters are not part of the adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf.families import PATHS
from jointnas_kernels.space import LINEARS

if TYPE_CHECKING:
    from peft import LoraConfig

    from jointnas_kernels.hf.supernet import Supernet

WEIGHTS = "adapter_model.safetensors"
READ = ("r", "lora_alpha", "use_rslora", "init_lora_weights", "target_modules", "lora_dropout")
IGNORED = (  # they say what the adapter belongs to, not what it computes
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version", "auto_mapping",
)  # fmt: skip


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise JointNASError("adapters need the package peft: pip install 'peft>=0.21'.") from None
    return peft


# ---- configuration --------------------------------------------------------------------------------------------------


def lora_options(config: LoraConfig) -> dict[str, Any]:
    """What a LoraConfig asks for, as options of `SupernetLinear`: r, lora_alpha, use_rslora, and init_lora_weights True
    or "gaussian". target_modules may be left out, and otherwise means all seven linears.

    Raises:
        JointNASError: anything else that is set; the supernet would not do it.
    """
    peft = _peft()
    if not isinstance(config, peft.LoraConfig):
        raise JointNASError(f"lora is a {type(config).__name__}; expected a peft.LoraConfig.")
    defaults = peft.LoraConfig()
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name not in (*READ, *IGNORED) and value != getattr(defaults, f.name):
            raise JointNASError(f"LoraConfig: {f.name}={value!r} is not supported. Supported: {', '.join(READ)}.")
    targets = config.target_modules
    if targets is not None and targets != "all-linear" and set(targets) != set(LINEARS):
        raise JointNASError(
            f"LoraConfig: target_modules {sorted(targets) if not isinstance(targets, str) else targets!r}: every linear"
            f" of a block is searched and has LoRA. Allowed: None, 'all-linear', or all of {', '.join(LINEARS)}."
        )
    if config.lora_dropout:
        raise JointNASError(
            f"LoraConfig: lora_dropout {config.lora_dropout} is not supported; set it to 0: LoRA is merged before the"
            " quantizer, Q(W + s B A), where a dropout of its input has no meaning."
        )
    inits = {True: "kaiming", "gaussian": "gaussian"}
    if config.init_lora_weights not in inits:
        raise JointNASError(
            f"LoraConfig: init_lora_weights={config.init_lora_weights!r} is not supported. Allowed: True, 'gaussian'."
        )
    init = inits[config.init_lora_weights]
    return {"rank": config.r, "alpha": config.lora_alpha, "rslora": config.use_rslora, "init": init}


# ---- files ----------------------------------------------------------------------------------------------------------


def adapter_names(supernet: Supernet) -> tuple[str, ...]:
    """One per weight precision, ascending; `default` where none is searched."""
    bits = supernet.space.weight_bits
    return ("default",) if bits is None else tuple(f"w{b}" for b in bits)


def save_adapters(supernet: Supernet, folder: str | Path) -> list[Path]:
    """Write FOLDER/NAME/{adapter_config.json, adapter_model.safetensors} for every adapter; returns these folders.

    Raises:
        JointNASError: peft is missing, or the supernet is a shrunk one.
    """
    peft, folder = _peft(), Path(folder)
    first = next(linear for _, linear in supernet.linears())
    config = peft.LoraConfig(
        r=first.rank, lora_alpha=first.alpha, use_rslora=first.rslora, target_modules=list(LINEARS),
        lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", inference_mode=True,
        base_model_name_or_path=getattr(supernet.config, "_name_or_path", None) or None,
    )  # fmt: skip
    written = []
    for index, name in enumerate(adapter_names(supernet)):
        tensors = {}
        for key, own, dim, order in _pairs(supernet, index):
            value = own.detach().to("cpu").contiguous()
            tensors[key] = value if order is None else torch.empty_like(value).index_copy_(dim, order, value)
        out = folder / name
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(out / WEIGHTS), metadata={"format": "pt"})
        config.save_pretrained(str(out))
        written.append(out)
    return written


@torch.no_grad()
def load_adapters(supernet: Supernet, folder: str | Path) -> None:
    """Inverse of `save_adapters`, also for adapters that PEFT trained on the original model and saved. The supernet may
    be in another channel order than the one they were saved from.

    Raises:
        JointNASError: an adapter is missing, or not of this supernet's shape, rank or scaling.
    """
    peft, folder = _peft(), Path(folder)
    first = next(linear for _, linear in supernet.linears())
    loaded = []
    for name in adapter_names(supernet):
        path = folder / name
        if not (path / WEIGHTS).is_file() or not (path / "adapter_config.json").is_file():
            raise JointNASError(f"{path} is no PEFT adapter: it needs adapter_config.json and {WEIGHTS}.")
        config = peft.LoraConfig.from_pretrained(str(path))
        scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        if (config.r, scaling) != (first.rank, first.scaling):
            raise JointNASError(
                f"{path}: rank {config.r} and scaling {scaling:g}; the supernet has rank {first.rank} and scaling"
                f" {first.scaling:g}."
            )
        loaded.append((path, load_file(str(path / WEIGHTS))))
    copies: list[tuple[Tensor, Tensor]] = []  # all are checked before the first is changed
    for index, (path, tensors) in enumerate(loaded):
        pairs = list(_pairs(supernet, index))
        missing, extra = sorted({p[0] for p in pairs} - set(tensors)), sorted(set(tensors) - {p[0] for p in pairs})
        if missing or extra:
            raise JointNASError(f"{path}: {len(missing)} tensors missing {missing[:2]}, {len(extra)} extra {extra[:2]}")
        for key, own, dim, order in pairs:
            if tensors[key].shape != own.shape:
                raise JointNASError(f"{path}: {key} is {tuple(tensors[key].shape)}; it must be {tuple(own.shape)}.")
            copies.append((own, tensors[key] if order is None else tensors[key].index_select(dim, order)))
    for own, value in copies:
        own.copy_(value)


def _pairs(supernet: Supernet, index: int) -> Iterator[tuple[str, Tensor, int, Tensor | None]]:
    """Of one precision: PEFT's key, the supernet's tensor, its dim of channels, and their original indices."""
    for b in range(len(supernet.blocks)):
        block: Any = supernet.blocks[b]
        for name, (rows, columns) in supernet.order.linears(b).items():
            part, linear_name = PATHS[name].split(".")
            linear = getattr(block.attention if part == "self_attn" else block.mlp, linear_name)
            lora_a, lora_b = linear.pair(None if linear.bits is None else index)
            prefix = f"base_model.model.model.layers.{b}.{PATHS[name]}"
            yield f"{prefix}.lora_A.weight", lora_a, 1, columns
            yield f"{prefix}.lora_B.weight", lora_b, 0, rows
