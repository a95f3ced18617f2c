"""A GPU's decode step in Triton's interpreter: its kernels against torch, and the whole step, as a recorded graph,
against stock transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf.families import build
from jointnas_kernels.latency.measure import BackendLinear, call_of, deploy
from jointnas_kernels.nn.packed import PackedLinear
from jointnas_kernels.ops.lowbit.pack import pack_weight
from jointnas_kernels.ops.quant import grid
from jointnas_kernels.runtime import generation, kernels, misfit
from jointnas_kernels.testing import assert_close, poisoned
from tests.hf.hf_models import ids, tiny_model
from tests.latency.test_step import CONFIG, SPACE, profiled
from tests.runtime import recorded
from tests.runtime.gpu_step import EPS, LENGTH, Problem, decoded, generated, model_of, norm, stock
from tests.runtime.recorded import Emulated, NotCapturable
from tests.runtime.test_decode import FAMILIES
from tests.runtime.test_generation import forwarded

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])  # no bf16 in there


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setitem(generation.STEPS, "cpu", Emulated)


# ---- kernels --------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (2, 576), (5, 1025)])
@pytest.mark.parametrize("added", [False, True])
def test_add_norm(rows: int, width: int, added: bool, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, width).to(dtype), torch.rand(width).to(dtype)
    y = torch.randn(rows, width).to(dtype) if added else None
    sum_ = x if y is None else x + y
    with poisoned():
        out = kernels.add_norm(x, y, weight, EPS)
    assert torch.equal(x, sum_)
    assert_close(out, norm(sum_, weight))


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (2, 1025)])
def test_swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    both = torch.randn(rows, 2 * width).to(dtype)
    for gate, up in (both.chunk(2, 1), (t.clone() for t in both.chunk(2, 1))):
        with poisoned():
            assert_close(kernels.swiglu(gate, up), functional.silu(gate) * up)


CASES = [  # batch, heads of a key-value head, key-value heads, dim, slot, window, starts
    (1, 1, 1, 2, 0, 0, 0), (1, 4, 2, 16, 37, 0, 0), (3, 3, 1, 12, 41, 0, 20), (2, 7, 2, 6, 49, 5, 0),
    (2, 17, 1, 10, 33, 20, 25), (2, 2, 2, 8, 30, 1, 0), (2, 2, 1, 8, 20, 0, 45),
]  # fmt: skip


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend(case: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one part, and in more than there are blocks of positions."""
    batch, share, kv_heads, dim, slot, window, start = case
    monkeypatch.setattr(kernels, "STAGE_BYTES", 1)  # 16 positions at once: several loads
    for parts, norms in ((1, False), (2, True), (8, False)):
        p = Problem(batch, share, kv_heads, dim, slot, dtype, norms=norms)
        starts = torch.arange(batch) * start // max(1, batch - 1)
        _, want = p.expected(starts, window)
        with poisoned():
            own = kernels.attend(p.heads, starts, window, 0.3, parts)
        assert_close(own, want, 2e-3 if dtype == torch.float16 else 2e-6)
        p.check_caches()


@DTYPES
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("case", [(1, 1, 1, 2, 0, 3), (2, 3, 2, 12, 9, 5)], ids=str)
def test_rotate(case: tuple[int, ...], norms: bool, dtype: torch.dtype) -> None:
    *sizes, count = case
    p = Problem(*sizes, dtype, count=count, norms=norms)
    q, _ = p.expected(torch.zeros(sizes[0]), 0)
    with poisoned():
        assert_close(kernels.rotate(p.heads, sizes[0]), q)
    p.check_caches()


