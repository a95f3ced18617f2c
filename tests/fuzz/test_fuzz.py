"""Every op on the CPU against its fp64 definition, on cases that hypothesis draws and shrinks.

The same cases in thousands, for every backend and device: ``python -m tests.fuzz``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from jointnas_kernels import _ext
from tests.fuzz.cases import CPU_KERNELS, LIBRARY, OPS
from tests.fuzz.check import Case, check
from tests.fuzz.shrinking import Shrinking
from tests.fuzz.source import LIMITS, Seeded

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASES = [pytest.param(op, "reference", id=f"{op}-{'torch' if op in LIBRARY else 'reference'}") for op in OPS]
CASES += [pytest.param(op, "cpu", id=f"{op}-cpu") for op in CPU_KERNELS]


@pytest.mark.parametrize("op, backend", CASES)
def test_values_and_gradients(op: str, backend: str) -> None:
    if backend == "cpu" and not _ext.available():
        pytest.skip("the extension is not built")

    @settings(
        max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )  # fmt: skip
    @given(st.data())
    def run(data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from(DTYPES[:2] if backend == "cpu" else DTYPES))
        case = OPS[op](Shrinking(data, dtype, backend, LIMITS["medium"]).start())
        outcome = check(case)
        assert not outcome.failures, f"{dtype} {case.text} layouts {case.layouts} gradients {case.wanted}"

    torch.manual_seed(0)
    run()


def seeded(op: str, seed: int, dtype: torch.dtype) -> Case:
    return OPS[op](Seeded(op, seed, 0, dtype, "reference", LIMITS["medium"]).start())


def one_element(out: Tensor) -> Tensor:
    """0.1 % of the largest element added to one."""
    out = out.clone()
    out.view(-1)[out.numel() // 2] += 1e-3 * out.detach().abs().max()
    return out


def unwritten(out: Tensor) -> Tensor:
    """The last element left as the poison."""
    out = out.clone()
    out.view(-1)[-1] = float("nan")
    return out


@pytest.mark.parametrize("op", ["channel_mask", "mixed_linear", "masked_swiglu", "mixed_rmsnorm", "quant_lora_mix"])
@pytest.mark.parametrize("damage", [one_element, unwritten])
def test_a_damaged_result_is_found(op: str, damage: Callable[[Tensor], Tensor]) -> None:
    for seed in range(10):
        case = seeded(op, seed, torch.float32)
        outcome = check(case)
        assert not outcome.failures
        if outcome.undecided:  # the damaged element may be one that fp32 cannot decide
            continue
        damaged = dataclasses.replace(case, call=lambda t, case=case: (damage(case.call(t)[0]),))
        values = case.call(case.tensors)[0]
        assert check(damaged).failures or not values.any(), case.text


def test_multiplying_by_the_reciprocal_of_the_scale_is_found() -> None:
    """x · (1/s) instead of x / s moves levels at ties only: some cases must notice."""

    def reciprocal(w: Tensor, bits: int, group: int) -> Tensor:
        grouped = w.unflatten(-1, (-1, group))
        s = grouped.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
        s = torch.where(s == 0, 1.0, s)
        q = (grouped * (1 / s)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * s
        return (q.detach() + grouped - grouped.detach()).flatten(-2)

    found = 0
    for seed in range(200):
        source = Seeded("fake_quant_weight", seed, 0, torch.float32, "reference", LIMITS["medium"]).start()
        case = OPS["fake_quant_weight"](source)
        if "symmetric=True" in case.text and "ste=identity" in case.text and "clip" not in case.tensors:
            bits, group = (int(case.text.split(f"{name}=")[1].split()[0]) for name in ("bits", "group"))
            wrong = dataclasses.replace(case, call=lambda t, b=bits, g=group: (reciprocal(t["weight"], b, g),))
            found += bool(check(wrong).failures)
    assert found > 0
