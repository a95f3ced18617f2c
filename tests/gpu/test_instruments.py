"""Instruments on a GPU: rates within what an SM can issue, launches with grids, counters where they are permitted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import bench_ncu, instruction_rates, launches, ncu

NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"


@pytest.mark.skipif(not Path(NVCC).exists(), reason="nvcc is not installed")
def test_an_sm_issues_128_fp32_instructions_per_clock_and_no_more() -> None:
    capability = torch.cuda.get_device_capability()
    wanted = {"FP32 FMA", "I2FP s32 to fp32"}
    others = set(instruction_rates.instructions(capability == (9, 0))) - wanted
    found = {i.name: rate for i, rate in instruction_rates.measure(NVCC, capability, others)}
    assert set(found) == wanted
    assert 115 < found["FP32 FMA"].clock <= 128.5
    assert 0 < found["I2FP s32 to fp32"].clock <= 128.5
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    assert found["FP32 FMA"].sms == sms
    clock = found["FP32 FMA"].second.median / found["FP32 FMA"].clock / sms
    assert 0.3e9 < clock < 3e9


def test_launches_have_grids_and_order(device: torch.device) -> None:
    a, b = torch.randn(1024, 1024, device=device), torch.randn(1024, 1024, device=device)
    found = launches.launches(launches.profiled(lambda: (a @ b).relu_(), "cuda"))
    assert len(found) >= 2
    assert all(x.grid and x.block and x.seconds > 0 and x.gap >= 0 for x in found)
    assert sum(x.flops for x in found) == 2 * 1024**3
    assert 0 < launches.busy(found) <= launches.span(found)


def test_counters_or_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = bench_ncu.main(["--ops", "channel_mask", "--tokens", "1024", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "FAILED" not in printed
    if not rows:
        assert "ncu: not measured: " in printed
        return
    extra = rows[0]["extra"]
    assert 0 < extra["dram_share"] < 1.1
    assert extra["dram_bytes"] > 1024 * 4096 * 2  # x is read at least
    assert set(extra["stalls"]) <= set(ncu.STALLS)
