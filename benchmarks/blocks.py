"""Which models benchmarks of whole models take: what `model.source` takes, or two random blocks of Llama-3.1-8B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.models import llama_8b, llama_tiny
from jointnas import assets, loading
from jointnas.config import ModelConfig
from jointnas_kernels.hf.families import build

BLOCKS = "blocks"
HELP = f"'embedded', a folder, GGUF file or hub name, or '{BLOCKS}': two random blocks of Llama-3.1-8B's shapes"
SHOWN = "two blocks of Llama-3.1-8B"


def config_of(model: str, tiny: bool = False) -> Any:
    """The transformers config; `tiny`: of much smaller blocks. Their vocabulary is that of the embedded model, whose
    head is no more than a few percent of them, and tied."""
    if model != BLOCKS:
        return loading.model_config(ModelConfig(source=model))
    config = llama_tiny() if tiny else llama_8b(2)
    config.vocab_size, config.tie_word_embeddings = len(assets.load_tokenizer()), True
    return config


def source_of(model: str, folder: Path, dtype: str, tiny: bool = False) -> ModelConfig:
    """Where to load it from; random blocks are written into the folder."""
    if model != BLOCKS:
        return ModelConfig(source=model, dtype=dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        made = build(config_of(model, tiny)).to(getattr(torch, dtype))
    made.save_pretrained(folder)
    assets.load_tokenizer().save_pretrained(folder)
    return ModelConfig(source=str(folder), dtype=dtype)


def shown(model: str) -> str:
    """Its name in rows."""
    return SHOWN if model == BLOCKS else Path(model).name
