"""Every script of examples/ runs, is short, uses public names only; README and the site show nothing but their text."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PUBLIC = ("jointnas", "jointnas_kernels.ops", "jointnas_kernels.hf", "jointnas_kernels.latency")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_runs(path: Path, tmp_path: Path) -> None:
    """In an empty folder; what it writes stays there. One thread: two on a busy machine wait for each other."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, path], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_is_short_and_public(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 60
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jointnas"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                assert whole in PUBLIC or (node.module in PUBLIC and alias.name in public(str(node.module))), whole
        elif isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if alias.name.startswith("jointnas")]
            assert all(name in PUBLIC for name in ours), ours


def public(module: str) -> list[str]:
    return list(importlib.import_module(module).__all__)


@pytest.mark.parametrize("page", ["README.md", "docs/how.md"])
def test_code_on_pages_is_that_of_the_examples(page: str) -> None:
    """A page's Python stands line by line, in this order, in one example; ``...`` is for what was left out."""
    scripts = [[line.strip() for line in path.read_text().splitlines()] for path in EXAMPLES]
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    for block in blocks:
        lines = [line.strip() for line in block.splitlines() if line.strip() not in ("", "...")]
        assert any(in_order(lines, script) for script in scripts), block


def in_order(lines: list[str], script: list[str]) -> bool:
    """Whether all lines occur in the script, one after the other."""
    rest = iter(script)
    return all(line in rest for line in lines)
