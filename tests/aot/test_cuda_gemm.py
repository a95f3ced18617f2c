"""The CUDA low-bit kernels compiled for sm_80 and sm_90a: nothing spills, and the instructions are the meant ones."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import render, sass
from tests.aot.harness import SHARED_LIMIT

needs_nvcc = pytest.mark.skipif(not Path(sass.nvcc()).exists(), reason="nvcc is not installed")

# file: instructions that must be there. IMMA / HMMA: tensor cores; LDGSTS: cp.async.
SOURCES = {
    "lowbit_stream": ("HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "IMMA.16832.S8.S8", "LDGSTS.E.BYPASS.128"),
    "lowbit_stripe": ("HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "LDGSTS.E.BYPASS.128", "LDG.E.128.STRONG.GPU"),
    "lowbit_tile": ("HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "IMMA.16832.S8.S8", "LDGSTS.E.BYPASS.128"),
    "lowbit_wgmma": ("IGMMA.64x128x32.S8.S8", "IGMMA.64x64x32.S8.S8"),
    "lowbit_half": ("HGMMA.64x64x16.F32.BF16", "HGMMA.64x16x16.F32 ", "UBLKCP.S.G.MULTICAST", "USETMAXREG"),
    # bulk copies to one block and to a cluster, rows turned round by stmatrix
    "lowbit_int8": (
        "IGMMA.64x128x32.S8.S8", "UBLKCP.S.G ", "UBLKCP.S.G.MULTICAST", "I2FP.F32.S32", "USETMAXREG", "STSM.16.MT88.4",
    ),
    "lowbit_bitplane": ("BMMA.168128.AND.POPC", "LDGSTS.E.BYPASS.128"),
    "lowbit_dequant": ("LDG.E.128", "STG.E.128"),
    "act_quant_pack": ("LDG.E.128",),
    "quant_lora_mix": ("HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "LDGSTS.E.BYPASS.128", "LDG.E.128", "STG.E.128"),
}
# what sm_90a emulates by hundreds of others
AMPERE_ONLY = {"lowbit_tile": "IMMA.16864.S4.S4"}
# wgmma exists on sm_90a only; elsewhere its kernels are empty and the launcher refuses
HOPPER_ONLY = (("lowbit_wgmma", "80"), ("lowbit_int8", "80"), ("lowbit_half", "80"))
CASES = [(name, arch) for name in SOURCES for arch in ("80", "90a") if (name, arch) not in HOPPER_ONLY]


@pytest.fixture(scope="module", params=CASES, ids="-sm_".join)
def cubin(request, tmp_path_factory):
    name, arch = request.param
    target = tmp_path_factory.mktemp("cubin") / f"{name}_{arch}.cubin"
    return name, arch, sass.assemble(name, arch, sass.ROOT / "csrc", target)


def cuobjdump(target: Path, flag: str) -> str:
    return subprocess.run([sass.cuobjdump(), flag, target], check=True, capture_output=True, text=True).stdout


@needs_nvcc
def test_nothing_spills(cubin):
    _, arch, target = cubin
    found = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    usage = re.findall(found, cuobjdump(target, "-res-usage"))
    assert usage
    for function, _, stack, shared, local in usage:
        assert int(stack) == int(local) == 0, f"{function} uses local memory"
        assert int(shared) <= SHARED_LIMIT[int(arch[:2])]


@needs_nvcc
def test_instructions(cubin):
    name, arch, target = cubin
    text = cuobjdump(target, "-sass")
    for instruction in SOURCES[name]:
        assert instruction in text, f"{name} has no {instruction}"
    assert name not in AMPERE_ONLY or (AMPERE_ONLY[name] in text) == (arch == "80")


@needs_nvcc
def test_loops_take_no_more_instructions_than_recorded(cubin):
    """Of the nvcc that is recorded; another may take a few more."""
    name, arch, target = cubin
    code, recorded = sass.kernels(target), sass.history()
    for item in sass.ITEMS:
        if (item.source, item.arch) == (name, arch):
            row, newest = sass.count(item, code), recorded[item.name][1]
            most = newest["instructions"] * (1 if newest["nvcc"] == sass.release() else 1.05)
            assert row["instructions"] <= most, f"{item.name}: {row['counts']}, recorded: {newest['counts']}"


def test_loops_are_found_and_floors_follow_from_them():
    lines = [(16 * i, what, "") for i, what in enumerate(["LDS", "IMMA.16832.S8.S8", "BRA", "FFMA", "BRA", "EXIT"])]
    lines[2], lines[4] = (32, "BRA", "0x10"), (64, "BRA", "0x0")
    assert sass.Code(lines, 8).loop("IMMA") == ["IMMA.16832.S8.S8", "BRA"]
    assert len(sass.Code(lines, 8).loop("FFMA")) == 5
    counts = {"FFMA": 4, "IMAD": 1, "I2FP": 3, "LDS.128": 2, "IGMMA.64x64x32.S8.S8": 1, "UMOV": 5}
    found = sass.clocks(counts, sass.GPUS["90a"])
    assert found["tensor"] == pytest.approx(64 * 64 * 32 / 4 / 4122, rel=1e-3)  # 1.91 POP/s
    assert {k: v for k, v in found.items() if k != "tensor"} == {"issue": 4, "FMA": 1.5, "ALU": 1.5, "memory": 8}
    rates = [sass.clocks({f"IMMA.168{k}": 1}, sass.GPUS["80"])["tensor"] for k in ("32.S8.S8", "64.S4.S4")]
    assert rates[0] == rates[1], "twice the work at twice the rate"


def test_the_page_shows_the_rows():
    """`python benchmarks/render.py` would change nothing."""
    page = sass.ROOT / "docs" / "ops.md"
    assert render.texts()[page] == page.read_text()
