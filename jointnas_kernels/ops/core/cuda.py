"""Calling the compiled CUDA kernels (csrc/cuda), torch tensors in and out."""

import functools

import torch
from torch import Tensor

from jointnas_kernels import _ext

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


def call(name: str, *args: Tensor | int | float | None, on: Tensor) -> None:
    """``_C.NAME(args..., stream)`` on the device and current stream of ``on``; tensors become addresses, None null."""
    values = [
        a if type(a) in (int, float, bool) else a.data_ptr() if isinstance(a, Tensor) else int(a or 0) for a in args
    ]
    with torch.cuda.device_of(on):
        _ext.check(getattr(_ext.load(cuda=True), name)(*values, current_stream(on)), name)
