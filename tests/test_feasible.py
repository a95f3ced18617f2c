"""Structures that the stock config class refuses: known from the config alone, and in no count, draw or expectation."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency import LatencyTable, Workload, enumerate_ops, feasible_choices
from jointnas_kernels.space import (
    ATTENTION,
    BITS,
    STRUCTURE,
    Choice,
    SearchSpace,
    count_params,
    expected_bytes,
    expected_params,
    joint,
    model_bytes,
    structure_params,
    subnet_config,
)
from tests.latency.tables import synthetic

# the shape of SmolLM2-135M, with fewer blocks
SMOL = LlamaConfig(
    vocab_size=97, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64, intermediate_size=1536,
    num_hidden_layers=2, tie_word_embeddings=True,
)  # fmt: skip
SPACE = SearchSpace((384, 576), (3, 6, 9), (32, 64), (512, 1536), (1, 2), (2, 4), (8, 16), group_size=64)


def smol(**change: Any) -> tuple[SearchSpace, list[str]]:
    return SearchSpace.from_dict({**SPACE.to_dict(), **change}).feasible(SMOL)


def test_refused_combinations_are_excluded_and_named_once() -> None:
    space, lines = smol()
    assert space.excluded == ((384, 9, 32), (384, 9, 64))
    assert {k: space.sizes(k) for k in STRUCTURE} == {k: SPACE.sizes(k) for k in STRUCTURE}
    assert lines == [
        "2 of 12 combinations of hidden, heads, head_dim, first hidden 384, heads 9, head_dim 32: LlamaConfig refuses"
        " it: The hidden size (384) is not a multiple of the number of attention heads (9)."
    ]
    assert space.feasible(SMOL) == (space, [])
    assert SearchSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    assert SearchSpace.from_dict({**space.to_dict(), "hidden": [576]}).excluded == ()


def test_the_class_is_asked() -> None:
    """What is excluded is exactly what cannot be built; everything else can."""
    space, _ = smol()
    for sizes in SPACE.combinations(ATTENTION):
        choice = Choice(*sizes, 512, 1)
        if sizes in space.excluded:
            with pytest.raises(JointNASError, match=r"hidden 384, heads 9.* LlamaConfig refuses it: The hidden size"):
                subnet_config(SMOL, choice)
        else:
            assert subnet_config(SMOL, choice).hidden_size == choice.hidden


def test_sizes_without_any_structure_are_removed() -> None:
    space, lines = smol(hidden=[256, 384, 576], heads=[3, 9], group_size=64)
    assert space.hidden == (384, 576)
    assert space.excluded == ((384, 9, 32), (384, 9, 64))
    assert lines[0].startswith("hidden 256: ")
    assert "The hidden size (256) is not a multiple of the number of attention heads (3)" in lines[0]
    assert lines[1].startswith("2 of 8 combinations")
    assert len(lines) == 2


def test_one_feasible_structure() -> None:
    space, lines = smol(hidden=[256, 384], heads=[3], head_dim=[64], intermediate=[512], blocks=[2], weight_bits=None)
    assert space.excluded == ()
    assert space.size() == 2**2
    assert {space.sample() for _ in range(40)} == set(space)
    assert len(lines) == 1
    by_hand = SearchSpace((384,), (6, 9), (64,), (512,), (2,), excluded=((384, 9, 64),))
    assert by_hand.size() == 1
    assert {by_hand.sample() for _ in range(20)} == {by_hand.full()} == {Choice(384, 6, 64, 512, 2)}


def test_an_empty_space_is_one_error() -> None:
    empty = SearchSpace.from_dict({**SPACE.to_dict(), "hidden": [320]})
    for check in (empty.feasible, empty.validate):
        with pytest.raises(JointNASError, match=r"no hidden, heads, head_dim is feasible\. hidden 320, h") as error:
            check(SMOL)
        assert str(error.value).endswith("Heads that fit hidden 320: none.")
    with pytest.raises(JointNASError, match=r"Heads that fit hidden 384: 3, 6\."):
        smol(hidden=[384], heads=[9])
    with pytest.raises(JointNASError, match="every combination is"):
        SearchSpace((8,), (2,), (4,), (8,), (1,), excluded=((8, 2, 4),))


@pytest.mark.parametrize(
    ("excluded", "message"),
    [
        (4, "expected a list"),
        ([4], "expected a list"),
        ([[384, 9]], r"expected hidden, heads, head_dim, found \[384, 9\]"),
        ([[384, 9, 6.4]], "expected an integer"),
    ],
)
def test_bad_exclusions(excluded: Any, message: str) -> None:
    with pytest.raises(JointNASError, match=f"excluded: {message}"):
        SearchSpace.from_dict({**SPACE.to_dict(), "excluded": excluded})


def test_counts_iteration_and_samples_know_no_excluded_structure() -> None:
    space, _ = smol(weight_bits=None, act_bits=None)
    everything = list(space)
    assert len(everything) == len(set(everything)) == space.size() == SPACE.size() // 4**2 - 2 * 4 == 40
    assert all(space.allows(choice) for choice in everything)
    assert space.structures() == everything
    generator = torch.Generator().manual_seed(0)
    drawn = [space.sample(generator) for _ in range(2000)]
    assert set(drawn) == set(everything)
    counts = torch.tensor([drawn.count(choice) for choice in everything]).double()
    assert ((counts - 50) ** 2 / 50).sum() < 80  # chi-square of 39 degrees of freedom
    assert smol()[0].size() == 40 * 4**2
    assert space.combinations(("heads", "hidden")) == [(3, 384), (3, 576), (6, 384), (6, 576), (9, 576)]
    assert space.combinations(("hidden", "intermediate")) == [(384, 512), (384, 1536), (576, 512), (576, 1536)]


def test_full_and_nearest_are_feasible() -> None:
    space, _ = smol()
    assert space.full() == SPACE.full()
    no_576, _ = smol(hidden=[192, 384], blocks=[1, 2])
    assert no_576.full() == Choice(384, 6, 64, 1536, 2, (4, 4), (16, 16))
    wrong = Choice(384, 9, 64, 512, 1)
    assert space.nearest(wrong) == Choice(384, 6, 64, 512, 1) or space.nearest(wrong).hidden == 576
    assert space.allows(space.nearest(wrong))


def test_spaces_of_the_paper_lose_nothing() -> None:
    llama = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    )  # fmt: skip
    for name in ("llama3", "qllama3"):
        space = SearchSpace.named(name)
        assert space.feasible(llama) == (space, [])


def test_rotary_factors_of_phi3(caplog: pytest.LogCaptureFixture) -> None:
    """They are as many as hidden / heads / 2: another rule of another class, found without knowing it."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}
    config = AutoConfig.for_model(
        "phi3", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, vocab_size=61,
        num_hidden_layers=2, max_position_embeddings=64, original_max_position_embeddings=32, rope_parameters=rope,
        pad_token_id=None,
    )  # fmt: skip
    logging.getLogger("transformers").propagate = True
    caplog.clear()
    space, lines = SearchSpace((32, 48, 64), (2, 4), (16,), (64,), (1, 2)).feasible(config)
    assert (space.hidden, space.heads) == ((32, 64), (2, 4))
    assert space.excluded == ((32, 4, 16), (64, 2, 16))
    assert "short_factor field must have length 4, got 8" in lines[-1] or "length" in lines[-1]
    assert [line.partition(":")[0] for line in lines[:-1]] == ["hidden 48"]
    assert not caplog.records


