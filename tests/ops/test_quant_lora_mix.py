"""quant_lora_mix and quant_lora_linear: values and gradients of every CPU backend, modes, edge cases.

Inputs sit on a coarse grid, so that W + B'A is exact in fp32 in any order of summation and levels can be compared one
by one: off the grid, a difference in the last bit moves the extreme weight of a group, a tie by construction, by a
whole level.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from jointnas_kernels import ops
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.quant.mixture.reference import ROW_TILE, Mixture, Upstream, forward, tiles
from jointnas_kernels.testing import assert_close, poisoned

BITS = (2, 4, 8)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
STE = pytest.mark.parametrize("ste", ["identity", "clip"])
BACKEND = pytest.mark.parametrize("backend", [None, "reference"])
# (rows, inputs, rank, group): one, primes, groups that divide nothing else, more than one row tile
SHAPES = [(1, 8, 1, 8), (7, 24, 2, 8), (13, 37, 3, 37), (31, 96, 5, 48), (ROW_TILE + 3, 64, 4, 32), (17, 256, 32, 128)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(shape: tuple[int, int, int, int], dtype: torch.dtype, precisions: int = 3) -> dict[str, Tensor]:
    o, i, r, g = shape
    weight = (torch.randn(o, i) * 64).round() / 64
    weight[-1, :g] = 0
    lora_b = torch.randint(-8, 9, (precisions, o, r)) / 32
    lora_b[:, -1] = 0
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "weight": weight.to(dtype),
        "lora_a": (torch.randint(-8, 9, (precisions, r, i)) / 16).to(dtype),
        "lora_b": lora_b.to(dtype),
        "probs": torch.rand(precisions, dtype=vectors),
        "clip": (torch.rand(precisions, o, i // g, dtype=vectors) * 0.5 + 0.5),
    }


def tiny_weights(inputs: int = 64) -> dict[str, Tensor]:
    """fp16 weights of 1,000 units of 2^-24 at most, with a LoRA of zero."""
    weight = (torch.randint(-1000, 1001, (64, inputs)) * 2.0**-24).half()
    zero = {"lora_a": torch.zeros(3, 8, inputs).half(), "lora_b": torch.zeros(3, 64, 8).half()}
    return {"weight": weight, **zero}


def reference(t: dict[str, Tensor], group: int, ste: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Eager autograd in fp32 (fp64) with the scales of ``dtype``; differs from the op by the rounding of W~ only."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {k: v.detach().to(wide).requires_grad_(v.requires_grad) for k, v in t.items()}
    inputs = {k: v for k, v in leaves.items() if k != "x"}
    mixed = forward(Mixture(scaling=0.5, bits=BITS, group_size=group, ste=ste, **inputs), dtype)
    return mixed, leaves


@DTYPES
@STE
@BACKEND
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mix(shape: tuple[int, int, int, int], backend: str | None, ste: str, dtype: torch.dtype) -> None:
    t = make(shape, dtype)
    names = ["lora_a", "lora_b", "probs"] + (["clip"] if ste == "clip" else [])
    for name in names:
        t[name].requires_grad_()
    with poisoned():
        out = ops.quant_lora_mix(scaling=0.5, bits=BITS, group_size=shape[3], ste=ste, backend=backend, **t)
    expected, leaves = reference(t, shape[3], ste, dtype)
    assert_close(out, expected)
    grad = torch.randn_like(out)
    with poisoned():
        got = torch.autograd.grad(out, [t[n] for n in names], grad)
    wanted = torch.autograd.grad(expected, [leaves[n] for n in names], grad.to(expected.dtype))
    for name, a, b in zip(names, got, wanted, strict=True):
        assert a.dtype == t[name].dtype
        assert_close(a, b, TOLERANCE[dtype], name)


@DTYPES
@STE
@pytest.mark.parametrize("mode", ["weight", "arch", "full"])
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(
    shape: tuple[int, int, int, int], recompute: bool, mode: str, ste: str, dtype: torch.dtype
) -> None:
    t = make(shape, dtype)
    bias = torch.randn(shape[0]).to(dtype).requires_grad_()
    t["x"] = torch.randn(2, 5, shape[1]).to(dtype)
    names = ["x"] + (["lora_a", "lora_b"] if mode != "arch" else []) + (["probs"] if mode != "weight" else [])
    names += ["clip"] if ste == "clip" and mode != "arch" else []
    for name in ("x", "lora_a", "lora_b", "probs", "clip"):  # the mode decides, not the flags
        t[name].requires_grad_()
    options = {"scaling": 0.5, "bits": BITS, "group_size": shape[3], "ste": ste, "mode": mode}
    with poisoned():
        y = ops.quant_lora_linear(bias=bias, recompute=recompute, **options, **t)
    mixed, leaves = reference(t, shape[3], ste, dtype)
    expected = leaves["x"] @ mixed.T + bias.to(mixed.dtype)
    assert_close(y, expected, TOLERANCE[dtype])
    grad = torch.randn_like(y)
    with poisoned():
        got = torch.autograd.grad(y, [bias] + [t[n] for n in names], grad)
    wanted = torch.autograd.grad(expected, [bias] + [leaves[n] for n in names], grad.to(expected.dtype))
    for name, a, b in zip(["bias", *names], got, wanted, strict=True):
        # half types round U = x Aᵀ, dW tiles and the result: three roundings in place of one
        assert_close(a, b, TOLERANCE[dtype] * (2 if dtype in (torch.float16, torch.bfloat16) else 1), name)
    unwanted = {"lora_a", "lora_b", "probs", "clip"} - set(names)
    if unwanted:
        y = ops.quant_lora_linear(bias=bias, **options, **t)
        rest = torch.autograd.grad(y, [t[n] for n in sorted(unwanted)], grad, allow_unused=True)
        assert all(g is None for g in rest)


def test_base_weight_never_gets_a_gradient() -> None:
    t = make((7, 24, 2, 8), torch.float32)
    t["weight"].requires_grad_()
    t["probs"].requires_grad_()
    out = ops.quant_lora_mix(scaling=0.5, bits=BITS, group_size=8, **t)
    assert torch.autograd.grad(out.sum(), t["weight"], allow_unused=True) == (None,)


def test_probability_gradient_by_finite_differences() -> None:
    t = make((9, 48, 3, 16), torch.float64)
    x = torch.randn(4, 48, dtype=torch.float64)
    probs = t.pop("probs").requires_grad_()

    def linear(p: Tensor) -> Tensor:
        return ops.quant_lora_linear(x, scaling=0.5, bits=BITS, probs=p, group_size=16, mode="arch", **t)

    assert torch.autograd.gradcheck(linear, (probs,))


def test_lora_gradient_is_that_of_the_unquantized_layer() -> None:
    """Straight through, one precision with probability 1: dA and dB are those of y = x (W + s B A)ᵀ."""
    t = make((11, 32, 4, 16), torch.float64, 1)
    a, b = t["lora_a"].requires_grad_(), t["lora_b"].requires_grad_()
    x = torch.randn(6, 32, dtype=torch.float64)
    t["probs"] = torch.ones(1, dtype=torch.float64)
    quantized = ops.quant_lora_linear(x, scaling=0.5, bits=(4,), group_size=16, **t)
    plain = x @ (t["weight"] + 0.5 * b[0] @ a[0]).T
    grad = torch.randn_like(plain)
    for got, expected in zip(*(torch.autograd.grad(y, (a, b), grad) for y in (quantized, plain)), strict=True):
        torch.testing.assert_close(got, expected)


@BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_hot_is_the_merged_weight_quantized(dtype: torch.dtype, backend: str | None) -> None:
    """With B = 0 the mixture at one precision is fake_quant_weight, bit for bit: what extraction relies on."""
    t = make((33, 256, 8, 128), dtype)
    t["lora_b"].zero_()
    for p, bits in enumerate(BITS):
        t["probs"] = torch.eye(3)[p]
        out = ops.quant_lora_mix(scaling=0.5, bits=BITS, group_size=128, backend=backend, **t)
        assert torch.equal(out, ops.fake_quant_weight(t["weight"], bits, 128, clip=t["clip"][p]))


def test_no_matrix_of_the_weights_size_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """dW is taken in row tiles, and not at all in a weight step with the identity rule."""
    seen: list[int] = []
    original = Upstream.rows

    def rows(self: Upstream, tile: slice) -> Tensor:
        seen.append(tile.stop - tile.start)
        return original(self, tile)

    monkeypatch.setattr(Upstream, "rows", rows)
    t = make((2 * ROW_TILE + 5, 32, 2, 16), torch.float32)
    for name in ("lora_a", "lora_b", "probs", "clip"):
        t[name].requires_grad_()
    x = torch.randn(3, 32)
    for ste, mode, expected in (
        ("identity", "weight", []),
        ("identity", "arch", [ROW_TILE, ROW_TILE, 5]),
        ("clip", "weight", [ROW_TILE, ROW_TILE, 5]),
    ):
        seen.clear()
        options = {"scaling": 0.5, "bits": BITS, "group_size": 16, "ste": ste, "mode": mode, "backend": "reference"}
        ops.quant_lora_linear(x, **options, **t).sum().backward()
        assert seen == expected
    assert tiles(0) == []


def test_autocast_and_mixed_dtypes() -> None:
    """fp32 LoRA on a bf16 base, bf16 activations, autocast: y has the activation's dtype, gradients their own."""
    t = make((9, 64, 4, 32), torch.bfloat16)
    t["lora_a"], t["lora_b"] = t["lora_a"].float().requires_grad_(), t["lora_b"].float().requires_grad_()
    options = {"scaling": 0.5, "bits": BITS, "group_size": 32, "mode": "weight"}
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.quant_lora_linear(x, **options, **t)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert t["lora_a"].grad is not None
    assert t["lora_a"].grad.dtype == torch.float32
    assert torch.equal(y, ops.quant_lora_linear(x.bfloat16(), **options, **t))


