"""quant_lora_linear_group: each linear is what it is alone, in values and gradients, on every CPU backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from jointnas_kernels import ops
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.quant.mixture.linear import beside
from jointnas_kernels.testing import assert_close, poisoned
from tests.ops.test_quant_lora_mix import BITS, TOLERANCE, make

OUTPUTS = (33, 5, 48)
GROUP = 16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def members(outputs: tuple[int, ...], dtype: torch.dtype, inputs: int = 64, rank: int = 4) -> list[dict[str, Tensor]]:
    """Each linear's tensors, as a leaf each; probs are those of the first."""
    found = [make((o, inputs, rank, GROUP), dtype) for o in outputs]
    for t in found:
        t["probs"] = found[0]["probs"]
        for name in ("lora_a", "lora_b", "probs", "clip"):
            t[name].requires_grad_()
    return found


def leaves(layers: list[dict[str, Tensor]], names: tuple[str, ...]) -> list[Tensor]:
    return [layers[0]["probs"], *(t[name] for t in layers for name in names)]


def group(x: Tensor, layers: list[dict[str, Tensor]], biases: list[Tensor], **options: object) -> tuple[Tensor, ...]:
    parts = ([t[name] for t in layers] for name in ("weight", "lora_a", "lora_b"))
    clips = [t["clip"] for t in layers]
    return ops.quant_lora_linear_group(
        x, *parts, 0.5, BITS, layers[0]["probs"], GROUP, clips, biases=biases, **options
    )  # fmt: skip


def alone(x: Tensor, layers: list[dict[str, Tensor]], biases: list[Tensor], **options: object) -> list[Tensor]:
    return [
        ops.quant_lora_linear(x, scaling=0.5, bits=BITS, group_size=GROUP, bias=bias, **t, **options)
        for t, bias in zip(layers, biases or [None] * len(layers), strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ste", ["identity", "clip"])
@pytest.mark.parametrize("mode", ["weight", "arch", "full"])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("outputs", [OUTPUTS, OUTPUTS[:2], OUTPUTS[:1]], ids=["three", "two", "one"])
def test_equals_each_alone(
    outputs: tuple[int, ...], backend: str | None, mode: str, ste: str, dtype: torch.dtype
) -> None:
    layers, x = members(outputs, dtype), torch.randn(2, 5, 64).to(dtype).requires_grad_()
    biases = [torch.randn(o).to(dtype).requires_grad_() for o in outputs] if len(outputs) == 3 else []
    wanted = [x, *leaves(layers, ("lora_a", "lora_b", "clip")), *biases]
    with poisoned():
        got = group(x, layers, biases, ste=ste, mode=mode, backend=backend)
    expected = alone(x, layers, biases, ste=ste, mode=mode, backend=backend)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    grads = [torch.randn_like(y) for y in got]
    with poisoned():
        of_group = torch.autograd.grad(got, wanted, grads, allow_unused=True)
    for a, b in zip(of_group, torch.autograd.grad(expected, wanted, grads, allow_unused=True), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert_close(a, b, TOLERANCE[dtype])  # dx and dprobs are added up in another order


def test_an_output_without_gradient() -> None:
    layers, x = members(OUTPUTS, torch.float32), torch.randn(3, 64, requires_grad=True)
    wanted = [x, *leaves(layers, ("lora_a",))]
    losses = [f(x, layers, [])[1].sum() for f in (group, alone)]
    pairs = [torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True) for loss in losses]
    for a, b in zip(*pairs, strict=True):
        assert_close(a, b, TOLERANCE[torch.float32])


@pytest.mark.parametrize("outputs", [OUTPUTS, OUTPUTS[:1]], ids=["three", "one"])
def test_a_mixture_that_is_there(outputs: tuple[int, ...]) -> None:
    """Made ahead, W~ of all is multiplied as it is, with the same gradients."""
    layers, x = members(outputs, torch.float32), torch.randn(3, 64, requires_grad=True)
    wanted = [x, *leaves(layers, ("lora_a", "lora_b"))]
    mixed = torch.cat([
        ops.quant_lora_mix(scaling=0.5, bits=BITS, group_size=GROUP, **t).detach() for t in layers
    ])  # fmt: skip
    found = []
    for ahead in (mixed, None):
        ys = group(x, layers, [], mixed=ahead)
        found.append([*ys, *torch.autograd.grad(sum((y.square().sum() for y in ys), torch.zeros(())), wanted)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with pytest.raises(JointNASError, match="mixed is"):
        group(x, layers, [], mixed=mixed[1:])


def test_gradients_beside_each_other_are_one() -> None:
    both, apart = torch.randn(7, 24), torch.randn(7, 8)
    first, second, third = both.split((8, 11, 5), dim=1)
    joined = beside([first, second, third])
    assert len(joined) == 1
    assert torch.equal(joined[0], both)
    assert joined[0].data_ptr() == both.data_ptr()
    for grads in ([first, third], [second, first, third], [first, apart], [first, second.clone()]):
        kept = beside(grads)
        assert len(kept) == len(grads)
        assert all(torch.equal(a, b) for a, b in zip(kept, grads, strict=True))
    assert len(beside([first, second, apart])) == 2


def test_registration() -> None:
    layers, x = members(OUTPUTS[:2], torch.float32), torch.randn(3, 64, requires_grad=True)
    parts = [t[name] for t in layers for name in ("weight", "lora_a", "lora_b", "clip")]
    values = (0.5, list(BITS), GROUP, "clip", None)
    opcheck(
        torch.ops.jointnas.quant_lora_linear_group.default,
        (x, layers[0]["probs"], *parts, *[None] * 8, *values),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_bad_arguments() -> None:
    layers, x = members(OUTPUTS, torch.float32), torch.randn(3, 64)
    with pytest.raises(JointNASError, match="one to three linears"):
        group(x, [*layers, *layers], [])
    with pytest.raises(JointNASError, match=r"one to three linears.* 2 biases"):
        group(x, layers, [torch.zeros(33), torch.zeros(5)])
    with pytest.raises(JointNASError, match="x has 63 channels"):
        group(x[:, 1:], layers, [])
    other = members(OUTPUTS[:1], torch.float32, rank=3)
    with pytest.raises(JointNASError, match=r"lora_as\[0\] is \(3, 4, 64\)"):
        group(x, [*layers[:1], *other], [])
