"""Builds ``jointnas_kernels._C`` from csrc/ with ninja.

C++ always; the CUDA files too where nvcc is found. No torch headers, so one build serves every torch version and takes
seconds, and ninja recompiles only what changed. Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# No contraction: a * b + c is fused only where a kernel says so, else quantization levels would depend on the compiler.
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-ffp-contract=off"]
# sm_80 and sm_90a machine code (90a, because wgmma exists in no plain target) and PTX for whatever comes later.
NVCC_FLAGS = [
    *("-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-Xcompiler", "-fvisibility=hidden", "--expt-relaxed-constexpr"),
    *("-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"),
    *("-gencode=arch=compute_90,code=compute_90", "--threads=0"),
]


def find_nvcc() -> str | None:
    """nvcc from CUDA_HOME, then PATH, then the customary place."""
    home = os.environ.get("CUDA_HOME")
    places = [Path(home) / "bin" / "nvcc"] if home else []
    on_path = shutil.which("nvcc")
    places += [Path(on_path)] if on_path else []
    places += [Path("/usr/local/cuda/bin/nvcc")]
    return next((str(p) for p in places if p.is_file()), None)


def cuda_include(nvcc: str) -> Path:
    """The toolkit's include folder, asked of nvcc itself because the file found may be a wrapper script."""
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    if top is None:
        raise RuntimeError(f"{nvcc} --dryrun does not say where its toolkit is; it printed:\n{plan[:500]}")
    return Path(top[1]).resolve() / "include"


def ninja_file(target: Path, build_dir: Path) -> str:
    """The text of build.ninja: one rule for C++, one for CUDA, one link."""
    nvcc = find_nvcc()
    cxx = os.environ.get("CXX", "g++")
    includes = [ROOT / "csrc", Path(sysconfig.get_paths()["include"]), Path(pybind11.get_include())]
    flags = list(CXX_FLAGS)
    sources = [ROOT / "csrc" / "bindings.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    link = f"{cxx} -shared -pthread"
    if nvcc:
        includes.append(cuda_include(nvcc))
        flags.append("-DJN_WITH_CUDA")
        sources += sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        link = f"{nvcc} -shared -cudart static -Xcompiler -pthread"
    else:
        print("nvcc not found: building the CPU part only", file=sys.stderr)
    include_flags = " ".join(f"{'-I' if n == 0 else '-isystem '}{i}" for n, i in enumerate(includes))
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {cxx} {' '.join(flags)} {include_flags} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule cuda",
        f"  command = {nvcc} {' '.join(NVCC_FLAGS)} -DJN_WITH_CUDA {include_flags} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {link} $in -o $out",
    ]
    objects = []
    for source in sources:
        obj = build_dir / (source.parent.name + "_" + source.name + ".o")
        objects.append(str(obj))
        lines.append(f"build {obj}: {'cuda' if source.suffix == '.cu' else 'cxx'} {source}")
    lines.append(f"build {target}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """``build_ext`` that hands the whole extension to ninja."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # one folder for every way of calling, so that `pip install -e` and `build_ext --inplace` share their objects
        build_dir = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(ninja_file(target, build_dir))
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", build_dir], check=True)


setup(ext_modules=[Extension("jointnas_kernels._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