@STE
def test_registration(ste: str) -> None:
    t = make((6, 24, 2, 8), torch.float32)
    x = torch.randn(3, 24, requires_grad=True)
    for name in ("lora_a", "lora_b", "probs", "clip"):
        t[name].requires_grad_()
    clip = t["clip"] if ste == "clip" else t["clip"].detach()
    mixture = (*(t[n] for n in ("weight", "lora_a", "lora_b", "probs")), clip, 0.5, list(BITS), 8, ste)
    opcheck(torch.ops.jointnas.quant_lora_mix.default, (*mixture, None))
    for recompute in (False, True):
        opcheck(torch.ops.jointnas.quant_lora_linear.default, (x, None, *mixture, recompute, None))

    def loss(x: Tensor, probs: Tensor, clip: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = ops.quant_lora_linear(x, t["weight"], a, b, 0.5, BITS, probs, 8, clip, ste)
        return y.square().sum()

    leaves = (x, t["probs"], t["clip"], t["lora_a"], t["lora_b"])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    pairs = (torch.autograd.grad(f(*leaves), leaves, allow_unused=True) for f in (compiled, loss))
    for a, b in zip(*pairs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a, b)


def test_bad_arguments() -> None:
    t = make((6, 24, 2, 8), torch.float32)

    def call(**changes: object) -> None:
        ops.quant_lora_mix(**({"scaling": 0.5, "bits": BITS, "group_size": 8} | t | changes))  # type: ignore[arg-type]

    for changes, message in (
        ({"bits": (2, 4)}, "one entry per bit width"),
        ({"lora_b": t["lora_b"][:, :5]}, r"lora_b \[3, 6, r\], got \(3, 2, 24\) and \(3, 5, 2\)"),
        ({"clip": t["clip"][:2]}, r"must have shape \(3, 6, 3\)"),
        ({"mode": "weights"}, "Did you mean 'weight'"),
        ({"group_size": 9}, "does not divide"),
        ({"backend": "cuda"}, "needs a CUDA tensor"),
    ):
        with pytest.raises(JointNASError, match=message):
            call(**changes)
    with pytest.raises(JointNASError, match="x has 23 channels, the weight takes 24"):
        ops.quant_lora_linear(torch.randn(2, 23), scaling=0.5, bits=BITS, group_size=8, **t)
