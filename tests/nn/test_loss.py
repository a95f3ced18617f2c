"""Distillation, a few tokens at a time, against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jointnas_kernels.nn import loss
from jointnas_kernels.nn.loss import IGNORE, distillation


def definition(z: Tensor, t: Tensor | None, labels: Tensor, kd: float, temperature: float) -> tuple[Tensor, ...]:
    learned = labels != IGNORE
    z, labels, count = z[learned].double(), labels[learned], max(1, int(learned.sum()))
    ce = F.cross_entropy(z, labels, reduction="sum") / count
    if t is None:
        return ce, ce, torch.zeros(())
    q, p = ((x / temperature).softmax(-1) for x in (t[learned].double(), z))
    kl = (q * (q.log() - p.log())).sum() / count * temperature**2
    return kd * kl + (1 - kd) * ce, ce, kl


def inputs(tokens: int, vocabulary: int, dtype: torch.dtype, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(tokens * vocabulary)
    z, t = (3 * torch.randn(tokens, vocabulary, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    labels = torch.randint(vocabulary, (tokens,), generator=g)
    labels[torch.rand(tokens, generator=g) < ignored] = IGNORE
    return z.requires_grad_(), t, labels


@pytest.mark.parametrize(("kd", "temperature"), [(0.7, 2.0), (1.0, 1.0), (0.0, 1.0), (0.5, 0.3), (0.9, None)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "vocabulary", "part"), [(1, 2, 1), (37, 61, 200), (16, 9, 1 << 20), (5, 300, 7)])
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, tokens: int, vocabulary: int, part: int, dtype: torch.dtype, kd: float,
    temperature: float | None,
) -> None:  # fmt: skip
    """In parts of many tokens and of one; None: no teacher."""
    monkeypatch.setitem(loss.PARTS, "cpu", part)
    z, t, labels = inputs(tokens, vocabulary, dtype)
    target = None if temperature is None else t
    found = distillation(z, target, labels, kd, temperature or 1.0)
    wanted = definition(z, target, labels, kd, temperature or 1.0)
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    for mine, right in zip(found, wanted, strict=True):
        assert mine.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(mine.double(), right.double(), rtol=close, atol=close)
    assert [x.requires_grad for x in found] == [True, False, False]
    (own,) = torch.autograd.grad(3 * found[0], z)
    (right,) = torch.autograd.grad(3 * wanted[0], z)
    assert own.dtype == dtype
    rounded = 3 * 2**-8 if dtype == torch.bfloat16 else close  # twice: here, and by the factor
    torch.testing.assert_close(own.double(), right.double(), rtol=rounded, atol=close)
    assert not own[labels == IGNORE].any()


def test_without_a_gradient_or_a_label() -> None:
    z, t, labels = inputs(7, 11, torch.float32)
    trained = distillation(z, t, labels, 0.5)
    with torch.no_grad():
        plain = distillation(z, t, labels, 0.5)
    assert not plain[0].requires_grad
    assert all(torch.equal(a.detach(), b) for a, b in zip(trained, plain, strict=True))
    value, ce, kl = distillation(z, t, torch.full_like(labels, IGNORE), 0.5)
    assert value.item() == ce.item() == kl.item() == 0
    assert not torch.autograd.grad(value, z)[0].any()


def test_not_a_number_stays_one() -> None:
    for i in range(2):
        z, t, labels = inputs(5, 8, torch.float32, ignored=0)
        (z.data if i == 0 else t)[2, 3] = float("nan")
        value, _, _ = distillation(z, t, labels, 0.5)
        assert value.isnan()
        assert torch.autograd.grad(value, z)[0].isnan().any(1).tolist() == [False, False, True, False, False]


def test_the_teacher_and_the_logits_are_not_changed() -> None:
    z, t, labels = inputs(9, 8, torch.float32)
    before = z.detach().clone(), t.clone()
    distillation(z, t, labels, 0.5, 2.0)[0].backward()
    assert torch.equal(before[0], z.detach())
    assert torch.equal(before[1], t)
