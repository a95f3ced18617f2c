"""What a supernet is made of, taken from a plain model of a supported family; its weights are shared, not copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from jointnas_kernels.hf.ordering import Order
from jointnas_kernels.layout import FINAL_NORM, HIDDEN, Norm, all_sizes, block_of, sliding_windows
from jointnas_kernels.nn.block import ActQuant, HeadNorm, SupernetBlock, SupernetNorm
from jointnas_kernels.nn.choices import ArchParameters
from jointnas_kernels.nn.linear import SupernetLinear
from jointnas_kernels.space import SearchSpace


def supernet_parts(
    model: nn.Module, space: SearchSpace, order: Order, *, groups: Mapping[str, int], linear: Mapping[str, Any],
    arch: Mapping[str, Any], act_symmetric: bool = False, backend: str | None = None,
) -> dict[str, Any]:
    """The arguments of `Supernet`.

    Args:
        model: reordered as `order` says.
        groups: the quantization group of every linear of a block.
        linear, arch: options of `SupernetLinear` and `ArchParameters`.
        act_symmetric, backend: of the activation quantizers, and of every operator.
    """
    config: Any = model.config
    layout, sizes = block_of(config), all_sizes(config)

    def linears(layer: nn.Module) -> dict[str, SupernetLinear]:
        found = {}
        for one in layout.linears:
            module: Any = layer.get_submodule(one.module)
            rows = layout.rows(one, sizes)
            bias = None if module.bias is None else module.bias[rows]
            found[one.name] = SupernetLinear(
                module.weight[rows], bias, bits=space.weight_bits, group_size=groups[one.name], backend=backend,
                **linear,
            )  # fmt: skip
        return found

    def norm(parent: nn.Module, of: Norm) -> Any:
        module: Any = parent.get_submodule(of.path)
        return (SupernetNorm if of.axis == HIDDEN else HeadNorm)(module.weight, module.variance_epsilon, backend)

    act = ActQuant(space.act_bits, act_symmetric, backend)
    body: Any = model.get_submodule("model")
    blocks = [
        SupernetBlock(
            linears(layer), {of.name: norm(layer, of) for of in layout.norms}, act, sizes["head_dim"],
            window is not None,
        )
        for layer, window in zip(body.layers, sliding_windows(config), strict=True)
    ]  # fmt: skip
    embedding, head = body.embed_tokens.weight, model.get_submodule("lm_head").weight
    return {
        "config": config, "space": space, "order": order, "blocks": blocks, "norm": norm(model, FINAL_NORM),
        "arch": ArchParameters(space, config, order.block_rank, **arch), "embedding": embedding,
        "lm_head": None if head is embedding else head, "rotary": body.rotary_emb, "backend": backend,
        "generation_config": getattr(model, "generation_config", None),
    }  # fmt: skip
