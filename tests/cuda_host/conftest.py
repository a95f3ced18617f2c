"""The CUDA kernels' own code on the CPU: csrc/cuda compiled by g++ with csrc/cuda/emulate in place of PTX.

``emulated`` is a stand-in for the compiled module ``jointnas_kernels._C``; ``on_cpu`` makes the launch code of
jointnas_kernels/ops use it, so that everything between the public function and the last instruction is executed.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
from filelock import FileLock

from jointnas_kernels.ops.core import backends, cuda
from jointnas_kernels.ops.quant.mixture import cuda as mixture_cuda

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = [*CSRC.glob("cuda/*.cu"), CSRC / "bindings.cpp", CSRC / "cpu/isa.cpp", CSRC / "cpu/parallel.cpp"]


def compiled(folder: Path, source: Path) -> Path:
    command = ["g++", "-c", "-std=c++17", "-O1", "-DJN_EMULATE", "-DJN_WITH_CUDA", "-Wall", "-Wno-unknown-pragmas"]
    command += ["-fvisibility=hidden", "-fPIC", f"-I{CSRC}", f"-I{sysconfig.get_paths()['include']}"]
    target = folder / f"{source.name}.o"
    subprocess.run([*command, f"-I{pybind11.get_include()}", "-x", "c++", source, "-o", target], check=True)
    return target


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> ModuleType:
    # one build for all processes of pytest-xdist, whose folders stand beside each other, on two processors
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "emulated"
    library = folder / "_C.so"
    with FileLock(f"{folder}.lock"):
        if not library.exists():
            folder.mkdir(exist_ok=True)
            with ThreadPoolExecutor(2) as pool:
                objects = list(pool.map(functools.partial(compiled, folder), SOURCES))
            subprocess.run(["g++", "-shared", *objects, "-o", library], check=True)
    spec = importlib.util.spec_from_file_location("emulated._C", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def on_cpu(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda._ext, "load", lambda cuda=False: emulated)
    monkeypatch.setattr(cuda, "current_stream", lambda tensor: 0)
    monkeypatch.setattr(cuda, "multiprocessors", lambda tensor: 4)
    monkeypatch.setattr(mixture_cuda, "shared_limit", lambda tensor: 227 * 1024)
    monkeypatch.setattr(backends, "why_not", lambda backend, tensor: None)
