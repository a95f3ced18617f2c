"""The benchmark harness, and that every benchmark runs from gate to table at its smallest shapes (nothing is timed)."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks import (
    bench_calibration,
    bench_decode,
    bench_depth,
    bench_gguf,
    bench_kernels,
    bench_masks,
    bench_memory,
    bench_ptq,
    bench_step,
    blocks,
    harness,
    models,
    render,
    sections,
)
from benchmarks.harness import Recorder, Timing, WrongResult
from benchmarks.rows import pick, read
from jointnas.verbs import bench
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency.timing import cache_bytes


def rows_of(folder: Path, topic: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{topic}.jsonl").read_text().splitlines()]


def test_timing_quantiles() -> None:
    timing = Timing.of([float(i) for i in range(101)])
    assert (timing.median, timing.p10, timing.p90, timing.n) == (50, 10, 90, 101)


def test_row_has_everything(tmp_path: Path) -> None:
    Recorder("topic", "cpu", tmp_path, commit="abc").row("op", Timing(1.0, 0.5, 2.0, 3), "s", {"share": 0.5}, m=4)
    (row,) = rows_of(tmp_path, "topic")
    assert (row["name"], row["params"], row["extra"]["share"], row["commit"]) == ("op", {"m": 4}, 0.5, "abc")
    keys = ("median", "p10", "p90", "n", "unit", "device", "driver", "torch", "triton", "python", "commit", "date")
    assert all(key in row for key in keys)


def test_what_has_its_row_is_left_out_on_resuming(tmp_path: Path) -> None:
    """One file of several topics; a line that was cut is no row, and takes none along."""
    file = tmp_path / "rows.jsonl"
    for topic in ("a", "b"):
        Recorder(topic, "cpu", file).row("op", 1.0, m=4, kind="x")
    file.write_text(file.read_text() + '{"topic": "a", "na')
    again = Recorder("a", "cpu", file, resume=True)
    assert again.has("op", m=4)
    assert not again.has("op", m=5)
    again.row("op", 2.0, m=4, kind="x")
    again.row("op", 3.0, m=5, kind="x")
    assert [(row["topic"], row["median"]) for row in read(file)] == [("a", 1), ("b", 1), ("a", 3)]
    assert not Recorder("a", "cpu", file).has("op", m=4)


def test_gate_refuses_wrong_and_nan() -> None:
    exact = torch.ones(4)
    assert harness.gate("op", {"y": (exact * (1 + 1e-4), exact)}, 1e-3) == pytest.approx(1e-4, rel=1e-2)
    for wrong in (exact * 1.1, exact * float("nan")):
        with pytest.raises(WrongResult, match="op: y is off"):
            harness.gate("op", {"y": (wrong, exact)}, 1e-3)


def test_peak_memory_sees_temporaries() -> None:
    x = torch.randn(4_000_000)
    peak = harness.peak_memory(lambda: (x + 1).sum(), "cpu")
    assert 12e6 < peak < 64e6


def test_rotation_exceeds_the_cache() -> None:
    assert len(harness.rotation(lambda: 0, 32 << 20, "cpu")) * (32 << 20) > 2 * cache_bytes(torch.device("cpu"))


def test_interleaved_runs_every_contender_equally_often() -> None:
    calls = {"a": 0, "b": 0}

    def call(name: str) -> None:
        calls[name] += 1

    times = harness.time_interleaved({n: lambda n=n: call(n) for n in calls}, rounds=3, warmup=2)  # type: ignore[misc]
    assert calls == {"a": 5, "b": 5}
    assert times["a"].n == 3


def test_guard_keeps_going(capsys: pytest.CaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("no")

    harness.guarded("thing", fail)
    assert "FAILED thing" in capsys.readouterr().out


def test_mask_variants_agree() -> None:
    bench_masks.check_variants()


def test_search_spaces_of_the_mask_benchmark() -> None:
    counts = [bench_masks.candidates(s, 32) for s in bench_masks.SPACES]
    assert counts == sorted(counts)
    assert counts[3] == 15360


@pytest.mark.slow
def test_every_benchmark_runs_and_renders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "results" / "machine"
    options = ["--device", "cpu", "--tiny", "--out", str(folder)]
    bench_kernels.main([*options, "--no-compile"])
    bench_masks.main(options)
    bench_step.main([*options, "--panels", "main"])
    bench_ptq.main([*options, "--schemes", "w4a4", "--methods", "16bit", "rtn", "omniquant", "supernet"])
    assert "FAILED" not in capsys.readouterr().out
    names = {row["name"] for row in rows_of(folder, "kernels")}
    assert {"mixed_rmsnorm", "masked_rope", "masked_swiglu", "gated_residual", "act_quant_mix"} <= names
    assert "mixed_rmsnorm_quant" in names
    assert {"ours", *bench_masks.PEERS} == {row["name"] for row in rows_of(folder, "masks")}
    assert {"llama3 arch step", "qllama3 arch step"} <= {row["name"] for row in rows_of(folder, "step")}
    monkeypatch.setattr(render, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sections, "PLOTS", tmp_path / "plots")
    text = render.sections()
    assert "mixed_rmsnorm" in text
    assert "stored masks (Eq. 9)" in text
    assert "qllama3 arch step" in text
    assert "| W4A4 | learned |" in text
    render.draw()
    assert len(list((tmp_path / "plots").glob("masks-*.png"))) == 1
    assert "loops over sub-matrices" in render.summary()


def test_choices_in_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One choice of the embedded model; a second call has nothing left to do."""
    pytest.importorskip("xllamacpp")
    folder = tmp_path / "results" / "machine"
    for _ in range(2):
        bench_gguf.main(["--device", "cpu", "--tiny", "--out", str(folder)])
    (row,) = rows_of(folder, "gguf")
    assert row["median"] <= 1e-3
    assert row["extra"]["unexplained"] <= 2 * row["extra"]["rounding"]
    assert row["extra"]["reloaded"] == 0
    monkeypatch.setattr(render, "RESULTS", tmp_path / "results")
    assert "| embedded | 1 |" in render.sections()


