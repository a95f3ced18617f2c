"""What a block launches, counted without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import instrument_sections, launch_count
from benchmarks.gpu_stages import ROOT
from benchmarks.rows import read

# In a process of its own: torch and Triton are others while it lasts.
PROGRAM = """
import json, torch
from benchmarks import instrument_sections, launch_count

with launch_count.counting() as launches:
    x = torch.ones(8, 16, device="cuda:0")
    launches.of = launch_count.Counts()
    y = (x.view(16, 8).t() @ x.new_empty(16, 4)).relu()
    y.sum().item()
    y.cpu()
    torch.zeros(3).add(1).tolist()
    q = torch.zeros(1, 2, 8, 16, device="cuda:0")
    torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    own = vars(launches.of)
print(json.dumps([own, launch_count.count()]))
"""


@pytest.fixture(scope="module")
def found() -> Any:
    env = os.environ | {"PYTHONWARNINGS": "ignore", "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "python")))}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_launches_are_what_reaches_the_device(found: Any) -> None:
    """No views, no allocations, nothing of the host; what the host reads is told apart."""
    own = found[0]
    launches = ["mm", "relu", "sum", "zeros", "_scaled_dot_product_flash_attention"]
    assert own == {"launches": launches, "reads": 2, "operators": 0}


def test_rows_are_of_this_code(found: Any) -> None:
    """`python -m benchmarks.launch_count` writes them again."""
    assert found[1] == read(launch_count.ROWS)


def test_the_host_waits_for_nothing_within_a_block(found: Any) -> None:
    for row in found[1]:
        assert [row["parts"][part]["reads"] for part in launch_count.PARTS] == [0, 0], row["params"]


def test_a_table_is_made_of_rows(tmp_path: Path) -> None:
    assert instrument_sections.launch_count(tmp_path / "none.jsonl") == ""
    assert "| qllama3 weight step, 8 × 128 tokens, bf16" in instrument_sections.launch_count(launch_count.ROWS)


# Launches of a block, forward and backward. What is above the goal of 12 and 30 says why.
BOUNDS = {
    # forward: W~ of all, four products, attention and rope, two norms, o's quantizer, swiglu with down's, the last sum
    # backward: attention (5) and rope, four products, 8 for dA and dB, two norms, a quantizer, swiglu, a mask, a sum
    ("qllama3", "weight"): (12, 24),
    # backward: four products of dX, of dW and reductions of these; one column sum each for the two norms and rope
    ("qllama3", "arch"): (12, 28),
    # W x and B u are the library's products of each linear (14), and u of each input (4): no product has three factors
    ("llama3", "weight"): (27, 43),
    ("llama3", "arch"): (27, 36),
}


@pytest.mark.parametrize("space", launch_count.SPACES)
@pytest.mark.parametrize("mode", launch_count.MODES)
def test_no_launch_is_added(mode: str, space: str) -> None:
    for row in read(launch_count.ROWS):
        params = row["params"]
        if (params["space"], params["mode"], params["adapters"]) == (space, mode, "bf16"):
            found = [row["parts"][part]["launches"] for part in launch_count.PARTS]
            assert all(n <= most for n, most in zip(found, BOUNDS[space, mode], strict=True)), found
