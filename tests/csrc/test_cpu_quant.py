"""The compiled quantizers: levels exactly those of the references, and gradients, per instruction set."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from jointnas_kernels.ops import quant_lora_mix
from jointnas_kernels.ops.quant.activations import act_quant_mix_reference
from jointnas_kernels.ops.quant.mixture import cpu
from jointnas_kernels.ops.quant.mixture.reference import Mixture, forward, rounded_lora
from jointnas_kernels.testing import assert_close, poisoned

pytestmark = pytest.mark.usefixtures("kernels")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
BITS = [2, 4, 8]
# as registered: without the public function's limit of four precisions
act_quant_mix = torch.ops.jointnas.act_quant_mix
act_quant_mix_backward = torch.ops.jointnas.act_quant_mix_backward


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@DTYPES
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (33, 127), (20, 512)], ids=str)
def test_act_quant_mix(shape: tuple[int, int], masked: bool, symmetric: bool, dtype: torch.dtype) -> None:
    x, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    if shape[0] > 2:
        x[0], x[1], x[2] = 0, x[1].abs(), -x[2].abs()  # an empty range, and one-sided ones
    mask = torch.rand(shape[1]) if masked else None
    bits = [2, 4, 8, 16, 3]
    for one_hot in (0, 1, 2, 3, 4):
        probs = torch.nn.functional.one_hot(torch.tensor(one_hot), 5).float()
        with poisoned():
            out = act_quant_mix(x, probs, mask, bits, symmetric, "cpu")[0]
        assert torch.equal(out, act_quant_mix_reference(x, bits, probs, symmetric, mask))
    probs = torch.rand(5).softmax(0)
    with poisoned():
        out = act_quant_mix(x, probs, mask, bits, symmetric, "cpu")[0]
        grads = act_quant_mix_backward(g, x, probs, mask, None, bits, symmetric, [True] * 3, "cpu")
    assert_close(out, act_quant_mix_reference(x, bits, probs, symmetric, mask))
    expected = act_quant_mix_backward(g, x, probs, mask, None, bits, symmetric, [True] * 3, "reference")
    # the reference sums in fp32 too, in another order: 2e-5 for sums over all tokens
    for name, grad, ref in zip(("x", "probs", "mask"), grads, expected, strict=True):
        assert_close(grad, ref, 8e-3 if grad.dtype == torch.bfloat16 else 2e-5, f"gradient of {name}")


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_every_bf16_value_of_a_token(symmetric: bool) -> None:
    """Tokens of 17 binades of values between extremes with every significand: each level is the reference's."""
    words = torch.arange(0x3800, 0x4080, dtype=torch.int32)  # 2^-15 .. 4
    values = (words << 16).view(torch.float32)
    most = values[-128:].view(-1, 1)
    for ratio in (0.0, 1.0, *(torch.rand(6) * 1.2).tolist()):
        x = torch.cat([-values, values]).clamp(-ratio * most, most).to(torch.bfloat16)
        for one_hot, bits in enumerate((2, 4, 8)):
            probs = torch.eye(3)[one_hot]
            out = act_quant_mix(x, probs, None, (2, 4, 8), symmetric, "cpu")[0]
            assert torch.equal(out, act_quant_mix_reference(x, (bits,), torch.ones(1), symmetric))


@DTYPES
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_tokens_at_the_ends_of_the_range(symmetric: bool, dtype: torch.dtype) -> None:
    """Scales whose reciprocal overflows or vanishes, subnormal values, one infinite token."""
    exponents = torch.tensor([-148, -140, -132, -127, -126, -119, -101, -100, 100, 118, 126, 127])
    x = (torch.rand(12, 67).double() * 2 - 1) * (2.0 ** exponents.double()).view(-1, 1)
    x = x.to(dtype)
    x[:, 5] = 2.0**-133
    x[-1, 3] = float("inf")
    bits = [2, 4, 8, 16]
    for one_hot in range(4):
        probs = torch.eye(4)[one_hot]
        out = act_quant_mix(x, probs, None, bits, symmetric, "cpu")[0]
        expected = act_quant_mix_reference(x, [bits[one_hot]], torch.ones(1), symmetric)
        torch.testing.assert_close(out[:-1], expected[:-1], rtol=0, atol=0)
        assert not out[-1].isfinite().all()


def test_nan_stays_where_it_is() -> None:
    for dtype, where in itertools.product((torch.float32, torch.bfloat16), (0, 16, 40, 66)):
        x = torch.randn(3, 67).to(dtype)
        x[1, where] = float("nan")
        out = act_quant_mix(x, torch.tensor([0.5, 0.5]), None, [4, 8], False, "cpu")[0]
        assert out[1, where].isnan()
        assert out[[0, 2]].isfinite().all()


MIXES = [
    # rows, inputs, group, rank, clip
    (1, 128, 128, 32, False),
    (13, 384, 128, 32, True),
    (25, 35, 7, 5, True),  # several groups in a tile, no multiple of a vector
    (31, 96, 96, 8, False),
    (7, 300, 300, 33, True),  # a group larger than a tile, an odd rank
    (5, 5, 1, 1, True),
    (40, 512, 32, 16, True),
]