@pytest.mark.slow
def test_depth_by_importance_and_from_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The embedded model whole and without all blocks but one, untrained and after a step; what is known stays."""
    folder = tmp_path / "results" / "machine"
    for _ in range(2):
        bench_depth.main(["--device", "cpu", "--tiny", "--resume", "--out", str(folder)])
    rows = rows_of(folder, "depth")
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        p, extra = row["params"], row["extra"]
        assert len(extra["kept"]) == 6 - p["dropped"]
        assert row["median"] == pytest.approx(math.log(extra["perplexity"]))
    whole = pick(rows, dropped=0, steps=0)
    assert whole[0]["median"] == pytest.approx(whole[1]["median"], rel=1e-5)
    assert pick(rows, "last", dropped=5, steps=0)[0]["extra"]["kept"] == [0]
    cut = pick(rows, "importance", dropped=5, steps=0)[0]
    assert cut["median"] > whole[0]["median"]
    assert pick(rows, "importance", dropped=5, steps=1)[0]["median"] != cut["median"]
    monkeypatch.setattr(render, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sections, "PLOTS", tmp_path / "plots")
    assert "| blocks dropped | by importance, untrained | the last, untrained | by imp" in render.sections()
    render.draw()
    assert len(list((tmp_path / "plots").glob("depth-*-embedded.png"))) == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_as_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own takes what the dry run says; what it needs besides is a few MB, of some 100 here."""
    folder = tmp_path / "results" / "machine"
    bench_memory.main(["--device", "cpu", "--tiny", "--out", str(folder)])
    rows = rows_of(folder, "memory")
    assert len(rows) == 3
    for row in rows:
        assert 0.85 < row["extra"]["ratio"] < 1.1
    monkeypatch.setattr(render, "RESULTS", tmp_path / "results")
    assert "| tiny | " in render.sections()


