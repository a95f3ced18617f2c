"""`auto`: the fastest device, the checkpoint's dtype; resolved once, and saved with the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from jointnas import cli, loading
from jointnas.bilevel import optimise
from jointnas.config import ModelConfig, RunConfig, build
from jointnas.preparation import prepare
from jointnas.run_folder import read_config
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency import LatencyTable, timing
from jointnas_kernels.latency.schema import Device
from tests.jointnas import tiny
from tests.latency.tables import SPACE, synthetic

CPUS = {
    "Zen 3": ("model name : AMD EPYC\nflags\t\t: fpu avx avx2 vaes\n", False),
    "Zen 4": ("processor : 0\nflags\t\t: avx2 avx512f avx512_bf16\n", True),
    "Sapphire Rapids": ("flags : amx_bf16 amx_tile amx_int8\n", True),
    "Skylake-X": ("flags : avx512f avx512bw avx512_vnni\n", False),
    "Neoverse V1": ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", True),
    "Neoverse N1": ("processor\t: 0\nFeatures\t: fp asimd asimddp\n", False),
    "unknown": ("", False),
}


def cpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(CPUS[name][0])
    monkeypatch.setattr(timing, "CPUINFO", tmp_path / "cpuinfo")


@pytest.mark.parametrize("name", CPUS)
def test_native_bf16(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(name, tmp_path, monkeypatch)
    assert timing.native_bf16() == CPUS[name][1]
    monkeypatch.setattr(timing, "CPUINFO", tmp_path / "none")
    assert not timing.native_bf16()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint, said to be of every dtype."""
    root = tmp_path_factory.mktemp("models")
    tiny.model().save_pretrained(root / "float32")
    for dtype in ("bfloat16", "float16", "none"):
        shutil.copytree(root / "float32", root / dtype)
        entries = json.loads((root / dtype / "config.json").read_text())
        entries.pop("dtype")
        (root / dtype / "config.json").write_text(json.dumps(entries | ({} if dtype == "none" else {"dtype": dtype})))
    return {f.name: f for f in root.iterdir()}