def mix_arguments(shape: tuple[int, int, int, int, bool], dtype: torch.dtype) -> tuple:
    o, i, g, r, clipped = shape
    w = (torch.randn(o, i) * 0.05).to(dtype)
    a, b = torch.randn(3, r, i) * 0.05, torch.randn(3, o, r) * 0.05
    clip = torch.rand(3, o, i // g) * 0.5 + 0.5 if clipped else None
    return w, a, b, clip, g


def undecided(w: Tensor, a: Tensor, b: Tensor, clip: Tensor | None, group: int) -> Tensor:
    """Where a level may differ, in fp64: w/s so close to a rounding boundary that the order in which the LoRA sum is
    added decides, |dT| <= (r + 2) 2^-24 (|W| + |B'||A|) for either side (and the same for the group's largest)."""
    a_, b_ = (t.double() for t in rounded_lora(w, a, b, 0.5))
    unsure = torch.zeros(w.shape, dtype=torch.bool)
    for p, bits in enumerate(BITS):
        t = w.double() + b_[p] @ a_[p]
        slack = 2 * (a.shape[1] + 2) * 2.0**-24 * (w.double().abs() + b_[p].abs() @ a_[p].abs())
        s = t.unflatten(-1, (-1, group)).abs().amax(-1) / ((2**bits - 1) / 2)
        s = s if clip is None else s * clip[p].double()
        relative = 2.0**-8 if w.dtype == torch.bfloat16 else 2.0**-22
        edge = s.float().to(w.dtype).double()  # as rounded; if the unrounded one is near a boundary itself: unsure
        nudged = (s * (1 + 2.0**-20)).float().to(w.dtype) != (s * (1 - 2.0**-20)).float().to(w.dtype)
        nudged = nudged if w.dtype == torch.bfloat16 else torch.zeros_like(nudged)
        v = t.unflatten(-1, (-1, group)) / edge.unsqueeze(-1)
        distance = (v - v.floor() - 0.5).abs()
        tolerance = slack.unflatten(-1, (-1, group)) / edge.unsqueeze(-1)
        if w.dtype == torch.float32:
            tolerance = tolerance + relative * v.abs() + slack.unflatten(-1, (-1, group)).amax(-1, True) * v.abs() / (
                edge.unsqueeze(-1) * (2**bits - 1) / 2)
        unsure |= ((distance <= tolerance) | nudged.unsqueeze(-1)).flatten(-2)
    return unsure


@DTYPES
@pytest.mark.parametrize("shape", MIXES, ids=lambda s: "x".join(map(str, s[:4])) + ("-clip" if s[4] else ""))
def test_quant_lora_mix(shape: tuple[int, int, int, int, bool], dtype: torch.dtype) -> None:
    w, a, b, clip, g = mix_arguments(shape, dtype)
    sure = ~undecided(w, a, b, clip, g)
    assert sure.double().mean() > 0.5
    for p, lora in itertools.product((0, 1, 2, None), (torch.float32, torch.bfloat16)):
        probs = torch.rand(3).softmax(0) if p is None else torch.eye(3)[p]
        a_, b_ = a.to(lora), b.to(lora)
        sure = ~undecided(w, a_, b_, clip, g)
        with poisoned():
            out = cpu.forward(Mixture(w, a_, b_, probs, clip, 0.5, BITS, g))
        ref = forward(Mixture(w, a_, b_, probs, clip, 0.5, BITS, g))
        # one-hot: level times scale, the same bits in fp32 up to the scale's last place, which the sum's order moves
        assert out.isfinite().all()
        assert_close(out[sure], ref[sure], 2e-6 if dtype == torch.float32 else 8e-3 if p is None else 1e-12)


def test_quant_lora_mix_without_lora_is_the_plain_quantizer() -> None:
    """Nothing to add up in another order: every level must be the reference's, absmax ties included."""
    for dtype, (o, i, g) in itertools.product((torch.float32, torch.bfloat16), ((9, 512, 128), (8, 66, 33))):
        w = torch.randn(o, i).to(dtype)
        w[0] = 0
        a, b = torch.zeros(3, 4, i), torch.zeros(3, o, 4)
        for p in range(3):
            mix = Mixture(w, a, b, torch.eye(3)[p], None, 1.0, BITS, g)
            assert torch.equal(cpu.forward(mix), forward(mix))


def test_quant_lora_mix_beyond_the_cache() -> None:
    """Outputs above 8 MiB are written past the cache."""
    w = torch.randn(1100, 4096).to(torch.bfloat16)
    a, b = torch.randn(3, 2, 4096) * 0.1, torch.randn(3, 1100, 2) * 0.1
    probs = torch.tensor([0.2, 0.3, 0.5])
    mix = Mixture(w, a, b, probs, None, 0.5, BITS, 128)
    assert_close(cpu.forward(mix), forward(mix))


@DTYPES
@pytest.mark.parametrize("ste", ["identity", "clip"])
@pytest.mark.parametrize("shape", MIXES[1:], ids=lambda s: "x".join(map(str, s[:4])))
def test_quant_lora_mix_gradients(
    shape: tuple[int, int, int, int, bool], ste: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "ROW_TILE", 16)  # several tiles, the last one smaller
    w, a, b, _, g = mix_arguments(shape, dtype)
    clip = torch.rand(3, w.shape[0], w.shape[1] // g) * 0.5 + 0.45  # clips some, and keeps ties at the absmax away
    tensors = {"lora_a": a, "lora_b": b, "probs": torch.rand(3).softmax(0), "clip": clip}
    upstream = torch.randn(w.shape).to(dtype)
    gradients = {}
    for backend in ("cpu", "reference"):
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        with poisoned():
            out = quant_lora_mix(w, scaling=0.5, bits=BITS, group_size=g, ste=ste, backend=backend, **leaves)
            used = [t for name, t in leaves.items() if name != "clip" or ste == "clip"]
            gradients[backend] = torch.autograd.grad(out, used, upstream)
    # fp32: one level moved by the order of the LoRA sum shows; bf16: products with A and B in bf16, the reference fp32
    for name, grad, ref in zip(tensors, *gradients.values(), strict=False):
        assert_close(grad, ref, 1e-3 if dtype == torch.float32 else 8e-3, f"gradient of {name}")
