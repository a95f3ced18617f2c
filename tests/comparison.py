"""One comparison for every op: a backend against the reference in fp64, values and gradients, outputs poisoned."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jointnas_kernels.testing import assert_close, poisoned, tolerance


def compare(
    call: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    wanted: Sequence[int],
    backend: str | None,
    tol: float | None = None,
    fp32: float = 2e-5,
    reference: Callable[..., Tensor | tuple[Tensor, ...]] | None = None,
) -> None:
    """``call(*tensors, backend=backend)`` in the tensors' own dtypes against fp64 on the same rounded inputs.

    Args:
        wanted: which tensors get gradients; the incoming gradients are random, rounded to the first tensor's dtype.
        tol: relative norm error of everything; default: ``testing.tolerance`` of each result's dtype, and for fp32
            results ``fp32``. These are sums over rows (mask gradients, also of half inputs, which are read exactly) or
            outputs of approximate exp and reciprocal square root (2 ulp each), hence ten times fp32's plain tolerance.
        reference: called with fp64 tensors; default: ``call`` with backend="reference".
    """
    first = next(t for t in tensors if t is not None)
    reference = reference or (lambda *args: call(*args, backend="reference"))

    def run(function: Callable[..., Tensor | tuple[Tensor, ...]], dtype: torch.dtype | None) -> list[Tensor]:
        inputs = [None if t is None else t.detach().clone() if dtype is None else t.detach().to(dtype)
                  for t in tensors]
        for i in wanted:
            inputs[i].requires_grad_()
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(7)
        incoming = [torch.randn(o.shape, generator=generator).to(first.dtype).to(o) for o in outputs]
        pairs = [(o, g) for o, g in zip(outputs, incoming, strict=True) if o.requires_grad]
        grads = torch.autograd.grad([o for o, _ in pairs], [inputs[i] for i in wanted], [g for _, g in pairs])
        return [o.detach() for o in outputs] + list(grads)

    with poisoned():
        results = run(lambda *args: call(*args, backend=backend), None)
    expected = run(reference, torch.float64)
    values = len(results) - len(wanted)
    for i, (out, ref) in enumerate(zip(results, expected, strict=True)):
        what = f"output {i}" if i < values else f"gradient of tensor {wanted[i - values]}"
        assert_close(out, ref, tol or (fp32 if out.dtype == torch.float32 else tolerance(out.dtype)), what)
