"""GGUF files: every tensor holds the exported integers and scales, and llama.cpp itself computes the model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.llama_cpp import LlamaCpp, eight_bit_inputs
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import Supernet, convert
from jointnas_kernels.hf.gguf import blocks, names
from jointnas_kernels.hf.gguf.read import already_quantized, read, read_tokenizer
from jointnas_kernels.hf.gguf.tokenizer import SPLITS, tokenizer_metadata, with_pre_tokenizer
from jointnas_kernels.hf.gguf.write import write
from jointnas_kernels.space import Choice, SearchSpace
from tests.hf.exported import exported, quantized_linears
from tests.hf.hf_models import LLAMA3_ROPE, random_importance, randomize_lora, tiny_model
from tests.hf.small_tokenizers import TEXT, VOCAB, byte_tokenizer, sentencepiece_tokenizer

llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp (llama.cpp)")
BOUND = 2e-5  # log-probabilities of fp32 files: both sides add the same fp32 products in their own order
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {}, "llama-tied": {"tie_word_embeddings": True}, "llama-bias": {"attention_bias": True, "mlp_bias": True},
    "llama-llama3": {"rope_parameters": LLAMA3_ROPE},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "llama-yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                       "original_max_position_embeddings": 16}},
    "mistral": {"family": "mistral"}, "mistral-window": {"family": "mistral", "sliding_window": 8},
    "qwen2": {"family": "qwen2", "tie_word_embeddings": True}, "qwen2-square": {"family": "qwen2", "hidden_size": 64},
    "qwen3": {"family": "qwen3"}, "phi3": {"family": "phi3"}, "phi3-square": {"family": "phi3", "hidden_size": 64},
}  # fmt: skip
SPACE = SearchSpace((128, 256), (2, 4), (32, 64), (64, 128), (1, 2, 3), (2, 4, 8), group_size=32)


def tokens(length: int = 7) -> Tensor:
    return torch.tensor(byte_tokenizer()(TEXT).input_ids[:length])


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits, group", [(8, 32), (8, 96), (4, 32), (4, 128), (2, 64), (2, 256), (2, 512)])
def test_blocks_are_what_gguf_dequantizes(bits: int, group: int) -> None:
    g = torch.Generator().manual_seed(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    q = torch.randint(low, high, (5, 2 * max(group, 96)), generator=g).to(torch.int8)
    q[0, :3] = torch.tensor([low, high - 1, 0])
    scale = torch.rand(5, q.shape[1] // group, generator=g).half()
    kind = blocks.type_for(bits, group)
    assert kind == {8: "Q8_0", 4: "Q4_0", 2: "TQ2_0" if group % 256 == 0 else "Q4_0"}[bits]
    got = gguf.dequantize(blocks.encode(q, scale, kind), gguf.GGMLQuantizationType[kind])
    want = q.unflatten(1, (-1, group)).float() * scale.float().unsqueeze(-1)
    assert torch.equal(torch.from_numpy(got), want.flatten(1))
    assert blocks.type_for(bits, 16) is None


@llama_cpp
@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_every_family_in_llama_cpp(tmp_path: Path, change: dict[str, Any]) -> None:
    """fp32: names, order of rows, rope, biases, windows, head sizes."""
    model = tiny_model(**{"vocab_size": VOCAB, **change})
    done = write(saved(model, tmp_path / "hf"), tmp_path / "m.gguf", byte_tokenizer())
    assert set(done.types.values()) == {"F32"}
    assert done.rounded == 0
    window = change.get("sliding_window")
    assert [r for r in done.remarks if "context length 8" in r] == done.remarks[: window is not None]
    again, ids = read(tmp_path / "m.gguf"), tokens()
    # Phi-3's is read as a Llama: torch may add up products of fused and of single linears in another order
    limit = 1e-5 if change.get("family") == "phi3" else 0.0
    assert float((again(ids[None]).logits - model(ids[None]).logits).abs().max()) <= limit
    got = LlamaCpp(tmp_path / "m.gguf").logprobs(ids, VOCAB, start=3)
    assert (got - model(ids[None]).logits[0, 3:].log_softmax(-1)).abs().max() <= BOUND


@llama_cpp
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_other_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model(dtype, vocab_size=VOCAB)
    done = write(saved(model, tmp_path / "hf"), tmp_path / "m.gguf", byte_tokenizer())
    assert set(done.types.values()) == {"F32", "BF16" if dtype == torch.bfloat16 else "F16"}
    again = read(tmp_path / "m.gguf", dtype)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    LlamaCpp(tmp_path / "m.gguf").logprobs(tokens(2), VOCAB)


def supernet(dtype: torch.dtype = torch.float32, **change: Any) -> Supernet:
    sizes = {"hidden_size": 256, "intermediate_size": 128, "head_dim": 64, "vocab_size": VOCAB}
    model = tiny_model(dtype, **{**sizes, **change})
    space = SPACE if model.config.head_dim == 64 else SearchSpace.single(model.config, (2, 4, 8), group_size=32)
    return randomize_lora(convert(model, space, lora_rank=2, importance=random_importance(model.config)))


def weight_of(state: dict[str, Tensor], linear: str) -> Tensor:
    """Of a Phi-3 that was written as a Llama, the rows of the linears that it fuses."""
    parent, _, name = linear.rpartition(".")
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}.get(name, ())
    apart = f"{linear}.weight" not in state
    return torch.cat([state[f"{parent}.{part}.weight"] for part in (fused if apart else (name,))])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
@torch.no_grad()
def test_every_tensor_of_mixed_choices(tmp_path: Path, family: str) -> None:
    """Dequantized by gguf's own code: levels times scales rounded to fp16, row for row."""
    net, g = supernet(family=family), torch.Generator().manual_seed(7)
    for i in range(3):
        choice = SPACE.sample(g)
        model = exported(net, choice, tmp_path / f"hf{i}")
        done = write(tmp_path / f"hf{i}", tmp_path / "m.gguf", byte_tokenizer())
        assert 0 < done.rounded <= 2**-11 * 1.001
        again = read(tmp_path / "m.gguf").state_dict()
        for name, linear in quantized_linears(model).items():
            scale = linear.scale.half().float()
            q = (linear.weight.unflatten(1, (scale.shape[1], -1)) / linear.scale.unsqueeze(-1)).round()
            assert torch.equal(weight_of(again, name), (q * scale.unsqueeze(-1)).flatten(1)), name
            kind = "Q8_0" if linear.weight_bits == 8 else "Q4_0"
            assert done.types.get(names.tensor_name(f"{name}.weight"), kind) == kind  # Phi-3's fused ones are apart


