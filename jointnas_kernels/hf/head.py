"""A quantized head in a transformers model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from jointnas_kernels.nn.linear import FakeQuantLinear
from jointnas_kernels.ops.quant.grid import Grid


def put_head(model: Any, values: Tensor, grid: Grid) -> None:
    """Puts the values [V, N] of a quantized head, which lie on the grid, into a transformers model, in place.

    An embedding that is tied to the head takes them, and is a tensor of its own from then on: checkpoint formats cannot
    say that a quantized matrix is both.
    """
    model.lm_head = FakeQuantLinear(values, model.lm_head.bias, grid)
    if model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.get_input_embeddings().weight = nn.Parameter(values.clone())
