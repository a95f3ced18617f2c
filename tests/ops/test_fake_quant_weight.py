"""fake_quant_weight: the formulas in plain numpy, straight-through gradients against eager autograd, edge cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from jointnas_kernels import ops
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.quant.weights import fake_quant_weight_reference
from jointnas_kernels.testing import assert_close

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def weights(rows: int, groups: int, group: int, dtype: torch.dtype) -> Tensor:
    """Rows of every kind: normal, coarse grid (ties), one-sided, constant, zero, tiny, large."""
    w = torch.randn(rows, groups * group)
    w[rows // 2 :] = (w[rows // 2 :] * 4).round() / 4
    for i, row in enumerate((0.0, 1.0, -2.5)):
        w[i % rows, :group] = row
    w[0, -group:] = w[0, -group:].abs()
    w[-1] *= 2.0**-12
    w[-1, :group] *= 2.0**14
    return w.to(dtype)


def by_the_book(w: Tensor, bits: int, group: int, symmetric: bool, clip: Tensor | None) -> Tensor:
    """One group after the other, in numpy's float32 (float64)."""
    kind = np.float64 if w.dtype == torch.float64 else np.float32
    values = w.double().numpy().astype(kind).reshape(-1, group)
    ratios = np.ones(len(values), kind) if clip is None else clip.double().numpy().astype(kind).reshape(-1)
    low, high, out = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, np.empty_like(values)
    for i, (v, ratio) in enumerate(zip(values, ratios, strict=True)):
        if symmetric:
            s = ratio * np.abs(v).max() / kind((2**bits - 1) / 2)
        else:
            s = ratio * (max(v.max(), kind(0)) - min(v.min(), kind(0))) / kind(2**bits - 1)
        s = torch.tensor(s).to(w.dtype).double().numpy().astype(kind)
        s = kind(1) if s < 2.0**-100 else s
        z = kind(0) if symmetric else np.rint(np.clip(low - ratio * min(v.min(), kind(0)) / s, low, high))
        out[i] = (np.clip(np.rint(v / s + z), low, high) - z) * s
    return torch.from_numpy(out.reshape(w.shape)).to(w.dtype)


@DTYPES
@SYMMETRIC
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("with_clip", [False, True], ids=["", "clip"])
def test_values(with_clip: bool, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    for rows, groups, group in ((1, 1, 1), (9, 3, 8), (17, 2, 37), (6, 2, 128)):
        w = weights(rows, groups, group, dtype)
        clip = torch.rand(rows, groups) * 0.9 + 0.1 if with_clip else None
        expected = by_the_book(w, bits, group, symmetric, clip)
        assert torch.equal(ops.fake_quant_weight(w, bits, group, symmetric, clip), expected)


@DTYPES
@SYMMETRIC
@pytest.mark.parametrize("ste", ["identity", "clip"])
def test_gradients_equal_eager_autograd(ste: str, symmetric: bool, dtype: torch.dtype) -> None:
    w = weights(11, 3, 16, dtype).requires_grad_()
    clip = (torch.rand(11, 3, dtype=torch.float64).to(dtype) * 0.5 + 0.4).requires_grad_()
    for bits in (2, 4, 8):
        leaves = (w, clip) if ste == "clip" else (w,)
        out = ops.fake_quant_weight(w, bits, 16, symmetric, clip, ste)
        reference = fake_quant_weight_reference(w, bits, 16, symmetric, clip, ste)
        assert torch.equal(out, reference)
        grad = torch.randn_like(out)
        got, expected = (torch.autograd.grad(y, leaves, grad) for y in (out, reference))
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype))


def test_clip_rule_by_hand() -> None:
    """Two levels above the range, one inside: s = 0.6, v = w/s; dQ/dclip = (q - [inside] v) · max|w| / 1.5 (2 bits)."""
    w = torch.tensor([[0.9, -0.55, 0.2, 0.1]], dtype=torch.float64, requires_grad=True)
    clip = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    ops.fake_quant_weight(w, 2, 4, True, clip, "clip").sum().backward()
    # s = 0.9 / 1.5 = 0.6; w/s = 1.5, -0.92, 0.33, 0.17; rint = 2 (clamped to 1), -1, 0, 0
    assert w.grad is not None
    assert clip.grad is not None
    assert w.grad.tolist() == [[0, 1, 1, 1]]
    expected = 0.6 * ((1 - 0) + (-1 + 0.55 / 0.6) + (0 - 0.2 / 0.6) + (0 - 0.1 / 0.6))
    assert clip.grad.item() == pytest.approx(expected, rel=1e-12)


