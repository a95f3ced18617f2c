"""Instruments without a GPU: what they make of recorded output, and that they run in the form that a CPU has."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import bench_launches, bench_ncu, instruction_rates, launches, ncu, render
from benchmarks.harness import Recorder
from benchmarks.instruction_rates import Span
from benchmarks.rows import pick, read

DATA = Path(__file__).parent / "data"


# --- instructions -----------------------------------------------------------------------------------------------------


def test_program_is_generated_for_both_generations() -> None:
    hopper, ampere = (instruction_rates.instructions(wgmma) for wgmma in (True, False))
    assert "wgmma.mma_async" in instruction_rates.source(hopper.values())
    assert "wgmma" not in instruction_rates.source(ampere.values())
    symbols = {i.symbol for i in hopper.values()}
    assert len(symbols) == len(hopper)
    assert all(i.threads * instruction_rates.BLOCKS <= 2048 for i in hopper.values()), "resident together"


def test_rate_per_clock_is_of_the_blocks_of_one_sm() -> None:
    """Two blocks on one SM, one of which starts later, and one block alone on another."""
    spans = [Span(0, 100, 1100), Span(0, 200, 1300), Span(1, 50_000, 51_200)]
    assert instruction_rates.per_clock(spans[:2], 6000) == 12000 / 1200
    assert instruction_rates.per_clock(spans, 6000) == (10 + 5) / 2


def test_what_the_program_says() -> None:
    instruction = instruction_rates.instructions(False)["FP32 FMA"]
    assert instruction.block_work == 256 * 4096 * 256
    blocks = " ".join(f"{sm}:0:{instruction.block_work / 32:.0f}" for sm in (0, 0, 0, 0, 1, 1, 1, 1))
    rate = instruction_rates.parsed(f"FP32 FMA\tno error\t0.5 1 2 \t{blocks} ", instruction)
    assert isinstance(rate, instruction_rates.Rate)
    assert (rate.clock, rate.sms, rate.second.n) == (128, 2, 3)
    assert rate.second.median == 8 * instruction.block_work
    assert instruction_rates.parsed("FP32 FMA\tno device\t0 \t", instruction) == "no device"


def test_rows_of_instructions_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "results" / "machine"
    rec = Recorder("ceilings", "cpu", folder)
    rec.row("instruction", 3e13, "instr/s", {"per_clock": 127.9, "sms": 132}, instruction="FP32 FMA")
    rec.row("copy", 4e12, "B/s")
    monkeypatch.setattr(render, "RESULTS", tmp_path / "results")
    assert "| FP32 FMA | 30 Tinstr/s | 127.9 |\n| copy  | 4 TB/s |  |" in render.sections()


# --- launches ---------------------------------------------------------------------------------------------------------


def event(cat: str, name: str, ts: float, dur: float, **args: object) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": 1, "args": args}


def kernel(name: str, ts: float, dur: float, op: int, correlation: int) -> dict:
    sizes = {"grid": [8, 4, 1], "block": [128, 1, 1], "stream": 7, "device": 0}
    return event("kernel", name, ts, dur, **sizes, **{"External id": op, "correlation": correlation})


def trace() -> list[dict]:
    """A product whose sum of parts is a kernel of its own, an addition that is launched late, a copy; µs."""
    gemm = "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm(int)>(cutlass_80::Params)"
    mm = {"Input Dims": [[64, 128], [128, 32]], "Input type": ["c10::BFloat16", "c10::BFloat16"]}
    add = {"Input Dims": [[64, 32], [32], []], "Input type": ["float", "float", "Scalar"]}
    return [
        {"ph": "M", "name": "process_name", "ts": 0, "pid": 1, "args": {"name": "python"}},
        kernel("before the step", 10, 50, 1, 1),
        event("user_annotation", launches.STEP, 100, 900),
        event("cpu_op", "aten::mm", 110, 40, **{"External id": 2}, **mm),
        event("cuda_runtime", "cudaLaunchKernel", 120, 5, correlation=2),
        event("cuda_runtime", "cudaLaunchKernel", 130, 5, correlation=3),
        kernel(gemm, 200, 20, 2, 2),
        kernel("void splitKreduce_kernel<32, 16>(int)", 222, 3, 2, 3),
        event("cpu_op", "aten::add", 300, 20, **{"External id": 4}, **add),
        event("cuda_driver", "cuLaunchKernelEx", 310, 5, correlation=4),
        kernel("void at::native::(anonymous namespace)::elementwise<4, at::Add<float> >(int)", 325, 10, 4, 4),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 335, 5, bytes=4096, stream=7, correlation=9),
    ]


def test_launches_of_a_trace() -> None:
    gemm, parts, add, copy = launches.launches(trace())
    assert (gemm.name, gemm.op, gemm.grid, gemm.block) == (
        "Kernel2<cutlass_80_tensorop_bf16_s16816gemm(int)>", "aten::mm", (8, 4, 1), (128, 1, 1),
    )  # fmt: skip
    assert (gemm.flops, gemm.bytes) == (2 * 64 * 128 * 32, 2 * (64 * 128 + 128 * 32 + 64 * 32))
    assert (parts.flops, parts.bytes) == (0, 0), "an operator's work is done by its longest launch"
    assert parts.gap == pytest.approx(2e-6)
    assert not parts.late, "it had been launched already"
    assert add.name == "elementwise<4, Add<float> >"
    assert add.gap == pytest.approx(100e-6)
    assert add.late
    assert add.bytes == 4 * (64 * 32 + 32 + 64 * 32)
    assert (copy.name, copy.bytes, copy.gap) == ("Memcpy HtoD (Pinned -> Device)", 4096, 0)


def test_summary_of_a_trace() -> None:
    found = launches.launches(trace())
    assert launches.span(found) == pytest.approx(140e-6)
    assert launches.busy(found) == pytest.approx(38e-6)
    assert launches.host_bound(found) == pytest.approx(100e-6)
    rates = {"flops": 1e12, "bytes": 1e9}
    first, *_ = kernels = launches.by_kernel(found, rates)
    assert first.floor == pytest.approx(28672 / 1e9)
    assert [k.floor > 0 for k in kernels] == [True, True, True, False]
    text = launches.listing(found, rates)
    assert "100.0*      10.0      16.5" in text
    assert "8×4×1   128×1×1  Kernel2" in text
    assert text.count("\n") == 5
    assert "1 others" in launches.totals(kernels, most=3)


def test_launches_that_overlap_are_busy_once() -> None:
    both = [event("user_annotation", launches.STEP, 0, 100), kernel("a", 10, 20, -1, 1), kernel("b", 15, 5, -1, 2)]
    found = launches.launches([*both, kernel("c", 40, 10, -1, 3)])
    assert launches.busy(found) == pytest.approx(30e-6)
    assert not any(x.late for x in found), "nobody knows when they were launched"


def test_work_of_operators_without_shapes_is_not_guessed() -> None:
    assert launches.work({}) == (0, 0)
    assert launches.work({"name": "aten::mm", "args": {"Input Dims": [[]], "Input type": [""]}}) == (0, 0)
    assert launches.work({"name": "aten::sort", "args": {"Input Dims": [[4]], "Input type": ["float"]}}) == (0, 0)
    batched = {"Input Dims": [[3, 4, 5], [3, 5, 6]], "Input type": ["float", "float"]}
    assert launches.work({"name": "aten::bmm", "args": batched}) == (2 * 3 * 4 * 5 * 6, 4 * 3 * (20 + 30 + 24))
    plus = {"Input Dims": [[6], [4, 5], [5, 6], [], []], "Input type": ["float"] * 3 + ["Scalar"] * 2}
    assert launches.work({"name": "aten::addmm", "args": plus}) == (2 * 4 * 5 * 6, 4 * (6 + 20 + 30 + 24))


def test_operators_stand_in_for_launches_on_a_cpu() -> None:
    x = torch.randn(8, 16, requires_grad=True)
    found = launches.launches(launches.profiled(lambda: (x @ x.t()).relu().sum().backward(), "cpu"))
    names = [launch.name for launch in found]
    assert names[0] == "aten::t"
    assert {"aten::matmul", "aten::relu", "aten::sum", "aten::mm"} <= set(names)
    assert sum(launch.seconds for launch in found) == pytest.approx(launches.busy(found), abs=1e-7)
    assert launches.host_bound(found) == 0


def test_a_step_from_model_to_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Once; a second call has nothing left to do."""
    file = tmp_path / "results" / "machine" / "launches.jsonl"
    for _ in range(2):
        options = ["--device", "cpu", "--tiny", "--rounds", "1", "--resume", "--out", str(file.parent)]
        bench_launches.main([*options, "--steps", "qllama3 arch step"])
        rows = read(file)
        assert len(pick(rows, "step")) == 1
    printed = capsys.readouterr().out
    assert "FAILED" not in printed
    assert "is there" in printed
    (step,), kernels = pick(rows, "step"), pick(rows, "kernel", step="qllama3 arch step")
    assert step["extra"]["launches"] == sum(k["extra"]["launches"] for k in kernels)
    assert math.isclose(sum(k["extra"]["share"] for k in kernels), 1)
    assert "host_share" not in step["extra"], "a CPU is its own host"
    monkeypatch.setattr(render, "RESULTS", tmp_path / "results")
    assert "| qllama3 arch step | 2 × (2 × 16) " in render.sections()


