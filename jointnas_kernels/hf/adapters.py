"""The supernet's LoRA pairs as PEFT adapters of the original model, and PEFT's configuration as its options.

One adapter per searched weight precision, `w2`, `w4`, `w8`; `default` where there are none, or all share one. Each is a
folder that stock PEFT loads onto the original model, whose channels are in their original order:

    PeftModel.from_pretrained(model, "adapters/w4", adapter_name="w4").load_adapter("adapters/w2", adapter_name="w2")

In the reordered supernet W' = W[rows][:, columns], so of a pair (A', B') the original layer has A[:, columns] = A' and
B[rows] = B'. PEFT's merge of an adapter is then `SupernetLinear.adapted`, in the original order, bit for bit: both
compute W + s (B A) with one rounding, and a dot product over the rank does not depend on where in the matrix it stands
(seen for ranks up to 64). What is quantized is that sum. Architecture parameters are not part of the adapters.

Where a family fuses n linears, each has its own pair in the supernet, and their module one in PEFT, of n times the
rank and with their B on its diagonal. Of an adapter that PEFT trained, the linears share the one A.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf.supernet import Supernet
from jointnas_kernels.layout import Block, block_of

if TYPE_CHECKING:
    from peft import LoraConfig

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


def lora_options(config: LoraConfig, layout: Block) -> dict[str, Any]:
    """What a LoraConfig asks for, as options of `SupernetLinear`: r, lora_alpha, use_rslora, and init_lora_weights True
    or "gaussian". target_modules may be left out, and otherwise means all linears of a block.
    Anything else that is set is an error: the supernet would not do it."""
    peft = _peft()
    if not isinstance(config, peft.LoraConfig):
        raise JointNASError(f"lora is a {type(config).__name__}; expected a peft.LoraConfig.")
    defaults = peft.LoraConfig()
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name not in (*READ, *IGNORED) and value != getattr(defaults, f.name):
            raise JointNASError(f"LoraConfig: {f.name}={value!r} is not supported. Supported: {', '.join(READ)}.")
    targets, names = config.target_modules, _modules(layout)
    if targets is not None and targets != "all-linear" and set(targets) != set(names):
        raise JointNASError(
            f"LoraConfig: target_modules {sorted(targets) if not isinstance(targets, str) else targets!r}: every linear"
            f" of a block is searched and has LoRA. Allowed: None, 'all-linear', or all of {', '.join(names)}."
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


def adapter_names(supernet: Supernet) -> tuple[str, ...]:
    """One per weight precision, ascending; `default` where none is searched, or all share a pair."""
    bits, (_, first) = supernet.space.weight_bits, next(supernet.linears())
    return ("default",) if bits is None or first.lora_pairs == "shared" else tuple(f"w{b}" for b in bits)


def save_adapters(supernet: Supernet, folder: str | Path) -> list[Path]:
    """Write FOLDER/NAME/{adapter_config.json, adapter_model.safetensors} for every adapter; returns these folders.

    Raises:
        JointNASError: peft is missing, or the supernet is a shrunk one, or its base weights are rounded.
    """
    peft, folder = _peft(), Path(folder)
    first = next(linear for _, linear in supernet.linears())
    if first.base_bits is not None:
        raise JointNASError(
            f"adapters: the search trained them on base weights of {first.base_bits} bits; on the original model they"
            " would compute something else. Search without base_bits, or export the model."
        )
    names = _modules(block_of(supernet.config))
    fused = {name: count for name, count in names.items() if count > 1}
    config = peft.LoraConfig(
        r=first.rank, lora_alpha=first.alpha, use_rslora=first.rslora, target_modules=list(names),
        rank_pattern={name: count * first.rank for name, count in fused.items()},
        alpha_pattern={name: first.alpha * (count**0.5 if first.rslora else count) for name, count in fused.items()},
        lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", inference_mode=True,
        base_model_name_or_path=getattr(supernet.config, "_name_or_path", None) or None,
    )  # fmt: skip
    written = []
    for index, name in enumerate(adapter_names(supernet)):
        tensors: dict[str, Tensor] = {}
        for keys, pairs in _pairs(supernet, index):
            a, b = zip(*(pair.original() for pair in pairs), strict=True)
            tensors |= dict(zip(keys, (torch.cat(a), torch.block_diag(*b)), strict=True))
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
        for module, count in _modules(block_of(supernet.config)).items():
            rank = config.rank_pattern.get(module, config.r)
            alpha = config.alpha_pattern.get(module, config.lora_alpha)
            scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
            if rank not in (first.rank, count * first.rank) or not math.isclose(scaling, first.scaling):
                raise JointNASError(
                    f"{path}: rank {rank} and scaling {scaling:g}; the supernet has rank {first.rank} and scaling"
                    f" {first.scaling:g}."
                )
        loaded.append((path, load_file(str(path / WEIGHTS))))
    copies: list[tuple[Tensor, Tensor]] = []  # all are checked before the first is changed
    for index, (path, tensors) in enumerate(loaded):
        modules = list(_pairs(supernet, index))
        names = {key for keys, _ in modules for key in keys}
        missing, extra = sorted(names - set(tensors)), sorted(set(tensors) - names)
        if missing or extra:
            raise JointNASError(f"{path}: {len(missing)} tensors missing {missing[:2]}, {len(extra)} extra {extra[:2]}")
        for keys, pairs in modules:
            rank, count = len(pairs[0].a), len(pairs)
            a, b = (tensors[key] for key in keys)
            full = rank if len(a) == rank else count * rank
            outputs = [len(pair.b) for pair in pairs]
            for key, shape in zip(keys, ((full, pairs[0].a.shape[1]), (sum(outputs), full)), strict=True):
                if tensors[key].shape != shape:
                    raise JointNASError(f"{path}: {key} is {tuple(tensors[key].shape)}; it must be {shape}.")
            ranks = [slice(i * rank, (i + 1) * rank) if full > rank else slice(None) for i in range(count)]
            new = [(a[own], rows[:, own]) for own, rows in zip(ranks, b.split(outputs), strict=True)]
            if full > rank and not torch.equal(torch.block_diag(*(rows for _, rows in new)), b):
                raise JointNASError(f"{path}: {keys[1]} mixes linears that the supernet keeps apart.")
            for pair, values in zip(pairs, new, strict=True):
                copies += [(pair.a, values[0][:, pair.columns]), (pair.b, values[1][pair.rows])]
    for own, value in copies:
        own.copy_(value)


class _Pair(NamedTuple):
    """A and B of one linear and precision, and the original indices of its channels."""

    a: Tensor
    b: Tensor
    columns: Tensor
    rows: Tensor

    def original(self) -> tuple[Tensor, Tensor]:
        """A and B in the order of the original model, on the host."""
        a, b = (tensor.detach().to("cpu") for tensor in (self.a, self.b))
        return torch.empty_like(a).index_copy_(1, self.columns, a), torch.empty_like(b).index_copy_(0, self.rows, b)


def _modules(layout: Block) -> dict[str, int]:
    """Names of the stored modules of a layer, and how many linears each holds."""
    return {path.rpartition(".")[2]: len(members) for path, members in layout.modules.items()}


def _pairs(supernet: Supernet, index: int) -> Iterator[tuple[tuple[str, str], list[_Pair]]]:
    """Of one precision and every stored module: PEFT's keys of A and B, and the pairs of the linears it holds."""
    layout, order = block_of(supernet.config), supernet.order
    block: Any
    for i, block in enumerate(supernet.blocks):
        for path, members in layout.modules.items():
            pairs = []
            for m in members:
                a, b = block.linears[m.name].pair(index)
                pairs.append(_Pair(a, b, order.channels(m.columns, i), order.channels(m.rows, i)))
            prefix = f"base_model.model.model.layers.{i}.{path}"
            yield (f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"), pairs