# ---- expectations ---------------------------------------------------------------------------------------------------


def random_probs(space: SearchSpace, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probs = {}
    for key in (*STRUCTURE, *BITS):
        if space.sizes(key):
            shape = (space.depth,) * (key in BITS) + (len(space.sizes(key)),)
            probs[key] = torch.rand(shape, generator=generator, dtype=torch.float64).softmax(-1)
    return probs


def probability(space: SearchSpace, probs: dict[str, torch.Tensor], choice: Choice) -> float:
    """Of independent dimensions."""
    p = 1.0
    for key in STRUCTURE:
        p *= probs[key][space.sizes(key).index(getattr(choice, key))].item()
    for key in BITS:
        for b, bits in enumerate(getattr(choice, key) or ()):
            p *= probs[key][b, space.sizes(key).index(bits)].item()
    return p


def averages(space: SearchSpace, table: LatencyTable, probs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Over the feasible choices, by definition; `mass` is their probability."""
    bound, rank = table.bind(space, (1, 0)), (1, 0)
    sums = dict.fromkeys(("mass", "params", "bytes", "latency"), 0.0)
    for choice in space:
        p = probability(space, probs, choice)
        sums["mass"] += p
        sums["params"] += p * count_params(SMOL, choice)
        sums["bytes"] += p * model_bytes(SMOL, space, choice, rank)
        sums["latency"] += p * bound.predict(choice)
    return {k: v if k == "mass" else v / sums["mass"] for k, v in sums.items()}


def test_expectations_are_sums_over_feasible_choices() -> None:
    space, _ = smol()
    table = synthetic(space, workload=Workload(seq=16), config=SMOL)
    for seed in range(3):
        probs = random_probs(space, seed)
        want = averages(space, table, probs)
        assert 0.5 < want["mass"] < 0.95
        assert joint(space, probs).feasible.item() == pytest.approx(want["mass"], rel=1e-12)
        assert joint(space, probs).probs.sum().item() == pytest.approx(1, rel=1e-12)
        assert expected_params(SMOL, space, probs).item() == pytest.approx(want["params"], rel=1e-12)
        assert expected_bytes(SMOL, space, probs, (1, 0)).item() == pytest.approx(want["bytes"], rel=1e-12)
        expected = table.expected(space, probs, (1, 0))
        assert expected.latency.item() == pytest.approx(want["latency"], rel=1e-10)
        assert expected.infeasible.item() == pytest.approx(1 - want["mass"], rel=1e-10)


def test_expectations_are_differentiable() -> None:
    space, _ = smol()
    table = synthetic(space, workload=Workload(seq=16), config=SMOL)
    logits = {k: p.log().requires_grad_() for k, p in random_probs(space).items()}

    def values(*flat: torch.Tensor) -> torch.Tensor:
        probs = {k: v.softmax(-1) for k, v in zip(logits, flat, strict=True)}
        return torch.stack([expected_params(SMOL, space, probs) / 1e6, *table.expected(space, probs)])

    assert torch.autograd.gradcheck(values, tuple(logits.values()), atol=1e-7)


def test_all_mass_on_an_excluded_structure_is_infeasible_not_nan() -> None:
    space, _ = smol()
    probs = random_probs(space)
    for key, size in (("hidden", 384), ("heads", 9)):
        probs[key] = torch.tensor([float(s == size) for s in space.sizes(key)], dtype=torch.float64, requires_grad=True)
    expected = synthetic(space, workload=Workload(seq=16), config=SMOL).expected(space, probs)
    assert expected.infeasible.item() == 1
    expected.infeasible.backward()
    assert expected.latency.isfinite()
    assert probs["heads"].grad is not None
    assert probs["heads"].grad[2] > probs["heads"].grad[0]  # away from 9 heads


def test_params_of_structures() -> None:
    counts = structure_params(SMOL, SPACE)
    assert counts.shape == (2, 3, 2, 2, 2)
    assert counts.flatten().tolist() == [count_params(SMOL, choice) for choice in SPACE.structures()]


# ---- latency --------------------------------------------------------------------------------------------------------


def test_operations_of_excluded_structures_alone_are_not_needed() -> None:
    """hidden 384 with 9 heads: the query projection [9 d, 384] and the output projection [384, 9 d]."""
    space, _ = smol(heads=[3, 9], head_dim=[64])
    everything, workload = SearchSpace.from_dict({**space.to_dict(), "excluded": []}), Workload(seq=16)

    def shapes(of: SearchSpace) -> set[tuple[int, int]]:
        return {(s.n, s.k) for s in enumerate_ops(of, SMOL, workload) if s.op == "linear"}

    assert shapes(everything) - shapes(space) == {(576, 384), (384, 576)}
    table = synthetic(space, workload=workload, config=SMOL)
    assert not table.coverage(space, SMOL).missing
    bound = table.bind(space)
    assert bound.original() == pytest.approx(table.bind(SearchSpace.single(SMOL, None, None)).original())
    with pytest.raises(JointNASError, match="hidden 384, heads 9, head_dim 64 are infeasible together"):
        bound.predict(Choice(384, 9, 64, 512, 1, (2, 2), (8, 8)))
    with pytest.raises(JointNASError, match="lacks"):
        table.bind(everything)


def test_restricting_bits_looks_at_feasible_structures_only() -> None:
    space, _ = smol()
    table = synthetic(space, workload=Workload(seq=16), config=SMOL)
    assert table.restrict(space) == (space, [])
    table = synthetic(space, lambda spec: spec.wbits != 2, Workload(seq=16), SMOL)
    restricted, removed = table.restrict(space)
    assert (restricted.weight_bits, restricted.excluded) == ((4,), space.excluded)
    assert len(removed) == 1


def test_choices_for_the_calibration_are_feasible() -> None:
    space, _ = smol()
    table = synthetic(space, workload=Workload(seq=16), config=SMOL)
    choices = feasible_choices(table, space, 60)
    assert choices[0] == space.full()
    assert all(space.allows(choice) for choice in choices)