# --- Nsight Compute ---------------------------------------------------------------------------------------------------


def test_counters_of_a_recorded_csv() -> None:
    quant, product = ncu.parse((DATA / "ncu.csv").read_text())
    assert (quant.kernel, quant.grid, quant.block) == ("_forward_kernel", "1024×1×1", "128×1×1")
    assert quant.seconds == pytest.approx(12.8e-6)
    extra = quant.extra()
    assert extra["dram_bytes"] == 8_912_896 + 1_048_576
    assert extra["dram_share"] == pytest.approx(0.6125)
    assert extra["occupancy"] == pytest.approx(0.5)
    assert "tensor_share" not in extra, "n/a is not 0"
    assert extra["stalls"] == {"long_scoreboard": 11.5, "wait": 1.25}
    assert product.kernel == "lowbit_int8_kernel<Tile<64, 128>, 4>"
    assert product.seconds == pytest.approx(1.2345e-3)
    assert product.extra()["dram_bytes"] == pytest.approx(16.5e6 + 2000)
    assert product.extra()["tensor_share"] == pytest.approx(0.725)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", "administrators"),
        ("==ERROR== Failed to initialize the profiler: LibraryNotLoaded", "LibraryNotLoaded"),
        ("==ERROR== An error occurred while trying to access the driver", "driver"),
    ],
)
def test_why_counters_cannot_be_read(text: str, reason: str) -> None:
    with pytest.raises(ncu.NotPermitted, match=reason):
        ncu.parse(text)


