"""A campaign small enough for tests: the tiny random Llama in a folder with a tokenizer of words, and a made-up table.

``python -m tests.jointnas.campaigns FOLDER PROCESSES`` runs or resumes it, for tests that kill it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from jointnas.compare_config import CompareConfig
from jointnas.config import build
from jointnas.verbs.compare import compare
from jointnas_kernels.latency import LatencyTable
from jointnas_kernels.space import SearchSpace
from tests.jointnas import tiny
from tests.jointnas.tiny_tokenizers import of_words
from tests.latency.tables import synthetic

WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in "aeiou"]  # 60, each followed by one of two


def text(words: int = 3000) -> str:
    generator = torch.Generator().manual_seed(1)
    after = torch.randint(len(WORDS), (len(WORDS), 2), generator=generator).tolist()
    turns = torch.randint(2, (words,), generator=generator).tolist()
    found = [0]
    for turn in turns:
        found.append(after[found[-1]][turn])
    return " ".join(WORDS[i] for i in found)


def prepare(root: Path, space: dict[str, Any] | None = None) -> None:
    """Model, text and table."""
    tiny.model().save_pretrained(root / "model")
    of_words(" ".join(WORDS)).save_pretrained(root / "model")
    (root / "text.txt").write_text(text())
    values = {k: None if v == "none" else v for k, v in (space or tiny.SPACE).items()}
    table = synthetic(SearchSpace.from_dict(values))
    elsewhere = table.header.device.model_copy(update={"name": "another"})  # so that nothing can be measured
    LatencyTable(table.header.model_copy(update={"device": elsewhere}), table.rows).save(root / "table.jsonl")


def config(root: Path, space: dict[str, Any] | None = None, out: str = "out", **sections: Any) -> CompareConfig:
    base = tiny.config(root / out, space, **{k: v for k, v in sections.items() if k != "compare"})
    values = base.model_dump() | {
        "resume": "auto", "tensorboard": False, "model": {"source": str(root / "model")},
        "data": {"source": str(root / "text.txt"), "seq_len": 16, "batch_size": 2, "cache": str(root / "cache")},
        "latency": {"table": str(root / "table.jsonl"), "force": True},
        "compare": {"strata": 4, "candidates": 2, "batches": 1, "threads": 1, **sections.get("compare", {})},
    }  # fmt: skip
    del values["seed"]
    return build(CompareConfig, values)


KILLED: dict[str, Any] = {
    "search": {"steps": 8, "save_every": 2}, "finetune": {"steps": 4, "save_every": 2},
    "compare": {
        "methods": ["joint", "no-bits", "subnet-selection", "ilp", "uniform"], "target_shares": [0.6],
        "precisions": ["W4A8"], "variants": {"rtn": {"quantizer.init": "rtn"}},
    },
}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = {**KILLED, "compare": {**KILLED["compare"], "processes": int(sys.argv[2])}}
    compare(config(Path(sys.argv[1]), **given))
