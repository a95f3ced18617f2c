"""A search small enough for tests: a random Llama of 3 blocks, random tokens, a made-up latency table.

``python -m tests.jointnas.tiny OUT`` runs or resumes it, for tests that kill it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from jointnas.bilevel import optimise
from jointnas.config import RunConfig, build
from jointnas.data import Streams
from jointnas.preparation import prepare
from jointnas.run_folder import Found, Run
from jointnas_kernels.hf.families import build as build_model
from tests.latency.tables import CONFIG, synthetic

SPACE: dict[str, Any] = {
    "hidden": [64, 128], "heads": [2, 4], "head_dim": [16, 32], "intermediate": [64, 192], "blocks": [1, 2, 3],
    "weight_bits": [4, 8], "act_bits": [8, 16], "group_size": 64,
}  # fmt: skip
NO_BITS = {**SPACE, "weight_bits": "none", "act_bits": "none"}


def model(family: str = "llama") -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **vars(CONFIG), max_position_embeddings=256, pad_token_id=None)
    made: Any = build_model(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return made


def streams(tokens: int = 4096) -> Streams:
    """A text with structure: the next token is mostly a function of this one."""
    generator = torch.Generator().manual_seed(1)
    table = torch.randint(97, (97,), generator=generator)
    noise = torch.rand(tokens, generator=generator) < 0.2
    other = torch.randint(97, (tokens,), generator=generator)
    text = [5]
    for i in range(1, tokens):
        text.append(int(other[i]) if noise[i] else int(table[text[-1]]))
    stream = torch.tensor(text)
    return Streams(stream[:-512], tokens // 2, stream[-512:])


def config(out: Path | str, space: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    values: dict[str, Any] = {
        "out": str(out),
        "progress": False,
        "data": {"seq_len": 16, "batch_size": 2},
        "space": space or SPACE,
        "search": {
            "steps": 12, "lora_rank": 4, "lr_arch": 0.1, "lr_weight": 1e-3, "log_every": 2, "gap_every": 4,
            "save_every": 2, "importance_batches": 2, "entropy_stop": 0.0,
        },
        "quantizer": {"init": "clip"},
        "finetune": {"steps": 6, "save_every": 3, "log_every": 2},
        "eval": {"tokens": 512, "tasks": []},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) and name in values else section
    return build(RunConfig, values)


def start(run_config: RunConfig) -> Run:
    return prepare(run_config, model(), streams(), synthetic(run_config.space.build()))


def search(run_config: RunConfig) -> tuple[Run, Found]:
    run = start(run_config)
    return run, optimise(run)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normal values that fp64 rounds to any dtype."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


if __name__ == "__main__":
    torch.set_num_threads(1)
    search(config(sys.argv[1], resume="auto", search={"steps": int(sys.argv[2])}))
