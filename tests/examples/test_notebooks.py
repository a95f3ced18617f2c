"""Notebooks of examples/ are stored as they ran, name nothing of the machine they ran on, and run today.

Their step counts stand in the cell tagged `parameters`, whose values a test replaces: without a kernel, each notebook
runs as a script, on a tiny random model instead of its own.
"""

from __future__ import annotations

import ast
import base64
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.examples.test_examples import PUBLIC, ROOT, public
from tests.jointnas import tiny
from tests.jointnas.campaigns import WORDS
from tests.jointnas.tiny_tokenizers import of_words

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
SPACE = {**tiny.SPACE, "act_bits": [8]}
TINY: dict[str, dict[str, Any]] = {
    "compress_smollm2": {
        "MODEL": "model", "SPACE": {**SPACE, "head_bits": [4, 8]}, "TARGET_SHARE": 2.0, "SECONDS_PER_OPERATION": 1e-4,
        "WHOLE_MODELS": 2, "CALIBRATION_WINDOWS": 2, "SEARCH_STEPS": 2, "DISTIL_STEPS": 2, "EVAL_TOKENS": 256,
        "NEW_TOKENS": 4, "PROMPT": " ".join(WORDS[:5]),
    },
    "read_a_report": {
        "MODEL": "model", "SPACE": SPACE, "TARGET_SHARES": [2.0, 1.5], "SECONDS_PER_OPERATION": 1e-4,
        "WHOLE_MODELS": 2, "SEARCH_STEPS": 2, "DISTIL_STEPS": 2, "EVAL_TOKENS": 256,
    },
}  # fmt: skip
# absolute paths
ELSEWHERE = re.compile(r"(?<![\w.)/])/(?:tmp|work|root|home|usr|opt|mnt|Users|var|private)/|[A-Z]:\\\\")


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def test_all_are_known() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(TINY)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_is_stored_as_it_ran(path: Path) -> None:
    notebook = read(path)
    assert notebook.nbformat == 4
    nbformat.validate(notebook)
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    for output in outputs:
        assert output.output_type in ("stream", "display_data", "execute_result"), output
        assert output.get("name") != "stderr", output.text
        picture = output.get("data", {}).get("image/png", "")
        assert len(base64.b64decode(picture)) < 60_000
    assert path.stat().st_size < 300_000
    assert ELSEWHERE.findall(path.read_text()) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_is_public(path: Path) -> None:
    """Public names only, besides the sections of a configuration; short lines of text, too."""
    for node in ast.walk(ast.parse("\n".join(cell.source for cell in code_cells(path)))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jointnas"):
            module = str(node.module)
            names = [alias.name for alias in node.names]
            assert module in (*PUBLIC, "jointnas.config", "jointnas.compare_config", "jointnas_kernels"), module
            if module in PUBLIC:
                assert set(names) <= set(public(module)), names
    first, *_ = read(path).cells
    assert first.cell_type == "markdown"
    assert "**Time:**" in first.source
    assert "**Needs:**" in first.source
    assert all(len(line) <= 120 for cell in read(path).cells for line in cell.source.splitlines())


def with_parameters(path: Path) -> str:
    """The code of all cells, with the parameters of TINY."""
    parts, values = [], TINY[path.stem]
    for cell in code_cells(path):
        parts.append(cell.source)
        if "parameters" in cell.metadata.get("tags", ()):
            names = {node.id for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Name)}
            assert values.keys() <= names
            parts += [f"{name} = {value!r}" for name, value in values.items()]
    assert len(parts) == len(code_cells(path)) + len(values), "one cell is tagged `parameters`"
    return "\n".join(parts)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(path: Path, tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "model")
    of_words(" ".join(WORDS)).save_pretrained(tmp_path / "model")
    (tmp_path / "notebook.py").write_text(with_parameters(path))
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "notebook.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / path.stem).is_dir()
