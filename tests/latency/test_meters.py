"""Energy and memory in the latency table's schema."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jointnas import cli
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency import LatencyTable, OpSpec, Target, Workload, meters, profile
from jointnas_kernels.latency.meters import meter, weight_bytes
from jointnas_kernels.space import SearchSpace
from tests.latency.tables import CONFIG, calm

CPU = Target(torch.device("cpu"), Workload(seq=8), 2)
SPACE = SearchSpace((64,), (4,), (32,), (64,), (1, 2, 3), (4,), (8,), group_size=64)
CONFIG_64 = SimpleNamespace(**{**vars(CONFIG), "intermediate_size": 64})


def rapl(folder: Path, package: int, energy: int, limit: int = 10**9) -> Path:
    path = folder / f"intel-rapl:{package}"
    path.mkdir(exist_ok=True)
    (path / "max_energy_range_uj").write_text(f"{limit}\n")
    (path / "energy_uj").write_text(f"{energy}\n")
    return path


def test_energy_is_the_counters_difference_per_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packages, every call costs 3 mJ, one counter wraps around; cores inside a package are not counted twice."""
    rapl(tmp_path, 0, 999_990_000)
    rapl(tmp_path, 1, 5)
    (tmp_path / "intel-rapl:0:0").mkdir()
    spent = [999_990_000, 5]
    monkeypatch.setattr(meters, "WINDOW", 0.01)
    monkeypatch.setattr(meters._energy, "__defaults__", (0.01,))

    def run() -> None:
        spent[0], spent[1] = (spent[0] + 2000) % (10**9 + 1), spent[1] + 1000
        rapl(tmp_path, 0, spent[0])
        rapl(tmp_path, 1, spent[1])

    found = meter("energy", CPU, tmp_path)(OpSpec("linear", 1, 8, 8), [run], 0.0, None)
    assert found.median == pytest.approx(3.0)
    assert found.samples == meters.WINDOWS


def test_no_counter_is_one_error_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(JointNASError, match=r"has no readable RAPL counter; .* Use --metric latency or memory"):
        meter("energy", CPU, tmp_path)
    path = rapl(tmp_path, 0, 1)
    (path / "energy_uj").unlink()
    with pytest.raises(JointNASError, match=r"no readable RAPL counter \(FileNotFoundError\)"):
        meter("energy", CPU, tmp_path)
    with pytest.raises(JointNASError, match="unknown metric 'power'"):
        meter("power", CPU)


@pytest.mark.skipif(meters.POWERCAP.exists() and os.geteuid() == 0, reason="this machine may have RAPL counters")
def test_energy_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", "--out", str(tmp_path / "t.jsonl"), "--metric", "energy"]) == 2
    assert "the energy of this CPU cannot be measured" in capsys.readouterr().err
    assert not (tmp_path / "t.jsonl").exists()


def test_memory_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["hidden=[256]", "heads=[4]", "head_dim=[64]", "intermediate=[256]", "blocks=[2,6]", "weight_bits=[4]"]
    space = [f"--space.{size}" for size in (*sizes, "act_bits=[8]")]
    options = ["--latency.seq=4", "--latency.seconds_per_operation=1e-4", "--latency.threads=1", "--progress=false"]
    out = tmp_path / "t.jsonl"
    assert cli.main(["profile", "--out", str(out), "--metric", "memory", *options, *space]) == 0
    table = LatencyTable.load(out)
    assert (table.header.metric, table.header.unit, table.calibration) == ("memory", "B", None)
    assert cli.main(["table", "show", str(out), *space]) == 0
    assert "0 not yet tried" in capsys.readouterr().out


def test_weight_bytes() -> None:
    assert weight_bytes(OpSpec("linear", 1, 32, 128), CPU) == 32 * 128 * 4
    assert weight_bytes(OpSpec("linear", 1, 32, 128, 4, 8, 64), CPU) == 32 * 128 // 2 + 32 * 2 * 4
    assert weight_bytes(OpSpec("norm", 1, 32, 0), CPU) == 0


def test_memory_counts_what_a_call_allocates() -> None:
    read = meter("memory", CPU)
    megabytes = read(OpSpec("add", 1, 1, 0), [lambda: torch.ones(1 << 24) + 1], 0.0, None).median / 2**20
    # two tensors of 64 MiB; the process's resident size also moves by a few MiB of its own (seen: 1.6)
    assert 127 < megabytes < 140
    assert read(OpSpec("add", 1, 1, 0), [lambda: None], 0.0, None).median < 12 * 2**20


def test_memory_table(tmp_path: Path) -> None:
    path = tmp_path / "memory.jsonl"
    options = {
        "workload": Workload(seq=8), "threads": 1, "progress": False, "seconds_per_operation": 1e-4, "watch": calm(),
    }  # fmt: skip
    table = profile(SPACE, CONFIG_64, path, metric="memory", **options)  # type: ignore[arg-type]
    assert (table.header.metric, table.header.unit) == ("memory", "B")
    assert LatencyTable.load(path).rows == table.rows
    for row in table.rows:
        if row.median is not None and row.op in ("linear", "lm_head"):
            assert row.median >= weight_bytes(row.spec, CPU)
    assert table.predict(SPACE.full(), SPACE) > 0
    with pytest.raises(JointNASError, match="another metric"):
        profile(SPACE, CONFIG_64, path, **options)  # type: ignore[arg-type]
