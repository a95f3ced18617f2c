"""The CUDA kernels' own code on the CPU: csrc/cuda compiled by g++ with csrc/include/emulate.h in place of PTX.

``emulated`` is a stand-in for the compiled module ``jointnas_kernels._C``; ``on_cpu`` makes the launch code of
jointnas_kernels/ops use it, so that everything between the public function and the last instruction is executed.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jointnas_kernels.ops.core import backends, cuda
from jointnas_kernels.ops.quant.mixture import cuda as mixture_cuda

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    *("lowbit_stream.cu", "lowbit_tile.cu", "lowbit_wgmma.cu", "lowbit_bitplane.cu", "lowbit_int8.cu"),
    *("lowbit_dequant.cu", "act_quant_pack.cu"),
    "quant_lora_mix.cu",
]
POINTER, INT = ctypes.c_void_p, ctypes.c_int


def structure(pointers: str, integers: str, floats: str = "") -> type[ctypes.Structure]:
    fields = [(name, POINTER) for name in pointers.split()] + [(name, INT) for name in integers.split()]
    fields += [(name, ctypes.c_float) for name in floats.split()]
    return type("Args", (ctypes.Structure,), {"_fields_": fields})


LOWBIT = structure(
    "weight scale x act_scale act_zero row_sum y partial locks",
    "tokens rows inputs w_bits dtype token_tiles warp_rows splits early a_bits cluster",
)

MIX = structure(
    "weight lora_a lora_b grad probs clip out partial",
    "rows begin end inputs rank precisions group_size bits dtype columns splits",
    "scaling",
)


def with_struct(function: Any, kind: type[ctypes.Structure]) -> Callable[..., int]:
    def call(*values: int) -> int:
        return function(ctypes.byref(kind(*values[:-1])), POINTER(values[-1]))

    return call


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    library = tmp_path_factory.mktemp("emulated") / "libemulated.so"
    flags = ["-std=c++17", "-O1", "-DJN_EMULATE", "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    sources = [str(ROOT / "csrc" / "cuda" / name) for name in SOURCES]
    command = ["g++", *flags, f"-I{ROOT / 'csrc' / 'include'}", "-x", "c++", *sources, "-o", str(library)]
    subprocess.run(command, check=True)
    c = ctypes.CDLL(str(library))
    c.jn_token_layout.argtypes = [POINTER] * 2 + [INT] * 2 + [POINTER]
    c.jn_lowbit_dequant.argtypes = [POINTER] * 3 + [INT] * 4 + [POINTER]
    c.jn_act_quant_pack.argtypes = [POINTER] * 4 + [INT] * 6 + [POINTER]
    return SimpleNamespace(
        has_cuda=True,
        act_quant_pack=c.jn_act_quant_pack,
        lowbit_dequant=c.jn_lowbit_dequant,
        lowbit_stream=with_struct(c.jn_lowbit_stream, LOWBIT),
        lowbit_tile=with_struct(c.jn_lowbit_tile, LOWBIT),
        lowbit_wgmma=with_struct(c.jn_lowbit_wgmma, LOWBIT),
        lowbit_bitplane=with_struct(c.jn_lowbit_bitplane, LOWBIT),
        lowbit_int8=with_struct(c.jn_lowbit_int8, LOWBIT),
        token_layout=c.jn_token_layout,
        quant_lora_mix=with_struct(c.jn_quant_lora_mix, MIX),
    )


@pytest.fixture
def on_cpu(emulated: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda._ext, "load", lambda cuda=False: emulated)
    monkeypatch.setattr(cuda, "current_stream", lambda tensor: 0)
    monkeypatch.setattr(cuda, "multiprocessors", lambda tensor: 4)
    monkeypatch.setattr(mixture_cuda, "shared_limit", lambda tensor: 227 * 1024)
    monkeypatch.setattr(backends, "why_not", lambda backend, tensor: None)
