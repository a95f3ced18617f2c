"""What vLLM (0.11 to 0.15) asks of a compressed-tensors folder, stated as code, and exported folders against it.

Rules, from its `compressed_tensors` quantization (`CompressedTensorsConfig`, `find_matched_target`,
`should_ignore_layer`, `CompressedTensorsWNA16`):

 1. It fuses q, k, v and gate, up. A fused layer is matched by the names of its parts: all parts have a target, or all
    are ignored; and it takes the scheme of the first, so all parts must have the same one.
 2. A linear is named by a target, exactly (no substring), or ignored: `ignore` names those without a scheme.
 3. Weights: int, symmetric, static, strategy group or channel, stored as pack-quantized, 4 or 8 bits.
 4. Input activations: none. (Int activations go with per-channel weights only; with groups there is no kernel.)
 5. Groups divide the inputs; its kernels have groups of 32, 64 and 128.
 6. Scales are fp16 or bf16: the folder's dtype is one of them.

W2 and A < 16 break rules 3 and 4: those run on this package's kernels, or in llama.cpp.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from jointnas_kernels.hf import Supernet, convert
from jointnas_kernels.hf.families import build
from jointnas_kernels.space import Choice, SearchSpace
from tests.hf.exported import exported
from tests.hf.hf_models import random_importance, randomize_lora, tiny_model

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
GROUPS = (32, 64, 128)
SPACE = SearchSpace((64, 128), (2, 4), (32,), (64, 96), (1, 2, 3), (4, 8), group_size=32)
QUANT = SearchSpace.from_dict({**SPACE.to_dict(), "weight_bits": (2, 4, 8), "act_bits": (8, 16)})


def broken(folder: Path) -> set[int]:
    """Numbers of the rules that a folder breaks."""
    raw = json.loads((folder / "config.json").read_text())
    config = raw.pop("quantization_config")
    with torch.device("meta"):
        model = build(AutoConfig.for_model(**raw))
    by_target = {t: g for g in config["config_groups"].values() for t in g["targets"]}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = set()
    for name, linear in linears.items():
        if (name in by_target) == (name in config["ignore"]):
            found.add(2)
        if name in by_target:
            found |= scheme_breaks(by_target[name], config, linear.in_features)
    for parts in fused_parts(list(linears)):
        schemes = [by_target.get(part) for part in parts]
        if any(part in config["ignore"] for part in parts) != all(part in config["ignore"] for part in parts):
            found.add(1)
        if any(not same(scheme, schemes[0]) for scheme in schemes):
            found.add(1)
    if raw["dtype"] not in ("float16", "bfloat16"):
        found.add(6)
    return found


def fused_parts(linears: list[str]) -> list[list[str]]:
    parents = {name.rpartition(".")[0] for name in linears}
    every = [[f"{parent}.{part}" for part in parts] for parent in sorted(parents) for parts in FUSED.values()]
    return [parts for parts in every if parts[0] in linears]


def same(a: Any, b: Any) -> bool:
    strip = [None if g is None else {k: v for k, v in g.items() if k != "targets"} for g in (a, b)]
    return strip[0] == strip[1]


def scheme_breaks(group: dict[str, Any], config: dict[str, Any], inputs: int) -> set[int]:
    weights, found = group["weights"], set()
    stored = group.get("format") or config["format"]
    kind = weights and (weights["type"], weights["symmetric"], weights["dynamic"], stored)
    if kind != ("int", True, False, "pack-quantized") or weights["num_bits"] not in (4, 8):
        found.add(3)
    if weights and (weights["strategy"] != "group" or inputs % weights["group_size"]):
        found.add(5)
    if weights and weights["group_size"] not in GROUPS:
        found.add(5)
    if group["input_activations"] is not None:
        found.add(4)
    return found


def supernet(family: str, space: SearchSpace = SPACE, dtype: torch.dtype = torch.bfloat16) -> Supernet:
    change = {"family": family, "hidden_size": 128, "intermediate_size": 96, "head_dim": 32}
    model = tiny_model(dtype, **change)
    return randomize_lora(convert(model, space, lora_rank=2, importance=random_importance(model.config)))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_exported_folders_keep_the_rules(tmp_path: Path, family: str) -> None:
    net, g = supernet(family), torch.Generator().manual_seed(1)
    for i in range(6):
        choice = SPACE.sample(g)
        exported(net, choice, tmp_path / str(i))
        assert broken(tmp_path / str(i)) == set()


def test_which_rules_other_choices_break(tmp_path: Path) -> None:
    net = supernet("llama", QUANT)
    full = (128, 4, 32, 96, 3)
    for i, (weights, acts, rules) in enumerate(
        (((4, 8, 4), (16, 16, 16), set()), ((4, 2, 4), (16,) * 3, {3}), ((4, 8, 4), (16, 8, 16), {4}))
    ):
        exported(net, Choice(*full, weights, acts), tmp_path / str(i))
        assert broken(tmp_path / str(i)) == rules
    exported(supernet("llama", dtype=torch.float32), SPACE.full(), tmp_path / "fp32")
    assert broken(tmp_path / "fp32") == {6}


def test_the_rules_are_checked(tmp_path: Path) -> None:
    """A folder with an unnamed linear, or a different k_proj, is found."""
    exported(supernet("llama"), SPACE.full(), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    whole = json.loads(path.read_text())
    groups = whole["quantization_config"]["config_groups"]
    assert whole["quantization_config"]["ignore"] == ["lm_head"]
    key = next(k for k, g in groups.items() if g["targets"][0].endswith("1.self_attn.k_proj"))
    groups[key]["weights"]["num_bits"] = 4 if groups[key]["weights"]["num_bits"] == 8 else 8
    path.write_text(json.dumps(whole))
    assert broken(tmp_path / "hf") == {1}
    del groups[key]
    path.write_text(json.dumps(whole))
    assert broken(tmp_path / "hf") == {1, 2}
