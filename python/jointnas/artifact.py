"""The result as a folder that stock transformers loads: config, safetensors, tokenizer, model card, choice.

Quantized weights are stored as the values they stand for, in the model's dtype. Stock transformers computes exactly
with them; what it cannot do is quantize activations, so where a choice has activation bits below 16, `reload` puts
these quantizers back, from `choice.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.nn.linear import FakeQuantLinear
from jointnas_kernels.space import LINEARS, Choice, kept_blocks

CHOICE_FILE = "choice.json"


def export(
    model: LlamaForCausalLM,
    folder: str | Path,
    choice: Choice,
    block_rank: Sequence[int],
    *,
    tokenizer: Any = None,
    facts: dict[str, Any] | None = None,
    base: str = "",
    licence: str | None = None,
) -> Path:
    """Writes the model (quantizers baked in) atomically: the folder is there whole, or not at all.

    facts: numbers for the model card, by name.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary, safe_serialization=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    layers = [
        {
            "original_block": b,
            "weight_bits": choice.weight_bits[b] if choice.weight_bits else 16,
            "act_bits": choice.act_bits[b] if choice.act_bits else 16,
        }
        for b in kept_blocks(block_rank, choice.blocks)
    ]
    record = {"choice": choice.to_dict(), "layers": layers, "act_symmetric": _symmetric(model), "base": base}
    (temporary / CHOICE_FILE).write_text(json.dumps(record, indent=1))
    (temporary / "README.md").write_text(card(choice, layers, facts or {}, base, licence))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    return folder


def reload(folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The exported model through stock `AutoModelForCausalLM`, with its activation quantizers, if it has any."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise JointNASError(f"{str(folder)!r} is no exported model: it has no config.json")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    path = folder / CHOICE_FILE
    if path.is_file():
        record = json.loads(path.read_text())
        for layer, bits in zip(model.model.layers, record["layers"], strict=True):
            if bits["act_bits"] < 16:
                for name in LINEARS:
                    parent = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
                    old: nn.Linear = getattr(parent, name)
                    weight, bias = old.weight.detach(), None if old.bias is None else old.bias.detach()
                    new = FakeQuantLinear(weight, bias, None, bits["act_bits"], record["act_symmetric"])
                    setattr(parent, name, new)
    model.eval()
    nn.Module.to(model, device)
    return model


def _symmetric(model: nn.Module) -> bool:
    return any(m.act_symmetric for m in model.modules() if isinstance(m, FakeQuantLinear))


def card(choice: Choice, layers: list[dict[str, Any]], facts: dict[str, Any], base: str, licence: str | None) -> str:
    """A model card in Markdown."""
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [compressed, jointnas]"]
    if licence:
        head.append(f"license: {licence}")
    lines = [*head, "---", "", f"# Compressed {base or 'Llama'}", ""]
    lines += [
        "Found by a joint search over architecture and precision, then distilled from the original. Load it with",
        "`transformers.AutoModelForCausalLM.from_pretrained(folder)`.",
        "",
        "| size | value |",
        "|---|---|",
        *(f"| {k} | {getattr(choice, k)} |" for k in ("hidden", "heads", "head_dim", "intermediate", "blocks")),
        *(f"| {k} | {v} |" for k, v in facts.items()),
        "",
    ]
    if choice.weight_bits or choice.act_bits:
        lines += ["| block | of the original | weight bits | activation bits |", "|---|---|---|---|"]
        lines += [
            f"| {i} | {b['original_block']} | {b['weight_bits']} | {b['act_bits']} |" for i, b in enumerate(layers)
        ]
        lines += ["", "Weights are stored as the values their integers stand for."]
        if choice.act_bits and min(b["act_bits"] for b in layers) < 16:
            lines += [
                "Activation quantizers are not part of the stock format: `jointnas.artifact.reload(folder)` adds them,",
                "stock transformers computes with unquantized activations.",
            ]
    return "\n".join(lines) + "\n"
