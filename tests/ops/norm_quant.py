"""mixed_rmsnorm with quantization against the two ops apart (equal) and against its definition in fp64 (gradients)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels import ops
from jointnas_kernels.ops.quant.spec import fake_quant_tokens
from tests.comparison import compare
from tests.ops import naive

X, WEIGHT, ALPHA, MASK, PROBS = range(5)  # positions of the tensors


def inputs(
    shape: Sequence[int], choices: int, bits: Sequence[int], masked: bool, dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor | None]:
    """Rows of many magnitudes; of three and more the first is zero and the second one-sided."""
    n, vector = shape[-1], torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(*shape, dtype=torch.float64) * torch.rand(*shape[:-1], 1, dtype=torch.float64) * 3
    if x.numel() // n > 2:
        x.view(-1, n)[0], x.view(-1, n)[1] = 0, x.view(-1, n)[1].abs()
    weight = torch.randn(n, dtype=torch.float64)
    mask = torch.rand(n, dtype=vector) + 0.1 if masked else None
    tensors = [x.to(dtype), weight.to(dtype), torch.rand(choices, dtype=vector) + 0.1, mask,
               torch.rand(len(bits), dtype=vector) + 0.1]
    return [None if t is None else t.to(device) for t in tensors]


def check(
    tensors: Sequence[Tensor | None], sizes: Sequence[int], eps: float, bits: Sequence[int], symmetric: bool,
    backend: str | None, subsets: Sequence[Sequence[int]], tol: float | None = None,
) -> None:
    """Values: those of the two ops apart, bit for bit. Gradients of each subset: autograd of the definition in fp64, in
    which the levels of that v are constants."""

    def call(x: Tensor, weight: Tensor, alpha: Tensor, mask: Tensor | None, probs: Tensor, backend: str | None
             ) -> Tensor:
        return ops.mixed_rmsnorm(x, weight, alpha, sizes, eps, mask, backend, bits, probs, symmetric)

    x, weight, alpha, mask, probs = tensors
    assert x is not None and weight is not None and alpha is not None and probs is not None  # noqa: PT018
    v = ops.mixed_rmsnorm(x, weight, alpha, sizes, eps, mask, backend)
    for p in (probs, torch.eye(len(bits), dtype=probs.dtype, device=probs.device)[-1]):
        apart = ops.act_quant_mix(v, bits, p, symmetric, backend=backend)
        assert torch.equal(call(x, weight, alpha, mask, p, backend), apart)
    values = [fake_quant_tokens(v, width, symmetric).double() for width in bits]

    def definition(x: Tensor, weight: Tensor, alpha: Tensor, mask: Tensor | None, probs: Tensor) -> Tensor:
        through = naive.mixed_rmsnorm(x, weight, alpha, sizes, eps, mask)
        through = through - through.detach()
        return torch.stack([p * (value + through) for p, value in zip(probs, values, strict=True)]).sum(0)

    for wanted in subsets:
        # A gradient of the probabilities is a sum of terms of both signs over all elements, which one precision alone
        # may have cancel by chance.
        if len(bits) == 1:
            wanted = [i for i in wanted if i != PROBS] or [X]
        compare(call, tensors, wanted, backend, tol, fp32=1e-4, reference=definition)
