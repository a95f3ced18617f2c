"""A GPU's decode step in Triton's interpreter: its kernels against torch, and the whole step, as a recorded graph,
against stock transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.nn.packed import PackedLinear
from jointnas_kernels.ops.lowbit.pack import pack_weight
from jointnas_kernels.ops.quant import grid
from jointnas_kernels.runtime import attach, generation, kernels, misfit
from jointnas_kernels.testing import assert_close, poisoned
from tests.hf.hf_models import ids, tiny_model
from tests.runtime import recorded
from tests.runtime.recorded import Emulated, NotCapturable
from tests.runtime.test_decode import FAMILIES, packed
from tests.runtime.test_generation import forwarded

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])  # no bf16 in there
LENGTH = 33  # new tokens
EPS = 1e-5


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setitem(generation.STEPS, "cpu", Emulated)


# ---- kernels --------------------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return x
    return weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


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


class Problem:
    """Heads of `batch` times `count` tokens from `slot` on, behind random caches of two blocks."""

    def __init__(self, batch: int, share: int, kv_heads: int, dim: int, slot: int, dtype: torch.dtype, count: int = 1,
                 norms: bool = False, length: int = 50) -> None:  # fmt: skip
        heads, self.batch, self.slot, self.count, self.share = share * kv_heads, batch, slot, count, share
        qkv = torch.randn(batch * count, (heads + 2 * kv_heads) * dim).to(dtype)  # as fused projections have it
        q, k, v = qkv.split((heads * dim, kv_heads * dim, kv_heads * dim), 1)
        self.caches = [torch.randn(batch, kv_heads, length, dim).to(dtype) for _ in range(4)]
        self.angles = [f(torch.randn(length, dim)).to(dtype) for f in (torch.cos, torch.sin)]
        where = [slot, length, *(t.data_ptr() for t in (*self.angles, *self.caches))]
        weights = [torch.rand(dim).to(dtype) + 0.5 if norms else None for _ in range(2)]
        self.heads = kernels.Heads(q, k, v, *weights, torch.tensor(where), torch.randint(length, (batch * count,)), 1,
                                   kv_heads, dim, EPS)  # fmt: skip

    def turned(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """[batch, heads, count, D] rotated, of [M, heads D]."""
        dim, h = self.heads.dim, self.heads
        x = norm(x.reshape(self.batch, self.count, -1, dim), weight)
        cosine, sine = (t[h.positions].view(self.batch, self.count, 1, dim) for t in self.angles)
        half = torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), -1)
        return (x * cosine + half * sine).transpose(1, 2)

    def expected(self, starts: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, keys, values and the result in fp64 (of one token)."""
        h, end = self.heads, self.slot + self.count
        q, k = self.turned(h.q, h.q_norm), self.turned(h.k, h.k_norm)
        keys, values = (t.clone() for t in self.caches[2:])
        keys[:, :, self.slot : end] = k
        values[:, :, self.slot : end] = h.v.reshape(self.batch, self.count, -1, h.dim).transpose(1, 2)
        self.want = keys, values
        at, own = torch.arange(end), torch.arange(self.slot, end)[:, None]
        seen = (at <= own) & (at >= starts[:, None, None]) & (at > own - window if window else at >= 0)
        seen = (seen | (at == own))[:, None]
        found = functional.scaled_dot_product_attention(
            q.double(), *(t[:, :, :end].double().repeat_interleave(self.share, 1) for t in (keys, values)), seen,
            scale=0.3,
        )  # fmt: skip
        return q, found.transpose(1, 2).reshape(self.batch * self.count, -1), seen

    def check_caches(self) -> None:
        for own, want in zip(self.caches[2:], self.want, strict=True):
            assert_close(own, want)


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
        _, want, _ = p.expected(starts, window)
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
    q, _, _ = p.expected(torch.zeros(sizes[0]), 0)
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


def model_of(change: dict[str, Any] | None = None, bits: tuple[int, ...] = (4, 8), act: int = 16) -> Any:
    """Two blocks, generating."""
    given = {"num_hidden_layers": 2, **(change or {})}
    model = packed(tiny_model(**given), list(bits), act)
    model.generation_config.eos_token_id = None
    attach(model)
    return model


def generated(model: Any, x: Tensor, fast: bool, mask: Tensor | None = None, **how: Any) -> Tensor:
    model.runtime.enabled, mask = fast, torch.ones_like(x) if mask is None else mask
    usual = {"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": 0}
    return model.generate(x, attention_mask=mask, **{**usual, **how})


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
    """In the layout that is stored, as of groups that the CUDA kernels do not take."""
    model = tiny_model(num_hidden_layers=1)
    for path in ("mlp.gate_proj", "mlp.down_proj", "self_attn.v_proj"):
        old = model.model.layers[0].get_submodule(path)
        values, of = grid.quantize(old.weight, 4, 16)
        words = pack_weight(grid.integers(values, of), 4)
        linear = PackedLinear(words, of.scale, old.bias, 4, 8, backend="triton")
        model.model.layers[0].set_submodule(path, linear)
    step, x = Emulated(model.requires_grad_(False)), ids(2, 5)
    assert (decoded(step, x) - model(x).logits[:, -1]).abs().max() <= 1e-3


def decoded(step: Emulated, x: Tensor, length: int = 9) -> Tensor:
    """Logits of the last token, decoded token by token."""
    caches = step.caches(len(x), length)
    for t in range(x.shape[1]):
        logits = step(x[:, t], torch.full((len(x),), t), caches, t)
    return logits


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
    model, x = model_of({"num_hidden_layers": 1}, (4,)), ids(1, 12)
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


def stock(model: Any, x: Tensor) -> Tensor:
    return type(model).forward(model, x).logits[:, -1]


@torch.no_grad()
def test_results_are_kept() -> None:
    """Logits of a step are not those of the next."""
    step, one = Emulated(tiny_model(num_hidden_layers=1)), torch.tensor([1])
    caches = step.caches(1, 4)
    first = step(one, one * 0, caches, 0)
    kept = first.clone()
    step(one + 5, one, caches, 1)
    assert torch.equal(first, kept)


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
