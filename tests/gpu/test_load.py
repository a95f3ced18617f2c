"""Exported folders on the CUDA kernels: each linear within its bound, generation, memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from jointnas_kernels import _ext, hf
from jointnas_kernels.nn import PackedLinear
from jointnas_kernels.space import Choice, SearchSpace
from tests.hf.exported import exported, quantized_linears
from tests.hf.hf_models import ids, random_importance, randomize_lora, tiny_model
from tests.hf.test_load import bound, inputs_of, packed_linears

pytestmark = pytest.mark.skipif(
    not (_ext.available() and _ext.load().has_cuda), reason="jointnas_kernels._C has no CUDA part"
)


def folder(path: Path, dtype: torch.dtype, w: int, a: int, head_dim: tuple[int, ...] = (128,)) -> LlamaForCausalLM:
    """A model of whole 128-groups, exported; with head_dim 64 among the choices o_proj has groups of 64."""
    config = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 128, "vocab_size": 61}
    model = tiny_model(dtype, **config)
    space = SearchSpace((256,), (4,), head_dim, (384,), (3,), (2, 4, 8), (2, 4, 8, 16))
    net = randomize_lora(hf.convert(model, space, lora_rank=4, importance=random_importance(model.config)), scale=0.02)
    return exported(net, Choice(256, 4, 128, 384, 3, (w,) * 3, (a,) * 3), path / "model")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("w, a", [(4, 16), (8, 16), (2, 8), (4, 8), (8, 4)], ids=lambda b: str(b))
@torch.no_grad()
def test_every_linear_is_within_its_bound(tmp_path: Path, device: torch.device, w: int, a: int, dtype) -> None:
    fake, run = folder(tmp_path, dtype, w, a).to(device), hf.load(tmp_path / "model", device)
    packed = packed_linears(run)
    assert {m.backend for m in packed.values()} == {"cuda"}
    for tokens in (1, 5, 70):  # other kernels for more tokens
        inputs = inputs_of(fake, list(packed), ids(1, tokens).to(device))
        for name, linear in quantized_linears(fake).items():
            want, got = linear(inputs[name]), packed[name](inputs[name])
            limit = bound(linear.cpu(), inputs[name].cpu(), want.cpu())
            assert ((got.double() - want.double()).abs().cpu() <= limit).all(), f"{name}, {tokens} tokens"
            linear.to(device)


@torch.no_grad()
def test_other_groups_run_on_triton(tmp_path: Path, device: torch.device) -> None:
    fake = folder(tmp_path, torch.bfloat16, 4, 8, (64, 128)).to(device)
    run, x = hf.load(tmp_path / "model", device), ids().to(device)
    assert {n.rpartition(".")[2] for n, m in packed_linears(run).items() if m.backend == "triton"} == {"o_proj"}
    assert (run(x).logits - fake(x).logits).float().norm() <= 0.1 * fake(x).logits.float().norm()


@torch.no_grad()
def test_generates_and_compiles(tmp_path: Path, device: torch.device) -> None:
    folder(tmp_path, torch.bfloat16, 4, 16)
    run, x = hf.load(tmp_path / "model", device), ids(1, 9).to(device)
    run.runtime.enabled = False  # its own sums round otherwise in bf16: test_runtime.py
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    want = run.generate(x, **options)
    assert torch.equal(run.generate(x, cache_implementation="static", disable_compile=True, **options), want)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, use_cache=False).logits, run(x, use_cache=False).logits)


def test_memory(tmp_path: Path, device: torch.device) -> None:
    """Packed integers and scales, rows padded to 16, and per layer 16 KiB of locks and one fp32 per row."""
    folder(tmp_path, torch.bfloat16, 4, 16)
    before = torch.cuda.memory_allocated()
    run = hf.load(tmp_path / "model", device)
    packed = [m for m in run.modules() if isinstance(m, PackedLinear)]
    for m in packed:
        assert m.nbytes <= m.stored_bytes + 4 * 4096 + 4 * m.out_features
    others = sum(p.numel() * p.element_size() for p in run.parameters())
    blocks = 512 * (len(packed) * 4 + 100)  # the allocator rounds up
    assert torch.cuda.memory_allocated() - before <= sum(m.nbytes for m in packed) + others + blocks
