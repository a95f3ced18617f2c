"""pytest-benchmark for single ops, to compare two states of a working copy on one machine:

    pytest benchmarks/test_ops.py --benchmark-save=before      # then change something
    pytest benchmarks/test_ops.py --benchmark-compare --benchmark-group-by=param:op

Forward and backward at one Llama-3.1-8B block's shapes; on a GPU each call is synchronised, so small ops show their
launch time. Use ``jointnas bench kernels`` for achieved bandwidth.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.bench_kernels import _backward, _prepare, elementwise_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {case.name: case for case in elementwise_cases(1024, DEVICE, torch.bfloat16)}


def synchronised(call: Any) -> None:
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("op", CASES)
def test_forward(op: str, benchmark: Any) -> None:
    inputs = _prepare(CASES[op], (), None)
    with torch.no_grad():
        benchmark(synchronised, partial(CASES[op].call, inputs, None))


@pytest.mark.parametrize("op", CASES)
def test_forward_and_backward(op: str, benchmark: Any) -> None:
    case = CASES[op]
    wanted = case.free + case.arch
    inputs = _prepare(case, wanted, None)
    benchmark(synchronised, partial(_backward, case, inputs, wanted, None))
