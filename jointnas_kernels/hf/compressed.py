"""The checkpoint format of compressed-tensors, as far as this package writes and runs it. No import of that package.

`config.json` holds a `quantization_config`: groups of one scheme each, with the modules ("targets") it applies to.
Stored for a linear of scheme W{2,4,8} symmetric, `pack-quantized`:

    NAME.weight_packed   int32 [O, I b / 32]   q + 2^(b-1), least significant bits first (ops/lowbit/pack.py)
    NAME.weight_scale    [O, I / group]        in the model's dtype
    NAME.weight_shape    int64 [2]             (O, I)

and for an asymmetric weight, `naive-quantized` (transformers cannot load packed zero points):

    NAME.weight int8 [O, I],   NAME.weight_scale,   NAME.weight_zero_point int8 [O, I / group]

Both stand for (q - z) scale, rounded once to the scale's dtype. Activations below 16 bits are quantized dynamically per
token, by the formulas of ops/quant/spec.py, in the model's dtype; nothing is stored for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.nn.linear import FakeQuantLinear
from jointnas_kernels.ops.lowbit.pack import pack_weight
from jointnas_kernels.ops.quant.grid import integers
from jointnas_kernels.ops.quant.spec import PACKED_ACT_BITS, PACKED_WEIGHT_BITS

METHOD, PACKED, NAIVE = "compressed-tensors", "pack-quantized", "naive-quantized"
SUPPORTED = (
    "weights: int of 2, 4 or 8 bits, symmetric, strategy group, static, stored as pack-quantized, or not quantized; "
    "input activations: int of 2, 4 or 8 bits, strategy token, dynamic, or not quantized"
)


@dataclass(frozen=True)
class Scheme:
    """How one linear is quantized."""

    weight_bits: int | None  # None: in the model's dtype
    group_size: int = 0  # inputs per scale
    act_bits: int = 16
    act_symmetric: bool = False
    weight_symmetric: bool = True

    @staticmethod
    def of(linear: FakeQuantLinear) -> Scheme:
        """That of a linear."""
        group, symmetric = (linear.group_size, linear.zero is None) if linear.weight_bits else (0, True)
        return Scheme(linear.weight_bits, group, linear.act_bits, linear.act_symmetric, symmetric)

    @property
    def plain(self) -> bool:
        """Nothing is quantized."""
        return self.weight_bits is None and self.act_bits == 16


def stored(linear: FakeQuantLinear) -> dict[str, Tensor]:
    """The tensors of a linear by their names in a checkpoint, without its bias."""
    grid = linear.grid
    if grid is None:
        return {"weight": linear.weight.detach()}
    q = integers(linear.weight, grid)
    if grid.zero is not None:
        return {"weight": q, "weight_scale": grid.scale, "weight_zero_point": grid.zero}
    per_word = 32 // grid.bits
    if q.shape[1] % per_word:
        raise JointNASError(f"{q.shape[1]} inputs of {grid.bits} bits do not fill whole words of {per_word}")
    shape = torch.tensor(tuple(q.shape), dtype=torch.int64)
    return {"weight_packed": pack_weight(q, grid.bits), "weight_scale": grid.scale, "weight_shape": shape}


def quantization_config(schemes: Mapping[str, Scheme], ignore: Iterable[str] = ("lm_head",)) -> dict[str, Any]:
    """The entry of `config.json`: one group per linear, so that any two may differ; `ignore`: linears without a group,
    which some readers want named."""
    quantized = {name: scheme for name, scheme in schemes.items() if not scheme.plain}
    digits = len(str(max(0, len(quantized) - 1)))  # readers sort the groups' names as text
    groups, formats = {}, set()
    for i, (name, scheme) in enumerate(quantized.items()):
        weights = inputs = stored_as = None
        if scheme.weight_bits is not None:
            stored_as = PACKED if scheme.weight_symmetric else NAIVE
            formats.add(stored_as)
            weights = {
                "num_bits": scheme.weight_bits, "type": "int", "symmetric": scheme.weight_symmetric,
                "strategy": "group", "group_size": scheme.group_size, "dynamic": False,
            }  # fmt: skip
        if scheme.act_bits < 16:
            inputs = {
                "num_bits": scheme.act_bits, "type": "int", "symmetric": scheme.act_symmetric, "strategy": "token",
                "dynamic": True,
            }  # fmt: skip
        groups[f"group_{i:0{digits}d}"] = {
            "targets": [name], "weights": weights, "input_activations": inputs, "output_activations": None,
            "format": stored_as,
        }  # fmt: skip
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
        "quantization_status": "compressed", "config_groups": groups, "ignore": list(ignore), "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def read_schemes(config: Mapping[str, Any], model: nn.Module) -> dict[str, Scheme]:
    """Scheme of every linear of the model that the config quantizes."""
    if config.get("quant_method") != METHOD:
        raise JointNASError(f"quantization method {config.get('quant_method')!r} is not supported; only {METHOD!r} is")
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if config.get(key):
            raise JointNASError(f"{METHOD}: {key} is not supported. Supported: {SUPPORTED}")
    if config.get("quantization_status", "compressed") != "compressed":
        raise JointNASError(
            f"{METHOD}: quantization_status {config['quantization_status']!r}; only 'compressed' is run"
        )
    by_target = {t: g for g in (config.get("config_groups") or {}).values() for t in g.get("targets", ())}
    # as compressed-tensors orders them: exact names, expressions, then classes
    targets, found = sorted(by_target, key=lambda t: (t.startswith("re:"), t)), {}
    ignore = config.get("ignore") or ()
    for name, module in model.named_modules():
        if any(_named(name, t) or _is_a(module, t) for t in ignore):
            continue
        ranked = [t for t in targets if _named(name, t)] + [t for t in targets if _is_a(module, t)]
        if not ranked:
            continue
        if isinstance(module, nn.Linear):
            scheme = _scheme(name, by_target[ranked[0]], config.get("format"))
            if not scheme.plain:
                found[name] = scheme
        elif isinstance(module, nn.Embedding) or ranked[0].endswith("Attention"):
            raise JointNASError(f"{name}: only linears can be quantized, not {type(module).__name__}")
    return found


def _named(name: str, target: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def _is_a(module: nn.Module, target: str) -> bool:
    return any(c.__name__ == target for c in type(module).__mro__)


def _scheme(name: str, group: Mapping[str, Any], overall: str | None) -> Scheme:
    """One group of the config for one linear; raises on the first thing in it that is not supported."""
    weights, inputs = group.get("weights"), group.get("input_activations")

    def only(what: str, value: Any, allowed: Iterable[Any]) -> None:
        if value not in allowed:
            raise JointNASError(f"{name}: {what} {value!r} is not supported. Supported: {SUPPORTED}")

    only("output activations", group.get("output_activations"), (None,))
    bits, size = None, 0
    if weights is not None:
        only("weight type", weights.get("type", "int"), ("int",))
        only("weight bits", weights.get("num_bits"), PACKED_WEIGHT_BITS)
        only("weight strategy", weights.get("strategy"), ("group",))
        only("weight symmetric =", weights.get("symmetric", True), (True,))
        only("weight dynamic =", weights.get("dynamic", False), (False,))
        only("weight actorder", weights.get("actorder"), (None, False, "weight", "static"))  # these need no index
        only("weight format", group.get("format") or overall, (PACKED,))
        bits, size = weights["num_bits"], weights.get("group_size") or 0
        if size < 1:
            raise JointNASError(f"{name}: weight group_size {size} is not supported. Supported: {SUPPORTED}")
    act_bits, act_symmetric = 16, False
    if inputs is not None:
        only("activation type", inputs.get("type", "int"), ("int",))
        only("activation bits", inputs.get("num_bits"), PACKED_ACT_BITS[:-1])
        only("activation dynamic =", inputs.get("dynamic", False), (True,))
        only("activation strategy", inputs.get("strategy"), ("token",))
        act_bits, act_symmetric = inputs["num_bits"], bool(inputs.get("symmetric", True))
    return Scheme(bits, size, act_bits, act_symmetric)
