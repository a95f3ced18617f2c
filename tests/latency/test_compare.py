"""Differences of tables, merging several, and interpolation between measured sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from jointnas import cli, loading, plots
from jointnas.config import ModelConfig
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency import LatencyTable, OpSpec, compare, interpolate, measure_choices
from jointnas_kernels.latency.interpolation import between, measured_by
from jointnas_kernels.latency.schema import INTERPOLATED, Device
from jointnas_kernels.space import Choice, SearchSpace
from tests.latency.tables import CONFIG, calm, cost, synthetic


def changed(table: LatencyTable, factors: dict[int, float]) -> LatencyTable:
    """Rows of these indices take that much longer."""
    rows = [
        r.model_copy(update={k: getattr(r, k) * factors.get(i, 1.0) for k in ("median", "p10", "p90")})
        for i, r in enumerate(table.rows)
    ]
    return LatencyTable(table.header, rows)


def test_largest_changes_come_first_either_way(table: LatencyTable) -> None:
    found = compare(table, changed(table, {3: 1.5, 7: 0.25, 11: 3.0}))
    assert [c.spec for c in found.changes[:3]] == [table.rows[i].spec for i in (7, 11, 3)]
    assert [c.ratio for c in found.changes[:4]] == pytest.approx([0.25, 3.0, 1.5, 1.0])
    text = found.text(limit=2).splitlines()
    assert "median 1.000" in text[2]
    assert "from 0.250 to 3.000" in text[2]
    assert "0.250x" in text[3]
    assert text[5].endswith(f"and {len(table.rows) - 2} smaller changes")


def test_operations_in_one_table_only(table: LatencyTable) -> None:
    found = compare(LatencyTable(table.header, table.rows[2:]), LatencyTable(table.header, table.rows[:-3]))
    assert [len(o) for o in found.only] == [3, 2]
    assert "only in a: 3 operations" in found.text()
    assert "no operation is measured in both" in compare(table, LatencyTable(table.header, [])).text()


def test_compare_on_the_command_line(tmp_path: Path, table: LatencyTable, capsys: pytest.CaptureFixture[str]) -> None:
    other = table.header.model_copy(update={"device": Device(type="cuda", name="H", arch="sm_90", threads=0)})
    table.save(tmp_path / "a.jsonl")
    LatencyTable(other, changed(table, {0: 2.0}).rows).save(tmp_path / "b.jsonl")
    assert cli.main(["table", "diff", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "2.000x" in out
    assert "b: cuda 'H' sm_90" in out
    assert cli.main(["table", "diff", str(tmp_path / "a.jsonl")]) == 2
    assert "the following arguments are required: second" in capsys.readouterr().err
    memory = table.header.model_copy(update={"metric": "memory", "unit": "B"})
    LatencyTable(memory, table.rows).save(tmp_path / "m.jsonl")
    assert cli.main(["table", "diff", str(tmp_path / "a.jsonl"), str(tmp_path / "m.jsonl")]) == 2
    assert "a table of latency cannot be compared with one of memory" in capsys.readouterr().err


def test_merge_on_the_command_line(tmp_path: Path, table: LatencyTable, capsys: pytest.CaptureFixture[str]) -> None:
    third = len(table.rows) // 3
    paths = [str(tmp_path / f"{i}.jsonl") for i in range(3)]
    for path, rows in zip(paths, (table.rows[: 2 * third], table.rows[third:], table.rows[:1]), strict=True):
        LatencyTable(table.header, rows).save(path)
    out = tmp_path / "merged.jsonl"
    assert cli.main(["table", "merge", *paths, "--out", str(out)]) == 0
    assert {r.spec for r in LatencyTable.load(out).rows} == {r.spec for r in table.rows}
    capsys.readouterr()
    assert cli.main(["table", "merge", *paths, "--out", str(out)]) == 2
    assert "exists; choose another file" in capsys.readouterr().err
    elsewhere = table.header.model_copy(update={"device": Device(type="cuda", name="H", arch="sm_90", threads=0)})
    LatencyTable(elsewhere, table.rows).save(paths[1])
    for force, message in (([], "was measured on cuda 'H'"), (["--force"], "cannot be merged: different device")):
        assert cli.main(["table", "merge", *paths, "--out", str(tmp_path / "n.jsonl"), *force]) == 2
        assert message in capsys.readouterr().err


def test_coverage_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model's tiny space against a table of another one: most is missing, and said so."""
    table = synthetic(feasible=lambda s: (s.wbits, s.abits) != (2, 8))
    table.save(tmp_path / "t.jsonl")
    assert cli.main(["table", "show", str(tmp_path / "t.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "W2A8 infeasible: not on this device" in out
    assert "for this space: 9 of 215 operations measured, 206 not yet tried" in out
    assert "unfinished" not in out


def test_coverage_of_an_unfinished_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is there is told, and the file is left as it is; one that is damaged otherwise, or of another device, is
    refused as ever, and whatever uses a table still wants it whole."""
    path = tmp_path / "t.jsonl"
    synthetic(feasible=lambda s: (s.wbits, s.abits) != (2, 8)).save(path)
    lines = path.read_bytes().splitlines(keepends=True)
    cut = b"".join(lines[:-20]) + lines[-20][:25]
    path.write_bytes(cut)
    assert cli.main(["table", "show", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"of {len(lines) - 21} operations measured" in out
    assert "the table is unfinished; run `jointnas profile --resume`" in out
    assert "for this space: 6 of 215 operations measured, 209 not yet tried" in out
    path.write_bytes(lines[0])
    assert cli.main(["table", "show", str(path)]) == 0
    assert "0 of 0 operations measured" in capsys.readouterr().out
    path.write_bytes(cut)
    for used in (["draw", str(path)], ["merge", str(path), str(path)], ["fill", str(path)]):
        assert cli.main(["table", *used, "--out", str(tmp_path / "o")]) == 2
        assert "is truncated" in capsys.readouterr().err
    assert path.read_bytes() == cut
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(lines[0].replace(b'"type":"cpu"', b'"type":"cuda"') + b"".join(lines[1:9]))
    assert cli.main(["table", "show", str(path)]) == 2
    assert "was measured on cuda" in capsys.readouterr().err
    path.write_bytes(lines[0] + b"garbage\n" + lines[1])
    assert cli.main(["table", "show", str(path)]) == 2
    assert "line 2: not valid JSON" in capsys.readouterr().err


def test_heatmap(tmp_path: Path, table: LatencyTable, capsys: pytest.CaptureFixture[str]) -> None:
    table.save(tmp_path / "t.jsonl")
    out = tmp_path / "t.png"
    assert cli.main(["table", "draw", str(tmp_path / "t.jsonl"), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    dense = [r for r in table.rows if r.wbits == 16]
    with pytest.raises(JointNASError, match="no quantized linears"):
        plots.table_heatmap(LatencyTable(table.header, dense), out)


# ---- interpolation --------------------------------------------------------------------------------------------------

WIDE = SearchSpace((64, 128), (2, 4), (16, 32), (64, 96, 128, 192), (1, 2, 3), (2, 4, 8), (8, 16), group_size=32)
ENDS = SearchSpace((64, 128), (2, 4), (16, 32), (64, 192), (1, 2, 3), (2, 4, 8), (8, 16), group_size=32)


def test_sizes_between_measured_ones_are_linear() -> None:
    """The made-up cost is linear in each size and the sizes are multiples of the tile: interpolation is exact."""
    filled = interpolate(synthetic(ENDS), WIDE, CONFIG)
    assert not filled.coverage(WIDE, CONFIG).missing
    new = [r for r in filled.rows if r.backend == INTERPOLATED]
    assert {96, 128} == {r.n for r in new if r.op == "swiglu"}
    for row in new:
        assert row.value == pytest.approx(cost(row.spec), rel=1e-9)
    choice = WIDE.full()
    assert filled.predict(choice, WIDE) == pytest.approx(synthetic(WIDE).predict(choice, WIDE), rel=1e-9)


def test_within_a_tile_the_cost_is_the_tiles() -> None:
    table = synthetic(SearchSpace((128,), (4,), (32,), (64, 128), (1,)))
    row = between(table, OpSpec("swiglu", 16, 81, 0))
    assert row is not None
    assert row.value == pytest.approx(cost(OpSpec("swiglu", 16, 96, 0)))


@pytest.mark.parametrize("spec", [OpSpec("swiglu", 16, 48, 0), OpSpec("swiglu", 16, 256, 0)], ids=["below", "above"])
def test_nothing_beyond_the_ends(spec: OpSpec) -> None:
    assert between(synthetic(ENDS), spec) is None


def test_nothing_across_a_missing_operation() -> None:
    """A neighbour that is infeasible stops it, although a farther one was measured."""
    table = synthetic(WIDE, feasible=lambda s: not (s.op == "swiglu" and s.n == 96))
    assert between(table, OpSpec("swiglu", 16, 80, 0)) is None
    assert between(table, OpSpec("swiglu", 16, 112, 0)) is None
    assert between(table, OpSpec("swiglu", 16, 160, 0)) is not None
    # two sizes at once are not interpolated
    assert between(table, OpSpec("linear", 16, 100, 100)) is None


def test_interpolated_rows_are_no_neighbours() -> None:
    """A second interpolation must not go on where the first one had to stop: two sizes away from what was measured."""
    space = SearchSpace((64, 96, 128), (4,), (32,), (64, 96, 128), (1, 2, 3), (4,), None, group_size=32)
    corners = SearchSpace((64, 128), (4,), (32,), (64, 128), (1, 2, 3), (4,), None, group_size=32)
    once = interpolate(synthetic(corners), space, CONFIG)
    missing = once.coverage(space, CONFIG).missing
    assert OpSpec("linear", 16, 96, 96) in missing
    assert interpolate(once, space, CONFIG).coverage(space, CONFIG).missing == missing


SIZES = [
    "--space.hidden=[256]", "--space.heads=[4]", "--space.head_dim=[64]", "--space.blocks=[2,6]",
    "--space.weight_bits=[8]", "--space.act_bits=[8]",
]  # fmt: skip
LINE = [
    "--progress=false", "--latency.seq=4", "--latency.seconds_per_operation=1e-4",
    '--latency.backends=["torch","torch-int8"]', "--latency.threads=1", "--latency.calibrate=0",
    "--latency.busy=mark",
]  # fmt: skip


def test_measured_beside_interpolated() -> None:
    """Both stand in the file of a profile that takes interpolated rows' place and was killed."""
    filled = interpolate(synthetic(ENDS), WIDE, CONFIG)
    (first, *_) = (r for r in filled.rows if r.backend == INTERPOLATED)
    slower = first.model_copy(update={"backend": "torch", "median": 2 * first.median, "p90": 3 * first.median})  # type: ignore[operator]
    both = LatencyTable(filled.header, [*filled.rows, slower])
    assert both.best(first.spec) == slower
    assert both.coverage(WIDE, CONFIG).interpolated == filled.coverage(WIDE, CONFIG).interpolated - 1


@pytest.mark.slow
def test_resuming_a_finished_table_on_the_command_line(tmp_path: Path) -> None:
    """What was disturbed and what is new is measured, then the whole models."""
    path = tmp_path / "t.jsonl"
    line = ["profile", "--out", str(path), *SIZES, *LINE, "--latency.calibrate=2"]
    assert cli.main([*line, '--latency.backends=["torch","ours-cpu"]']) == 0
    first = LatencyTable.load(path)
    assert first.calibration is not None
    busy = {"contended": True, "p10": 1e3, "median": 1e3, "p90": 1e3}
    rows = [r.model_copy(update=busy) if r.op == "norm" else r for r in first.rows]
    LatencyTable(first.header, rows, first.calibration).save(path)
    backends = '--latency.backends=["torch","ours-cpu","torch-int8"]'
    assert cli.main([*line, backends, "--resume"]) == 0
    second = LatencyTable.load(path)
    assert second.calibration not in (None, first.calibration)
    assert {r.backend for r in second.rows} == {"torch", "ours-cpu", "torch-int8"}
    assert not [r for r in second.rows if r.median == 1e3]


def test_interpolation_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the ends of the embedded model's MLP sizes to one between them, and back to measuring it."""
    path = tmp_path / "ends.jsonl"
    assert cli.main(["profile", "--out", str(path), "--space.intermediate=[256,768]", *SIZES, *LINE]) == 0
    between_them = ["--space.intermediate=[256,512,768]", *SIZES]
    assert cli.main(["table", "fill", str(path), "--out", str(tmp_path / "more.jsonl"), *between_them]) == 0
    out = capsys.readouterr().out
    assert "5 operations interpolated, 0 still missing" in out
    assert cli.main(["table", "show", str(tmp_path / "more.jsonl"), *between_them]) == 0
    assert "5 interpolated between measured sizes" in capsys.readouterr().out
    table = LatencyTable.load(tmp_path / "more.jsonl")
    new = {row.spec: measured_by(table, row) for row in table.rows if row.backend == INTERPOLATED}
    assert set(new.values()) == {"torch", "torch-int8"}
    space = SearchSpace((256,), (4,), (64,), (256, 512, 768), (2, 6), (8,), (8,))
    choice = Choice(256, 4, 64, 512, 2, (8,) * 6, (8,) * 6)
    config = loading.model_config(ModelConfig())
    (deployed,) = measure_choices(table, space, config, [choice], seconds=1e-3, watch=calm())
    assert deployed.median > 0
    assert cli.main(["table", "fill", str(path), "--out", str(tmp_path / "more.jsonl"), *between_them]) == 2
    assert "exists; choose another file" in capsys.readouterr().err
    assert cli.main(["profile", "--resume", "--out", str(tmp_path / "more.jsonl"), *between_them, *LINE]) == 0
    measured = LatencyTable.load(tmp_path / "more.jsonl")
    assert all(row.backend != INTERPOLATED for row in measured.rows)
    assert new.keys() <= set(measured.specs)
