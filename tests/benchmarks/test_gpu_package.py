"""A package for a GPU machine: packed, loaded, refused where it does not belong."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from benchmarks import gpu_package
from benchmarks.gpu_package import Stale, load, other_python, pack, sources

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout that the package belongs to."""
    for name in ("csrc/cpu/a.cpp", "csrc/b.h", "setup.py", "jointnas_kernels/__init__.py"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(name)
    return tmp_path / "root"


def package(root: Path, **changes: str) -> Path:
    folder = root.parent / "made"
    cached = folder / "triton" / "KEY"
    for name in ("_C.so", "site/some/__init__.py", "triton/KEY/kernel.cubin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    group = {"child_paths": {"kernel.cubin": "/where/it/was/KEY/kernel.cubin"}}
    (cached / "__grp__kernel.json").write_text(json.dumps(group))
    manifest = {"sources": sources(root), "suffix": SUFFIX, "triton": gpu_package.triton_version(), **changes}
    parts = {f"jointnas_kernels/_C{manifest['suffix']}": folder / "_C.so"}
    pack(root.parent / "package.tar.gz", manifest, {**parts, **{n: folder / n for n in ("site", "triton", "absent")}})
    return root.parent / "package.tar.gz"


def test_loaded(root: Path) -> None:
    """The extension beside its package, the rest into build/; the cache's files are where its groups say."""
    assert load(package(root), root) == ["extension", "packages", "Triton's cache"]
    assert (root / "jointnas_kernels" / f"_C{SUFFIX}").read_text() == "_C.so"
    assert (root / "build" / gpu_package.SITE.name / "some" / "__init__.py").is_file()
    (group,) = (root / "build" / gpu_package.CACHE.name).rglob("__grp__*.json")
    (file,) = json.loads(group.read_text())["child_paths"].values()
    assert Path(file).read_text() == "triton/KEY/kernel.cubin"


def test_a_cache_of_another_triton_is_left_out(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert load(package(root, triton="0.1"), root) == ["extension", "packages"]
    assert "its cache is of Triton 0.1" in capsys.readouterr().out


def test_stale_ones_are_refused(root: Path) -> None:
    with pytest.raises(Stale, match=r"for \.cpython-27-x.so, this Python takes"):
        load(package(root, suffix=".cpython-27-x.so"), root)
    for change in ("csrc/cpu/a.cpp", "csrc/new.cu", "setup.py"):
        file = package(root)
        (root / change).write_text("other")
        with pytest.raises(Stale, match=r"csrc/ or setup\.py are others"):
            load(file, root)
    assert not list((root / "jointnas_kernels").glob("*.so")), "nothing is unpacked"


def test_too_large_ones_are_not_made(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_package, "MOST", 10)
    with pytest.raises(SystemExit, match="more than"):
        package(root)
    assert not (root.parent / "package.tar.gz").exists()


def test_without_a_package_the_extension_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    built: list[list[str]] = []
    monkeypatch.setattr(gpu_package.subprocess, "run", lambda command, **_: built.append(command))
    monkeypatch.setattr(gpu_package, "check", lambda: "True")
    assert gpu_package.main(["load", str(tmp_path / "none.tar.gz")]) == 0
    assert "is not used" in capsys.readouterr().out
    assert built[0][1:] == ["setup.py", "-q", "build_ext", "--inplace"]


def test_only_bindings_and_target_are_another_pythons() -> None:
    own = sysconfig.get_paths()["include"]
    text = (
        f"build /here/_C.so: link /o/cpu_a.cpp.o /o/csrc_bindings.cpp.o\n  glue = -isystem {own} -isystem /pybind11\n"
    )
    found = other_python(text, "/include/python3.12", "cpython-312", Path("/o/_C.312.so"))
    assert found == (
        "build /o/_C.312.so: link /o/cpu_a.cpp.o /o/bindings.cpython-312.o\n"
        "  glue = -isystem /include/python3.12 -isystem /pybind11\n"
    )
