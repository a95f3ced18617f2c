"""Access to the compiled module ``jointnas_kernels._C`` (csrc/), loaded on first use."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from jointnas_kernels.errors import JointNASError


@functools.cache
def available() -> bool:
    """Whether the compiled module is there and loads on this machine."""
    try:
        importlib.import_module("jointnas_kernels._C")
    except ImportError:
        return False
    return True


@functools.cache
def load(cuda: bool = False) -> ModuleType:
    """The compiled module; with ``cuda=True`` only if its CUDA part was built."""
    try:
        module = importlib.import_module("jointnas_kernels._C")
    except ImportError as error:
        raise JointNASError(
            f"the compiled extension jointnas_kernels._C cannot be loaded ({error}); "
            "build it with `make setup` or `python setup.py build_ext --inplace`"
        ) from error
    if cuda and not module.has_cuda:
        raise JointNASError(
            "jointnas_kernels._C was built without CUDA because nvcc was not found; "
            "install the CUDA toolkit (nvcc on PATH or CUDA_HOME set) and rebuild with `make setup`"
        )
    return module


def lowbit_kernels() -> str:
    """A hash of the CUDA low-bit kernels that were compiled."""
    return f"{load(cuda=True).lowbit_kernels():016x}"


def check(code: int, what: str) -> None:
    """Raise unless a function of the module returned 0, but a key of ``_C.ERRORS`` (negative) or a cudaError_t."""
    if code:
        module = load()
        reason = module.ERRORS.get(code) or f"CUDA error {code} ({module.cuda_error_name(code)})"
        raise JointNASError(f"{what}: {reason}")