def test_only_counters_that_the_gpu_has_are_asked_for() -> None:
    stall = f"{ncu.STALL}barrier"
    listed = f"Device H200 (GH100)\n---\ndram__bytes_read   Counter  byte  # of bytes\n{stall}  Ratio  warp\n"
    assert ncu.available(listed) == [ncu.READ, f"{stall}_per_issue_active.ratio"]
    assert ncu.available("") == list(ncu.METRICS)


def tool(folder: Path, script: str) -> str:
    """A stand-in for ncu; $log is the file that it is told to write."""
    file = folder / "ncu"
    head = 'while [ $# -gt 0 ]; do [ "$1" = --log-file ] && log=$2; [ "$1" = --metrics ] && metrics=$2; shift; done'
    file.write_text(f"#!/bin/sh\n{head}\n{script}\n")
    file.chmod(0o755)
    return str(file)


def test_what_is_run_and_what_comes_of_it(tmp_path: Path) -> None:
    """Rows of a recorded run; a run that is not permitted; one that fails by itself."""
    rec = Recorder("ncu", "cpu", tmp_path)
    bench_ncu.measure(rec, tool(tmp_path, f'cp {DATA / "ncu.csv"} "$log"'), list(ncu.METRICS), "act_quant_mix", 64, 60)
    assert [row["params"]["launch"] for row in rec.rows] == [0, 1]
    assert rec.rows[0]["params"] | {"launch": 0} == rec.rows[0]["params"]
    refused = tool(tmp_path, 'echo "==ERROR== ERR_NVGPUCTRPERM - no" > "$log"; exit 1')
    with pytest.raises(ncu.NotPermitted):
        bench_ncu.measure(rec, refused, list(ncu.METRICS), "act_quant_mix", 64, 60)
    for script in ("echo Traceback >&2; exit 1", 'echo "==WARNING== No kernels were profiled." > "$log"'):
        with pytest.raises(RuntimeError, match=r"ncu: exit [01], 0 kernels: .*(Traceback|No kernels)"):
            bench_ncu.measure(rec, tool(tmp_path, script), list(ncu.METRICS), "act_quant_mix", 64, 60)
    assert len(rec.rows) == 2


def test_without_counters_there_is_one_line_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert bench_ncu.main(["--device", "cpu", "--out", str(tmp_path)]) == []
    assert capsys.readouterr().out == "ncu: not measured: counters are those of a GPU\n"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(Path, "exists", lambda _: False)
    with pytest.raises(ncu.NotPermitted, match="not installed"):
        ncu.find()


@pytest.mark.parametrize("name", [*bench_ncu.DEFAULT, "masked_rope backward", "gated_residual backward"])
def test_chosen_ops_can_be_called(name: str) -> None:
    bench_ncu.child(name, 2, "cpu")


def test_counters_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rec = Recorder("ncu", "cpu", tmp_path / "results" / "machine")
    for number, found in enumerate(ncu.parse((DATA / "ncu.csv").read_text())):
        params = {"op": "act_quant_mix", "tokens": 1024, "launch": number, "kernel": found.kernel}
        rec.row("kernel", found.seconds, "s", found.extra(), **params)
    monkeypatch.setattr(render, "RESULTS", tmp_path / "results")
    line = "| `act_quant_mix`, 1,024 tokens | `_forward_kernel` | 12.8 µs | 9.961 MB | 61% | 44% |  | 21% | 50% |"
    assert f"{line} long_scoreboard 12, wait 1.2 |" in render.sections()
