"""The contracts of import-linter in pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.contracts.sources import ROOT

LINT = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(cache_dir=None, no_logo=True))"


def test_layers() -> None:
    """Imports go one way, by the contracts of pyproject.toml; the same by hand: `lint-imports`.

    In a process of its own: import-linter silences the loggers it finds.
    """
    path = os.pathsep.join((os.fspath(ROOT), os.fspath(ROOT / "python")))
    done = subprocess.run(
        [sys.executable, "-c", LINT], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
