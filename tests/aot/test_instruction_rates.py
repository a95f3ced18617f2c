"""That the kernels of benchmarks/instruction_rates.py time what they say: their loops for sm_80 and sm_90a."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import instruction_rates
from tests.aot.harness import TOOLS

NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
pytestmark = pytest.mark.skipif(not Path(NVCC).exists(), reason="nvcc is not installed")
# in a loop beside what is timed: counter, comparison and branch; for wgmma also fences, waits and descriptors
OTHERS = {1: 4, 8: 4, 4: 20}


@pytest.fixture(scope="module", params=["80", "90a"])
def assembled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, str]]:
    """Compute capability, and the SASS of every kernel by its name."""
    chosen = instruction_rates.instructions(wgmma=request.param == "90a").values()
    target = tmp_path_factory.mktemp("cubin") / "rates.cubin"
    instruction_rates.compile_program(NVCC, request.param, chosen, target, "-cubin")
    text = subprocess.run([TOOLS / "cuobjdump", "-sass", target], check=True, capture_output=True, text=True).stdout
    return int(request.param[:2]), {part.split()[0]: part for part in text.split("Function : ")[1:]}


def code(sass: str) -> list[tuple[int, str, str]]:
    """(address, instruction, operands) of a kernel."""
    pattern = r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
    return [(int(at, 16), what, operands) for at, what, operands in re.findall(pattern, sass, re.M)]


def last_loop(lines: list[tuple[int, str, str]]) -> tuple[int, int]:
    """Addresses of the first and the last instruction of the loop that ends last."""
    backward = []
    for at, what, operands in lines:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if what == "BRA" and target and int(target[1], 16) < at:
            backward.append((int(target[1], 16), at))
    return backward[-1]


def test_loops_hold_what_is_timed_and_little_else(assembled: tuple[int, dict[str, str]]) -> None:
    capability, kernels = assembled
    chosen = instruction_rates.instructions(wgmma=capability == 90)
    assert set(kernels) == {i.symbol for i in chosen.values()}
    for name, instruction in chosen.items():
        lines = code(kernels[instruction.symbol])
        if not instruction.sass[capability]:  # emulated by a function that the loop calls
            continue
        first, last = last_loop(lines)
        inside = Counter(what for at, what, _ in lines if first <= at <= last)
        meant = sum(n for what, n in inside.items() if re.fullmatch(instruction.sass[capability], what))
        assert meant == instruction.count, f"{name}: {inside}"
        kind = 1 if instruction.unit == "instr/s" else instruction.count
        assert inside.total() - meant <= OTHERS[kind], f"{name}: {inside}"
        clocks = [at for at, what, operands in lines if what == "CS2R" and "SR_CLOCK" in operands]
        assert len(clocks) == 2
        assert clocks[0] < first < last < clocks[1], f"{name}: the loop is not between its clocks"
        assert any(what.startswith("STG") and at > last for at, what, _ in lines), f"{name}: nothing is stored"


def test_nothing_is_kept_in_memory(assembled: tuple[int, dict[str, str]]) -> None:
    for name, sass in assembled[1].items():
        assert not re.search(r"\b(LDL|STL)\b", sass), f"{name} spills"


def test_without_a_device_it_says_so(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program compiled, linked and run."""
    if torch.cuda.is_available():
        pytest.skip("there is one: tests/gpu")
    others = set(instruction_rates.instructions(wgmma=True)) - {"PRMT"}
    assert list(instruction_rates.measure(NVCC, (8, 0), others)) == []
    assert re.search(r"FAILED PRMT: .*(CUDA|driver)", capfd.readouterr().out)
