"""What operators do to tensors around their kernels."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.core.cuda import multiprocessors


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that math on inputs of ``dtype`` runs in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_NOTHING = contextlib.nullcontext()


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast off inside an op. Where it is off already nothing is entered: the context costs as much as a launch."""
    return _NOTHING if autocast_dtype(tensor) is None else torch.autocast(tensor.device.type, enabled=False)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast computes in on the tensor's device; None: it is off, or it is the meta device, which has none."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # asking about meta is an error
        return None
    return torch.get_autocast_dtype(kind)


def bad(op: str, message: str) -> JointNASError:
    """The error of bad input to ``op``. Raised by the caller, so that a good call builds no message."""
    return JointNASError(f"{op}: {message}")


def rows(tensor: Tensor) -> Tensor:
    """``tensor`` as [rows, last dim] with unit stride along the last dim; a view whenever the layout allows it."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def dense(tensor: Tensor | None) -> Tensor | None:
    """Contiguous; None of None."""
    return None if tensor is None else tensor.contiguous()


def dense_like(tensor: Tensor) -> Tensor:
    """Contiguous memory for a result like ``tensor``."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def processors(tensor: Tensor) -> int:
    """Streaming multiprocessors of the tensor's GPU; 2 in the interpreter, so that loops over rows are exercised."""
    return multiprocessors(tensor) if tensor.is_cuda else 2


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << (n - 1).bit_length()


def in_dtype_of(total: Tensor | None, like: Tensor | None) -> Tensor | None:
    """A gradient summed in fp32, in the dtype and shape of its input; None of None."""
    if total is None or like is None:
        return None
    if total.dtype != like.dtype:
        total = total.to(like.dtype)
    return total if total.shape == like.shape else total.view(like.shape)  # comparing first saves 3 us