@pytest.mark.slow
def test_tokens_of_whole_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "results" / "machine"
    bench_decode.main(["--device", "cpu", "--tiny", "--no-compile", "--out", str(folder)])
    assert "FAILED" not in capsys.readouterr().out
    rows = rows_of(folder, "decode")
    names = ["ours W4A8", "ours 16 bit", "torch"]
    if importlib.util.find_spec("xllamacpp"):
        names.insert(1, "llama.cpp Q4_0")
        ratios = {row["params"]["what"] for row in rows if "against" in row["extra"]}
        assert ratios == {"decode", "prefill"}
    for model in ("embedded", blocks.SHOWN):
        for what in ("decode", "prefill"):
            here = pick(rows, model=model, what=what)
            assert [row["name"] for row in here] == names
            assert all((row["extra"].get("share", 0) > 0) == (what == "decode") for row in here)
    monkeypatch.setattr(render, "RESULTS", tmp_path / "results")
    text = render.sections()
    assert f"**A token of {blocks.SHOWN}, batch 1" in text
    assert "| ours W4A8 | 4 MB |" in text
    assert f"a token of {blocks.SHOWN} after 8, W4A8" in render.summary() or len(names) == 3


@pytest.mark.slow
def test_a_compiled_model_computes_what_torch_does() -> None:
    """Prompts that are only opened are read eagerly, tokens by the compiled code, in a cache that is used again."""
    model = models.LlamaForCausalLM(models.llama_tiny(1)).eval()
    ids = torch.arange(1, 17)
    compiled, eager = bench_decode.Compiled(model, ids, 3), bench_decode.InTorch(model, model, ids, 3)
    with torch.inference_mode():
        for context in (5, 9):
            for run in (compiled, eager):
                run.open(context)
                assert run.decode() > 0
            assert harness.gate("compiled", {"logits": (compiled.next(), eager.next())}, 1e-4) <= 1e-4
        assert compiled.prefill() > 0


def test_contenders_that_compute_something_else_are_not_timed() -> None:
    bench_decode.alike("a", [1, 2, 3, 4], [1, 2, 3, 5])
    with pytest.raises(WrongResult, match="a: 25% of 4 tokens"):
        bench_decode.alike("a", [1, 2, 3, 4], [1, 3, 2, 5])


@pytest.mark.slow
def test_predictions_of_whole_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "results" / "machine"
    bench_calibration.main(["--device", "cpu", "--tiny", "--modes", "decode", "--model", "embedded", "blocks",
                            "--out", str(folder)])  # fmt: skip
    assert "FAILED" not in capsys.readouterr().out
    rows = rows_of(folder, "calibration")
    for model, acts in (("embedded", (4, 8, 16)), (blocks.SHOWN, (8, 16))):
        here = [row for row in rows if row["params"]["model"] == model]
        assert [row["params"]["set"] for row in pick(here, "mape")] == list(bench_calibration.SETS)
        held_out = [row for row in pick(here, "model") if row["params"]["set"] != "fit"]
        assert sum(row["extra"]["models"] for row in pick(here, "mape")) == len(held_out)
        schemes = [f"W{w}A{a}" for w in (2, 4, 8) for a in acts]
        assert [row["params"]["scheme"] for row in pick(here, "speed-up")] == schemes
        assert all(row["median"] > 0 and row["extra"]["predicted"] > 0 for row in pick(here, "speed-up"))
    monkeypatch.setattr(render, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sections, "PLOTS", tmp_path / "plots")
    text = render.sections()
    for words in (*sections.KINDS.values(), "Speed-up of one precision", "W2A4"):
        assert words in text
    render.draw()
    assert len(list((tmp_path / "plots").glob("calibration-*.png"))) == 2
    assert "latency table, decode 1 × 128 of embedded: error" in render.summary()


