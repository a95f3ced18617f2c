"""The compiled mixed_rmsnorm with quantization: equal to the two kernels apart, gradients, per instruction set."""

from __future__ import annotations

import pytest
import torch

from jointnas_kernels.testing import poisoned
from tests.ops.norm_quant import ALPHA, MASK, PROBS, WEIGHT, X, check, inputs

pytestmark = pytest.mark.usefixtures("kernels")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
BITS = (2, 4, 8, 16)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@DTYPES
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 5, 129), (131, 64), (37, 1031)], ids=str)
def test_values_and_gradients(shape: tuple[int, ...], masked: bool, symmetric: bool, dtype: torch.dtype) -> None:
    n = shape[-1]
    half = max(1, n // 2)
    sizes = [half, max(1, n // 3), n - (n > 2), half]  # unsorted, with a repetition, the last channel in none
    every = [X, WEIGHT, ALPHA, MASK, PROBS] if masked else [X, WEIGHT, ALPHA, PROBS]
    for bits in (BITS, (7, 3), (4,)):
        tensors = inputs(shape, len(sizes), bits, masked, dtype)
        check(tensors, sizes, 0.5, bits, symmetric, "cpu", [[X], [X, PROBS], [WEIGHT], every])


@DTYPES
def test_a_row_of_the_8b_model(dtype: torch.dtype) -> None:
    sizes = [32, 64, 128, 256, 512, 1024, 2048, 4096]
    tensors = inputs((5, 4096), 8, BITS, True, dtype)
    check(tensors, sizes, 1e-5, BITS, False, "cpu", [[X], [X, ALPHA, MASK, PROBS]])


@DTYPES
def test_every_output_is_written(dtype: torch.dtype) -> None:
    """inv and levels too, which no gradient of a weight step reads; and the channels that no size keeps."""
    x, weight, alpha, mask, probs = inputs((9, 131), 2, BITS, True, dtype)
    tensors, values = (x, weight, alpha, mask, probs), ([7, 100], 1e-5, list(BITS), False)
    with poisoned():
        y, inv, levels = torch.ops.jointnas.mixed_rmsnorm_quant(*tensors, *values, "cpu")
        grads = torch.ops.jointnas.mixed_rmsnorm_quant_backward(x, *tensors, inv, levels, *values, [True] * 5, "cpu")
    assert all(t.isfinite().all() for t in (y, inv, levels, *grads))
    assert not y[:, 100:].any()
    assert not grads[0][:, 100:].any()
