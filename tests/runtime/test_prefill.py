"""Prompts through the decode step against stock transformers: lengths around chunks and tiles, paddings, windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.core import cpu
from jointnas_kernels.runtime import DecodeStep
from tests.hf.hf_models import ids, tiny_model
from tests.runtime.test_decode import FAMILIES, packed

CHUNK = 12  # tokens of each sequence
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)
TILES = 2 * 96 + 7  # positions that make three tiles of attention (kKeys in csrc/cpu/decode_step.h)


def model_of(change: dict[str, Any], bits: list[int], act: int = 16, dtype: torch.dtype = torch.float32) -> Any:
    return packed(tiny_model(dtype, **{**change, "max_position_embeddings": 512}), bits, act)


def chunked(monkeypatch: pytest.MonkeyPatch, batch: int, chunk: int = CHUNK) -> None:
    monkeypatch.setattr(DecodeStep, "chunk", chunk * batch)


def read(step: DecodeStep, x: Tensor, keep: int | None = None) -> Tensor:
    """Logits of the last `keep` tokens (all)."""
    batch, length = x.shape
    caches = step.caches(batch, length)
    return step.prefill(x, torch.arange(length).expand(batch, -1), caches, 0, keep=keep or length)


def close(own: Tensor, stock: Tensor, act: int = 16) -> None:
    """fp32: the order of sums; with quantized activations, now and then a value at the border between two levels, which
    are 17 times as far apart with 4 bits as with 8: of one token in a hundred that may show more."""
    wrong, largest = (own - stock).abs(), stock.abs().max()
    limit = (2e-5 if act == 16 else 0.06) * largest
    if act > 4:
        assert wrong.max() <= limit
    assert (wrong.amax(-1) > limit).float().mean() <= 0.01
    assert wrong.max() <= 0.3 * largest
    assert wrong.mean() <= (2e-6 if act == 16 else 2e-3) * largest


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("change", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_families(change: dict[str, Any], batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chunked(monkeypatch, batch)
    for bits, act in (([2, 4, 8], 16), ([16, 16, 16], 16), ([4, 8, 2], 8), ([8, 4, 16], 4)):
        if 16 in bits and act < 16:
            bits = [8, 4, 2]
        model = model_of(change, bits, act)
        step = DecodeStep(model)
        for length in LENGTHS:
            x = ids(batch, length, seed=length)
            close(read(step, x), model(x).logits, act)


@pytest.mark.parametrize("window", [None, 5, 40, 150])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
@torch.no_grad()
def test_many_tiles_of_positions(window: int | None, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows within a tile, a chunk, and over several; heads that fill tiles of queries and that do not."""
    chunked(monkeypatch, 1, 64)
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "hidden_size": 16 * heads[0]}
    model = model_of({"family": "mistral", "sliding_window": window, **sizes}, [4, 8, 2])
    x = ids(1, TILES)
    close(read(DecodeStep(model), x), model(x).logits)


@pytest.mark.parametrize("change", [FAMILIES[name] for name in ("llama", "qwen3-window", "phi3-window")])
@torch.no_grad()
def test_bf16_is_rounded_where_transformers_rounds(change: dict[str, Any]) -> None:
    """Against the same weights in fp64 the step is as near as the stock model."""
    model = model_of(change, [16, 16, 16], dtype=torch.bfloat16)
    x = ids(2, TILES)
    own, stock, exact = read(DecodeStep(model), x), model(x).logits, model.double()(x).logits
    error, stocks = ((v.double() - exact).square().mean().sqrt() for v in (own, stock))
    assert error <= 1.3 * stocks


