"""humming-kernels: W{2,4,8}A16, compiled for every shape when it is first used.

Ran on an H200 in the GEMM benchmark (W4A16, groups of 128, bf16, 1 to 4096 tokens); what else is declared here follows
version 0.1.19's source and has only run on stand-ins (tests). Its layer takes our words as they are: offset binary,
lowest input first. Its int8 activations are symmetric, those of a table's choices are not.
"""

from __future__ import annotations

from typing import Any

from jointnas_kernels.latency.backends.base import Call, Target, ThirdParty, Weight, stored
from jointnas_kernels.latency.spec import DENSE, OpSpec


class Humming(ThirdParty):
    """humming's layer; `symmetric`: A8 too, for callers (the benchmark) that hold it to the symmetric reference."""

    name, package, distribution = "humming", "humming", "humming-kernels"
    multiples = (64, 32)
    activations = ": its int8 ones have no zero point, the table's have"

    def __init__(self, symmetric: bool = False) -> None:
        self.abits = (8, DENSE) if symmetric else (DENSE,)

    def prepare(self, spec: OpSpec, target: Target, weight: Weight | None) -> Call:
        from humming.layer import HummingLayer

        packed, scale = stored(weight)
        layer: Any = HummingLayer(
            shape_n=spec.n, shape_k=spec.k,
            weight_config={"dtype": f"int{spec.wbits}", "group_size": spec.group if spec.group < spec.k else 0},
            input_config={"dtype": "int8"} if spec.abits == 8 else None, torch_dtype=target.dtype,
        ).to(target.device)
        layer.load_from_tensors({"weight": packed, "weight_scale": scale})
        layer.transform()
        call: Call = layer
        return call
