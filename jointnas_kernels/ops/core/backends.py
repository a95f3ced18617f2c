"""Which implementation of an op runs: decided inside the op, from the tensor's device and dtype or by the caller."""

from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels import _ext
from jointnas_kernels.errors import JointNASError, unknown


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def why_not(backend: str, tensor: Tensor) -> str | None:
    """Why ``backend`` cannot run on ``tensor``; None if it can."""
    if backend == "reference":
        return None
    if tensor.dtype == torch.float64:
        return "it computes in float32 and the input is float64"
    if backend == "triton":
        if tensor.is_cuda or interpreting():
            return None
        return f"Triton needs a CUDA tensor and this one is on {tensor.device.type!r}"
    if backend == "cuda":
        if not tensor.is_cuda:
            return f"it needs a CUDA tensor and this one is on {tensor.device.type!r}"
        if not (_ext.available() and _ext.load().has_cuda):
            return "jointnas_kernels._C was built without CUDA or is not built"
        return None
    if tensor.device.type != "cpu":
        return f"it needs a CPU tensor and this one is on {tensor.device.type!r}"
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        return f"it has float32 and bfloat16 kernels and the input is {tensor.dtype}"
    return None if _ext.available() else "jointnas_kernels._C is not built (run `make setup`)"


def resolve(
    op: str, backend: str | None, tensor: Tensor, available: Sequence[str] = ("triton", "cpu", "reference")
) -> str:
    """The backend that was asked for, if ``op`` has it and it can run on ``tensor``; of None or "auto" the first of
    ``available`` that can. The Triton interpreter is never chosen by itself: ask for "triton"."""
    if backend is None or backend == "auto":
        for name in available:
            if (name != "triton" or tensor.is_cuda) and why_not(name, tensor) is None:
                return name
        raise JointNASError(f"{op}: none of its backends ({', '.join(available)}) runs on a {tensor.dtype} "
                            f"tensor on {tensor.device}")
    if backend not in available:
        raise unknown("backend", backend, available, where=op)
    reason = why_not(backend, tensor)
    if reason is not None:
        raise JointNASError(f"{op}: backend {backend!r} cannot run: {reason}")
    return backend
