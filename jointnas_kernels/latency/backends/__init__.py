"""The backend registry. `register` adds one (also from outside this package); names are unique."""

from __future__ import annotations

import torch

from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.latency.backends.base import Backend, Target, ThirdParty, failure, random_input, random_weight
from jointnas_kernels.latency.backends.gemlite import Gemlite
from jointnas_kernels.latency.backends.humming import Humming
from jointnas_kernels.latency.backends.marlin import Marlin
from jointnas_kernels.latency.backends.ours import Ours
from jointnas_kernels.latency.backends.step import Step
from jointnas_kernels.latency.backends.torch_dense import TorchDense
from jointnas_kernels.latency.backends.torch_lowbit import TorchFp8, TorchInt4, TorchInt8
from jointnas_kernels.latency.spec import DENSE, OpSpec, Workload

# best first: a backend ten times slower than one before it is not timed thoroughly
_BUILTIN: tuple[Backend, ...] = (
    TorchDense(), Step(), Ours("cpu", "cpu"), Ours("cuda", "cuda"), Ours("triton", "cuda"), Humming(), Marlin("vllm"),
    Marlin("gptqmodel"), Gemlite(), TorchInt8(), TorchInt4(), TorchFp8(),
)  # fmt: skip
_REGISTRY = {backend.name: backend for backend in _BUILTIN}


def register(backend: Backend) -> None:
    """Makes a backend known to `profile`, `deploy` and `doctor`.

    Raises:
        JointNASError: one of that name is there already.
    """
    if backend.name in _REGISTRY:
        raise JointNASError(f"a latency backend named {backend.name!r} is already registered")
    _REGISTRY[backend.name] = backend


def unregister(name: str) -> None:
    """Forgets a backend.

    Raises:
        JointNASError: there is none of that name.
    """
    del _REGISTRY[get(name).name]


def names() -> list[str]:
    """Of all backends, best first."""
    return list(_REGISTRY)


def get(name: str) -> Backend:
    """The backend of a name."""
    if name not in _REGISTRY:
        raise unknown("latency backend", name, _REGISTRY)
    return _REGISTRY[name]


def survey(device: torch.device, dtype: str = "float32") -> dict[str, dict[str, str]]:
    """For `doctor`: backend -> {"W4A16": "works" or why not} on one small linear per bit combination.

    Raises:
        JointNASError: an unknown dtype.
    """
    prefill, decode = (Target(device, Workload(mode, 1, 1, dtype), 1) for mode in ("prefill", "decode"))
    generator = torch.Generator().manual_seed(0)
    found: dict[str, dict[str, str]] = {}
    for name, backend in _REGISTRY.items():
        found[name] = {}
        rows, target = (1, decode) if isinstance(backend, Step) else (32, prefill)
        for w in (2, 4, 8, DENSE):
            for a in (2, 4, 8, 16) if w < DENSE else (DENSE,):
                spec = OpSpec("linear", rows, 256, 256, w, a, 128 if w < DENSE else 0)
                reason = backend.unsupported(spec, target)
                if reason is None:
                    weight = random_weight(spec, target, generator)
                    reason = failure(backend, spec, target, random_input(spec, target, generator), weight)
                found[name][f"W{w}A{a}"] = reason or "works"
    return found


__all__ = [
    "Backend", "Gemlite", "Humming", "Marlin", "Target", "ThirdParty", "get", "names", "register",
    "survey", "unregister",
]  # fmt: skip