def test_clip_gradient_by_finite_differences_where_it_is_smooth() -> None:
    """Clamped values move with the scale alone; so does the loss when all others sit on level 0."""
    w = torch.tensor([[1.0, 0.02, -0.03, 1.0]], dtype=torch.float64)
    clip = torch.full((1, 1), 0.6, dtype=torch.float64, requires_grad=True)

    def loss(ratio: Tensor) -> Tensor:
        return (ops.fake_quant_weight(w, 2, 4, True, ratio, "clip") * torch.tensor([1.0, 0.0, 0.0, 2.0])).sum()

    (gradient,) = torch.autograd.grad(loss(clip), clip)
    difference = (loss(clip.detach() + 1e-6) - loss(clip.detach() - 1e-6)) / 2e-6
    assert gradient.item() == pytest.approx(difference.item(), rel=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_commutes_with_masks_that_are_constant_in_a_group(bits: int) -> None:
    """Q(diag(r) W diag(c)) = diag(r) Q(W) diag(c): the mixture over precisions is computed on unmasked weights.

    Bit for bit where the products are exact. Otherwise rounding may move the extreme weight of a group by one level,
    because max|w| / s = (2^b - 1)/2 is a tie by construction; nothing else moves.
    """
    w, groups = torch.randn(12, 64), torch.arange(64) // 16
    r, c = 0.5 ** torch.randint(4, (12, 1)), (0.5 ** torch.randint(4, (4,)))[groups]
    quantized = ops.fake_quant_weight(w, bits, 16)
    assert torch.equal(ops.fake_quant_weight(r * w * c, bits, 16), r * quantized * c)

    w, quantized = w.double(), ops.fake_quant_weight(w.double(), bits, 16)
    r, c = torch.rand(12, 1).double() + 0.1, (torch.rand(4).double() + 0.1)[groups]
    moved = (ops.fake_quant_weight(r * w * c, bits, 16) - r * quantized * c).abs() > 1e-12
    extreme = w.abs().unflatten(1, (4, 16))
    extreme = (extreme == extreme.amax(-1, keepdim=True)).flatten(1)
    assert not (moved & ~extreme).any()

    within = torch.rand(64).double() + 0.1  # not constant inside a group: it does not commute
    assert not torch.allclose(ops.fake_quant_weight(w * within, bits, 16), quantized * within)


def test_requantizing_changes_nothing() -> None:
    """Levels are fixed points when the extreme value of a group keeps its level."""
    w = torch.randn(8, 64)
    w[:, ::16] = 4.0
    for bits in (4, 8):
        once = ops.fake_quant_weight(w, bits, 16, symmetric=False)
        torch.testing.assert_close(ops.fake_quant_weight(once, bits, 16, symmetric=False), once, rtol=1e-5, atol=1e-5)


def test_registration() -> None:
    w, clip = torch.randn(4, 24, requires_grad=True), torch.rand(4, 3, requires_grad=True)
    for op in (torch.ops.jointnas.fake_quant_weight, torch.ops.jointnas.fake_quant_weight_identity):
        opcheck(op.default, (w, clip, 4, 8, True, None))

    def loss(w: Tensor, clip: Tensor) -> Tensor:
        return ops.fake_quant_weight(w, 4, 8, True, clip, "clip").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(f(w, clip), (w, clip)) for f in (compiled, loss)), strict=True):
        assert torch.equal(a, b)


def test_bad_arguments() -> None:
    w = torch.randn(4, 24)
    with pytest.raises(JointNASError, match="weight bit width '16'"):
        ops.fake_quant_weight(w, 16, 8)
    with pytest.raises(JointNASError, match="group_size 7 does not divide the 24 input channels"):
        ops.fake_quant_weight(w, 4, 7)
    with pytest.raises(JointNASError, match="Did you mean 'identity'"):
        ops.fake_quant_weight(w, 4, 8, ste="identiy")
    with pytest.raises(JointNASError, match=r"shape \(4, 3\)"):
        ops.fake_quant_weight(w, 4, 8, clip=torch.rand(4, 2))
    with pytest.raises(JointNASError, match="floating-point matrix"):
        ops.fake_quant_weight(torch.ones(4, 24, dtype=torch.int8), 4, 8)
