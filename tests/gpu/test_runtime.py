"""A GPU's decode step as a real graph: its kernels at sizes of real models, and generation against transformers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jointnas_kernels import _ext
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.nn.packed import PackedLinear
from jointnas_kernels.runtime import GraphStep, generation, kernels
from jointnas_kernels.runtime.generation import RESULT
from jointnas_kernels.testing import assert_close
from tests.hf.hf_models import ids
from tests.runtime.gpu_step import EPS, LENGTH, Problem, decoded, generated, model_of, norm, stock
from tests.runtime.test_decode import FAMILIES
from tests.runtime.test_generation import filled, forwarded

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of attention
WIDE = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 128}  # whole groups of 128: the CUDA kernels


@DTYPES
@pytest.mark.parametrize("width", [17, 576, 4096, 8192])
def test_add_norm(device: torch.device, poison: None, dtype: torch.dtype, width: int) -> None:
    x, y = (torch.randn(5, width, device=device).to(dtype) for _ in range(2))
    weight, total = torch.rand(width, device=device).to(dtype), x + y
    out = kernels.add_norm(x, y, weight, EPS)
    assert torch.equal(x, total)
    assert_close(out, norm(total, weight))


@DTYPES
@pytest.mark.parametrize("heads", [(4, 8, 128), (3, 3, 64), (1, 32, 96)], ids=str)
def test_attend(device: torch.device, poison: None, heads: tuple[int, ...], dtype: torch.dtype) -> None:
    (share, kv_heads, dim), kinds = heads, ((None, False, 0), (1, True, 0), (64, False, 100))
    for (parts, norms, window), slot in itertools.product(kinds, (0, 63, 64, 65, 4000)):
        p = Problem(2, share, kv_heads, dim, slot, dtype, norms=norms, length=4100, device="cuda")
        starts = torch.tensor([0, slot // 2], device=device)
        _, want = p.expected(starts, window)
        assert_close(kernels.attend(p.heads, starts, window, 0.3, parts), want, TOLERANCE[dtype])
        p.check_caches()


@DTYPES
@pytest.mark.parametrize("norms", [False, True])
def test_rotate(device: torch.device, poison: None, norms: bool, dtype: torch.dtype) -> None:
    p = Problem(3, 4, 2, 96, 9, dtype, count=31, norms=norms, device="cuda")
    q, _ = p.expected(torch.zeros(3, device=device), 0)
    assert_close(kernels.rotate(p.heads, 3), q)
    p.check_caches()


@pytest.mark.parametrize(
    ("change", "how"), [*((change, {}) for change in FAMILIES.values()), (FAMILIES["qwen3-window"], {"num_beams": 3})],
    ids=[*FAMILIES, "beams"],
)  # fmt: skip
def test_same_tokens_as_transformers(device: torch.device, change: dict[str, Any], how: dict[str, Any]) -> None:
    model, padding = model_of(change, (2, 16, 8), device="cuda"), torch.tensor([0, 3, 5])
    mask = (torch.arange(7) >= padding[:, None]).long().to(device)
    for x, of in ((ids(1, 5).to(device), None), (ids(3, 7).to(device) * mask, mask)):
        model.runtime.prompts = model.runtime.steps = 0
        assert torch.equal(generated(model, x, True, of, **how), generated(model, x, False, of, **how))
        assert (model.runtime.prompts, model.runtime.steps) == (1, LENGTH - 1)
    assert model.runtime._step.captured == 2


@pytest.mark.skipif(not (_ext.available() and _ext.load().has_cuda), reason="jointnas_kernels._C has no CUDA part")
@pytest.mark.parametrize("act", [16, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.no_grad()
def test_products_of_the_cuda_kernels(device: torch.device, dtype: torch.dtype, act: int) -> None:
    """As near to the same weights in fp64 as transformers' code with the same linears."""
    model = model_of(WIDE, (4, 8, 2), act, "cuda", dtype, 128)
    assert {m.backend for m in model.modules() if isinstance(m, PackedLinear)} == {"cuda"}
    x = ids(4, 9).to(device)
    own, other = decoded(GraphStep(model), x), stock(model, x)
    assert (own - other).float().norm() <= (0.02 if act == 16 else 0.1) * other.float().norm()


def test_one_graph_for_a_batch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that grow, and others, need none; other weights do."""
    monkeypatch.setattr(generation, "MORE", 2)
    model, x = model_of(device="cuda"), ids(1, 12).to(device)
    for _ in range(2):
        cache = filled(model, x[:, :1])
        for t in range(1, 12):
            own = forwarded(model, x[:, t : t + 1], cache)
        assert (own - stock(model, x)).abs().max() <= 1e-4
    step = model.runtime._step
    assert step.captured == 1
    old = model.model.layers[0].mlp.down_proj
    new = nn.Linear(old.in_features, old.out_features, device=device).requires_grad_(False)
    model.model.layers[0].mlp.down_proj = new
    own = forwarded(model, x[:, 3:4], filled(model, x[:, :3]))
    assert (own - stock(model, x[:, :4])).abs().max() <= 1e-4
    assert model.runtime._step is not step


def test_steps_never_wait_for_the_device(device: torch.device) -> None:
    step, one = GraphStep(model_of(device="cuda")), torch.tensor([1], device=device)
    caches = step.caches(1, 8)
    step(one, one * 0, caches, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for slot in range(1, 8):
            step(one, one, caches, slot)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Waiting(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * input.sum().item()


def test_modules_that_wait_are_named(device: torch.device) -> None:
    model = model_of(device="cuda")
    old = model.model.layers[0].mlp.down_proj
    new = Waiting(old.in_features, old.out_features, device=device).requires_grad_(False)
    model.model.layers[0].mlp.down_proj = new
    one = torch.tensor([[1]], device=device)
    with pytest.raises(JointNASError, match="cannot be captured as a CUDA graph"):
        model(input_ids=one, **{RESULT: filled(model, one.expand(1, 3))})
    torch.cuda.synchronize()
    model.runtime.enabled = False
    assert model(input_ids=one).logits.isfinite().all()
