"""One packed matrix as embedding and head: the rows of a head, and models that hold no second one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from jointnas import exporting
from jointnas_kernels import hf
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf.head import put_head
from jointnas_kernels.nn.packed import PackedEmbedding, PackedLinear
from jointnas_kernels.ops.lowbit.pack import pack_weight
from jointnas_kernels.ops.quant import grid
from jointnas_kernels.runtime import DecodeStep, misfit
from jointnas_kernels.runtime.generation import RESULT
from jointnas_kernels.space import SearchSpace
from tests.hf.hf_models import ids, tiny_model
from tests.runtime.test_decode import LENGTH, packed, steps

DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def head(weight: torch.Tensor, bits: int, group: int, backend: str = "auto") -> tuple[PackedLinear, torch.Tensor]:
    """The packed weight, and its values."""
    values, of = grid.quantize(weight, bits, group)
    return PackedLinear(pack_weight(grid.integers(values, of), bits), of.scale, None, bits, backend=backend), values


@DTYPE
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bits, group", [(2, 16), (4, 16), (4, 64), (8, 32), (8, 512)])
def test_rows_are_the_values_bit_for_bit(bits: int, group: int, backend: str, dtype: torch.dtype) -> None:
    weight = torch.randn(131, 512, generator=torch.Generator().manual_seed(bits)).to(dtype)
    linear, values = head(weight, bits, group, backend)
    tokens = torch.tensor([[0, 130, 63], [64, 5, 5]])
    found = PackedEmbedding(linear, dtype)(tokens)
    assert found.dtype == dtype
    assert torch.equal(found, values[tokens])


@DTYPE
@pytest.mark.parametrize("bits, group, hidden", [(4, 16, 32), (8, 16, 32), (8, 512, 512)])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_the_step_reads_rows_of_the_head(bits: int, group: int, hidden: int, batch: int, dtype: torch.dtype) -> None:
    """Bit for bit what it computes from a dense embedding of the same values."""
    model = packed(tiny_model(dtype, hidden_size=hidden, vocab_size=67), [4, 16, 8], 16)
    model.lm_head, values = head(model.lm_head.weight, bits, group)
    model.get_input_embeddings().weight = nn.Parameter(values, requires_grad=False)
    x = ids(batch, LENGTH, vocab=67)
    want = steps(model, x)
    model.set_input_embeddings(PackedEmbedding(model.lm_head, dtype))
    assert misfit(model) is None
    assert all(torch.equal(steps(model, x, threads), want) for threads in (1, 2))
    model.lm_head, _ = head(values.flip(0), bits, group)
    with pytest.raises(JointNASError, match="its embedding has the rows of another head"):
        DecodeStep(model)


@DTYPE
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@torch.no_grad()
def test_loaded_models_hold_one_matrix(tmp_path: Path, bits: int, tied: bool, dtype: torch.dtype) -> None:
    """If embedding and head of the folder are equal; through prompts and decode steps alike."""
    model, x = tiny_model(dtype, tie_word_embeddings=tied), ids(2, 9)
    put_head(model, *grid.quantize(model.lm_head.weight, bits, 16))
    want = model(x).logits
    exporting.export_model(model, tmp_path / "m", SearchSpace.single(model.config).full(), range(3))
    loaded: Any = hf.load(tmp_path / "m")
    assert isinstance(loaded.get_input_embeddings(), PackedEmbedding) == tied
    sizes = {name: p.numel() for name, p in loaded.named_parameters()}
    assert ("model.embed_tokens.weight" in sizes) != tied
    assert torch.equal(loaded.model.embed_tokens(x), model.model.embed_tokens(x))
    out = loaded(x[:, :8], use_cache=True)
    step = loaded(x[:, 8:], **{RESULT: getattr(out, RESULT)}).logits[:, -1]
    assert loaded.runtime.reason is None
    near = 1e-4 if dtype == torch.float32 else 0.05
    for found in (loaded(x).logits[:, -1], step):
        assert (found - want[:, -1]).abs().max() <= near * want.abs().max()
    assert len(loaded.generate(x, max_new_tokens=4, do_sample=False, eos_token_id=None)[0]) == 13
