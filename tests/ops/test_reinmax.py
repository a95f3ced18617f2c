"""ReinMax: hard one-hot samples from the right distribution, and a gradient that is exact on average for quadratics."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from jointnas_kernels import ops


def estimates(logits: Tensor, f, count: int, seed: int) -> Tensor:
    """``count`` single-sample gradient estimates of E[f(D)] with respect to logits."""
    many = logits.detach().expand(count, -1).clone().requires_grad_()
    sample = ops.reinmax(many, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad(f(sample).sum(), many)[0]


@pytest.mark.parametrize("k", [2, 3, 8])
def test_expected_gradient_is_exact_on_quadratics(k: int) -> None:
    torch.manual_seed(k)
    logits, matrix, vector = (torch.randn(*s, dtype=torch.float64) for s in ((k,), (k, k), (k,)))

    def quadratic(d: Tensor) -> Tensor:
        return ((d @ matrix) * d).sum(-1) + d @ vector

    theta = logits.clone().requires_grad_()
    values = quadratic(torch.eye(k, dtype=torch.float64))
    exact = torch.autograd.grad((theta.softmax(-1) * values).sum(), theta)[0]
    # no sampling error: the estimator's value for each outcome, weighted by the outcome's probability
    index = torch.arange(k)
    many = logits.expand(k, k).clone().requires_grad_()
    out = torch.ops.jointnas.reinmax(many, index, 1.0, None)
    per_outcome = torch.autograd.grad(quadratic(out).sum(), many)[0]
    expected = (logits.softmax(-1)[:, None] * per_outcome).sum(0)
    torch.testing.assert_close(expected, exact, rtol=1e-10, atol=1e-12)
    # and the sampled mean agrees within five standard errors
    draws = estimates(logits, quadratic, 20000, seed=1)
    error = (draws.mean(0) - exact).abs()
    assert (error <= 5 * draws.std(0) / 20000**0.5 + 1e-12).all()


def test_forward_is_a_hard_sample_with_the_right_frequencies() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 0.5])
    out = ops.reinmax(logits.expand(40000, -1), generator=torch.Generator().manual_seed(0))
    assert set(out.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(out.sum(-1), torch.ones(40000))
    p = logits.softmax(-1)
    assert ((out.mean(0) - p).abs() < 5 * (p * (1 - p) / 40000).sqrt()).all()


def test_gradient_is_the_published_algorithm() -> None:
    """Algorithm 2 of the paper, by autograd through its detached terms."""
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    tau = 1.3
    index = torch.arange(5)
    hard = torch.nn.functional.one_hot(index, 6).double()
    p0 = logits.softmax(-1)
    p1 = (hard + (logits / tau).softmax(-1)) / 2
    p1 = ((p1.log() - logits).detach() + logits).softmax(-1)
    p2 = 2 * p1 - 0.5 * p0
    surrogate = p2 - p2.detach() + hard
    grad = torch.randn(5, 6, dtype=torch.float64)
    want = torch.autograd.grad(surrogate, logits, grad)[0]
    out = torch.ops.jointnas.reinmax(logits, index, tau, None)
    assert torch.equal(out, hard)
    torch.testing.assert_close(torch.autograd.grad(out, logits, grad)[0], want)


def test_the_generator_decides() -> None:
    logits = torch.zeros(3, 4, 16)
    a, b, c = (ops.reinmax(logits, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert a.shape == logits.shape
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_opcheck_and_compile() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    opcheck(torch.ops.jointnas.reinmax, (logits, torch.tensor([0, 3, 1]), 1.0, None))
    torch._dynamo.reset()
    out = torch.compile(ops.reinmax, fullgraph=True, backend="aot_eager")(logits)
    assert torch.equal(out.sum(-1), torch.ones(3))


@pytest.mark.parametrize("tau", [0.0, -1.0])
def test_tau_must_be_positive(tau: float) -> None:
    with pytest.raises(ValueError, match="tau must be positive"):
        ops.reinmax(torch.zeros(3), tau)
