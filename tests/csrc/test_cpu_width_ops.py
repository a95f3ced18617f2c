"""The compiled elementwise kernels and mixed_weight: values and all gradients against fp64, per instruction set."""

from __future__ import annotations

from operator import itemgetter

import pytest
import torch
from torch import Tensor

from jointnas_kernels import ops
from tests.comparison import compare
from tests.ops import naive

pytestmark = pytest.mark.usefixtures("kernels")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHAPES = pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 5, 129), (131, 64), (37, 1031)], ids=str)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def masks(*shape: int) -> Tensor:
    return torch.rand(*shape) + 0.1


@DTYPES
@SHAPES
def test_channel_mask(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = [rand(*shape, dtype=dtype), masks(shape[-1])]
    for wanted in ([0], [0, 1]):
        compare(ops.channel_mask, tensors, wanted, "cpu", reference=naive.channel_mask)


@DTYPES
@SHAPES
def test_gated_residual(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    h, y, x = (rand(*shape, dtype=dtype) for _ in range(3))
    mask, gate = masks(shape[-1]), torch.tensor(0.3)
    for tensors, wanted in (
        ([h, y, None, None, None], [0, 1]),
        ([h, y, mask, None, None], [0, 1, 2]),
        ([h, y, None, gate, x], [0, 1, 3, 4]),
        ([h, y, mask, gate, x], [0, 1, 4]),
        ([h, y, mask, gate, x], [0, 1, 2, 3, 4]),
    ):
        # dgate is one number, a sum of 1 to 40k terms of either sign in fp32: cancellation costs it digits
        compare(ops.gated_residual, tensors, wanted, "cpu", fp32=5e-4, reference=naive.gated_residual)


@DTYPES
@pytest.mark.parametrize("gate", [0.0, 1.0], ids=["skipped", "kept"])
def test_hard_gate_is_exact(gate: float, dtype: torch.dtype) -> None:
    """At a one-hot depth the blend is the block's output, or its input, bit for bit."""
    h, y, x, mask = *(rand(9, 131, dtype=dtype) * 100 for _ in range(3)), masks(131)
    out = ops.gated_residual(h, y, mask, torch.tensor(gate), x, backend="cpu")
    assert torch.equal(out, ops.gated_residual(h, y, mask, backend="cpu") if gate else x)


@DTYPES
@SHAPES
def test_masked_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = [rand(*shape, dtype=dtype) * 3, rand(*shape, dtype=dtype), masks(shape[-1]), masks(shape[-1])]
    for wanted in ([0, 1], [0, 1, 2], [3], [0, 1, 2, 3]):
        compare(ops.masked_swiglu, tensors, wanted, "cpu", reference=naive.masked_swiglu)


def test_swiglu_of_extreme_gates() -> None:
    """exp is clamped: far gates must give 0 and the gate itself, and NaN must stay NaN."""
    gate = torch.tensor([[-1e30, -200.0, -100.0, -88.0, 0.0, 88.0, 100.0, 200.0, 1e30, float("nan")]])
    one = torch.ones(10)
    out = ops.masked_swiglu(gate, torch.ones(1, 10), one, one, backend="cpu")
    assert out[0, 9].isnan()
    # 1e30 times the smallest sigmoid, e^-88, is the largest error
    torch.testing.assert_close(out[0, 1:9], torch.nn.functional.silu(gate)[0, 1:9], rtol=1e-6, atol=1e-30)


@DTYPES
@SHAPES
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_mixed_rmsnorm(shape: tuple[int, ...], masked: bool, dtype: torch.dtype) -> None:
    n = shape[-1]
    half = max(1, n // 2)
    sizes = [half, max(1, n // 3), n - (n > 2), half]  # unsorted, with a repetition
    # a large eps, because dx of a single channel is otherwise a difference of nearly equal numbers
    tensors = [rand(*shape, dtype=dtype), rand(n, dtype=dtype), masks(len(sizes)), masks(n) if masked else None]

    def op(x: Tensor, weight: Tensor, alpha: Tensor, mask: Tensor | None, backend: str = "cpu") -> Tensor:
        return ops.mixed_rmsnorm(x, weight, alpha, sizes, 0.5, mask, backend)

    def plain(x: Tensor, weight: Tensor, alpha: Tensor, mask: Tensor | None) -> Tensor:
        return naive.mixed_rmsnorm(x, weight, alpha, sizes, 0.5, mask)

    for wanted in ([0], [0, 1, 2], [0, 1, 2, 3] if masked else [0, 2]):
        compare(op, tensors, wanted, "cpu", reference=plain)


@DTYPES
@pytest.mark.parametrize(
    "b, t, heads, kv, d, per_token",
    [(1, 1, 1, 1, 2, False), (2, 5, 4, 2, 16, True), (3, 33, 6, 3, 34, False), (2, 40, 3, 1, 128, True)],
    ids=["one", "small", "odd", "llama"],
)
def test_masked_rope(b: int, t: int, heads: int, kv: int, d: int, per_token: bool, dtype: torch.dtype) -> None:
    cos, sin = torch.randn(b if per_token else 1, t, d), torch.randn(1, t, d)
    tensors = [rand(b, t, heads, d, dtype=dtype), rand(b, t, kv, d, dtype=dtype), masks(heads, d), masks(kv, d)]

    def op(q: Tensor, k: Tensor, qm: Tensor, km: Tensor, backend: str = "cpu") -> tuple[Tensor, Tensor]:
        return ops.masked_rope(q, k, cos, sin, qm, km, backend)

    def plain(q: Tensor, k: Tensor, qm: Tensor, km: Tensor) -> tuple[Tensor, ...]:
        return naive.masked_rope(q, k, cos.double(), sin.double(), qm, km)

    for wanted in ([0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 2, 3]):
        compare(op, tensors, wanted, "cpu", reference=plain)


@pytest.mark.parametrize("width", [4096, 4112], ids=["lines", "odd"])
def test_beyond_the_cache(width: int) -> None:
    """Outputs of 8 MiB and more go past the cache, as whole lines: the same bits as of a few rows at a time."""
    rows, few = 1030, 103
    a, b, c = (rand(rows, width, dtype=torch.bfloat16) for _ in range(3))
    mask, gate, sizes = masks(width), torch.tensor(0.3), [width, 1000, 33]
    alpha, cos, head_mask = masks(3), torch.randn(1, rows, width // 8), masks(8, width // 8)
    backward, need = torch.ops.jointnas.gated_residual_backward, [True, True, False, False, True]
    dh_dy_dx = itemgetter(0, 1, 4)

    def rope(i: slice) -> Tensor:
        q = a[i].view(1, -1, 8, width // 8)
        out = ops.masked_rope(q, q, cos[:, i], cos[:, i], head_mask, head_mask, "cpu")
        return out[0].transpose(1, 2)[0]

    calls = {
        "channel_mask": lambda i: ops.channel_mask(a[i], mask, "cpu"),
        "gated_residual": lambda i: ops.gated_residual(a[i], b[i], mask, gate, c[i], "cpu"),
        "its backward": lambda i: torch.cat(dh_dy_dx(backward(a[i], b[i], c[i], mask, gate, c[i], need, "cpu")), -1),
        "masked_swiglu": lambda i: ops.masked_swiglu(a[i], b[i], mask, mask, "cpu"),
        "mixed_rmsnorm": lambda i: ops.mixed_rmsnorm(a[i], mask, alpha, sizes, 1e-5, mask, "cpu"),
        "act_quant_mix": lambda i: ops.act_quant_mix(a[i], (2, 4, 8), alpha, backend="cpu"),
        "masked_rope": rope,
    }
    for name, call in calls.items():
        parts = [call(slice(begin, begin + few)) for begin in range(0, rows, few)]
        assert torch.equal(call(slice(0, rows)), torch.cat(parts)), name


@DTYPES
@pytest.mark.parametrize("m, n", [(1, 1), (3, 17), (129, 257), (70, 1024)])
def test_mixed_weight(m: int, n: int, dtype: torch.dtype) -> None:
    sizes_in, sizes_out = [n, max(1, n // 2), max(1, n // 3)], [max(1, m // 2), m]

    def op(weight: Tensor, alpha_in: Tensor, alpha_out: Tensor, backend: str) -> Tensor:
        return ops.mixed_weight(weight, alpha_in, sizes_in, alpha_out, sizes_out, backend=backend)

    for wanted in ([1, 2], [0, 1, 2]):
        # a gradient of alpha sums up to 72k products of either sign, 8 at a time or (scalar) one by one: cancellation
        compare(op, [rand(m, n, dtype=dtype), masks(3), masks(2)], wanted, "cpu", fp32=5e-4)


def test_mixed_weight_beyond_the_cache() -> None:
    """Outputs above 8 MiB are written past the cache, whole lines at a time; odd rows are not aligned to lines."""
    for n in (4096, 4099):
        for dtype in (torch.float32, torch.bfloat16):
            weight = rand(1030, n, dtype=dtype)
            alpha = torch.tensor([0.5, 0.5])
            out = ops.mixed_weight(weight, alpha, [n, n // 2], alpha, [1030, 515], backend="cpu")
            ref = ops.mixed_weight(weight, alpha, [n, n // 2], alpha, [1030, 515], backend="reference")
            assert torch.equal(out, ref)
