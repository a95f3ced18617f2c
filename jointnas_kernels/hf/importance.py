"""Importance of channels and blocks from activations of a calibration set (Minitron, arXiv 2407.14679).

hidden channel   L2 norm over tokens of both norms' outputs, summed over blocks
query head       L2 norm over tokens of o_proj's input, over the head's dims
value dim        L2 norm over tokens of o_proj's input, over the query heads of its key-value head
MLP neuron       L2 norm over tokens of down_proj's input
block            1 - mean over tokens of cos(block input, block output)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.layout import HEADS, HIDDEN, NEURONS, VALUES, all_sizes, block_of


@dataclass(frozen=True)
class Importance:
    """Scores, larger = more important, on the host in fp32: hidden [N], heads [L, H], value_dims [L, Hkv, D],
    neurons [L, I], blocks [L]."""

    hidden: Tensor
    heads: Tensor
    value_dims: Tensor
    neurons: Tensor
    blocks: Tensor

    def check(self, config: Any) -> None:
        """Raise unless the scores belong to a model of this config.

        Raises:
            JointNASError: other shapes, or scores that are not finite.
        """
        s = all_sizes(config)
        shapes = {
            "hidden": ("hidden",), "heads": ("blocks", "heads"), "value_dims": ("blocks", "kv_heads", "head_dim"),
            "neurons": ("blocks", "intermediate"), "blocks": ("blocks",),
        }
        for name, dims in shapes.items():
            scores, shape = getattr(self, name), tuple(s[d] for d in dims)
            if tuple(scores.shape) != shape:
                raise JointNASError(f"importance: {name} has shape {tuple(scores.shape)}; the model needs {shape}.")
            if not torch.isfinite(scores).all():
                raise JointNASError(f"importance: {name} has scores that are not finite.")

    def save(self, path: str | Path) -> None:
        """As safetensors."""
        save_file({f.name: getattr(self, f.name).contiguous() for f in fields(self)}, str(path))

    @classmethod
    def load(cls, path: str | Path) -> Importance:
        """Inverse of `save`.

        Raises:
            JointNASError: no file, or one of other tensors.
        """
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
    """Run the model on calibration batches [B, T] of token ids, or keyword arguments of its forward, and score it.

    Raises:
        JointNASError: there are no batches.
    """
    config: Any = model.config
    s, layout = all_sizes(config), block_of(config)
    layers: Any = model.get_submodule("model.layers")
    device = next(model.parameters()).device
    count = s["blocks"]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=device)

    norms = [norm for norm in layout.norms if norm.axis == HIDDEN]
    hidden, neurons = zeros(count, len(norms), s["hidden"]), zeros(count, s["intermediate"])
    context = zeros(count, s["heads"] * s["head_dim"])
    inputs_of = {NEURONS: neurons, (*HEADS, *VALUES): context}
    cosine, tokens, current = zeros(count), 0, None  # sums over tokens; `current`: padding mask of the running batch

    def rows(x: Tensor) -> Tensor:
        x = x.float().flatten(0, 1)
        return x if current is None else x[current]

    def energy(total: Tensor, x: Tensor) -> None:
        total += rows(x).square().sum(0)

    def of_output(total: Tensor, module: nn.Module, args: Any, output: Tensor) -> None:
        energy(total, output)

    def of_input(total: Tensor, module: nn.Module, args: Any) -> None:
        energy(total, args[0])

    def of_block(i: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        cosine[i] += nn.functional.cosine_similarity(rows(x), rows(y), dim=-1).sum()

    with ExitStack() as stack:  # hooks end, and training goes on, behind it
        for i, layer in enumerate(layers):
            stack.enter_context(layer.register_forward_hook(partial(of_block, i), with_kwargs=True))
            for norm, total in zip(norms, hidden[i], strict=True):
                stack.enter_context(layer.get_submodule(norm.path).register_forward_hook(partial(of_output, total)))
            for linear in layout.linears:
                if linear.columns in inputs_of:
                    hook = partial(of_input, inputs_of[linear.columns][i])
                    stack.enter_context(layer.get_submodule(linear.module).register_forward_pre_hook(hook))
        stack.callback(model.train, model.training)
        model.eval()
        for batch in batches:
            inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
            inputs.pop("labels", None)
            inputs = {k: v.to(device) for k, v in inputs.items()}
            mask = inputs.get("attention_mask")
            current = None if mask is None else mask.flatten().bool()
            tokens += inputs["input_ids"].numel() if current is None else int(current.sum())
            model(**inputs, use_cache=False, logits_to_keep=1)
    if tokens == 0:
        raise JointNASError("importance: the calibration set is empty.")
    per_dim = context.view(count, s["kv_heads"], -1, s["head_dim"])
    scores = {
        "hidden": hidden.sqrt().flatten(0, 1).sum(0), "heads": per_dim.sum(-1).flatten(1).sqrt(),
        "value_dims": per_dim.sum(2).sqrt(), "neurons": neurons.sqrt(), "blocks": 1 - cosine / tokens,
    }
    return Importance(**{k: v.float().cpu() for k, v in scores.items()})
