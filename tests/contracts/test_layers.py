"""The contracts of import-linter in pyproject.toml."""

from __future__ import annotations

import os

import pytest
from importlinter.cli import lint_imports

from tests.contracts.sources import ROOT


def test_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """csrc -> ops -> nn -> hf -> latency -> jointnas -> benchmarks; the same by hand: `lint-imports`."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(os.fspath(ROOT / "python"))
    assert lint_imports(cache_dir=None, no_logo=True) == 0
