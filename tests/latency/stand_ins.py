"""Other libraries' low-bit linears in plain torch: their interface and their storage layout, not their kernels.

`install` puts one into sys.modules for a test. Each takes apart exactly what the real one is documented to expect, so
that an adapter's packing and order of arguments are exercised; what it is not told how to read, it does not guess.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VLLM = "vllm.model_executor.layers.quantization.utils.marlin_utils"


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, **attributes: Any) -> None:
    """The module `name` with its parent packages, of a distribution "`package` 1.2.3"."""
    package = name.split(".")[0]
    for end in range(1, len(name.split(".")) + 1):
        part = ".".join(name.split(".")[:end])
        if part not in sys.modules:
            module = types.ModuleType(part)
            module.__spec__ = importlib.machinery.ModuleSpec(part, None, is_package=True)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, part, module)
    vars(sys.modules[name]).update(attributes)
    distribution = {"humming": "humming-kernels"}.get(package, package)
    info = folder / f"{distribution.replace('-', '_')}-1.2.3.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2.3\n")
    monkeypatch.syspath_prepend(folder)


def unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """Unsigned fields of int32 words, lowest first, along `dim`."""
    fields = [(words >> bits * i) & ((1 << bits) - 1) for i in range(32 // bits)]
    return torch.stack(fields, dim + 1).flatten(dim, dim + 1)


# ---- humming: humming.layer -----------------------------------------------------------------------------------------


class HummingLayer(nn.Module):
    """weight int32 [N, K * bits / 32], offset binary; weight_scale [N, K / group] (group 0: [N, 1])."""

    def __init__(
        self, shape_n: int, shape_k: int, weight_config: dict[str, Any], input_config: dict[str, Any] | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        assert torch_dtype in (torch.float16, torch.bfloat16)
        assert shape_n % 64 == 0
        assert shape_k % 32 == 0
        self.bits = int(weight_config["dtype"].removeprefix("int"))
        self.group = weight_config["group_size"] or shape_k
        self.symmetric_bits = None if input_config is None else int(input_config["dtype"].removeprefix("int"))
        for name, shape, dtype in (
            ("weight", (shape_n, shape_k * self.bits // 32), torch.int32),
            ("weight_scale", (shape_n, shape_k // self.group), torch_dtype),
        ):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))
        self.dense: Tensor | None = None

    def load_from_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.load_state_dict(tensors, strict=False)

    def transform(self) -> None:
        levels = unpacked(self.weight, self.bits, 1).float() - 2 ** (self.bits - 1)
        self.dense = levels * self.weight_scale.float().repeat_interleave(self.group, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        assert self.dense is not None, "call transform() before forward()"
        x = inputs.float()
        if self.symmetric_bits is not None:
            scale = x.abs().amax(-1, keepdim=True) / (2 ** (self.symmetric_bits - 1) - 1)
            x = (x / scale).round() * scale
        return (x @ self.dense.T).to(inputs.dtype)


# ---- gemlite: gemlite.helper ----------------------------------------------------------------------------------------


class A16Wn:
    """uint8 levels [N, K], scales and zeros [N, K / group] in the model's dtype: w = (q - zero) * scale."""

    def __init__(self, device: str = "cuda:0", dtype: torch.dtype | None = None) -> None:
        self.device, self.dtype = device, dtype

    def from_weights(
        self, W_q: Tensor, scales: Tensor, zeros: Tensor, W_nbits: int, group_size: int, bias: Tensor | None = None
    ) -> nn.Module:
        assert W_q.dtype == torch.uint8
        assert int(W_q.max()) < 1 << W_nbits
        assert scales.dtype == zeros.dtype == self.dtype
        q = W_q.float().unflatten(1, (-1, group_size))
        dense = ((q - zeros.float()[..., None]) * scales.float()[..., None]).flatten(1)
        layer = nn.Linear(*dense.T.shape, bias=False, device=self.device, dtype=self.dtype)
        layer.weight = nn.Parameter(dense.to(layer.weight), requires_grad=False)
        return layer


# ---- Marlin: functions of vLLM and GPTQModel ------------------------------------------------------------------------

MANY = torch.tensor([i + 8 * j for i in range(8) for j in range(8)])  # scales of several groups, of one
ONE = torch.tensor([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])


class ScalarTypes:
    uint4b8, uint8b128 = (4, 8), (8, 128)  # bits and bias


def gptq_marlin_repack(b_q_weight: Tensor, perm: Tensor, size_k: int, size_n: int, num_bits: int) -> Tensor:
    """int32 [K * bits / 32, N] to the kernel's shape; here its order is reversed, there it is the tensor cores'."""
    assert b_q_weight.is_contiguous()
    assert b_q_weight.shape == (size_k * num_bits // 32, size_n)
    assert perm.numel() == 0
    return b_q_weight.flatten().flip(0).view(size_k // 16, size_n * 16 * num_bits // 32)


def marlin_permute_scales(s: Tensor, size_k: int, size_n: int, group_size: int) -> Tensor:
    """[K / group, N] in the order of the kernel's threads."""
    order = MANY if 0 < group_size < size_k else ONE
    return s.reshape(-1, len(order))[:, order].reshape(-1, size_n).contiguous()


def marlin_make_workspace_new(device: torch.device, max_blocks_per_sm: int = 1) -> Tensor:
    return torch.zeros(132 * max_blocks_per_sm, dtype=torch.int, device=device)


def apply_gptq_marlin_linear(
    input: Tensor, weight: Tensor, weight_scale: Tensor, weight_zp: Tensor, g_idx: Tensor, g_idx_sort_indices: Tensor,
    workspace: Tensor, wtype: tuple[int, int], output_size_per_partition: int, input_size_per_partition: int,
    is_k_full: bool, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    n, k, (bits, offset) = output_size_per_partition, input_size_per_partition, wtype
    assert weight.shape == (k // 16, n * 16 * bits // 32)
    assert weight_scale.dtype == input.dtype
    assert not any(t.numel() for t in (weight_zp, g_idx, g_idx_sort_indices))
    assert not workspace.any()
    levels = unpacked(weight.flatten().flip(0).view(-1, n), bits, 0).float() - offset  # [K, N]
    order = MANY if len(weight_scale) > 1 else ONE
    scale = weight_scale.view(-1, len(order))[:, order.argsort()].view(-1, n).float()
    return (input.float() @ (levels * scale.repeat_interleave(k // len(scale), 0))).to(input.dtype)


UTILS = {f.__name__: f for f in (marlin_permute_scales, marlin_make_workspace_new, apply_gptq_marlin_linear)}
REPACK = {"gptq_marlin_repack": gptq_marlin_repack}
LIBRARIES: dict[str, dict[str, dict[str, Any]]] = {  # by backend: modules and what is in them
    "humming": {"humming.layer": {"HummingLayer": HummingLayer}},
    "gemlite": {"gemlite.helper": {"A16Wn": A16Wn}},
    "marlin-vllm": {
        "vllm._custom_ops": REPACK,
        VLLM: UTILS,
        "vllm.scalar_type": {"scalar_types": ScalarTypes},
    },
    "marlin-gptqmodel": {
        "gptqmodel.utils.marlin": REPACK | UTILS,
        "gptqmodel.utils.marlin_scalar_type": {"scalar_types": ScalarTypes},
    },
}
