"""Generation through the decode step: the tokens of transformers' own code, and calls that are left to it."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.runtime import Runtime, attach
from jointnas_kernels.runtime.generation import RESULT
from tests.hf.hf_models import ids, tiny_model
from tests.runtime.test_decode import FAMILIES, packed

LENGTH = 24
PADDING = torch.tensor([0, 3, 5])


def model_of(change: dict[str, Any] | None = None, bits: tuple[int, ...] = (2, 4, 8), act: int = 16) -> Any:
    model = packed(tiny_model(**(change or {})), list(bits), act)
    model.generation_config.eos_token_id = None
    attach(model)
    return model


def generated(model: Any, x: Tensor, fast: bool, **how: Any) -> Tensor:
    model.runtime.enabled, model.runtime.steps = fast, 0
    torch.manual_seed(0)
    usual = {"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(x)}
    found = model.generate(x, **{**usual, **how})
    assert (model.runtime.steps > 0) == fast, str(model.runtime)
    return found


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 8, "temperature": 0.7},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 4},
}


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("change", FAMILIES.values(), ids=FAMILIES)
def test_same_tokens_as_transformers(change: dict[str, Any], how: dict[str, Any]) -> None:
    """Alone, and in a batch padded on the left; windows of 3 and 4 positions slide many times."""
    model = model_of(change)
    single, batch = ids(1, 5), ids(3, 7)
    mask = (torch.arange(7) >= PADDING[:, None]).long()
    for x, more in ((single, {}), (batch * mask, {"attention_mask": mask})):
        own, stock = (generated(model, x, fast, **how, **more) for fast in (True, False))
        assert torch.equal(own, stock)


def test_every_token_but_the_first_is_a_step() -> None:
    model = model_of()
    generated(model, ids(1, 5), True)
    assert model.runtime.steps == LENGTH - 1
    assert str(model.runtime) == f"prompts: 1, decode steps: {LENGTH - 1}; the latest call was one of them"


@pytest.mark.parametrize("change", [FAMILIES["llama"], FAMILIES["qwen3-window"]])
def test_a_further_prompt_goes_on_with_the_cache(change: dict[str, Any]) -> None:
    """Two turns; buffers grow on the way (they hold 256 positions more than their first prompt)."""
    model = model_of({**change, "max_position_embeddings": 1024})
    seen = []
    for fast in (True, False):
        cache, text = DynamicCache(config=model.config), ids(1, 5)
        for turn in range(3):
            text = torch.cat([text, ids(1, 6, seed=turn)], 1)
            text = generated(model, text, fast, max_new_tokens=140, **{RESULT: cache})
        seen.append(text)
        assert cache.get_seq_length() == text.shape[1] - 1
    assert torch.equal(*seen)


def test_prompt_lookup_crops_the_cache() -> None:
    model, x = model_of(), ids(1, 4).repeat(1, 3)
    model.runtime.enabled = True
    own = model.generate(x, max_new_tokens=LENGTH, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(own, generated(model, x, False))


def forwarded(model: Any, x: Tensor, cache: Any, **more: Any) -> Tensor:
    return model(input_ids=x, **{RESULT: cache}, **more).logits[:, -1]


def filled(model: Any, x: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    forwarded(model, x, cache)
    return cache


def test_caches_may_be_cropped_reordered_selected_and_copied() -> None:
    """Each against the text it then stands for; gradients are on, and nothing needs one."""
    model, x = model_of(), ids(3, 9)
    cache = filled(model, x[:, :6])
    for t in (6, 7):
        forwarded(model, x[:, t : t + 1], cache)
    twin = copy.deepcopy(cache)
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    order = x[[2, 0, 0]]
    for t in (6, 7, 8):
        own = forwarded(model, order[:, t : t + 1], cache)
    assert (own - model(order).logits[:, -1]).abs().max() <= 1e-4
    cache.batch_select_indices(torch.tensor([0, 1]))
    own = forwarded(model, x[:2, :1], cache)
    assert (own - model(torch.cat([order[:2], x[:2, :1]], 1)).logits[:, -1]).abs().max() <= 1e-4
    own = forwarded(model, x[:, 8:], twin)
    assert (own - model(x).logits[:, -1]).abs().max() <= 1e-4
    assert model.runtime.steps == 7


def test_models_with_a_trained_part_keep_their_gradients() -> None:
    model, x = model_of(), ids(1, 5)
    cache = filled(model, x)
    model.model.norm.weight.requires_grad_(True)
    forwarded(model, x[:, :1], cache).sum().backward()
    assert model.model.norm.weight.grad is not None
    assert "gradients are wanted" in str(model.runtime)
    with torch.no_grad():
        forwarded(model, x[:, :1], cache)
    assert model.runtime.reason is None


def hooked(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def gelu(model: Any) -> None:
    model.config.hidden_act = "gelu"


@pytest.mark.parametrize(
    ("change", "more", "reason"),
    [
        (None, {"output_attentions": True}, "output_attentions is given"),
        (None, {"use_cache": False}, "use_cache is False"),
        (None, {"labels": torch.tensor([[1]])}, "labels is given"),
        (None, {"return_dict": False}, "return_dict is False"),
        (None, {"attention_mask": torch.ones(1, 5)}, "an attention mask of 5 positions, where there are 6"),
        (None, {"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1]])}, "more than padding on the left"),
        (None, {"attention_mask": torch.zeros(1, 1, 1, 6)}, "not [batch, positions]"),
        (None, {"position_ids": torch.tensor([[9999]])}, "positions beyond"),
        (None, {"logits_to_keep": torch.tensor([0])}, "logits_to_keep is no number of last tokens"),
        (hooked, {}, "modules of the model have hooks"),
        (gelu, {}, "its activation is 'gelu'"),
        (lambda m: setattr(m.runtime, "enabled", False), {}, "switched off"),
        (lambda m: m.double(), {}, "not torch.float64"),
        (lambda m: setattr(m.config, "output_hidden_states", True), {}, "the config wants other outputs"),
    ],
)  # fmt: skip
def test_other_calls_are_left_to_transformers(change: Any, more: dict[str, Any], reason: str) -> None:
    model, x = model_of(bits=(16, 16, 16)), ids(1, 5)
    if change:
        change(model)
    cache = filled(model, x)
    given = {"input_ids": x[:, :1], RESULT: cache, **more}
    want = type(model).forward(copy.deepcopy(model), **copy.deepcopy(given))
    found = model(**given)
    assert reason in str(model.runtime)
    assert torch.equal(found[0].nan_to_num(7), want[0].nan_to_num(7))  # the loss of a single label is none


def test_other_caches_and_batches_are_left_to_transformers() -> None:
    model = model_of()
    wide = ids(17, 3)
    assert torch.equal(generated(model, wide[:16], True), generated(model, wide[:16], False))
    model.runtime.enabled = True
    model.generate(wide, max_new_tokens=3)
    assert model.runtime.reason == "17 sequences, of at most 16"
    static = StaticCache(config=model.config, max_cache_len=16)
    forwarded(model, ids(1, 4), static)
    forwarded(model, ids(1, 1), static)
    assert model.runtime.reason == "its cache is no plain DynamicCache"
    with torch.autocast("cpu"):
        forwarded(model, ids(1, 1), filled(model, ids(1, 4)))
    assert model.runtime.reason == "autocast is on"


def test_changed_models_are_looked_at_again() -> None:
    model, x = model_of(), ids(1, 6)
    generated(model, x, True)
    old = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = nn.Linear(old.in_features, old.out_features).requires_grad_(False)
    assert torch.equal(generated(model, x, True), generated(model, x, False))
    model.load_state_dict({"lm_head.weight": model.lm_head.weight.flip(0).clone()}, strict=False, assign=True)
    assert torch.equal(generated(model, x, True), generated(model, x, False))


def test_copies_run_on_their_own() -> None:
    model, x, buffer = model_of(), ids(1, 6), io.BytesIO()
    want = generated(model, x, True)
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert other.runtime.model is other
        assert other.forward is other.runtime
        assert torch.equal(generated(other, x, True), want)
        other.model.embed_tokens.weight.zero_()
    assert torch.equal(generated(model, x, True), want)


def test_a_model_that_does_not_fit_is_looked_at_once_for_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding with transformers' code must not become slower."""
    model, x = model_of(), ids(1, 5)
    hooked(model)
    looked: list[int] = []
    fitted = Runtime.fitted
    monkeypatch.setattr(Runtime, "fitted", lambda self: looked.append(1) or fitted(self))
    cache = filled(model, x)
    for _ in range(4):
        forwarded(model, x[:, :1], cache)
        assert model.runtime.reason == "modules of the model have hooks"
    assert len(looked) == 1


def test_caches_can_be_stored() -> None:
    model, x, buffer = model_of(), ids(2, 6), io.BytesIO()
    cache = filled(model, x[:, :4])
    forwarded(model, x[:, 4:5], cache)
    torch.save(cache, buffer)
    assert b"CausalLM" not in buffer.getvalue()  # without the model
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    own = forwarded(model, x[:, 5:], again)
    assert model.runtime.reason is None
    assert (own - model(x).logits[:, -1]).abs().max() <= 1e-4


def test_another_thread_is_refused() -> None:
    model, x = model_of(), ids(1, 6)
    cache = filled(model, x)
    forwarded(model, x[:, :1], cache)
    errors = []

    def other() -> None:
        try:
            forwarded(model, x[:, :1], filled(model, x))
        except JointNASError as error:
            errors.append(str(error))

    with model.runtime._step._busy:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert errors == ["decode step: another thread is in it; give each thread a model of its own"]
