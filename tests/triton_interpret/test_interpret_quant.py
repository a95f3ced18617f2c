"""The quantizer kernels in the interpreter: levels bit for bit, values and gradients against eager autograd.

The interpreter has no fused multiply-add, so true division stands in for its substitutes, which
tests/ops/test_exact_division.py and tests/gpu check; everything else is the kernels' own code.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from jointnas_kernels import ops
from jointnas_kernels.ops.core import arrival
from jointnas_kernels.ops.quant.activations import act_quant_mix_reference
from jointnas_kernels.ops.quant.mixture import lora
from jointnas_kernels.ops.quant.mixture.reference import Mixture
from jointnas_kernels.ops.quant.weights import fake_quant_weight_reference
from jointnas_kernels.testing import assert_close, poisoned
from tests.ops.test_act_quant_mix import tokens
from tests.ops.test_fake_quant_weight import weights
from tests.ops.test_quant_lora_mix import BITS, TOLERANCE, make, reference, tiny_weights

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
STE = pytest.mark.parametrize("ste", ["identity", "clip"])
# (rows, inputs, rank, group): off every tile; groups that are no power of two, narrower and wider than a tile
SHAPES = [(65, 256, 32, 128), (1, 8, 1, 8), (33, 160, 5, 32), (17, 96, 4, 48), (19, 512, 3, 256)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def gradients(out: Tensor, leaves: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    with poisoned():
        return torch.autograd.grad(out, leaves, grad.to(out.dtype))


@DTYPES
@pytest.mark.parametrize("with_clip", [False, True], ids=["", "clip"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mix_levels(shape: tuple[int, int, int, int], with_clip: bool, dtype: torch.dtype) -> None:
    t = make(shape, dtype)
    t["clip"] = t["clip"] if with_clip else None  # type: ignore[assignment]
    for p in range(3):
        t["probs"] = torch.eye(3)[p]
        options = {"scaling": 0.5, "bits": BITS, "group_size": shape[3]}
        with poisoned():
            out = ops.quant_lora_mix(backend="triton", **options, **t)
        assert torch.equal(out, ops.quant_lora_mix(backend="reference", **options, **t))


def test_mix_levels_of_subnormal_scales() -> None:
    """fp16 scales below 2^-14 are coarse: the largest weights of a group lie beyond the lowest level."""
    t = tiny_weights()
    for p in range(3):
        t["probs"] = torch.eye(3)[p]
        options = {"scaling": 0.5, "bits": BITS, "group_size": 8}
        out = ops.quant_lora_mix(backend="triton", **options, **t)
        assert torch.equal(out, ops.quant_lora_mix(backend="reference", **options, **t))


@DTYPES
@STE
@pytest.mark.parametrize(
    ("mode", "shape", "count"),
    [("weight", SHAPES[2], 70), ("arch", SHAPES[2], 1), *(("full", shape, 70) for shape in SHAPES)],
    ids=str,
)
def test_linear(count: int, shape: tuple[int, int, int, int], mode: str, ste: str, dtype: torch.dtype) -> None:
    t = make(shape, dtype) | {"x": torch.randn(count, shape[1]).to(dtype)}
    names = ["x"] + (["lora_a", "lora_b"] if mode != "arch" else []) + (["probs"] if mode != "weight" else [])
    names += ["clip"] if ste == "clip" and mode != "arch" else []
    for name in names:
        t[name].requires_grad_()
    with poisoned():
        y = ops.quant_lora_linear(
            scaling=0.5, bits=BITS, group_size=shape[3], ste=ste, mode=mode, backend="triton", **t
        )
    mixed, leaves = reference(t, shape[3], ste, dtype)
    expected = leaves["x"] @ mixed.T
    assert_close(y, expected, 2 * TOLERANCE[dtype])
    grad = torch.randn_like(y)
    got = gradients(y, [t[n] for n in names], grad)
    wanted = gradients(expected, [leaves[n] for n in names], grad)
    for name, a, b in zip(names, got, wanted, strict=True):
        assert_close(a, b, 2 * TOLERANCE[dtype], name)


@DTYPES
@STE
@pytest.mark.parametrize(("outputs", "rank", "tokens"), [((33, 7, 150), 5, 70), ((9, 20), 32, 1)], ids=str)
def test_group(
    outputs: tuple[int, ...], rank: int, tokens: int, ste: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over slices of channels, of which linears have one or several."""
    monkeypatch.setattr(lora, "SLICE", 64)
    layers = [make((o, 160, rank, 32), dtype) for o in outputs]
    probs, x = layers[0]["probs"].requires_grad_(), torch.randn(tokens, 160).to(dtype).requires_grad_()
    names = ["lora_a", "lora_b"] + (["clip"] if ste == "clip" else [])
    for t in layers:
        t["probs"] = probs
        for name in names:
            t[name].requires_grad_()
    wanted = [x, probs, *(t[name] for t in layers for name in names)]
    parts = [[t[name] for t in layers] for name in ("weight", "lora_a", "lora_b")]
    clips = [t["clip"] for t in layers]
    with poisoned():
        got = ops.quant_lora_linear_group(x, *parts, 0.5, BITS, probs, 32, clips, ste, backend="triton")
    options = {"scaling": 0.5, "bits": BITS, "group_size": 32, "ste": ste, "backend": "reference"}
    expected = [ops.quant_lora_linear(x, **options, **t) for t in layers]
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, 2 * TOLERANCE[dtype])
    grads = [torch.randn_like(y) for y in got]
    with poisoned():
        of_group = torch.autograd.grad(got, wanted, grads)
    for a, b in zip(of_group, torch.autograd.grad(expected, wanted, grads), strict=True):
        assert_close(a, b, 2 * TOLERANCE[dtype])


