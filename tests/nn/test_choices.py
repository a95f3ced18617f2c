"""Architecture parameters: probabilities, draws, masks and gates."""

import pytest
import torch
from transformers import LlamaConfig

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.nn import ArchParameters
from jointnas_kernels.nn.choices import FLOOR, _Dirichlet, _ToDevice
from jointnas_kernels.space import SearchSpace
from tests.ops.naive import strided_pair_index

CONFIG = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=16)  # fmt: skip
SPACE = SearchSpace((16, 32), (2, 4), (4, 8, 16), (16, 48), (1, 2, 3), (2, 4, 8), (4, 16), group_size=4)


def arch(**change) -> ArchParameters:
    parameters = ArchParameters(SPACE, CONFIG, (2, 0, 1), **change)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in parameters.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return parameters


def test_probabilities_are_the_means_of_the_draws() -> None:
    for change in ({}, {"relaxation": "reinmax", "bit_relaxation": "reinmax"}, {"bit_relaxation": "dirichlet"}):
        parameters, g = arch(**change), torch.Generator().manual_seed(1)
        with torch.no_grad():
            draws = [parameters.draw(g) for _ in range(2000)]
            for key, expected in parameters.probs().items():
                assert expected.sum(-1).allclose(torch.ones(()))
                mean = torch.stack([d[key] for d in draws]).mean(0)
                assert (mean - expected).abs().max() < 0.05  # 4.5 standard deviations of a coin in 2000 draws


def test_dirichlet_concentration_is_elu_plus_one_with_a_floor() -> None:
    parameters = arch()
    with torch.no_grad():
        parameters.logits["hidden"].copy_(torch.tensor([-50.0, 2.0]))
    assert parameters.concentration("hidden").tolist() == pytest.approx([FLOOR, 3 + FLOOR])


def test_dirichlet_gradient_is_unbiased() -> None:
    """d/dc E[f(x)] with f = sum w x^2, whose expectation is known."""
    c = torch.tensor([0.7, 1.5, 3.0], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    total = c.sum()
    exact = torch.autograd.grad((w * c * (c + 1) / (total * (total + 1))).sum(), c)[0]
    g, n = torch.Generator().manual_seed(3), 20_000
    x = _Dirichlet.apply(c.expand(n, 3), g)
    estimate = torch.autograd.grad((w * x.square()).sum() / n, c)[0]
    assert (estimate - exact).abs().max() < 0.02 * exact.abs().max() + 0.005


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masks_of_a_choice_are_its_channels(dtype: torch.dtype) -> None:
    parameters, g = arch(), torch.Generator().manual_seed(5)
    for _ in range(20):
        choice = SPACE.sample(g)
        sample = parameters.assemble(parameters.one_hot(choice), dtype=dtype)
        m = sample.masks
        assert m.hidden.tolist() == [float(i < choice.hidden) for i in range(32)]
        assert m.intermediate.tolist() == [float(i < choice.intermediate) for i in range(48)]
        heads = torch.tensor([float(h % 2 < choice.heads // 2) for h in range(4)], dtype=dtype)
        pairs = torch.zeros(16, dtype=dtype)
        pairs[strided_pair_index(16, choice.head_dim)] = 1
        dims = (torch.arange(16) < choice.head_dim).to(dtype)
        torch.testing.assert_close(m.q, torch.outer(heads, pairs) / choice.head_dim**0.5)
        assert torch.equal(m.k, pairs.expand(2, 16))
        assert torch.equal(m.value, torch.outer(heads, dims).flatten())
        kept = {2, 0, 1} if choice.blocks == 3 else {2, 0} if choice.blocks == 2 else {2}
        assert {b for b in range(3) if sample.gates[b] == 1} == kept
        for b, one in enumerate(sample.blocks):
            assert (one.gate is None) == (b in kept)
            assert SPACE.sizes("weight_bits")[one.weight_index] == choice.weight_bits[b]
            assert SPACE.sizes("act_bits")[one.act_index] == choice.act_bits[b]
        assert not sample.requires_grad


def test_argmax_is_the_likeliest_choice() -> None:
    parameters, choice = arch(), SPACE.sample(torch.Generator().manual_seed(8))
    with torch.no_grad():
        for key, hot in parameters.one_hot(choice).items():
            parameters.logits[key].copy_(3 * hot)
    assert parameters.argmax() == choice


def test_depth_is_one_hard_draw() -> None:
    parameters, g = arch(), torch.Generator().manual_seed(2)
    for _ in range(20):
        sample = parameters.assemble(parameters.draw(g))
        depth = sample.alphas["blocks"]
        assert sorted(depth.tolist()) == [0, 0, 1]
        assert sum(sample.gates) == SPACE.blocks[int(depth.argmax())]
        assert sample.requires_grad
        assert all(b.gate is not None and b.weight_index is None for b in sample.blocks)


def test_one_copy_to_the_device_and_back() -> None:
    """Packing and its gradient, here from the host to the host."""
    g = torch.Generator().manual_seed(4)
    tensors = [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((3,), (70,), (2, 5), ())]
    assert torch.autograd.gradcheck(lambda *t: _ToDevice.apply(torch.device("cpu"), None, *t), tensors)
    for moved, t in zip(_ToDevice.apply(torch.device("cpu"), None, *tensors), tensors, strict=True):
        assert torch.equal(moved, t)
        assert moved.storage_offset() % 64 == 0


def test_parameters_stay_on_the_host() -> None:
    parameters = arch()
    parameters.to("meta", torch.bfloat16)
    assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in parameters.parameters())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"relaxation": "softmax"}, "unknown relaxation 'softmax'"),
        ({"bit_relaxation": "softmx"}, "Did you mean 'softmax'"),
        ({"tau": 0.0}, "must be positive"),
    ],
    ids=["relaxation", "bits", "tau"],
)
def test_bad_options_are_refused(change: dict, message: str) -> None:
    with pytest.raises(JointNASError, match=message):
        arch(**change)
