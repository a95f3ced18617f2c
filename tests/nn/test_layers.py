"""Supernet linears and the fused loss."""

import pytest
import torch
from torch import nn

from jointnas_kernels import ops
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.nn import SupernetLinear, linear_cross_entropy
from jointnas_kernels.nn import loss as loss_module


def layer(**change) -> SupernetLinear:
    torch.manual_seed(0)
    linear = SupernetLinear(torch.randn(24, 32), torch.randn(24), **{"rank": 4, "group_size": 8, **change})
    nn.init.normal_(linear.lora_b)
    return linear


def test_merging_is_the_forward_pass() -> None:
    linear, x = layer(), torch.randn(5, 32)
    torch.testing.assert_close(linear(x), nn.functional.linear(x, linear.merged(), linear.bias), rtol=1e-5, atol=1e-4)
    linear = layer(bits=(2, 4))
    linear.set_clip(torch.rand(2, 24, 4) * 0.5 + 0.5)
    for index in range(2):
        weight = linear.merged(index)
        assert torch.equal(linear(x, index=index), nn.functional.linear(x, weight, linear.bias))
        probs = torch.eye(2)[index]
        torch.testing.assert_close(linear(x, probs=probs), nn.functional.linear(x, weight, linear.bias))
        levels = weight.view(24, 4, 8)
        assert max(len(group.unique()) for row in levels for group in row) <= 2 ** (2 * index + 2)


def test_slicing_keeps_the_channels() -> None:
    rows, columns = torch.tensor([3, 0, 17]), torch.cat([torch.arange(8, 16), torch.arange(24, 32)])
    x = torch.randn(5, 16)
    for linear, index in ((layer(), None), (layer(bits=(2, 4)), 1)):
        if index is not None:
            linear.set_clip(torch.rand(2, 24, 4) * 0.5 + 0.5)
        small = linear.sliced(rows, columns)
        expected = nn.functional.linear(x, linear.merged(index)[rows][:, columns], linear.bias[rows])
        torch.testing.assert_close(small(x, index=index), expected, rtol=1e-4, atol=1e-4)
        assert small.lora_a.shape[-1] == 16


def test_only_lora_trains_and_arch_mode_leaves_it() -> None:
    linear, x = layer(), torch.randn(5, 32, requires_grad=True)
    linear(x, "arch").sum().backward()
    assert linear.lora_a.grad is None
    assert x.grad is not None
    linear(x, "weight").sum().backward()
    assert linear.lora_a.grad is not None
    assert linear.weight.grad is None


@pytest.mark.parametrize("ste", ["identity", "clip"])
def test_a_shared_pair_is_the_same_pair_for_every_precision(ste: str) -> None:
    """Values and gradients of the reference on copies of it, whose gradients add up; and what becomes of the layer."""
    linear, x, probs = layer(bits=(2, 4, 8), lora_pairs="shared", ste=ste), torch.randn(5, 32), torch.rand(3)
    clip = torch.rand(3, 24, 4) * 0.5 + 0.5
    linear.set_clip(clip)
    assert (linear.lora_a.shape, linear.lora_b.shape) == ((1, 4, 32), (1, 24, 4))
    a, b = (p.detach().repeat(3, 1, 1).requires_grad_() for p in (linear.lora_a, linear.lora_b))
    weight = ops.quant_lora_mix(
        linear.weight, a, b, linear.scaling, (2, 4, 8), probs, 8, clip=clip, ste=ste, backend="reference"
    )
    wanted = nn.functional.linear(x, weight, linear.bias)
    own = linear(x, probs=probs)
    torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-4)
    toward = torch.randn_like(own)
    for out in (own, wanted):
        (out * toward).sum().backward()
    for shared, copies in ((linear.lora_a, a), (linear.lora_b, b)):
        torch.testing.assert_close(shared.grad, copies.grad.sum(0, keepdim=True), rtol=1e-4, atol=1e-3)
    linear(x, "arch", probs.requires_grad_()).sum().backward()
    assert probs.grad is not None
    rows, columns = torch.tensor([3, 0, 17]), torch.arange(8, 24)
    for index, bits in enumerate((2, 4, 8)):
        merged = linear.merged(index)
        assert torch.equal(linear(x, index=index), nn.functional.linear(x, merged, linear.bias))
        small = linear.sliced(rows, columns)
        assert torch.equal(small.merged(index), merged[rows][:, columns])
        small.keep(bits)
        assert torch.equal(small.merged(0), merged[rows][:, columns])


def test_bad_layers_are_refused() -> None:
    with pytest.raises(JointNASError, match="rank is 0"):
        layer(rank=0)
    with pytest.raises(JointNASError, match="unknown straight-through estimator 'lsq'"):
        layer(ste="lsq")
    with pytest.raises(JointNASError, match="unknown LoRA pairs 'share'"):
        layer(bits=(2, 4), lora_pairs="share")
    with pytest.raises(JointNASError, match=r"needs \(2, 24, 4\)"):
        layer(bits=(2, 4)).set_clip(torch.ones(2, 24, 3))
    with pytest.raises(JointNASError, match="learn_clip"):
        layer(bits=(2, 4)).learn_clip()
    with pytest.raises(JointNASError, match="needs their probabilities"):
        layer(bits=(2, 4))(torch.ones(1, 32))
    with pytest.raises(JointNASError, match="index of one precision"):
        layer(bits=(2, 4)).merged()


@pytest.mark.parametrize("chunk", [1, 3 * 17, 1 << 26], ids=["one-row", "three-rows", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fused_loss_is_cross_entropy(monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(11, 13, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(17, 13, generator=g, dtype=torch.float64).to(dtype)
    labels = torch.randint(17, (11,), generator=g)
    labels[[0, 4]] = -100
    wide = x.detach().double().requires_grad_()
    expected = nn.functional.cross_entropy(wide @ weight.double().t(), labels)
    (2 * expected).backward()
    own = linear_cross_entropy(x, weight, labels)
    (2 * own).backward()
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    assert own.item() == pytest.approx(expected.item(), rel=limit)
    assert (x.grad.double() - wide.grad).norm() <= limit * wide.grad.norm()
    assert own.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
