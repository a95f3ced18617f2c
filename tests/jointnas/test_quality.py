"""Perplexity and lm-eval accuracy against direct computation, on a small random model with the real tokenizer."""

import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jointnas import assets
from jointnas.config import EvalConfig
from jointnas.evaluation import accuracy, perplexity
from jointnas.tasks import EMBEDDED, load_tasks
from jointnas_kernels.errors import JointNASError


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        vocab_size=4096, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("context, batch_size", [(256, 16), (17, 3), (2, 64)])
def test_perplexity_equals_the_definition(model: LlamaForCausalLM, context: int, batch_size: int) -> None:
    tokens = assets.held_out_tokens()[: 5 * context + 1]
    total = count = 0.0
    for i in range(5):
        ids = tokens[i * context : (i + 1) * context]
        with torch.no_grad():
            logp = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        total -= sum(float(logp[t, ids[t + 1]]) for t in range(context - 1))
        count += context - 1
    found = perplexity(model, tokens, context=context, batch_size=batch_size)
    assert found == pytest.approx(math.exp(total / count), rel=1e-4)


def test_perplexity_restores_the_training_mode(model: LlamaForCausalLM) -> None:
    model.train()
    perplexity(model, assets.held_out_tokens(), max_tokens=512)
    assert model.training
    model.eval()


def test_perplexity_of_too_little_text_is_an_error(model: LlamaForCausalLM) -> None:
    with pytest.raises(JointNASError, match="at least one window of 256"):
        perplexity(model, torch.zeros(100, dtype=torch.int64))


def _direct(model: LlamaForCausalLM, name: str, limit: int) -> tuple[float, float]:
    """acc and acc_norm (log-likelihood per character) one sequence at a time."""
    tokenizer = assets.load_tokenizer()
    right = right_norm = 0
    lines = (assets.task_dir() / f"{name}.jsonl").read_text().splitlines()[:limit]
    for item in map(json.loads, lines):
        scores = []
        start = len(tokenizer(item["query"]).input_ids)
        for choice in item["choices"]:
            ids = torch.tensor([tokenizer(f"{item['query']} {choice}").input_ids])
            with torch.no_grad():
                logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            scores.append(float(logp.gather(1, ids[0, 1:, None])[start - 1 :].sum()))
        norm = [s / len(c) for s, c in zip(scores, item["choices"], strict=True)]
        right += scores.index(max(scores)) == item["answer"]
        right_norm += norm.index(max(norm)) == item["answer"]
    return right / limit, right_norm / limit


def test_evaluate_equals_a_direct_scorer(model: LlamaForCausalLM, capfd: pytest.CaptureFixture[str]) -> None:
    limit = 20
    results = accuracy(model, assets.load_tokenizer(), load_tasks(EvalConfig()), limit=limit, batch_size=16)
    assert capfd.readouterr().out == ""
    assert set(results) == {*EMBEDDED, "mean"}
    for name in EMBEDDED:
        acc, acc_norm = _direct(model, name, limit)
        assert results[name]["items"] == limit
        assert results[name]["acc"] == pytest.approx(acc), name
        assert results[name]["acc_norm"] == pytest.approx(acc_norm), name
    assert results["mean"]["acc"] == pytest.approx(sum(results[n]["acc"] for n in EMBEDDED) / len(EMBEDDED))
