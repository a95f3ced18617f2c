"""How two results are compared everywhere in the project: tolerances with their reasons, poisoned memory.

A fast path is compared with its reference computed in fp64 on the same (already rounded) inputs, by the relative norm
‖out − ref‖ / ‖ref‖. Element-wise tolerances would have to be loose enough for cancellation in a few elements and would
then miss real errors in all the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Unit round-off of the storage type, times a small factor for the handful of roundings between input and output of
# one fused op (each output element is rounded once to the storage type; the internal math is fp32 or better).
_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,  # 2^-24 = 6e-8 per operation; sums of up to 16k terms add a random walk
    torch.float16: 1e-3,  # 2^-11 = 4.9e-4, rounded once
    torch.bfloat16: 8e-3,  # 2^-8  = 3.9e-3, rounded once
}


def tolerance(dtype: torch.dtype) -> float:
    """Largest accepted relative norm error of one fused op whose output is stored as ``dtype``."""
    return _TOLERANCE[dtype]


def relative_error(out: Tensor, ref: Tensor) -> float:
    """‖out − ref‖ / ‖ref‖ in fp64 of out, ref [...]; ‖out‖ where ref is exactly zero; infinite for any NaN."""
    out64, ref64 = out.detach().double().cpu(), ref.detach().double().cpu()
    if out64.shape != ref64.shape:
        raise AssertionError(f"shape {tuple(out64.shape)} where the reference has {tuple(ref64.shape)}")
    if out64.isnan().any() or ref64.isnan().any():
        return float("inf")
    norm = ref64.norm().item()
    return ((out64 - ref64).norm() / (norm if norm > 0 else 1.0)).item()


def assert_close(out: Tensor, ref: Tensor, tol: float | None = None, what: str = "result") -> float:
    """Assert and return the relative error of out [...] from ref [...]; ``tol`` defaults to the one of out's dtype."""
    limit = tolerance(out.dtype) if tol is None else tol
    error = relative_error(out, ref)
    assert error <= limit, f"{what}: relative error {error:.3g} > {limit:.3g} (shape {tuple(out.shape)}, {out.dtype})"
    return error


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what ``torch.empty`` hands out with NaN (integers: the largest value), so that an unwritten output shows."""
    names = ("empty", "empty_like", "empty_strided")
    original = {name: getattr(torch, name) for name in names}
    method = Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        if tensor.device.type == "meta":
            return tensor
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).max)

    def wrap(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: poison(function(*args, **kwargs))

    try:
        for name, function in original.items():
            setattr(torch, name, wrap(function))
        Tensor.new_empty = wrap(method)  # type: ignore[method-assign]
        yield
    finally:
        for name, function in original.items():
            setattr(torch, name, function)
        Tensor.new_empty = method  # type: ignore[method-assign]
