"""Kernels compiled for a GPU that is not there: found again by the same launch, and by no other one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_package, triton_ahead
from benchmarks.gpu_stages import ROOT

# In a process of its own: torch and Triton are others while it lasts.
PROGRAM = """
import importlib.util, json, sys
from pathlib import Path
import torch
from benchmarks.absent_gpu import absent
from jointnas_kernels import ops

KERNEL = '''
import triton
import triton.language as tl

@triton.jit
def add(x_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at, mask=at < n) + ADDED, mask=at < n)
'''

def kernel(added):  # as another process would import it
    file = Path(sys.argv[1]) / "kernels.py"
    file.write_text(KERNEL.replace("ADDED", str(added)))
    spec = importlib.util.spec_from_file_location("kernels", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.add

launches = {"first": (0, 33, 4, 1), "again": (0, 35, 4, 1), "aligned size": (0, 32, 4, 1), "one": (0, 1, 4, 1),
            "alignment": (1, 33, 4, 1), "options": (0, 33, 8, 1), "source": (0, 33, 4, 2)}
compiled, said = {}, {}
with absent() as counter:
    for name, (offset, n, warps, added) in launches.items():
        before = counter.compiled
        kernel(added)[(1,)](torch.zeros(64, device="cuda")[offset:], n, BLOCK=64, num_warps=warps)
        compiled[name] = counter.compiled - before
    hits = counter.hits
    x = torch.randn(7, 129, device="cuda").bfloat16().requires_grad_()
    y = ops.channel_mask(x, torch.tensor([0.5] * 129, device="cuda"))
    y.sum().backward()
    said = {"cuda": y.is_cuda, "device": str(x.device), "shape": list(x.grad.shape), "dtype": str(x.grad.dtype),
            "number": float(y.detach().sum()), "host": torch.zeros(3, device="cuda").cpu().tolist(),
            "real": torch.arange(3).tolist(), "own": counter.compiled > sum(compiled.values())}
said["after"] = [str(torch.zeros(2).device), torch.cuda.is_available()]
print(json.dumps([compiled, hits, said]))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("ahead")
    env = os.environ | {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONWARNINGS": "ignore"}
    env["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "python"), env.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_only_the_same_launch_is_found(found: list[Any]) -> None:
    """By a function imported anew: of the same source, alignment, value 1 and options."""
    compiled, hits, _ = found
    assert compiled == {**dict.fromkeys(compiled, 1), "again": 0}
    assert hits == 1


def test_a_program_runs_without_a_gpu(found: list[Any]) -> None:
    """Tensors say that they are on cuda, shapes are right, numbers are 1; and after it all is as before."""
    said = found[2]
    assert (said["cuda"], said["device"], said["shape"]) == (True, "cuda:0", [7, 129])
    assert (said["dtype"], said["number"], said["host"]) == ("torch.bfloat16", 1.0, [0.0] * 3)
    assert (said["real"], said["own"]) == ([0, 1, 2], True)
    assert said["after"] == ["cpu", torch.cuda.is_available()]


def test_stages_are_those_of_a_gpu_run(tmp_path: Path) -> None:
    for stage in triton_ahead.STAGES:
        for command in triton_ahead.commands(stage, tmp_path):
            assert command[0] in ("-m", "tests/gpu/every_op_once.py")
            assert "--resume" not in command


def test_a_package_takes_what_was_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        called.append(command)
        return type("Done", (), {"stdout": "3.6.0\n"})

    monkeypatch.setattr(gpu_package.subprocess, "run", run)
    assert gpu_package.compile_ahead("python3.12", tmp_path, 5) == "3.6.0"
    assert called[1][1:5] == ["-m", "benchmarks.triton_ahead", "fill", "--cache"]
