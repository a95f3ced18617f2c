"""Calling the compiled CUDA kernels (csrc/cuda), torch tensors in and out."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence

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


def _address(name: str, value: Tensor | int | float | None, device: torch.device) -> int | float:
    """Of a tensor on this device; None is null, numbers are themselves."""
    if isinstance(value, Tensor):
        if value.device != device:
            raise JointNASError(f"{name}: tensors on {device} and {value.device}; move them to one device")
        return value.data_ptr()
    return 0 if value is None else value


def addresses(name: str, device: torch.device, values: Sequence[Tensor | int | None]) -> array[int]:
    """What `call` would pass, in memory of the host whose address a kernel's launcher takes; keep it until then.

    Raises:
        JointNASError: a tensor on another device.
    """
    return array("q", [int(_address(name, value, device)) for value in values])


def call(name: str, *args: Tensor | int | float | None, on: Tensor) -> None:
    """``_C.NAME(args..., stream)`` on the device and current stream of ``on``; tensors become addresses, None null.

    Raises:
        JointNASError: a tensor on another device, or arguments that the kernel refuses.
    """
    values = [_address(name, a, on.device) for a in args]
    with torch.cuda.device_of(on):
        _ext.check(getattr(_ext.load(cuda=True), name)(*values, current_stream(on)), name)
