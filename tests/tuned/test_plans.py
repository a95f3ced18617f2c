"""Files of plans: what is read is what was written, nothing else is, and only where and with what it was measured."""

from __future__ import annotations

import importlib.util
import json
import logging
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools
import torch

import jointnas_kernels.tuned
from jointnas_kernels import tuned
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.tuned import Plans, Shape, lookup
from tests.contracts.sources import ROOT
from tests.tuned import samples
from tests.tuned.samples import H100, H200, KERNELS, row

SHAPE = Shape(4, 16, 4096, 4096)
SHIPPED = sorted(Path(jointnas_kernels.tuned.__file__).parent.glob("*.json"))


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "x.json"
    rows = row(), row(tokens=64, kernel="dense", plan=None), row(tokens=32, kernel=None, plan=None)
    tuned.write(path, samples.tuned(*rows))
    assert tuned.read(path) == samples.tuned(*rows)
    tuned.write(path, samples.tuned())
    assert tuned.read(path) == samples.tuned()
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]
    assert tuned.read(tmp_path / "none.json") is None


def test_names_of_files() -> None:
    assert tuned.file_name(H100.name) == "nvidia-h100-80gb-hbm3.json"
    assert tuned.file_name(H200.name) == "nvidia-h200.json"


DAMAGES: dict[str, tuple[Any, str]] = {
    "version": (lambda d: d.update(version=2), "no file of tuned plans of version 1"),
    "rows": (lambda d: d.update(rows={}), "rows must be a list"),
    "row": (lambda d: d.update(rows=[3]), "row 1 must be an object, got 3"),
    "key": (lambda d: d.update(kernel="x"), "unknown key 'kernel'"),
    "missing": (lambda d: d["device"].pop("capability"), "device: capability is missing"),
    "row-key": (lambda d: d["rows"][0].update(token=1), "row 1. Did you mean 'tokens'?"),
    "kernel": (lambda d: d["rows"][0].update(kernel="fast"), "row 1: kernel cannot be 'fast'"),
    "type": (lambda d: d["rows"][0].update(tokens=True), "row 1: tokens cannot be True"),
    "zero": (lambda d: d["rows"][0].update(w_bits=0), "row 1: w_bits cannot be 0"),
    "time": (lambda d: d["rows"][0].update(ms=float("nan")), "row 1: ms cannot be nan"),
    "plan": (lambda d: d["rows"][0].update(plan=[1, 2, 3]), r"row 1: plan cannot be [1, 2, 3]"),
    "no-plan": (lambda d: d["rows"][0].update(plan=None), "kernel 'stream' cannot have plan None"),
    "dense-plan": (lambda d: d["rows"][0].update(kernel="dense"), "kernel 'dense' cannot have plan"),
    "range": (lambda d: d["rows"][0].update(least=17), "least = 17 is more than tokens = 16"),
    "dtype": (lambda d: d["rows"][0].update(dtype="float32"), "unknown dtype 'float32'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_in_a_file_is_named(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / tuned.file_name(H200.name)
    tuned.write(path, samples.tuned(row()))
    data = json.loads(path.read_text())
    change, message = DAMAGES[damage]
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(JointNASError) as error:
        tuned.read(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert tuned.load(H200, KERNELS, [tmp_path]) is None
    assert len(caplog.records) == 1


def test_a_cut_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    tuned.write(path, samples.tuned(row()))
    path.write_text(path.read_text()[:-9])
    with pytest.raises(JointNASError, match="cannot be read"):
        tuned.read(path)


def test_rows_hold_for_their_counts_of_tokens_only() -> None:
    rows = row(least=1, tokens=1), row(), row(least=17, tokens=32, kernel=None, plan=None)
    plans = Plans([samples.tuned(*rows)])
    found = {tokens: plans.find(tokens, SHAPE) for tokens in (1, 2, 8, 9, 16, 17, 32, 33)}
    assert found == {**dict.fromkeys(found), 1: rows[0], 9: rows[1], 16: rows[1]}
    assert plans.find(16, SHAPE._replace(outputs=4112)) is None
    assert plans.find(16, SHAPE._replace(dtype="float16")) is None
    assert plans.find(16, SHAPE._replace(planes=True)) is None


def test_the_users_rows_come_first(tmp_path: Path) -> None:
    """Also where they say that the usual plan is the fastest."""
    own, shipped = tmp_path / "own", tmp_path / "shipped"
    name = tuned.file_name(H200.name)
    kept = row(least=1, tokens=8, kernel=None, plan=None)
    tuned.write(own / name, samples.tuned(row(plan=(4, 1, 1, 1)), kept))
    tuned.write(shipped / name, samples.tuned(row(), row(least=1, tokens=8), row(least=17, tokens=32)))
    plans = tuned.load(H200, KERNELS, [own, shipped])
    assert plans is not None
    found = [plans.find(tokens, SHAPE) for tokens in (16, 8, 32)]
    assert [None if r is None else r.plan for r in found] == [(4, 1, 1, 1), None, (2, 2, 3, 1)]
    assert tuned.load(H200, KERNELS, [tmp_path]) is None


@pytest.mark.parametrize(
    ("device", "kernels", "why"),
    [
        (H100, KERNELS, "another device"), (replace(H200, multiprocessors=66), KERNELS, "another device"),
        (replace(H200, capability="10.0"), KERNELS, "another device"), (H200, "0" * 16, "other kernels"),
    ],
)  # fmt: skip
def test_plans_count_for_their_device_and_kernels_only(
    device: tuned.Device, kernels: str, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the file is called."""
    tuned.write(tmp_path / tuned.file_name(device.name), samples.tuned(row()))
    assert tuned.load(device, kernels, [tmp_path]) is None
    assert len(caplog.records) == 1
    assert why in caplog.text


def test_an_h200_takes_no_plans_of_an_h100(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tuned.write(tmp_path / tuned.file_name(H100.name), samples.tuned(row(), device=H100))
    with caplog.at_level(logging.WARNING):
        assert tuned.load(H200, KERNELS, [tmp_path]) is None
        assert tuned.load(H100, KERNELS, [tmp_path]) is not None
    assert not caplog.records


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("JOINTNAS_TUNED", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tuned.user_folder() == tmp_path / "cache" / "jointnas" / "tuned"
    monkeypatch.setenv("JOINTNAS_TUNED", str(tmp_path / "own"))
    assert tuned.user_folder() == tmp_path / "own"
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(lookup, "describe", lambda device: H200)
    monkeypatch.setattr(lookup, "kernels_here", lambda: "f" * 16)
    tuned.write(tmp_path / "own" / tuned.file_name(H200.name), samples.tuned(row()))
    tuned.forget()
    assert [tuned.plans(gpu) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1, "one warning for a stale file"
    monkeypatch.setattr(lookup, "kernels_here", lambda: KERNELS)
    tuned.forget()
    assert tuned.plans(gpu) is tuned.plans(gpu) is not None
    monkeypatch.setenv("JOINTNAS_TUNED", "")
    tuned.forget()
    assert tuned.plans(gpu) is None
    tuned.forget()


def test_a_cpu_has_no_plans() -> None:
    assert tuned.plans(torch.device("cpu")) is None


# --- what is shipped --------------------------------------------------------------------------------------------------


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("setup_of_the_package", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_hash_is_of_code_and_not_of_comments(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    for name in ("ptx.cuh", "lowbit_tile.cu", "act_quant_pack.cu", "quant_lora_mix.cu"):
        (folder / name).write_text(f"// of {name}\nint a = 1;\n")
    first = setup.lowbit_kernels()
    assert len(first) == 16
    assert int(first, 16)
    (folder / "ptx.cuh").write_text("// otherwise said\n  int a = 1;  // one\n")
    (folder / "quant_lora_mix.cu").write_text("int b;")
    assert setup.lowbit_kernels() == first
    (folder / "ptx.cuh").write_text("int a = 2;")
    assert setup.lowbit_kernels() != first


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_plans_are_of_these_kernels(path: Path, setup: ModuleType) -> None:
    file = tuned.read(path)
    assert file is not None
    assert path.name == tuned.file_name(file.device.name)
    assert file.kernels == setup.lowbit_kernels(), "measure again, or remove the file"


def test_plans_are_part_of_the_package() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "tuned/*.json" in data["jointnas_kernels"]
