"""That the kernels of benchmarks/instruction_rates.py time what they say: their loops for sm_80 and sm_90a."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import instruction_rates, sass

pytestmark = pytest.mark.skipif(not Path(sass.nvcc()).exists(), reason="nvcc is not installed")
Assembled = tuple[int, dict[str, sass.Code]]
# in a loop beside what is timed: counter, comparison and branch; for wgmma also fences, waits and descriptors
OTHERS = {1: 4, 8: 4, 4: 20}


@pytest.fixture(scope="module", params=["80", "90a"])
def assembled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Assembled:
    """Compute capability, and every kernel by its name."""
    chosen = instruction_rates.instructions(wgmma=request.param == "90a").values()
    target = tmp_path_factory.mktemp("cubin") / "rates.cubin"
    instruction_rates.compile_program(sass.nvcc(), request.param, chosen, target, "-cubin")
    return int(request.param[:2]), sass.kernels(target)


def test_loops_hold_what_is_timed_and_little_else(assembled: Assembled) -> None:
    capability, kernels = assembled
    chosen = instruction_rates.instructions(wgmma=capability == 90)
    assert set(kernels) == {i.symbol for i in chosen.values()}
    for name, instruction in chosen.items():
        code = kernels[instruction.symbol]
        if not instruction.sass[capability]:  # emulated by a function that the loop calls
            continue
        first, last = code.loops[-1]
        inside = Counter(what for at, what, _ in code.lines if first <= at <= last)
        meant = sum(n for what, n in inside.items() if re.fullmatch(instruction.sass[capability], what))
        assert meant == instruction.count, f"{name}: {inside}"
        kind = 1 if instruction.unit == "instr/s" else instruction.count
        assert inside.total() - meant <= OTHERS[kind], f"{name}: {inside}"
        clocks = [at for at, what, operands in code.lines if what == "CS2R" and "SR_CLOCK" in operands]
        assert len(clocks) == 2
        assert clocks[0] < first < last < clocks[1], f"{name}: the loop is not between its clocks"
        assert any(what.startswith("STG") and at > last for at, what, _ in code.lines), f"{name}: nothing is stored"


def test_nothing_is_kept_in_memory(assembled: Assembled) -> None:
    for name, code in assembled[1].items():
        assert not any(what.startswith(("LDL", "STL")) for _, what, _ in code.lines), f"{name} spills"


def test_without_a_device_it_says_so(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program compiled, linked and run."""
    if torch.cuda.is_available():
        pytest.skip("there is one: tests/gpu")
    others = set(instruction_rates.instructions(wgmma=True)) - {"PRMT"}
    assert list(instruction_rates.measure(sass.nvcc(), (8, 0), others)) == []
    assert re.search(r"FAILED PRMT: .*(CUDA|driver)", capfd.readouterr().out)