def gpu(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 * there)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "none"])
@pytest.mark.parametrize("machine", ["GPU", "Zen 4", "Zen 3"])
def test_model(
    stored: str, machine: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(machine == "GPU", monkeypatch)
    cpu("Zen 3" if machine == "GPU" else machine, tmp_path, monkeypatch)
    found = loading.resolve_model(ModelConfig(source=str(folders[stored])))
    assert found.device == ("cuda" if machine == "GPU" else "cpu")
    assert found.dtype == ("bfloat16" if stored == "bfloat16" and machine != "Zen 3" else "float32")
    assert loading.resolve_model(found) == found
    for dtype in ("float32", "bfloat16"):  # what was said stays
        said = ModelConfig(source=str(folders[stored]), dtype=dtype, device="cpu")
        assert loading.resolve_model(said) == said


def test_other_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model is float32 everywhere, Llama-3.1-8B is known to be stored in bfloat16."""
    cpu("Zen 4", tmp_path, monkeypatch)
    for there in (False, True):
        gpu(there, monkeypatch)
        assert loading.resolve_model(ModelConfig()).dtype == "float32"
        assert loading.resolve_model(ModelConfig(source="llama-3.1-8b")).dtype == "bfloat16"


@pytest.mark.parametrize("device, message", [
    ("tpu", "unknown device 'tpu'; allowed: auto, cpu, cuda, cuda:N"),
    ("cuda:2", "device 'cuda:2' was asked for, but there are 2: cuda:0 to cuda:1"),
])  # fmt: skip
def test_devices_that_are_not_there(device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(True, monkeypatch)
    assert loading.resolve_model(ModelConfig(device="cuda:1")).device == "cuda:1"
    with pytest.raises(JointNASError, match=message):
        loading.resolve_model(ModelConfig(device=device))
    gpu(False, monkeypatch)
    with pytest.raises(JointNASError, match="torch sees no CUDA device"):
        loading.resolve_model(ModelConfig(device="cuda:1"))


def test_a_table_is_of_the_models_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(False, monkeypatch)
    for name, dtype in (("Zen 4", "bfloat16"), ("Zen 3", "float32")):
        cpu(name, tmp_path, monkeypatch)
        resolved = loading.resolve(build(RunConfig, {"model": {"source": "llama-3.1-8b"}}))
        assert resolved.latency.value().dtype == resolved.model.dtype == dtype
    said = loading.resolve(build(RunConfig, {"latency": {"dtype": "float16"}}))
    assert said.latency.value().dtype == "float16"


def test_a_run_keeps_what_auto_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.yaml says so, and the run cannot be resumed with another meaning."""
    gpu(False, monkeypatch)
    config = tiny.config(tmp_path / "run", search={"steps": 2})
    assert (config.model.device, config.model.dtype, config.latency.dtype) == ("auto", "auto", "auto")
    optimise(tiny.start(config))
    saved = read_config(tmp_path / "run")
    assert (saved.model.device, saved.model.dtype, saved.latency.dtype) == ("cpu", "float32", "float32")
    monkeypatch.setattr(loading, "resolve_model", lambda m: m.model_copy(update={"device": "cpu", "dtype": "bfloat16"}))
    with pytest.raises(JointNASError, match=r"another configuration: model\.dtype was 'float32', is 'bfloat16'"):
        optimise(tiny.start(config.model_copy(update={"resume": "auto"})))


def test_every_verb_takes_the_gpu(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one, without being told: the device that reaches the first thing that would use it."""
    gpu(True, monkeypatch)
    used: list[tuple[str, str]] = []

    def stop(config: Any, *_: Any, **__: Any) -> Any:
        model = loading.resolve(config).model if isinstance(config, RunConfig) else loading.resolve_model(config)
        used.append((model.device, model.dtype))
        raise JointNASError("stop")

    monkeypatch.setattr(loading, "load_model", stop)
    monkeypatch.setattr("jointnas.verbs.table.measure_table", stop)
    monkeypatch.setattr("jointnas.verbs.demo.with_target", stop)
    source, out = ["--model.source", str(folders["bfloat16"])], ["--out", str(tmp_path / "out")]
    space = [f"--space.{k}={json.dumps(v)}" for k, v in tiny.SPACE.items()]
    search = ["search", *source, *space, "--eval.tasks=[]"]
    verbs = (search, ["quantize", *source, "--bits.group_size=64"], ["profile", *source, *space])
    for arguments in verbs:
        assert cli.main([*arguments, *out]) == 2
    assert used == [("cuda", "bfloat16")] * 3
    assert cli.main(["demo", *out]) == 2
    assert used[-1] == ("cuda", "float32")
    profile = ["profile", *source, *space]
    for arguments in ([*search, "--model.device=cpu"], [*profile, "--device=cpu"], [*profile, "--model.device=cpu"]):
        assert cli.main([*arguments, *out]) == 2
        assert used[-1][0] == "cpu"


def test_tables_of_whichever_device_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = synthetic(SPACE)
    table.save(tmp_path / "cpu.jsonl")
    there = Device(type="cuda", name="NVIDIA H200", arch="sm_90", threads=0)
    header = table.header.model_copy(update={"device": there, "runtime": "graph"})
    LatencyTable(header, table.rows).save(tmp_path / "cuda.jsonl")
    real = timing.describe
    described = lambda d, t=None: there if d == "cuda" else real(d, t)  # noqa: E731
    monkeypatch.setattr("jointnas_kernels.latency.table.describe", described)
    for available in (True, False):
        gpu(available, monkeypatch)
        LatencyTable.load(tmp_path / "cpu.jsonl", "auto")
    with pytest.raises(JointNASError, match="was measured on cuda 'NVIDIA H200'"):
        LatencyTable.load(tmp_path / "cuda.jsonl", "auto")
    gpu(True, monkeypatch)
    assert LatencyTable.load(tmp_path / "cuda.jsonl", "auto").header.device == there
    with pytest.raises(JointNASError, match="was measured on cuda"):
        LatencyTable.load(tmp_path / "cuda.jsonl", "cpu")


def test_a_given_model_stays_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu(True, monkeypatch)
    config = tiny.config(tmp_path)
    run = prepare(config, tiny.model(), tiny.streams(), synthetic(config.space.build()))
    assert (run.config.model.device, run.config.model.dtype) == ("cpu", "float32")
