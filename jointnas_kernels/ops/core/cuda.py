"""Calling the compiled CUDA kernels (csrc/cuda), torch tensors in and out."""

import functools

import torch
from torch import Tensor

from jointnas_kernels import _ext
from jointnas_kernels.errors import JointNASError

DTYPES = {torch.float16: 0, torch.bfloat16: 1}


def current_stream(tensor: Tensor) -> int:
    """The address of the stream that work on the tensor's device goes to."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(tensor: Tensor) -> int:
    """Streaming multiprocessors of the tensor's GPU."""
    return _multiprocessors(tensor.device)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, dense and where 16-byte loads can start: a view into another one at an odd offset is copied."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def call(name: str, *args: Tensor | int | float | None, on: Tensor) -> None:
    """``_C.NAME(args..., stream)`` on the device and current stream of ``on``; tensors become addresses, None null.

    Raises:
        JointNASError: a tensor on another device, or arguments that the kernel refuses.
    """
    device = on.device
    values: list[int | float] = []
    for a in args:
        if isinstance(a, Tensor):
            if a.device != device:
                raise JointNASError(f"{name}: tensors on {device} and {a.device}; move them to one device")
            values.append(a.data_ptr())
        else:
            values.append(0 if a is None else a)
    with torch.cuda.device_of(on):
        _ext.check(getattr(_ext.load(cuda=True), name)(*values, current_stream(on)), name)
