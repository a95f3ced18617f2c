"""What identifies a device, and that tables of another one are refused unless forced."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import harness
from jointnas import cli
from jointnas.config import RunConfig, build
from jointnas.preparation import load_table
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency import LatencyTable, Workload, describe, profile, timing
from tests.latency.tables import CONFIG, SPACE, calm

ZEN = "processor\t: {i}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\nstepping\t: 1\n\n"
ARM = "processor\t: {i}\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd0c\n\n"


def cpuinfo(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = folder / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr(timing, "CPUINFO", path)


def test_processors_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for family, model in ((25, 17), (26, 2)):
        cpuinfo(tmp_path, monkeypatch, "".join(ZEN.format(i=i, family=family, model=model) for i in range(2)))
        found.append(describe("cpu", 1).name)
        assert harness.device_name("cpu").startswith(f"{found[-1]} ")
    assert found == ["AMD EPYC (family 25, model 17)", "AMD EPYC (family 26, model 2)"]


def test_processors_without_family_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.platform, "processor", lambda: "")
    monkeypatch.setattr(timing.platform, "machine", lambda: "aarch64")
    cpuinfo(tmp_path, monkeypatch, "".join(ARM.format(i=i) for i in range(2)))
    assert timing.cpu_name() == "aarch64 (implementer 0x41, part 0xd0c)"
    cpuinfo(tmp_path, monkeypatch, "cpu\t\t: POWER9, altivec supported\nrevision\t: 2.2 (pvr 004e 1202)\n")
    assert timing.cpu_name() == "aarch64"
    (tmp_path / "cpuinfo").unlink()
    assert timing.cpu_name() == "aarch64"


def test_folder_of_benchmark_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "cpu_name", lambda: "AMD EPYC (family 25, model 17)")
    monkeypatch.setattr(harness.os, "cpu_count", lambda: 2)
    recorder = harness.Recorder("topic", "cpu", commit="abc")
    assert recorder.env["device"] == "AMD EPYC (family 25, model 17) 2 cores"
    assert recorder.file == harness.RESULTS / "amd-epyc-family-25-model-17-2-cores" / "topic.jsonl"


@pytest.fixture
def elsewhere(tmp_path: Path, table: LatencyTable) -> Path:
    """A table of a processor of the same name, as it was written before names had the family and model."""
    device = table.header.device.model_copy(update={"name": "AMD EPYC"})
    LatencyTable(table.header.model_copy(update={"device": device}), table.rows).save(tmp_path / "t.jsonl")
    return tmp_path / "t.jsonl"


def test_tables_of_another_device_are_refused(elsewhere: Path) -> None:
    with pytest.raises(JointNASError, match=r"measured on cpu 'AMD EPYC' .*, this device is cpu .*, or force its use"):
        LatencyTable.load(elsewhere)
    assert LatencyTable.load(elsewhere, force=True).rows
    with pytest.raises(JointNASError, match=r"cannot be continued: .* device \(cpu 'AMD EPYC' .*choose another file"):
        profile(SPACE, CONFIG, elsewhere, workload=Workload(seq=16), threads=1, progress=False, watch=calm())


def test_force_on_the_command_line(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["table", "show", str(elsewhere)]) == 2
    assert "was measured on cpu 'AMD EPYC'" in capsys.readouterr().err
    assert cli.main(["table", "show", str(elsewhere), "--force"]) == 0
    assert "operations measured" in capsys.readouterr().out


@pytest.mark.parametrize("force", [False, True])
def test_a_search_takes_them_only_by_force(elsewhere: Path, force: bool) -> None:
    config = build(RunConfig, {"latency": {"table": str(elsewhere), "force": force}})
    if force:
        assert load_table(config, SPACE, CONFIG).rows
        return
    with pytest.raises(JointNASError, match="force its use"):
        load_table(config, SPACE, CONFIG)
