"""position_ids: rotary positions, and several sequences packed into one row, as stock transformers sees them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jointnas_kernels.hf import Supernet, convert, extract
from jointnas_kernels.space import Choice
from tests.hf.hf_models import SPACE, ids, random_importance, randomize_lora, tiny_model

WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral-window": {"family": "mistral", "sliding_window": 3},
    "qwen2-window": {"family": "qwen2", **WINDOWS},
    "qwen3-window": {"family": "qwen3", **WINDOWS},
    "phi3-window": {"family": "phi3", "sliding_window": 4},
}  # fmt: skip
ROWS = {
    "packed": [[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5, 6, 0]],
    "one row for all": [[0, 1, 2, 3, 4, 0, 1, 2, 3]],
    "shifted": [[3, 4, 5, 6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5, 6, 7, 8]],
    "jumps": [[0, 1, 2, 7, 8, 9, 20, 21, 22], [5, 4, 3, 2, 1, 0, 0, 1, 2]],
}


def build(change: dict[str, Any]) -> Supernet:
    model = tiny_model(**change)
    return randomize_lora(convert(model, SPACE, lora_rank=4, importance=random_importance(model.config)))


@pytest.mark.parametrize("change", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_choices_are_exact(change: dict[str, Any]) -> None:
    supernet, x = build(change), ids(2, 9)
    for choice in (Choice(16, 2, 8, 48, 3), Choice(32, 4, 16, 16, 2)):
        subnet = extract(supernet.fix(choice), choice)
        plain = supernet(x).logits
        for rows in ROWS.values():
            positions = torch.tensor(rows)
            own = supernet(x, position_ids=positions).logits
            assert (own - plain).abs().max() > 1e-3 or rows is ROWS["shifted"]  # rotary embedding is relative
            stock = subnet(x, position_ids=positions, use_cache=False).logits  # with a cache it sees no packing
            assert (own - stock).abs().max() <= 1e-4
        mask = torch.ones_like(x)
        mask[1, 6:] = 0
        own = supernet(x, mask, position_ids=positions).logits  # stock looks for packing without a mask only
        stock = subnet(x, attention_mask=mask, position_ids=positions, use_cache=False).logits
        assert (own - stock)[mask.bool()].abs().max() <= 1e-4


@pytest.mark.parametrize("mode", ["weight", "arch"])
def test_packed_sequences_do_not_see_each_other(mode: str) -> None:
    """Relaxed, with gradients: one row of two sequences equals the two alone; so does the original model."""
    supernet, x, cut = build(FAMILIES["mistral-window"]).double().mode(mode), ids(1, 9), 4
    parts = (x[:, :cut], x[:, cut:])
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    labels = x.clone()
    labels[:, cut] = -100  # the first token of a sequence has nobody to predict it
    supernet.step = 3
    packed = supernet(x, labels=labels, position_ids=positions, return_logits=True)
    packed.loss.backward()
    trained = [p for p in supernet.parameters() if p.grad is not None]
    gradients = [p.grad.clone() for p in trained]
    supernet.zero_grad()
    alone = []
    for part in parts:
        supernet.step = 3
        alone.append(supernet(part, labels=part, num_items_in_batch=x.shape[1] - 2, return_logits=True))
        alone[-1].loss.backward()
    torch.testing.assert_close(packed.logits, torch.cat([out.logits for out in alone], dim=1))
    torch.testing.assert_close(packed.loss, alone[0].loss + alone[1].loss)
    assert trained
    for p, gradient in zip(trained, gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    original = [supernet.original(part).logits for part in parts]
    torch.testing.assert_close(supernet.original(x, position_ids=positions).logits, torch.cat(original, dim=1))