@pytest.mark.parametrize("parts", [1, 4])
def test_not_a_number_stays_one(parts: int) -> None:
    """In the cache, and of a token at a position without angles; other heads and sequences are as they were."""
    p = Problem(2, 2, 2, 8, 40, torch.float32)
    p.caches[2][0, 1, 3, 0] = torch.nan
    own = kernels.attend(p.heads, torch.zeros(2, dtype=torch.int64), 0, 0.3, parts).view(2, 2, 2, 8)
    assert own[0, 1].isnan().all()
    assert own[0, 0].isfinite().all()
    assert own[1].isfinite().all()
    for outside in (-1, 50):
        p.heads.positions[1] = outside
        own = kernels.attend(p.heads, torch.zeros(2, dtype=torch.int64), 0, 0.3, parts).view(2, -1)
        assert own[1].isnan().all()


# ---- the step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", FAMILIES.values(), ids=FAMILIES)
def test_same_tokens_as_transformers(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 3 and 4 positions slide many times."""
    monkeypatch.setattr(kernels, "parts_for", lambda h: 1)
    model, x = model_of(change, (2, 16) if "bias" in str(change) else (4, 8)), ids(1, 7)
    assert torch.equal(generated(model, x, True), generated(model, x, False))
    assert (model.runtime.prompts, model.runtime.steps) == (1, LENGTH - 1)
    assert model.runtime._step.captured == 1


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_batches_with_padding_and_quantized_activations(how: dict[str, Any]) -> None:
    model, padding = model_of(FAMILIES["qwen3-window"], act=8), torch.tensor([0, 3])
    mask = (torch.arange(7) >= padding[:, None]).long()
    x = ids(2, 7) * mask
    own, stock = (generated(model, x, fast, mask, max_new_tokens=8, **how) for fast in (True, False))
    assert torch.equal(own, stock)


@torch.no_grad()
def test_products_of_triton() -> None:
    """In the layout that is stored, as of groups that the CUDA kernels do not take; q, k, v are one, with biases."""
    model = tiny_model(family="qwen2", num_hidden_layers=1)
    for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj"):
        old = model.model.layers[0].get_submodule(path)
        values, of = grid.quantize(old.weight, 4, 16)
        words = pack_weight(grid.integers(values, of), 4)
        linear = PackedLinear(words, of.scale, old.bias, 4, 8, backend="triton")
        model.model.layers[0].set_submodule(path, linear)
    step, x = Emulated(model.requires_grad_(False)), ids(2, 5)
    assert [len(modules) for modules in step._blocks[0].products] == [1, 1, 2, 1]
    assert (decoded(step, x) - model(x).logits[:, -1]).abs().max() <= 1e-3


@pytest.mark.parametrize("change", [FAMILIES["qwen3-window"], FAMILIES["phi3-window"]], ids=["qwen3", "phi3"])
@torch.no_grad()
def test_fp16_is_rounded_where_transformers_rounds(change: dict[str, Any]) -> None:
    """Against the same weights in fp64 the step is as near as the stock model; a prompt, to the last bit of sums."""
    model, x = model_of(change, (16, 16)).half(), ids(2, 7)
    model.runtime.enabled, step = False, Emulated(model)
    prompt = step.prefill(x, torch.arange(7).expand(2, -1), step.caches(2, 7), 0, keep=7)
    own, stock = decoded(step, x), model(x).logits
    assert_close(prompt, stock, 1e-3)
    exact = model.double()(x).logits[:, -1]
    error, stocks = ((v.double() - exact).square().mean().sqrt() for v in (own, stock[:, -1]))
    assert error <= 1.3 * stocks


@pytest.mark.parametrize("change", [{}, FAMILIES["mistral-window"]], ids=["all", "window"])
@torch.no_grad()
def test_prompts_by_the_chunk(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At the beginning of a cache and later, padded on the left."""
    monkeypatch.setattr(Emulated, "chunk", 8)
    model, x, padding = model_of(change), ids(2, 11), torch.tensor([0, 6])
    step = Emulated(model)
    caches, positions = step.caches(2, 12), (torch.arange(11) - padding[:, None]).clamp_min(0)
    first = step.prefill(x[:, :7], positions[:, :7], caches, 0, padding, keep=2)
    then = step.prefill(x[:, 7:], positions[:, 7:], caches, 7, padding, keep=4)
    model.runtime.enabled = False
    for row, start in enumerate(padding.tolist()):
        want = model(x[row : row + 1, start:]).logits[0]
        assert_close(then[row], want[-4:], 2e-6)
        assert_close(first[row][-1], want[6 - start], 2e-6)


@torch.no_grad()
def test_one_graph_for_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that grow, and others, need none; another batch and other weights do."""
    monkeypatch.setattr(generation, "MORE", 2)
    model, x = model_of(bits=(4,)), ids(1, 12)
    model.runtime.enabled, caches = True, [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        lengths = set()
        for t in range(7):
            own = forwarded(model, x[:, t : t + 1], cache)
            lengths.add(cache._room._caches.length)
        assert lengths == {3, 6, 9}
        assert (own - stock(model, x[:, :7])).abs().max() <= 1e-5
    step = model.runtime._step
    assert step.captured == 1
    many = x.view(3, 4)
    cache = DynamicCache(config=model.config)
    for t in range(4):
        own = forwarded(model, many[:, t : t + 1], cache)
    assert (own - stock(model, many)).abs().max() <= 1e-5
    assert step.captured == 2
    old = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = nn.Linear(old.in_features, old.out_features).requires_grad_(False)
    cache = DynamicCache(config=model.config)
    for t in range(4):
        own = forwarded(model, x[:, t : t + 1], cache)
    assert (own - stock(model, x[:, :4])).abs().max() <= 1e-5
    assert model.runtime._step is not step
    assert model.runtime._step.captured == 1


@torch.no_grad()
def test_results_are_kept() -> None:
    """Logits of a step are not those of the next."""
    step, one = Emulated(tiny_model(num_hidden_layers=1)), torch.tensor([1])
    caches = step.caches(1, 4)
    first = step(one, one * 0, caches, 0)
    kept = first.clone()
    step(one + 5, one, caches, 1)
    assert torch.equal(first, kept)


@torch.inference_mode()
def test_whole_models_of_a_table_run_through_it(tmp_path: Path) -> None:
    """With linears that are other backends'."""
    table = profiled(tmp_path / "t.jsonl", backends=["torch", "ours-cpu"])
    table.header = table.header.model_copy(update={"runtime": "graph"})
    model = deploy(build(CONFIG), SPACE.full(), SPACE, table)
    decode = call_of(model, table.workload, torch.device("cpu"))
    for _ in range(2):
        decode()
    assert isinstance(model.model.layers[0].mlp.down_proj, BackendLinear)
    assert (model.runtime.prompts, model.runtime.steps) == (1, 2)


def test_what_cannot_be_captured_is_noticed() -> None:
    x = torch.ones(3)
    calls: list[Callable[[], object]] = [
        lambda: x.sum().item(), lambda: x.nonzero(), lambda: bool(x[0]), lambda: torch.equal(x, x)
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(NotCapturable):
            recorded.capture(lambda call=call: (call(), x)[1], x.device)


def test_a_replay_has_the_numbers_of_the_capture() -> None:
    x, n = torch.ones(3), [1]
    replay = recorded.capture(lambda: x * n[0], x.device)
    x += 1
    n[0] = 5
    assert torch.equal(replay(), torch.full((3,), 2.0))


def test_other_calls_are_refused() -> None:
    model = tiny_model(num_hidden_layers=1)
    step = Emulated(model)
    one = torch.tensor([1])
    with pytest.raises(JointNASError, match="a batch of 65; allowed: 1 to 64"):
        step(one.expand(65), one.expand(65), step.caches(65, 2), 0)
    for slot in (-1, 2):
        with pytest.raises(JointNASError, match=f"1 tokens from slot {slot} on, in caches of 2"):
            step(one, one, step.caches(1, 2), slot)
    assert "it runs models in float16, bfloat16, float32 on cpu, not torch.float64" in str(misfit(model.double()))