@pytest.mark.parametrize("act", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_results_do_not_depend_on_threads(act: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of({}, [2, 4, 8], act, dtype)
    for batch in (1, 3):
        chunked(monkeypatch, batch)
        x = ids(batch, 2 * CHUNK + 3)
        alone = read(DecodeStep(model, 1), x)
        assert all(torch.equal(read(DecodeStep(model, threads), x), alone) for threads in (2, 3, 7))


@pytest.mark.parametrize("isa", range(1, len(cpu.ISAS)), ids=cpu.ISAS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_instruction_sets(isa: int, dtype: torch.dtype) -> None:
    model = model_of(FAMILIES["qwen3-window"], [2, 4, 8], dtype=dtype)
    x = ids(2, 120)
    try:
        own = read(DecodeStep(model, isa=isa), x)
    except JointNASError as error:
        pytest.skip(str(error))
    assert (own - read(DecodeStep(model), x)).abs().max() <= (1e-4 if dtype == torch.float32 else 0.1)
    if dtype == torch.float32:
        close(own, model(x).logits)


@pytest.mark.parametrize("name", ["llama", "qwen3-window", "phi3-window"])
@torch.no_grad()
def test_sequences_of_unequal_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left padding over whole chunks: positions count from the first token, and slots before it are not seen."""
    length, padding = 3 * CHUNK + 5, torch.tensor([0, 4, CHUNK, 2 * CHUNK + 7, 3 * CHUNK + 4])
    chunked(monkeypatch, len(padding))
    model = model_of(FAMILIES[name], [4, 8, 2])
    x = ids(len(padding), length)
    step = DecodeStep(model)
    caches = step.caches(len(x), length)
    positions = (torch.arange(length) - padding[:, None]).clamp_min(0)
    own = step.prefill(x, positions, caches, 0, padding, keep=length)
    assert own.isfinite().all()
    for row, count in enumerate(padding.tolist()):
        close(own[row, count:], model(x[row : row + 1, count:]).logits[0])


@pytest.mark.parametrize("name", ["llama", "mistral-window", "phi3-window"])
@torch.no_grad()
def test_prompts_and_steps_in_turns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache, whichever way its positions came; a prompt goes on from what is there."""
    chunked(monkeypatch, 2)
    model = model_of(FAMILIES[name], [4, 8, 2])
    x = ids(2, 50)
    step = DecodeStep(model)
    caches, seen = step.caches(2, 50), []
    for begin, end in ((0, 17), (17, 18), (18, 19), (19, 45), (45, 46), (46, 48), (48, 50)):
        positions = torch.arange(begin, end).expand(2, -1)
        if end - begin == 1:
            seen.append(step(x[:, begin], positions[:, 0], caches, begin)[:, None])
        else:
            seen.append(step.prefill(x[:, begin:end], positions, caches, begin, keep=end - begin))
    close(torch.cat(seen, 1), model(x).logits)


@torch.no_grad()
def test_last_logits_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1 to all tokens, over the borders of chunks."""
    chunked(monkeypatch, 2)
    step, x = DecodeStep(model_of({}, [2, 4, 8])), ids(2, 2 * CHUNK + 3)
    whole = read(step, x)
    for keep in range(1, x.shape[1] + 1):
        assert (read(step, x, keep) - whole[:, -keep:]).abs().max() <= 1e-5


@torch.no_grad()
def test_memory_does_not_grow_with_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    chunked(monkeypatch, 1)
    step, sizes = DecodeStep(model_of({}, [4, 4, 4])), []
    for length in (2 * CHUNK, 20 * CHUNK):
        read(step, ids(1, length), 1)
        sizes.append(len(step._memory))
    assert sizes[0] == sizes[1]


@torch.no_grad()
def test_not_a_number_stays_one() -> None:
    """In the cache, of an earlier token: all that look back at it are none."""
    step, x = DecodeStep(model_of({}, [4, 4, 4])), ids(1, 9)
    caches = step.caches(1, 9)
    positions = torch.arange(9)[None]
    step.prefill(x[:, :4], positions[:, :4], caches, 0)
    caches.keys[1][0, :, 2, 0] = torch.nan
    assert step.prefill(x[:, 4:], positions[:, 4:], caches, 4, keep=5).isnan().all()
    caches.keys[1][0, :, 2, 0] = 0.0
    assert not step.prefill(x[:, 4:], positions[:, 4:], caches, 4, starts=torch.tensor([3])).isnan().any()


def test_what_is_outside_is_refused() -> None:
    step, x = DecodeStep(model_of({}, [4, 4, 4])), ids(2, 5)
    positions, caches = torch.arange(5).expand(2, -1), step.caches(2, 8)
    with pytest.raises(JointNASError, match="logits of 6 tokens; allowed: 1 to 5"):
        step.prefill(x, positions, caches, 0, keep=6)
    with pytest.raises(JointNASError, match=r"positions must be int64 \[2, 5\] on cpu, got torch.int64 \[2\]"):
        step.prefill(x, positions[:, 0], caches, 0)
    for ids_, positions_, slot, starts in (
        (x, positions + 4, 0, None), (x + 60, positions, 0, None), (x, positions, 0, torch.tensor([0, 5])),
    ):
        with pytest.raises(JointNASError, match="an argument it does not support"):
            step.prefill(ids_, positions_, caches, slot, starts)
    for slot in (-1, 4):
        with pytest.raises(JointNASError, match=f"5 tokens from slot {slot} on, in caches of 8"):
            step.prefill(x, positions, caches, slot)
