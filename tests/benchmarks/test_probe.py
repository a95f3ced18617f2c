"""Benchmarks on slow machines: a shape that takes seconds, an announced time, rows as they come."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_masks, bench_step, harness, models, probe
from benchmarks.harness import Timing
from benchmarks.rows import one_shape

BLOCK = models.linear_weights(models.llama_8b(1))


def arguments(**values: object) -> argparse.Namespace:
    return argparse.Namespace(**{"device": "cpu", "dtype": "auto", "batch": None, "tokens": None, **values})


def test_weights_of_a_block() -> None:
    with torch.device("meta"):
        model = models.LlamaForCausalLM(models.llama_8b(1, 256))
    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert sum(m.weight.numel() for m in linears) == BLOCK
    small = models.llama_8b(1, 256, scale=4)
    assert (small.hidden_size, small.head_dim, small.intermediate_size) == (1024, 32, 3584)
    assert 16 * models.linear_weights(small) == BLOCK


@pytest.mark.parametrize("rates, expected", [
    ({"bf16": 4e12, "fp32": 1e12}, (torch.bfloat16, 8, 128)),  # AMX
    ({"bf16": 1e10, "fp32": 4e11}, (torch.float32, 8, 128)),  # 3 s
    ({"bf16": 2e10, "fp32": 1e11}, (torch.float32, 2, 128)),  # two cores without fast bf16
    ({"bf16": 1e9, "fp32": 1e10}, (torch.float32, 1, 32)),  # slower than any shape helps
])  # fmt: skip
def test_a_cpu_takes_its_faster_dtype_and_a_short_step(
    rates: dict[str, float], expected: tuple[torch.dtype, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "gemm_rate", {probe.DTYPES[k]: v for k, v in rates.items()}.__getitem__)
    plan = probe.plan(arguments(), BLOCK)
    assert plan[:3] == expected
    assert plan.seconds <= probe.LONGEST or (plan.batch, plan.tokens) == probe.SHAPES[-1]
    # what was asked for is taken
    assert probe.plan(arguments(dtype="bf16", batch=8, tokens=128), BLOCK)[:3] == (torch.bfloat16, 8, 128)
    assert probe.plan(arguments(tokens=512), BLOCK).tokens == 512


def test_a_gpu_takes_the_papers_shape() -> None:
    assert probe.plan(arguments(device="cuda"), BLOCK) == (torch.bfloat16, 8, 128, 0.0)


def test_probes_measure() -> None:
    assert all(1e7 < probe.gemm_rate(dtype, 16, 64, 64) < 1e14 for dtype in probe.DTYPES.values())
    assert 1e7 < probe.copy_rate(1 << 18) < 1e13


class Clock:
    """Time that passes only in contenders."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(harness.time, "perf_counter", lambda: self.now)

    def call(self, seconds: float) -> harness.Callable[[], None]:
        def run() -> None:
            self.now += seconds

        return run


def test_rounds_that_fit_are_announced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(monkeypatch)
    contenders = {"a": clock.call(1.0), "b": clock.call(3.0)}
    order: list[tuple[str, int]] = []
    found = harness.time_interleaved(
        contenders, 9, 0, budget=13.0, what="panel", done=lambda name, t: order.append((name, t.n))
    )
    assert "panel: 2 contenders, 2 more rounds, 0:00:08" in capsys.readouterr().out
    assert order == [("a", 3), ("b", 3)]
    assert found == {"a": Timing(1, 1, 1, 3), "b": Timing(3, 3, 3, 3)}
    assert harness.time_interleaved(contenders, 9, 0, budget=1.0)["a"].n == 2  # at least
    order.clear()
    harness.time_interleaved(contenders, 9, 0, budget=1.0, least=1, done=lambda name, t: order.append((name, t.n)))
    assert order == [("a", 1), ("b", 1)]
    assert harness.time_interleaved(contenders, 1, 0)["b"].n == 1


