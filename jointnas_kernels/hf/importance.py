"""Importance of channels and blocks from activations of a calibration set (Minitron, arXiv 2407.14679).

hidden channel   L2 norm over tokens of both norms' outputs, summed over blocks
query head       L2 norm over tokens of o_proj's input, over the head's dims
value dim        L2 norm over tokens of o_proj's input, over the query heads of its key-value head
MLP neuron       L2 norm over tokens of down_proj's input
block            1 - mean over tokens of cos(block input, block output)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.space import original_sizes


@dataclass(frozen=True)
class Importance:
    """Scores, larger = more important, on the host in fp32."""

    hidden: Tensor  # [N]
    heads: Tensor  # [L, H]
    value_dims: Tensor  # [L, Hkv, D]
    neurons: Tensor  # [L, I]
    blocks: Tensor  # [L]

    def check(self, config: Any) -> None:
        """Raise unless the scores belong to a model of this config."""
        s, n_kv = original_sizes(config), config.num_key_value_heads
        blocks = s["blocks"]
        shapes = {
            "hidden": (s["hidden"],),
            "heads": (blocks, s["heads"]),
            "value_dims": (blocks, n_kv, s["head_dim"]),
            "neurons": (blocks, s["intermediate"]),
            "blocks": (blocks,),
        }
        for name, shape in shapes.items():
            scores = getattr(self, name)
            if tuple(scores.shape) != shape:
                raise JointNASError(f"importance: {name} has shape {tuple(scores.shape)}; the model needs {shape}.")
            if not torch.isfinite(scores).all():
                raise JointNASError(f"importance: {name} has scores that are not finite.")

    def save(self, path: str | Path) -> None:
        """As safetensors."""
        save_file({f.name: getattr(self, f.name).contiguous() for f in fields(self)}, str(path))

    @classmethod
    def load(cls, path: str | Path) -> Importance:
        """Inverse of `save`."""
        if not Path(path).is_file():
            raise JointNASError(f"importance file {str(path)!r} does not exist.")
        data = load_file(str(path))
        names = {f.name for f in fields(cls)}
        if set(data) != names:
            found, needed = ", ".join(sorted(data)), ", ".join(sorted(names))
            raise JointNASError(f"{path}: expected the tensors {needed}; found {found}.")
        return cls(**data)


@torch.no_grad()
def importance_scores(model: nn.Module, batches: Iterable[Tensor | Mapping[str, Tensor]]) -> Importance:
    """Run the model on calibration batches (token ids [B, T], or keyword arguments of its forward) and score it."""
    config: Any = model.config
    s, n_kv = original_sizes(config), config.num_key_value_heads
    layers: Any = model.get_submodule("model.layers")
    device = next(model.parameters()).device
    count = s["blocks"]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=device)

    hidden, neurons = zeros(2 * count, s["hidden"]), zeros(count, s["intermediate"])
    context = zeros(count, s["heads"] * s["head_dim"])
    cosine, tokens, current = zeros(count), 0, None  # sums over tokens; `current`: padding mask of the running batch

    def rows(x: Tensor) -> Tensor:
        x = x.float().flatten(0, 1)
        return x if current is None else x[current]

    def energy(total: Tensor, x: Tensor) -> None:
        total += rows(x).square().sum(0)

    def norm_hook(i: int):
        return lambda module, args, output: energy(hidden[i], output)

    def input_hook(total: Tensor, i: int):
        return lambda module, args: energy(total[i], args[0])

    def block_hook(i: int):
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            cosine[i] += nn.functional.cosine_similarity(rows(x), rows(y), dim=-1).sum()

        return hook

    hooks, training = [], model.training
    for i, layer in enumerate(layers):
        hooks += [
            layer.input_layernorm.register_forward_hook(norm_hook(2 * i)),
            layer.post_attention_layernorm.register_forward_hook(norm_hook(2 * i + 1)),
            layer.self_attn.o_proj.register_forward_pre_hook(input_hook(context, i)),
            layer.mlp.down_proj.register_forward_pre_hook(input_hook(neurons, i)),
            layer.register_forward_hook(block_hook(i), with_kwargs=True),
        ]
    try:
        model.eval()
        for batch in batches:
            inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
            inputs.pop("labels", None)
            inputs = {k: v.to(device) for k, v in inputs.items()}
            mask = inputs.get("attention_mask")
            current = None if mask is None else mask.flatten().bool()
            tokens += inputs["input_ids"].numel() if current is None else int(current.sum())
            model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    if tokens == 0:
        raise JointNASError("importance: the calibration set is empty.")
    per_dim = context.view(count, n_kv, s["heads"] // n_kv, s["head_dim"])
    scores = {
        "hidden": hidden.sqrt().sum(0),
        "heads": per_dim.sum(-1).flatten(1).sqrt(),
        "value_dims": per_dim.sum(2).sqrt(),
        "neurons": neurons.sqrt(),
        "blocks": 1 - cosine / tokens,
    }
    return Importance(**{k: v.float().cpu() for k, v in scores.items()})