@torch.no_grad()
def test_groups_that_cut_blocks_keep_their_values(tmp_path: Path) -> None:
    """Heads of 16 have groups of 16 in o_proj."""
    net = supernet(head_dim=16)
    model = exported(net, net.space.full(), tmp_path / "hf")
    done = write(tmp_path / "hf", tmp_path / "m.gguf", byte_tokenizer())
    assert sum("o_proj.weight is stored as F32" in remark for remark in done.remarks) == 3
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(read(tmp_path / "m.gguf").state_dict()[name], model.state_dict()[name])


@torch.no_grad()
def test_scales_of_half_precision_models_are_not_rounded(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        net = supernet(dtype)
        exported(net, uniform(4), tmp_path / "hf")
        assert write(tmp_path / "hf", tmp_path / "m.gguf", byte_tokenizer()).rounded == 0
        stored, again = load_file(tmp_path / "hf" / "model.safetensors"), read(tmp_path / "m.gguf").state_dict()
        name = "model.layers.1.mlp.up_proj"
        scale = stored[f"{name}.weight_scale"].float()
        q = again[f"{name}.weight"].unflatten(1, (scale.shape[1], -1)) / scale.unsqueeze(-1)
        assert torch.equal(q, q.round())
        assert q.abs().max() <= 8


def uniform(bits: int) -> Choice:
    return Choice(256, 4, 64, 128, 3, (bits,) * 3)


@llama_cpp
@pytest.mark.parametrize("bits", [2, 4, 8])
@torch.no_grad()
def test_quantized_models_in_llama_cpp(tmp_path: Path, bits: int) -> None:
    """With llama.cpp's own rounding of inputs done in torch, too, float accumulation is left at positions where all
    roundings agree; where an input fell on the other side of a half, no more than rounding itself does."""
    net = supernet()
    exported(net, Choice(256, 4, 64, 128, 1, (bits,) * 3), tmp_path / "hf")
    done = write(tmp_path / "hf", tmp_path / "m.gguf", byte_tokenizer())
    model, ids = read(tmp_path / "m.gguf"), tokens(12)
    plain = model(ids[None]).logits[0].log_softmax(-1)
    linears = {m.rpartition(".")[0] for m, _ in model.named_parameters() if done.types[names.tensor_name(m)] != "F32"}
    assert len(linears) == 7
    eight_bit_inputs(model, linears)
    want = model(ids[None]).logits[0].log_softmax(-1)
    got = LlamaCpp(tmp_path / "m.gguf").logprobs(ids, VOCAB)
    by_position = (got - want).abs().amax(-1)
    assert by_position.min() <= BOUND
    assert by_position.median() <= 1e-2
    assert by_position.max() <= 2 * (want - plain).abs().max()


# ---- tokenizers -----------------------------------------------------------------------------------------------------


@llama_cpp
@pytest.mark.parametrize("pre", SPLITS)
def test_byte_level_tokenizers(tmp_path: Path, pre: str) -> None:
    tokenizer = byte_tokenizer(pre)
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_metadata(tokenizer, VOCAB)["ggml.pre"] == pre
    write(saved(tiny_model(vocab_size=VOCAB), tmp_path / "hf"), tmp_path / "m.gguf", tokenizer)
    again = read_tokenizer(tmp_path / "m.gguf")
    text = "In 2024 12345 ships' — café 東\n\n  they'll.\t<|end|> x"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.chat_template == tokenizer.chat_template
    assert again.eos_token == "<|end|>"
    server = LlamaCpp(tmp_path / "m.gguf")
    assert server.tokenized(text) == len(tokenizer(text).input_ids)


@llama_cpp
def test_sentencepiece_tokenizers(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer()
    values = tokenizer_metadata(tokenizer, VOCAB)
    assert values["ggml.model"] == "llama"
    assert values["ggml.add_bos_token"]
    assert values["ggml.add_space_prefix"]
    write(saved(tiny_model(vocab_size=VOCAB), tmp_path / "hf"), tmp_path / "m.gguf", tokenizer)
    again = read_tokenizer(tmp_path / "m.gguf")
    text = "the ships sailed north; naïve 東京"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert LlamaCpp(tmp_path / "m.gguf").tokenized(text) == len(tokenizer(text).input_ids)


def test_tokenizers_that_llama_cpp_does_not_have() -> None:
    tokenizer = byte_tokenizer("smollm")
    with pytest.raises(JointNASError, match="ids up to 297"):
        tokenizer_metadata(tokenizer, 100)
    with pytest.raises(JointNASError, match="only fast tokenizers"):
        tokenizer_metadata(object(), 100)
    with pytest.raises(JointNASError, match="pre-tokenizer 'nope' is not known"):
        with_pre_tokenizer(tokenizer, "nope", "file")
    state = tokenizer.backend_tokenizer.pre_tokenizer
    try:
        tokenizer.backend_tokenizer.pre_tokenizer = None
        with pytest.raises(JointNASError, match="no name for this byte-level"):
            tokenizer_metadata(tokenizer, VOCAB)
    finally:
        tokenizer.backend_tokenizer.pre_tokenizer = state


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(saved(tiny_model(vocab_size=VOCAB), tmp_path / "hf"), tmp_path / "m.gguf", byte_tokenizer())
    return tmp_path / "m.gguf"


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.02, 0.1, 0.5, 0.99])
def test_cut_off_files(file: Path, share: float) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(JointNASError, match=r"is cut off: tensor|is damaged|is no GGUF file"):
        read(file)


