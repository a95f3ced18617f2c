"""Random mixed choices of every family, exported: greedy text of the packed model is that of the fake-quantized one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jointnas import exporting
from jointnas_kernels import hf
from jointnas_kernels.hf import convert, extract
from jointnas_kernels.space import SearchSpace
from tests.hf.hf_models import ids, random_importance, randomize_lora, tiny_model
from tests.runtime.test_decode import FAMILIES

SPACE = SearchSpace((16, 32), (2, 4), (16,), (16, 48), (1, 2, 3), (2, 4, 8), (4, 8, 16), group_size=16)
CHOICES, TOKENS = 20, 64


@pytest.mark.parametrize("name", ["llama3-tied", "mistral-window", "qwen3-window", "phi3-window"])
@torch.no_grad()
def test_greedy_tokens_are_those_of_the_fake_quantized_model(name: str, tmp_path: Path) -> None:
    model = tiny_model(**{**FAMILIES[name], "max_position_embeddings": 128})
    supernet = randomize_lora(convert(model, SPACE, importance=random_importance(model.config), lora_rank=2))
    generator = torch.Generator().manual_seed(5)
    for i in range(CHOICES):
        choice = SPACE.sample(generator)
        fake: Any = extract(supernet, choice)
        exporting.export_model(fake, tmp_path / str(i), choice, supernet.block_rank)
        packed: Any = hf.load(tmp_path / str(i))
        x = ids(1, 6, seed=i)
        how = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
               "attention_mask": torch.ones_like(x)}  # fmt: skip
        assert torch.equal(packed.generate(x, **how), fake.generate(x, **how)), choice
        assert packed.runtime.steps == TOKENS - 1
