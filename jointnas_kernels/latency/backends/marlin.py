"""Marlin as vLLM or GPTQModel bring it: W{4,8}A16.

Never ran on a device: written after both libraries' sources of 2025 and 2026, and tested on stand-ins with their
interface. Both have the same functions with the same keywords, which did not change while the operator below them got
other arguments and another name. They know the kernel's layout, and take GPTQ's: levels packed along the inputs,
[K * bits / 32, N], with scales [K / group, N].
"""

from __future__ import annotations

from importlib import import_module

import torch

from jointnas_kernels.latency.backends.base import Call, Target, ThirdParty, Weight, stored
from jointnas_kernels.latency.spec import OpSpec

MODULES = {  # where `gptq_marlin_repack`, the other functions and `scalar_types` are
    "vllm": (
        "vllm._custom_ops", "vllm.model_executor.layers.quantization.utils.marlin_utils", "vllm.scalar_type",
    ),
    "gptqmodel": ("gptqmodel.utils.marlin", "gptqmodel.utils.marlin", "gptqmodel.utils.marlin_scalar_type"),
}  # fmt: skip


class Marlin(ThirdParty):
    """Marlin of "vllm" or "gptqmodel"."""

    wbits = (4, 8)
    multiples = (64, 128)

    def __init__(self, package: str) -> None:
        self.name, self.package, self.distribution = f"marlin-{package}", package, package

    def prepare(self, spec: OpSpec, target: Target, weight: Weight | None) -> Call:
        packed, scale = stored(weight)
        repacking, library, types = (import_module(name) for name in MODULES[self.package])
        none = torch.empty(0, dtype=torch.int32, device=target.device)  # no order of the inputs, no zero points
        levels = repacking.gptq_marlin_repack(
            b_q_weight=packed.t().contiguous(), perm=none, size_k=spec.k, size_n=spec.n, num_bits=spec.wbits
        )
        group = spec.group if spec.group < spec.k else -1
        scale = library.marlin_permute_scales(
            s=scale.t().contiguous(), size_k=spec.k, size_n=spec.n, group_size=group
        )
        workspace = library.marlin_make_workspace_new(target.device)
        kind = {4: "uint4b8", 8: "uint8b128"}[spec.wbits]  # stored with this bias
        fixed = {
            "weight": levels, "weight_scale": scale, "weight_zp": none, "g_idx": none, "g_idx_sort_indices": none,
            "workspace": workspace, "wtype": getattr(types.scalar_types, kind), "output_size_per_partition": spec.n,
            "input_size_per_partition": spec.k, "is_k_full": True,
        }  # fmt: skip
        return lambda x: library.apply_gptq_marlin_linear(input=x, **fixed)
