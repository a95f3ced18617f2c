"""The CUDA low-bit kernels compiled for sm_80 and sm_90a: nothing spills, and the instructions are the meant ones."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.aot.harness import SHARED_LIMIT, TOOLS

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
pytestmark = pytest.mark.skipif(not Path(NVCC).exists(), reason="nvcc is not installed")

# file: instructions that must be there. IMMA / HMMA: tensor cores; LDGSTS: cp.async.
SOURCES = {
    "lowbit_stream": ("HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "IMMA.16832.S8.S8", "LDGSTS.E.BYPASS.128"),
    "lowbit_tile": ("HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "IMMA.16832.S8.S8", "LDGSTS.E.BYPASS.128"),
    "lowbit_wgmma": ("HGMMA.64x128x16.F32.BF16", "HGMMA.64x64x16.F32 ", "IGMMA.64x128x32.S8.S8"),
    # bulk copies to one block and to two, products whose accumulators another one's scaling runs beside
    "lowbit_int8": ("IGMMA.64x64x32.S8.S8", "UBLKCP.S.G ", "UBLKCP.S.G.MULTICAST", "I2FP.F32.S32", "USETMAXREG"),
    "lowbit_bitplane": ("BMMA.168128.AND.POPC", "LDGSTS.E.BYPASS.128"),
    "lowbit_dequant": ("LDG.E.128", "STG.E.128"),
    "act_quant_pack": ("LDG.E.128",),
    "quant_lora_mix": ("HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "LDGSTS.E.BYPASS.128", "LDG.E.128", "STG.E.128"),
}
# wgmma exists on sm_90a only; elsewhere its kernels are empty and the launcher refuses
HOPPER_ONLY = (("lowbit_wgmma", "80"), ("lowbit_int8", "80"))
CASES = [(name, arch) for name in SOURCES for arch in ("80", "90a") if (name, arch) not in HOPPER_ONLY]


@pytest.fixture(scope="module", params=CASES, ids="-sm_".join)
def cubin(request, tmp_path_factory):
    name, arch = request.param
    target = tmp_path_factory.mktemp("cubin") / f"{name}_{arch}.cubin"
    command = [NVCC, "-O3", "-std=c++17", f"-I{ROOT / 'csrc'}"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command += ["-cubin", str(ROOT / "csrc" / "cuda" / f"{name}.cu"), "-o", str(target)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "wgmma.mma_async instructions are serialized" not in done.stdout + done.stderr
    return name, arch, target


def cuobjdump(target: Path, flag: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", flag, target], check=True, capture_output=True, text=True).stdout


def test_nothing_spills(cubin):
    _, arch, target = cubin
    found = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    usage = re.findall(found, cuobjdump(target, "-res-usage"))
    assert usage
    for function, _, stack, shared, local in usage:
        assert int(stack) == int(local) == 0, f"{function} uses local memory"
        assert int(shared) <= SHARED_LIMIT[int(arch[:2])]


def test_instructions(cubin):
    name, _, target = cubin
    sass = cuobjdump(target, "-sass")
    for instruction in SOURCES[name]:
        assert instruction in sass, f"{name} has no {instruction}"