def test_sets_of_models_differ_in_what_they_say() -> None:
    config = blocks.config_of("embedded")
    space = bench_calibration.space_of("embedded", config, 64)
    plain = bench_calibration.unquantized(space)
    assert [c.blocks for c in plain.structures()] == list(space.blocks)
    assert plain.full().weight_bits is None
    only_bits = bench_calibration.whole(space)
    assert only_bits.size() == (3 * 3) ** only_bits.depth
    other = bench_calibration.space_of("blocks", blocks.config_of("blocks", tiny=True), 64)
    assert (other.blocks, other.head_bits, other.group_size) == ((1, 2), (8, 16), 64)


def test_texts_are_up_to_date() -> None:
    """`python benchmarks/render.py` would change neither README.md nor docs/results.md."""
    assert render.main(["--check"]) == 0


def test_every_picture_is_there() -> None:
    pages = [*render.ROOT.glob("*.md"), *render.ROOT.glob("docs/*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())]
    assert len(links) > 5
    files = {(page.resolve().parent / link).resolve() for page, link in links}
    assert [file for file in files if not file.is_file()] == []
    assert set((render.ROOT / "docs" / "plots").resolve().iterdir()) <= files, "a plot that no page shows"


def test_kernels_that_are_no_longer_chosen_are_not_ours() -> None:
    def row(name: str, scheme: str, m: int, us: int, **extra: str) -> dict:
        return {"name": name, "params": {"scheme": scheme, "m": m}, "median": us, "device": "GPU", "extra": extra}

    old = [row("ours", "w4a16", 512, 149), row("ours, wgmma", "w4a16", 512, 149), row("ours, dense", "w4a16", 512, 129)]
    found = pick(sections.chosen_today(old), "ours")
    assert [r["median"] for r in found] == [129], "the kernel of today, timed in the same run"
    assert pick(sections.chosen_today(old[:2]), "ours") == [], "no row of today's kernel: no row of ours"
    named = [row("ours", "w4a16", 512, 149, kernel="dense"), row("ours", "w4a16", 4096, 800)]
    assert sections.chosen_today(named) == named
    cpu = [row("ours", "w4a16", 512, 149) | {"device": "AMD EPYC 2 cores"}]
    assert sections.chosen_today(cpu) == cpu


def test_newest_row_wins(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"name": "a", "params": {"m": 1}, "date": f"2026-01-0{d}", "median": d} for d in (2, 3, 1)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert [r["median"] for r in render.newest(path)] == [3]


def test_rows_of_processors_of_one_name_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "RESULTS", tmp_path / "results")
    names = ["AMD EPYC 2 cores", *(f"AMD EPYC (family {f}) 2 cores" for f in ("25, model 17", "26, model 2"))]
    rows = rows_of(harness.RESULTS / "amd-epyc-2-cores", "step")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**r, "device": n}) + "\n" for n in names for r in rows))
    assert render.add([tmp_path / "rows.jsonl"]) == 3 * len(rows)
    assert render.add([tmp_path / "rows.jsonl"]) == 0
    assert [line for line in render.sections().splitlines() if line.startswith("#")] == [f"## {n}" for n in names]
    fewer = [r for r in render.newest(render.RESULTS / "amd-epyc-2-cores" / "step.jsonl") if "arch" not in r["name"]]
    (render.RESULTS / "amd-epyc-2-cores" / "step.jsonl").write_text("".join(json.dumps(r) + "\n" for r in fewer))
    shown = [line for line in render.summary().splitlines() if line.startswith("#")]
    assert shown == [f"### {names[1]}"], "README shows the one of a kind with most lines"
    assert set(render.devices()) == set(names)


def test_command_names_the_nearest_topic() -> None:
    with pytest.raises(JointNASError, match="Did you mean 'masks'"):
        bench.bench(["mask"])
    assert bench.bench([]) == 0
