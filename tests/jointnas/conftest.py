"""Fixtures of several test files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.jointnas.brought import TEXT, save


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests copy from."""
    root = tmp_path_factory.mktemp("given")
    save(root / "m")
    (root / "t.txt").write_text(TEXT)
    return root


@pytest.fixture
def here(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, which is also the home folder, with a model `m` and a text `t.txt`; no network."""
    shutil.copytree(given, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / f"{tmp_path.name}.cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path