def test_each_result_is_done_before_the_next_contender_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(monkeypatch), []
    contenders = {n: lambda n=n: (log.append(n), clock.call(1.0)()) for n in "ab"}  # type: ignore[misc]
    harness.time_interleaved(contenders, 2, 0, done=lambda name, _: log.append(f"{name} done"))
    assert log == ["a", "b", "a", "a done", "b", "b done"]


def test_rows_of_a_panel_that_is_killed(tmp_path: Path) -> None:
    """What was measured before is on disk, with its ratio to the LoRA steps, which come first."""
    rec = harness.Recorder("step", "cpu", tmp_path, "abc")
    bench = bench_step.Bench.random(arguments(tiny=True, layers=None, dtype="fp32"))
    rows: list[int] = []

    def killed() -> None:
        rows.append(len((tmp_path / "step.jsonl").read_text().splitlines()) if rec.rows else 0)
        if len(rows) == 4:  # first step, peak, first round, last round
            raise KeyboardInterrupt

    steps = {"PEFT LoRA, a": lambda: None, "PEFT LoRA, b": lambda: None, "mine": lambda: None, "killed": killed}
    with pytest.raises(KeyboardInterrupt):
        bench_step.measure(rec, bench, "main", steps, bench.ids(2, 16), 2, 9.0)
    found = [json.loads(line) for line in (tmp_path / "step.jsonl").read_text().splitlines()]
    assert [row["name"] for row in found] == ["PEFT LoRA, a", "PEFT LoRA, b", "mine"]
    peer = min(row["median"] for row in found[:2])
    assert [row["extra"]["ratio"] for row in found] == [row["median"] / peer for row in found]
    assert found[0]["params"] == {"panel": "main", "dtype": "float32", "layers": 2, "batch": 2, "tokens": 16}


# ---- masks ----------------------------------------------------------------------------------------------------------


def test_stored_masks_are_counted_before_they_are_made() -> None:
    config, space = models.llama_tiny(layers=1), bench_masks.TINY[-1]
    base = models.build_llama(config, "cpu", torch.float32)
    for variant, item in (("masks", 1), ("gemv", 4)):
        kept = models.PlainSupernet(base, space, variant).stored_bytes()
        assert bench_masks.pair_bytes(config, space, item, shapes=True) == kept


@pytest.mark.slow
def test_masks_that_do_not_fit_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_masks, "free_memory", lambda device: 1_000_000)
    monkeypatch.setattr(bench_masks, "check_variants", lambda: None)
    rows = bench_masks.main(["--device", "cpu", "--tiny", "--out", str(tmp_path), "--variants", "gemv,loop-best"])
    out = capsys.readouterr().out
    assert "LEFT OUT gemv" in out
    assert out.index("masks: 2 spaces, ours, gemv, loop-best") < out.index("LEFT OUT")
    assert {row["name"] for row in rows} == {"ours", "loop-best"}


def test_spaces_are_scaled_with_the_model() -> None:
    """As many candidates, nested in a model of a quarter of the widths, and a loop in a sixteenth of the time."""
    for space in bench_masks.SPACES:
        small = bench_masks.scaled(space, 4)
        assert bench_masks.candidates(small, 32) == bench_masks.candidates(space, 32)
        assert all(d % 2 == 0 for d in small["head_dim"])
        sizes = [(models.llama_8b(1, 256, s), bench_masks.scaled(space, s)) for s in (1, 4)]
        times = [bench_masks.loop_seconds(config, part, 4, 1e10) for config, part in sizes]
        assert times[0] == pytest.approx(16 * times[1])


def test_rows_of_other_shapes_stay_out_of_a_table() -> None:
    shape = {"layers": 1, "batch": 8, "tokens": 128, "dtype": "bfloat16"}
    rows = [{"params": {**shape, **other}} for other in ({}, {"scale": 4}, {"tokens": 32}, {"candidates": 7})]
    assert one_shape(rows) == [rows[0], rows[3]]
    assert one_shape(rows[1:2]) == rows[1:2]
    assert one_shape([]) == []