def test_other_bad_files(file: Path, tmp_path: Path) -> None:
    with pytest.raises(JointNASError, match=r"no\.gguf' does not exist"):
        read(tmp_path / "no.gguf")
    whole = file.read_bytes()
    for old, new, message in (
        (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0llamb", r"architecture 'llamb'.*Did you mean 'llama'"),
        (b"llama.embedding_length", b"llama.embedding_lengtj", "has no llama.embedding_length"),
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_ux.weight", r"no tensor 'blk\.1\.ffn_up\.weight'"),
        (b"block_count\4\0\0\0\3\0\0\0", b"block_count\4\0\0\0\3\0\0\1", "3 blocks; its metadata want 16777219"),
        (b"GGUF\x03", b"GGUF\x01", "has version 1"),
    ):
        assert old in whole
        file.write_bytes(whole.replace(old, new))
        with pytest.raises(JointNASError, match=message):
            read(file)
    file.write_bytes(whole[:-4] + b"\xff\xff\xff\x7f")
    with pytest.raises(JointNASError, match="not finite"):
        read(file)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": {**VARIANTS["llama-yarn"]["rope_parameters"], "beta_fast": 16}}, "yarn with its own beta"),
        ({"family": "qwen3", "attention_bias": True}, "no biases in the attention of Qwen3"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
    ],
)
def test_models_that_llama_cpp_does_not_compute(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = saved(tiny_model(**{"vocab_size": VOCAB, **change}), tmp_path / "hf")
    with pytest.raises(JointNASError, match=message):
        write(folder, tmp_path / "m.gguf", byte_tokenizer())


def test_what_is_said_of_quantized_sources() -> None:
    assert already_quantized({"a": "F32", "b": "BF16"}) == ""
    said = already_quantized({"a": "Q4_1", "b": "Q4_1", "c": "Q8_0", "d": "F32"})
    assert "2 × Q4_1 (4 bits)" in said
    assert "1 × Q8_0 (8 bits)" in said
