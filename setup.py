"""Builds ``jointnas_kernels._C`` from csrc/ with ninja.

C++ always; the CUDA files too where nvcc is found. No torch headers, so one build serves every torch version and takes
seconds, and ninja recompiles only what changed. Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import hashlib
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


def sources(nvcc: str | None) -> list[Path]:
    """What the module is made of; CUDA files only where they can be compiled."""
    folder = ROOT / "csrc"
    cuda = sorted((folder / "cuda").glob("*.cu")) if nvcc else []
    return [folder / "bindings.cpp", *sorted((folder / "cpu").glob("*.cpp")), *cuda]


def lowbit_kernels() -> str:
    """A hash of the CUDA low-bit kernels' code, for plans that were measured with it (jointnas_kernels/tuned): of what
    the compiler reads, so that a comment does not make plans stale."""
    cuda = ROOT / "csrc" / "cuda"
    headers = [file for file in cuda.glob("*.cuh") if file.name != "quant_lora_mix.cuh"]
    files = [*headers, *cuda.glob("lowbit_*.cu"), cuda / "act_quant_pack.cu"]
    code = [re.sub(r"//.*|\s+", " ", file.read_text()) for file in sorted(files)]
    return hashlib.sha256("\0".join(" ".join(text.split()) for text in code).encode()).hexdigest()[:16]


def ninja_file(target: Path, build_dir: Path) -> str:
    """The text of build.ninja: one rule for C++, one for CUDA, one link."""
    nvcc = find_nvcc()
    cxx = os.environ.get("CXX", "g++")
    # for bindings.cpp alone: pip builds with a pybind11 elsewhere, which must not make ninja compile everything again
    glue = f"-isystem {sysconfig.get_paths()['include']} -isystem {pybind11.get_include()}"
    glue += " -DJN_WITH_CUDA" if nvcc else ""
    link = f"{nvcc} -shared -cudart static -Xcompiler -pthread" if nvcc else f"{cxx} -shared -pthread"
    compilers = {"cxx": f"{cxx} {' '.join(CXX_FLAGS)} -MMD", "cuda": f"{nvcc} {' '.join(NVCC_FLAGS)} -MD"}
    lines = ["ninja_required_version = 1.11", "rule link", f"  command = {link} $in -o $out", "  description = linking"]
    for rule, compiler in compilers.items():
        lines += [f"rule {rule}", f"  command = {compiler} -MF $out.d -I{ROOT / 'csrc'} $glue -c $in -o $out"]
        lines += ["  description = compiling $in", "  depfile = $out.d", "  deps = gcc"]
    objects = []
    for source in sources(nvcc):
        obj = build_dir / f"{source.parent.name}_{source.name}.o"
        objects.append(str(obj))
        lines.append(f"build {obj}: {'cuda' if source.suffix == '.cu' else 'cxx'} {source}")
        own = {"bindings": glue, "fingerprint": f"-DJN_LOWBIT_KERNELS=0x{lowbit_kernels()}ull"}.get(source.stem)
        lines += [f"  glue = {own}"] if own else []
    lines.append(f"build {target}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):  # type: ignore[misc]
    """``build_ext`` that hands the whole extension to ninja: one line, and compilers' output only if they complain."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # one folder for every way of calling, so that `pip install -e` and `build_ext --inplace` share their objects
        build_dir = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(ninja_file(target, build_dir))
        command = [str(Path(ninja.BIN_DIR) / "ninja")]
        plan = subprocess.run([*command, "-n"], cwd=build_dir, capture_output=True, text=True)
        if "no work to do" in plan.stdout:
            return
        files = [source.suffix for source in sources(find_nvcc())]
        cuda = f"{files.count('.cu')} CUDA sources" if ".cu" in files else "no CUDA sources, as nvcc was not found"
        print(f"building {ext.name}: {files.count('.cpp')} C++ and {cuda}", flush=True)
        if not sys.stdout.isatty():
            command.append("--quiet")  # a terminal gets one line of progress that overwrites itself
        if subprocess.run(command, cwd=build_dir).returncode:
            raise SystemExit(f"building {ext.name} failed; the compiler's message is above")


setup(ext_modules=[Extension("jointnas_kernels._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
