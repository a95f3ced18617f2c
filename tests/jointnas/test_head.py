"""A head in 4 or 8 bits: as fake-quantized, exported, reloaded, on the low-bit kernels, and in a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from jointnas import assets, cli, exporting
from jointnas.config import BitsConfig
from jointnas.initialise.head import initialise_head, quantize_head
from jointnas.verbs.quantize import quantize
from jointnas_kernels import hf
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf.gguf.read import read
from jointnas_kernels.hf.gguf.write import write
from jointnas_kernels.nn.packed import PackedLinear
from jointnas_kernels.ops.quant.weights import fake_quant_weight
from jointnas_kernels.runtime.generation import RESULT
from jointnas_kernels.space import SearchSpace
from tests.hf.hf_models import ids, tiny_model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("searched", [False, True], ids=["quantized", "searched"])
@torch.no_grad()
def test_the_same_model_everywhere(bits: int, tied: bool, searched: bool, tmp_path: Path) -> None:
    """Bit for bit reloaded and read back; with the kernels but for the order of sums, decode step included. A plain
    model whose head is quantized, and the choice of a space with these bits."""
    model = tiny_model(tie_word_embeddings=tied, vocab_size=4096)
    x = ids(2, 9)
    before = model(x).logits
    space = SearchSpace.single(model.config, group_size=32, head_bits=(bits,))
    if searched:
        supernet = hf.convert(model, space)
        initialise_head(supernet, x)
        model = hf.extract(supernet, space.full())
    else:
        quantize_head(model, bits, 32, x)
    want = model(x).logits
    assert 0 < (want - before).norm() / before.norm() < (0.02 if bits == 8 else 0.3)
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight) == tied
    exporting.export_model(model, tmp_path / "m", space.full(), range(3), tokenizer=assets.load_tokenizer())
    assert torch.equal(exporting.reload(tmp_path / "m")(x).logits, want)
    packed: Any = hf.load(tmp_path / "m")
    assert isinstance(packed.lm_head, PackedLinear)
    out = packed(x[:, :8], use_cache=True)
    step = packed(x[:, 8:], **{RESULT: getattr(out, RESULT)}).logits[:, -1]
    assert packed.runtime.reason is None
    for found in (packed(x).logits[:, -1], step):
        assert (found - want[:, -1]).abs().max() <= 1e-4 * want.abs().max()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    written = write(tmp_path / "m", tmp_path / "m.gguf", tokenizer)
    kind = {4: "Q4_0", 8: "Q8_0"}[bits]
    assert written.types["token_embd.weight"] == (kind if tied else "F32")
    assert written.types.get("output.weight") == (None if tied else kind)
    back = read(tmp_path / "m.gguf", torch.float32)
    assert back.config.tie_word_embeddings == tied
    assert (back(x).logits - want).abs().max() <= 2e-3 * want.abs().max()  # scales in fp16


@torch.no_grad()
def test_energies_of_inputs_decide_what_is_clipped() -> None:
    """Less error of the logits than without clipping, where some inputs are much larger than others."""
    model, x = tiny_model(vocab_size=512), ids(4, 16)
    model.model.norm.weight[::8] *= 20
    before, hidden = model(x).logits, model.model(x).last_hidden_state
    rounded = hidden @ fake_quant_weight(model.lm_head.weight, 4, 32).T
    quantize_head(model, 4, 32, x)
    assert (model(x).logits - before).norm() < 0.9 * (rounded - before).norm()


@pytest.mark.parametrize(
    ("bits", "group", "reason"),
    [(2, 32, "bits are 2; allowed: 4, 8"), (8, 24, "32 inputs, no multiple of the group size 24")],
)
def test_bad_arguments(bits: int, group: int, reason: str) -> None:
    with pytest.raises(JointNASError, match=reason):
        quantize_head(tiny_model(), bits, group)


def test_through_the_command(tmp_path: Path) -> None:
    out = tmp_path / "model"
    given = ["quantize", "--out", str(out), "--bits.weight=4", "--bits.act=8", "--bits.head=8", "--method=rtn"]
    assert cli.main(given) == 0
    model: Any = hf.load(out)
    assert (model.lm_head.weight_bits, model.lm_head.act_bits) == (8, 16)
    card = (out / "README.md").read_text()
    assert "embeddings and norms are not quantized" in card
    assert "| head_bits | 8 |" in card
    assert json.loads((out / "choice.json").read_text())["choice"]["head_bits"] == 8
    with pytest.raises(JointNASError, match="no multiple of 96, the quantization group size"):
        quantize(str(tmp_path / "other"), bits=BitsConfig(head=8, group_size=96), method="rtn")
