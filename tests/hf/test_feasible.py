"""Odd sizes: one error, or every feasible choice is a stock model. A supernet computes refused structures, too."""

from __future__ import annotations

import itertools
import logging
import random
from typing import Any

import pytest
import torch

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import convert, extract, shrink
from jointnas_kernels.hf.families import FAMILIES, build
from jointnas_kernels.space import Choice, SearchSpace
from tests.hf.hf_models import ids, randomize_lora, tiny_config, tiny_model

SPACE = SearchSpace((32, 96), (2, 4, 6), (8,), (48,), (1, 2, 3))  # 32 is no multiple of 6
WRONG = Choice(32, 6, 8, 48, 3)


def supernet() -> Any:
    model = tiny_model(hidden_size=96, num_attention_heads=6, head_dim=8)
    return randomize_lora(convert(model, SPACE, lora_rank=2))


def test_convert_leaves_out_what_the_class_refuses(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "jointnas_kernels"):
        made = supernet()
    assert made.space.excluded == ((32, 6, 8),)
    assert made.arch.space == made.space
    assert [record.getMessage() for record in caplog.records] == [
        "search space: removed 1 of 6 combinations of hidden, heads, head_dim, first hidden 32, heads 6, head_dim 8: "
        "LlamaConfig refuses it: The hidden size (32) is not a multiple of the number of attention heads (6)."
    ]


@torch.no_grad()
def test_a_refused_structure_computes_but_is_not_extracted() -> None:
    made = supernet()
    assert made.fix(WRONG)(ids()).logits.isfinite().all()
    for cut in (extract, shrink):
        with pytest.raises(JointNASError) as error:
            cut(made, WRONG)
        assert str(error.value) == (
            "no stock model is hidden 32, heads 6, head_dim 8, intermediate 48, blocks 3: LlamaConfig refuses it: The"
            " hidden size (32) is not a multiple of the number of attention heads (6). Nearest in the space: hidden 32,"
            " heads 4, head_dim 8."
        )


def test_the_most_probable_choice_is_feasible() -> None:
    made = supernet()
    with torch.no_grad():
        made.arch.logits["hidden"].copy_(torch.tensor([2.0, 1.0]))
        made.arch.logits["heads"].copy_(torch.tensor([0.0, 0.5, 4.0]))
    probs = made.arch.probs()
    joint = {(h, n): a * b for h, a in zip(made.space.hidden, probs["hidden"].tolist(), strict=True)
             for n, b in zip(made.space.heads, probs["heads"].tolist(), strict=True)}  # fmt: skip
    del joint[32, 6]
    assert probs["hidden"].argmax() == 0
    assert probs["heads"].argmax() == 2
    choice = made.argmax()
    assert (choice.hidden, choice.heads) == max(joint, key=joint.__getitem__) == (96, 6)
    extract(made, choice)


# ---- odd spaces -----------------------------------------------------------------------------------------------------


def some(rng: random.Random, of: list[int], most: int = 3) -> list[int]:
    return sorted(rng.sample(of, min(len(of), rng.randint(1, most))))


def odd_space(rng: random.Random) -> tuple[Any, dict[str, Any]]:
    """A config that its class accepts, and a space around it whose sizes often do not fit."""
    family = rng.choice(sorted(FAMILIES))
    while True:
        groups, per_group, dim = rng.randint(1, 3), rng.randint(1, 4), rng.choice([4, 8, 12, 16])
        hidden, neurons, blocks = rng.choice([24, 32, 36, 40, 48, 60]), rng.choice([24, 32, 40, 48]), rng.randint(1, 2)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
        if rng.random() < 0.2:
            factors = {name: [1.0] * (dim // 2) for name in ("short_factor", "long_factor")}
            rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, **factors}
        heads = groups * per_group
        try:
            config = tiny_config(
                family, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=groups, head_dim=dim,
                intermediate_size=neurons, num_hidden_layers=blocks, rope_parameters=rope,
                tie_word_embeddings=rng.random() < 0.5,
            )  # fmt: skip
            break
        except Exception:  # sizes that the class refuses for the model itself
            continue
    fits = rng.random() < 0.7  # otherwise any sizes
    space = {
        "hidden": some(rng, list(range(4, hidden + 1, 4)) if fits else list(range(3, hidden + 3))),
        "heads": some(rng, list(range(groups, heads + 1, groups)) if fits else list(range(1, heads + 2))),
        "head_dim": some(rng, [d for d in range(2, dim + 1, 2) if dim % d == 0] if fits else list(range(1, dim + 3))),
        "intermediate": some(rng, list(range(4, neurons + 1, 4))),
        "blocks": sorted({*some(rng, list(range(1, blocks + 1))), blocks}) if fits else some(rng, [1, 2, 3]),
        "group_size": rng.choice([2, 4, 8, 12]),
    }
    for key, bits in (("weight_bits", [2, 4, 8]), ("act_bits", [4, 8, 16])):
        if rng.random() < 0.4:
            space[key] = some(rng, bits, 2)
    return config, space


@torch.no_grad()
def try_space(seed: int, most: int = 4) -> str:
    """Nothing if all feasible choices, or `most` random ones, are stock models with equal outputs; or the error."""
    rng = random.Random(seed)
    config, values = odd_space(rng)
    torch.manual_seed(seed)
    try:
        space = SearchSpace.from_dict(values)
        space.validate(config)
        made = randomize_lora(convert(build(config).double().eval(), space, lora_rank=2))
    except JointNASError as error:
        return str(error)
    generator, x = torch.Generator().manual_seed(seed), ids(1, 5)
    few = made.space.size() <= most
    choices = list(itertools.islice(made.space, most)) if few else [made.space.sample(generator) for _ in range(most)]
    for choice in [*choices, made.argmax(), made.space.full()]:
        own, stock = made.fix(choice)(x).logits, extract(made, choice)
        assert type(stock) is FAMILIES[config.model_type].model
        assert (own - stock(x).logits).abs().max() <= 1e-5, (seed, choice)
    return ""


def test_odd_spaces() -> None:
    results = [try_space(seed) for seed in range(24)]
    assert 6 <= results.count("") <= 20
    assert all(results.count(error) < 6 for error in results if error)
