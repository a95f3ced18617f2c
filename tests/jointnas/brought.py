"""What users bring, made small: a model, a text and its records, and the command that takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from jointnas import cli
from jointnas_kernels.hf.families import build
from tests.jointnas.tiny_tokenizers import of_bytes

LINE = "The quick brown fox jumps over the lazy dog.\n"
TEXT = LINE * 60
BASE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "num_hidden_layers": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def save(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, tokenizer: Any = None, shard: str = "1GB",
    **changes: Any,
) -> Path:  # fmt: skip
    """A random model of this shape, with a tokenizer of bytes unless told otherwise."""
    torch.manual_seed(0)
    model: Any = build(AutoConfig.for_model(family, **{**BASE, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    (tokenizer or of_bytes()).save_pretrained(folder)
    return folder


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of what is refused; files and folders are as they were."""
    before = {p: p.lstat().st_mtime_ns for p in Path.cwd().rglob("*")}
    code, out, err = run(arguments, capsys)
    lines = [line for line in err.splitlines() if line.startswith("jointnas: error: ")]
    assert (code, len(lines), out) == (2, 1, ""), err
    assert "Traceback" not in err
    assert {p: p.lstat().st_mtime_ns for p in Path.cwd().rglob("*")} == before
    return lines[0]


QUANTIZE = ["quantize", "--method=rtn", "--bits.group_size=16", "--progress=false"]
EVAL = ["--tasks=[]", "--tokens=512", "--context=32"]


def perplexity(source: str, data: str, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """The row of `jointnas eval`."""
    out = Path("row.json")
    out.unlink(missing_ok=True)
    code, _, err = run(["eval", source, "--data", data, *EVAL, "--out", str(out), *more], capsys)
    assert code == 0, err
    (row,) = json.loads(out.read_text())
    return row