def test_lora_gradients_repeat_and_leave_counters_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "SLICE", 64)
    t = {k: v for k, v in make((40, 160, 3, 32), torch.float32).items() if k != "clip"}
    mix = Mixture(clip=None, scaling=0.7, bits=BITS, group_size=32, **t)
    grad, x = torch.randn(70, 40), torch.randn(70, 160)
    first, second = (lora.gradients([grad, grad], x, [mix, mix]) for _ in range(2))
    assert all(torch.equal(a, b) for p, q in zip(first, second, strict=True) for a, b in zip(p, q, strict=True))
    assert not arrival.counters(x, 1).any()
    empty = lora.gradients([grad[:0]], x[:0], [mix])
    assert not any(part.any() for part in empty[0])
    assert not lora.fits([mix._replace(lora_a=torch.zeros(3, 65, 160))])


@DTYPES
@STE
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_mix_gradients(shape: tuple[int, int, int, int], ste: str, dtype: torch.dtype) -> None:
    t = make(shape, dtype)
    names = ["lora_a", "lora_b", "probs"] + (["clip"] if ste == "clip" else [])
    for name in names:
        t[name].requires_grad_()
    out = ops.quant_lora_mix(scaling=0.5, bits=BITS, group_size=shape[3], ste=ste, backend="triton", **t)
    expected, leaves = reference(t, shape[3], ste, dtype)
    grad = torch.randn_like(out)
    pairs = (gradients(out, [t[n] for n in names], grad), gradients(expected, [leaves[n] for n in names], grad))
    for name, a, b in zip(names, *pairs, strict=True):
        assert_close(a, b, TOLERANCE[dtype], name)


@DTYPES
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fake_quant_weight(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    for rows, groups, group in ((1, 1, 1), (9, 3, 8), (7, 2, 37), (40, 2, 128)):
        w = weights(rows, groups, group, dtype).requires_grad_()
        clip = (torch.rand(rows, groups) * 0.5 + 0.4).requires_grad_()
        with poisoned():
            plain = ops.fake_quant_weight(w, bits, group, symmetric, backend="triton")
            out = ops.fake_quant_weight(w, bits, group, symmetric, clip, "clip", backend="triton")
        assert torch.equal(plain, fake_quant_weight_reference(w, bits, group, symmetric))
        expected = fake_quant_weight_reference(w, bits, group, symmetric, clip, "clip")
        assert torch.equal(out, expected)
        grad = torch.randn_like(out)
        for a, b in zip(*(gradients(y, (w, clip), grad) for y in (out, expected)), strict=True):
            assert_close(a, b, 1e-5 if a.dtype == torch.float32 else None)


@DTYPES
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_act_quant_mix(symmetric: bool, dtype: torch.dtype) -> None:
    bits = (2, 4, 8, 16)
    for x in (tokens(dtype), *(torch.randn(shape).to(dtype) for shape in ((3, 1), (5, 1100), (3, 2600)))):
        mask = torch.rand(x.shape[-1])
        for q in range(4):
            with poisoned():
                out = ops.act_quant_mix(x, bits, torch.eye(4)[q], symmetric, mask, backend="triton")
            assert torch.equal(out, act_quant_mix_reference(x, bits, torch.eye(4)[q], symmetric, mask))
        for with_mask in (False, True):
            leaves = [x.clone().requires_grad_(), torch.rand(4).requires_grad_()]
            leaves += [mask.clone().requires_grad_()] if with_mask else []
            used = leaves[2] if with_mask else None
            out = ops.act_quant_mix(leaves[0], bits, leaves[1], symmetric, used, backend="triton")
            expected = act_quant_mix_reference(leaves[0], bits, leaves[1], symmetric, used)
            assert_close(out, expected)
            grad = torch.randn_like(out)
            for a, b in zip(*(gradients(y, leaves, grad) for y in (out, expected)), strict=True):
                assert_close(a, b, 1e-5 if dtype == torch.float32 else 2e-3)


def test_act_quant_mix_of_strided_rows() -> None:
    x, probs = torch.randn(4, 9, 40)[:, :, 5:30], torch.rand(4)
    out = ops.act_quant_mix(x, (2, 4, 8, 16), probs, backend="triton")
    assert torch.equal(out, ops.act_quant_mix(x.contiguous(), (2, 4, 8, 16), probs, backend="triton"))
