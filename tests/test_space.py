"""Search spaces, exact sizes and their expectations, and the messages for bad input."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.layout import all_sizes, block_of
from jointnas_kernels.space import (
    WIDTHS,
    Choice,
    SearchSpace,
    count_params,
    expected_bytes,
    expected_params,
    keep_probability,
    kept_blocks,
    model_bytes,
)

LLAMA8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
)
TINY = LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    tie_word_embeddings=True,
)


def meta_count(config: LlamaConfig, choice: Choice) -> int:
    """What transformers says, from a model without storage."""
    small = LlamaConfig(**{**config.to_dict(), "hidden_size": choice.hidden, "num_attention_heads": choice.heads})
    small.head_dim, small.intermediate_size = choice.head_dim, choice.intermediate
    small.num_hidden_layers = choice.blocks
    with torch.device("meta"):
        model = LlamaForCausalLM(small)
    model.tie_weights()
    return sum(p.numel() for p in model.parameters())


def random_probs(space: SearchSpace, seed: int = 0, requires_grad: bool = False) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    probs = {}
    for key in (*WIDTHS, "blocks"):
        probs[key] = torch.rand(len(space.sizes(key)), generator=g, dtype=torch.float64)
    for key in ("weight_bits", "act_bits"):
        if space.sizes(key):
            probs[key] = torch.rand(space.depth, len(space.sizes(key)), generator=g, dtype=torch.float64)
    if space.head_bits:
        probs["head_bits"] = torch.rand(len(space.head_bits), generator=g, dtype=torch.float64)
    return {k: (p / p.sum(-1, keepdim=True)).requires_grad_(requires_grad) for k, p in probs.items()}


def test_named_spaces_are_table_1() -> None:
    llama3, qllama3 = SearchSpace.named("llama3"), SearchSpace.named("qllama3")
    assert llama3.size() == 8 * 3 * 5 * 4 * 32 == 15_360
    assert qllama3.size() == 6 * 2 * 3 * 4 * 32 * 3**32 * 4**32
    assert llama3.hidden == (32, 64, 128, 256, 512, 1024, 2048, 4096)
    assert llama3.intermediate == tuple(int(4096 * i) for i in (1, 2, 3, 3.5))
    assert qllama3.heads == (16, 32)
    assert qllama3.head_dim == (32, 64, 128)
    assert qllama3.weight_bits == (2, 4, 8)
    assert qllama3.act_bits == (2, 4, 8, 16)
    for space in (llama3, qllama3):
        space.validate(LLAMA8B)
    SearchSpace.named("tiny").validate(TINY)
    assert SearchSpace.named("tiny").o_proj_group == 32


@pytest.mark.parametrize(
    "change, total",
    [
        ({}, 8_030_261_248),
        ({"heads": 16}, 7_493_390_336),
        ({"head_dim": 64}, 7_359_172_608),
        ({"hidden": 2048}, 4_015_130_624),
    ],
    ids=lambda v: str(v),
)
def test_known_totals_of_llama_8b(change: dict[str, int], total: int) -> None:
    choice = Choice(**{**SearchSpace.named("llama3").full().to_dict(), **change})
    assert count_params(LLAMA8B, choice) == total


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_counts_equal_transformers(tied: bool, biased: bool) -> None:
    config = LlamaConfig(**{**TINY.to_dict(), "tie_word_embeddings": tied})
    config.attention_bias = config.mlp_bias = biased
    space = SearchSpace([32, 128, 256], heads=[2, 4], head_dim=[8, 64], intermediate=[256, 768], blocks=[1, 4, 6])
    g = torch.Generator().manual_seed(3)
    for choice in [space.full(), *(space.sample(g) for _ in range(12))]:
        assert count_params(config, choice) == meta_count(config, choice)


def test_counts_equal_transformers_at_8b() -> None:
    space, g = SearchSpace.named("llama3"), torch.Generator().manual_seed(1)
    for choice in (space.full(), space.sample(g), space.sample(g)):
        assert count_params(LLAMA8B, choice) == meta_count(LLAMA8B, choice)


def test_expected_params_equal_the_enumeration_of_llama3() -> None:
    space, probs = SearchSpace.named("llama3"), random_probs(SearchSpace.named("llama3"))
    index = {k: {s: i for i, s in enumerate(space.sizes(k))} for k in (*WIDTHS, "blocks")}
    p = {k: v.tolist() for k, v in probs.items()}
    total, mass, n = 0.0, 0.0, 0
    for choice in space:
        weight = 1.0
        for k in (*WIDTHS, "blocks"):
            weight *= p[k][index[k][getattr(choice, k)]]
        total += weight * count_params(LLAMA8B, choice)
        mass += weight
        n += 1
    assert n == space.size()
    assert mass == pytest.approx(1.0, abs=1e-12)
    assert expected_params(LLAMA8B, space, probs).item() == pytest.approx(total, rel=1e-12)


def test_expectations_are_exact_at_one_hot_and_differentiable() -> None:
    space, g = SearchSpace.named("tiny"), torch.Generator().manual_seed(5)
    rank = [3, 0, 5, 1, 4, 2]
    for _ in range(10):
        choice = space.sample(g)
        hot = {k: torch.tensor([float(s == getattr(choice, k)) for s in space.sizes(k)]) for k in (*WIDTHS, "blocks")}
        for k in ("weight_bits", "act_bits"):
            hot[k] = torch.tensor([[float(s == b) for s in space.sizes(k)] for b in getattr(choice, k)])
        assert expected_params(TINY, space, hot).item() == count_params(TINY, choice)
        assert expected_bytes(TINY, space, hot, rank).item() == pytest.approx(model_bytes(TINY, space, choice, rank))
    probs = random_probs(space, requires_grad=True)
    keys = (*WIDTHS, "blocks", "weight_bits")
    inputs = tuple(probs[k] for k in keys)

    def both(*values: torch.Tensor) -> torch.Tensor:
        p = dict(zip(keys, values, strict=True))
        return torch.stack([expected_params(TINY, space, p), expected_bytes(TINY, space, p, rank)]) / 1e6

    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("head_bits", [None, (8,), (4, 8, 16)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_expected_bytes_equal_enumeration(tied: bool, head_bits: tuple[int, ...] | None) -> None:
    space = SearchSpace(
        [128, 256], [2, 4], [32, 64], [256], [1, 2], weight_bits=[2, 4], act_bits=None, head_bits=head_bits
    )
    config = LlamaConfig(**{**TINY.to_dict(), "num_hidden_layers": 2, "tie_word_embeddings": tied})
    probs, rank, total = random_probs(space, 2), [1, 0], 0.0
    for c in space:
        assert c.weight_bits is not None
        weight = 1.0
        for k in (*WIDTHS, "blocks"):
            weight *= probs[k][space.sizes(k).index(getattr(c, k))].item()
        for b, bits in enumerate(c.weight_bits):
            weight *= probs["weight_bits"][b, space.sizes("weight_bits").index(bits)].item()
        if c.head_bits is not None:
            weight *= probs["head_bits"][space.sizes("head_bits").index(c.head_bits)].item()
        total += weight * model_bytes(config, space, c, rank)
    assert expected_bytes(config, space, probs, rank).item() == pytest.approx(total, rel=1e-12)


def test_bytes_of_a_block_by_hand() -> None:
    space = SearchSpace.named("tiny")
    dense = model_bytes(TINY, SearchSpace(**{**space.to_dict(), "weight_bits": None}), Choice(256, 4, 64, 768, 2))
    assert dense == 2 * count_params(TINY, Choice(256, 4, 64, 768, 2))
    choice = Choice(256, 4, 64, 768, 2, weight_bits=(8, 8, 8, 4, 8, 2), act_bits=(16,) * 6)
    sizes = all_sizes(TINY, choice.widths)
    weights = {m.name: m.weights(sizes) for m in block_of(TINY).linears}
    expected = 2 * (4096 * 256 + 256) + 2 * (2 * 2 * 256)
    for bits in (4, 2):  # blocks 3 and 5 are the most important two
        expected += sum(n * bits // 8 + 2 * n // (32 if name == "o_proj" else 128) for name, n in weights.items())
    assert model_bytes(TINY, space, choice, [5, 3, 0, 1, 2, 4]) == expected


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_bytes_of_a_head_by_hand(tied: bool) -> None:
    """Packed levels and a scale per group; one matrix of a tied model is both, so its embedding shrinks, too."""
    config = LlamaConfig(**{**TINY.to_dict(), "tie_word_embeddings": tied})
    space = SearchSpace.from_dict({**SearchSpace.named("tiny").to_dict(), "head_bits": [4, 8, 16]})
    choice, weights = space.full(), 4096 * 256
    of_16 = model_bytes(config, space, choice)
    assert of_16 == model_bytes(config, SearchSpace.named("tiny"), replace(choice, head_bits=None))
    for bits in (4, 8):
        small = replace(choice, head_bits=bits)
        assert of_16 - model_bytes(config, space, small) == 2 * weights - weights * bits / 8 - 2 * weights / 128
        assert count_params(config, small) == count_params(config, choice)
    probs = random_probs(space, requires_grad=True)
    (slope,) = torch.autograd.grad(expected_bytes(config, space, probs), probs["head_bits"])
    sizes = torch.tensor([4 / 8 + 2 / 128, 8 / 8 + 2 / 128, 2.0], dtype=torch.float64)
    hidden = (probs["hidden"].detach() * torch.tensor(space.hidden)).sum()
    torch.testing.assert_close(slope, sizes * 4096 * hidden)


def test_head_bits_are_a_dimension(tmp_path: Path) -> None:
    space = SearchSpace([8, 16], [2], [4, 8], [8], [1, 2], weight_bits=[4], group_size=8, head_bits=[16, 4])
    assert space.head_bits == space.sizes("head_bits") == (4, 16)
    choices = list(space)
    assert len(choices) == len(set(choices)) == space.size() == 2 * 2 * 2 * 2
    assert space.full().head_bits == 16
    g = torch.Generator().manual_seed(0)
    assert {space.sample(g).head_bits for _ in range(20)} == {4, 16}
    for choice in choices:
        space.check(choice)
        assert Choice.from_dict(json.loads(json.dumps(choice.to_dict()))) == choice
        assert choice.quantizes_head == (choice.head_bits == 4)
    assert SearchSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    (tmp_path / "space.yaml").write_text("base: tiny\nhead_bits: [4, 8]\n")
    assert SearchSpace.from_yaml(tmp_path / "space.yaml").head_bits == (4, 8)
    feasible, _ = SearchSpace.from_dict({**SearchSpace.named("tiny").to_dict(), "head_bits": [8]}).feasible(TINY)
    assert feasible.head_bits == (8,)


def test_files_from_before_head_bits_load() -> None:
    for of, full in ((SearchSpace, SearchSpace.named("tiny")), (Choice, SearchSpace.named("tiny").full())):
        values = full.to_dict()
        assert values.pop("head_bits") is None
        assert of.from_dict(values) == full


def test_kept_blocks_and_their_probability() -> None:
    rank = [2, 0, 3, 1]
    assert kept_blocks(rank, 3) == (0, 2, 3)
    space = SearchSpace([8], [2], [4], [8], [1, 2, 4])
    assert keep_probability(space, torch.tensor([0.5, 0.3, 0.2]), rank).tolist() == pytest.approx([0.5, 0.2, 1.0, 0.2])


def test_choices_and_spaces_survive_json(tmp_path) -> None:
    for name in ("llama3", "qllama3", "tiny"):
        space = SearchSpace.named(name)
        assert SearchSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
        for choice in (space.full(), space.sample()):
            assert Choice.from_dict(json.loads(json.dumps(choice.to_dict()))) == choice
            space.check(choice)
    path = tmp_path / "space.yaml"
    path.write_text("base: tiny\nhidden: [256, 128]\nblocks: [6, 1]\n")
    space = SearchSpace.from_yaml(path)
    assert space.hidden == (128, 256)
    assert space.blocks == (1, 6)
    assert space.act_bits == (4, 8, 16)


def test_sampling_is_uniform_and_seeded() -> None:
    space = SearchSpace.named("tiny")
    a = [space.sample(torch.Generator().manual_seed(7)) for _ in range(2)]
    assert a[0] == a[1]
    g = torch.Generator().manual_seed(0)
    choices = [space.sample(g) for _ in range(600)]
    for key in (*WIDTHS, "blocks"):
        counts = torch.tensor([sum(getattr(c, key) == s for c in choices) for s in space.sizes(key)]).double()
        n = len(space.sizes(key))
        assert ((counts - 600 / n) ** 2 / (600 / n)).sum() < 25  # chi-square with at most 4 degrees of freedom


def test_iteration_covers_the_space_once() -> None:
    space = SearchSpace([8, 16], [2], [4, 8], [8], [1, 2], weight_bits=[2, 4], act_bits=[8, 16], group_size=4)
    choices = list(space)
    assert len(choices) == len(set(choices)) == space.size()
    for c in choices:
        space.check(c)
    assert next(iter(SearchSpace.named("qllama3"))).hidden == 128  # lazily


BASE = {"hidden": [128, 256], "heads": [2, 4], "head_dim": [32, 64], "intermediate": [256], "blocks": [6]}
BAD_SPACES = {
    "unknown key": ({**BASE, "hiden": [1]}, "hiden.*Did you mean 'hidden'"),
    "missing": ({k: v for k, v in BASE.items() if k != "heads"}, "missing heads"),
    "empty": ({**BASE, "heads": []}, "heads: at least one"),
    "not a list": ({**BASE, "heads": 4}, "heads: expected a list"),
    "a string": ({**BASE, "heads": "4"}, "heads: expected a list"),
    "not an integer": ({**BASE, "heads": [2.5]}, "heads: expected an integer"),
    "a boolean": ({**BASE, "heads": [True]}, "heads: expected an integer"),
    "negative": ({**BASE, "blocks": [-1, 2]}, "blocks: -1 is not positive"),
    "twice": ({**BASE, "blocks": [2, 2]}, "names a choice twice"),
    "odd head_dim": ({**BASE, "head_dim": [15]}, "even head_dim"),
    "weight bits": ({**BASE, "weight_bits": [4, 16]}, "weight_bits contains 16"),
    "act bits": ({**BASE, "act_bits": [12]}, "act_bits contains 12"),
    "head bits": ({**BASE, "head_bits": [2, 8]}, "head_bits contains 2; allowed: 4, 8, and 16 for an unquantized head"),
    "head bits of none": ({**BASE, "head_bits": []}, "head_bits: at least one choice is needed"),
    "group of the head": ({**BASE, "head_bits": [8], "hidden": [96]}, "hidden 96 is no multiple of 128"),
    "words of the head": ({**BASE, "head_bits": [4], "hidden": [4], "group_size": 4}, "hidden 4 is no multiple of 8"),
    "group": ({**BASE, "weight_bits": [4], "hidden": [96, 256]}, "hidden 96 is no multiple of 128"),
    "group of o_proj": ({**BASE, "weight_bits": [4], "head_dim": [32, 48]}, "head_dim 48 is no multiple of 32"),
    "base": ({"base": "tyny"}, "unknown search space 'tyny'.*Did you mean 'tiny'"),
}


@pytest.mark.parametrize("name", BAD_SPACES, ids=lambda n: n.replace(" ", "-"))
def test_bad_spaces_are_refused(name: str) -> None:
    data, message = BAD_SPACES[name]
    with pytest.raises(JointNASError, match=message):
        SearchSpace.from_dict(data)


BAD_MODELS = {
    "hidden too large": ({"hidden": [512]}, "hidden 512 exceeds the model's 256"),
    "blocks too many": ({"blocks": [7]}, "blocks 7 exceeds the model's 6"),
    "heads not in groups": ({"heads": [3, 4]}, "heads 3 is no multiple of the model's 2 key-value heads.*Nearest: 4"),
    "head_dim does not divide": ({"head_dim": [24]}, "head_dim 24 does not divide the model's 64.*Allowed: 2, 4, 8"),
    "bits without full depth": ({"blocks": [2], "act_bits": [8]}, "must contain the full depth"),
}


@pytest.mark.parametrize("name", BAD_MODELS, ids=lambda n: n.replace(" ", "-"))
def test_spaces_that_do_not_fit_the_model_are_refused(name: str) -> None:
    change, message = BAD_MODELS[name]
    space = SearchSpace.from_dict({**BASE, **change})
    with pytest.raises(JointNASError, match=message):
        space.validate(TINY)


def test_a_model_off_the_heads_group_is_refused() -> None:
    config = LlamaConfig(**{**TINY.to_dict(), "hidden_size": 320, "intermediate_size": 700})
    SearchSpace.from_dict({**BASE, "head_bits": [16]}).validate(config)
    with pytest.raises(JointNASError, match="hidden size 320 is no multiple of the quantization group size 128"):
        SearchSpace.from_dict({**BASE, "head_bits": [8]}).validate(config)


def test_a_model_off_the_quantization_group_is_refused() -> None:
    config = LlamaConfig(**{**TINY.to_dict(), "intermediate_size": 700})
    space = SearchSpace.from_dict({**BASE, "weight_bits": [4]})
    with pytest.raises(JointNASError, match="intermediate size 700 is no multiple of the quantization group size 128"):
        space.validate(config)


SIZES = {  # choices of hidden, intermediate, head_dim
    "SmolLM2-135M": ([576], [1536], [64]),
    "two widths": ([384, 576], [768, 1536], [32, 64]),
    "odd head_dim": ([192], [384], [48, 72]),
    "eights only": ([72], [216], [24]),
    "fours only": ([20], [60], [20]),
    "none": ([6], [10], [2]),
}


@pytest.mark.parametrize("name", SIZES, ids=lambda n: n.replace(" ", "-"))
def test_a_wrong_group_size_names_those_that_fit(name: str) -> None:
    hidden, intermediate, head_dim = SIZES[name]
    sizes = {**BASE, "hidden": hidden, "intermediate": intermediate, "head_dim": head_dim, "weight_bits": [2, 4]}

    def fits(group: int) -> bool:
        try:
            SearchSpace.from_dict({**sizes, "group_size": group})
        except JointNASError:
            return False
        return True

    with pytest.raises(JointNASError, match="no multiple of") as error:
        SearchSpace.from_dict({**sizes, "group_size": 1024})
    said = [int(n) for n in re.findall(r"\d+", str(error.value).rpartition("Group sizes that fit:")[2])]
    assert all(fits(group) for group in said)
    possible = [group for group in range(4, 1024, 4) if fits(group)]
    word = next((w for w in (16, 8, 4) if any(g % w == 0 for g in possible)), 16)
    assert said == [g for g in possible if g % word == 0]


def test_group_sizes_that_fit_the_model_too() -> None:
    """A space of multiples of 128 on a model of 576: 64 divides both."""
    config = LlamaConfig(**{**TINY.to_dict(), "hidden_size": 576, "intermediate_size": 1536})
    space = SearchSpace.from_dict({**BASE, "hidden": [128, 256], "weight_bits": [4]})
    message = r"hidden size 576 is no multiple .* 128\. Group sizes that fit: 16, 32, 64\."
    with pytest.raises(JointNASError, match=message):
        space.validate(config)
    SearchSpace.from_dict({**space.to_dict(), "group_size": 64}).validate(config)


@pytest.mark.parametrize(
    "text, message",
    [
        ("hidden: [", "not valid YAML"),
        ("- 1", "expected a mapping"),
        ("", "expected a mapping"),
        ("hiden: [1]", "space.yaml.*Did you mean 'hidden'"),
        ("\xff\xfe", "not valid YAML|expected a mapping"),
    ],
    ids=["syntax", "list", "empty", "typo", "bytes"],
)
def test_bad_files_are_refused(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(JointNASError, match=message):
        SearchSpace.from_yaml(path)
    with pytest.raises(JointNASError, match="does not exist"):
        SearchSpace.from_yaml(tmp_path / "none.yaml")


BAD_CHOICES = {
    "size": ({"hidden": 100}, "unknown hidden choice '100'"),
    "bits missing": ({"weight_bits": None}, "weight_bits is None, but the space searches"),
    "bits short": ({"weight_bits": [4] * 5}, "5 weight_bits for 6 blocks"),
    "head bits": ({"head_bits": 8}, "head_bits is 8, but the space does not search"),
    "bits value": ({"act_bits": [2] * 6}, "unknown act_bits choice '2'"),
}


@pytest.mark.parametrize("name", BAD_CHOICES, ids=lambda n: n.replace(" ", "-"))
def test_choices_outside_the_space_are_refused(name: str) -> None:
    change, message = BAD_CHOICES[name]
    space = SearchSpace.named("tiny")
    choice = Choice.from_dict({**space.full().to_dict(), **change})
    with pytest.raises(JointNASError, match=message):
        space.check(choice)


def test_head_bits_outside_the_space_are_refused() -> None:
    space = SearchSpace.from_dict({**SearchSpace.named("tiny").to_dict(), "head_bits": [4, 16]})
    for bits, message in ((8, "unknown head_bits choice '8'.*Allowed: 4, 16"), (None, "None, but the space searches")):
        with pytest.raises(JointNASError, match=message):
            space.check(replace(space.full(), head_bits=bits))


def test_bad_choice_data_is_refused() -> None:
    with pytest.raises(JointNASError, match="Did you mean 'hidden'"):
        Choice.from_dict({"hiden": 1})
    with pytest.raises(JointNASError, match="missing heads"):
        Choice.from_dict({"hidden": 1})
    with pytest.raises(JointNASError, match="unknown search-space dimension 'head'"):
        SearchSpace.named("tiny").sizes("head")
