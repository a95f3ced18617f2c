"""Runs the compiled CPU kernels with a chosen instruction set and thread count, through the same ops."""

from __future__ import annotations

import pytest

from jointnas_kernels._ext import load
from jointnas_kernels.ops.core import cpu, cpu_calls

LEVELS = {"scalar": 1, "avx2": 2, "avx512": 4, "avx512ext": 5}
LOWBIT_LEVELS = LEVELS | {"avxvnni": 3, "amx": 6}  # what only the low-bit products have variants for
_EXTENSION = ("avx512f", "avx512_bf16", "avx512_vnni", "avx512_vpopcntdq")
_NEEDS = ((), (), ("avx2",), ("avx_vnni",), ("avx512f",), _EXTENSION, (*_EXTENSION, "amx"))


def supported(isa: int) -> bool:
    features = load().cpu_features()
    return all(features[name] for name in _NEEDS[isa])


def force(monkeypatch: pytest.MonkeyPatch, isa: int, threads: int) -> None:
    """All kernels called from now on use this instruction set and thread count."""
    if not supported(isa):
        pytest.skip(f"this processor lacks {cpu.ISAS[isa]}")
    real = cpu.call
    for module in (cpu, cpu_calls):
        monkeypatch.setattr(module, "call", lambda name, *args: real(name, *args, threads=threads, isa=isa))


def _forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each instruction set in turn, with 1, 2 or 3 threads."""
    isa = request.param[1]
    force(monkeypatch, isa, (isa - 1) % 3 + 1)
    return isa


kernels = pytest.fixture(_forced, params=LEVELS.items(), ids=lambda item: item[0])
lowbit_kernels = pytest.fixture(_forced, params=LOWBIT_LEVELS.items(), ids=lambda item: item[0])
