"""Every elementwise Triton kernel in the interpreter against its reference in fp64: values and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from jointnas_kernels import ops
from jointnas_kernels.ops.quant.mixture.linear import beside
from tests.comparison import compare
from tests.ops import norm_quant, test_fused

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


def check(call: Callable[..., Tensor | tuple[Tensor, ...]], tensors: list[Tensor | None], wanted: list[int],
          tol: float | None = None) -> None:
    compare(call, tensors, wanted, "triton", tol)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 5, 129), (37, 1030)], ids=str)
@pytest.mark.parametrize("wanted", [[0], [0, 1]], ids=["dx", "dx-dmask"])
def test_channel_mask(shape: tuple[int, ...], wanted: list[int], dtype: torch.dtype) -> None:
    check(ops.channel_mask, [rand(*shape, dtype=dtype), torch.rand(shape[-1])], wanted)


def test_channel_mask_of_a_strided_view() -> None:
    x = rand(6, 40)[:, 3:20]
    check(ops.channel_mask, [x, torch.rand(17)], [0, 1])


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (5, 63), (2, 9, 520)], ids=str)
@pytest.mark.parametrize("wanted", [[0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 2, 3]], ids=str)
def test_masked_swiglu(shape: tuple[int, ...], wanted: list[int], dtype: torch.dtype) -> None:
    n = shape[-1]
    check(ops.masked_swiglu, [rand(*shape, dtype=dtype), rand(*shape, dtype=dtype), torch.rand(n), torch.rand(n)],
            wanted)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (7, 31), (2, 6, 515)], ids=str)
@pytest.mark.parametrize(
    "has_mask, has_gate, wanted",
    [(False, False, [0, 1]), (True, False, [0, 1]), (True, False, [0, 1, 2]), (False, True, [0, 1, 4]),
     (True, True, [0, 1, 4]), (True, True, [0, 1, 2, 3, 4]), (False, True, [0, 1, 3, 4])],
)
def test_gated_residual(shape: tuple[int, ...], has_mask: bool, has_gate: bool, wanted: list[int],
                        dtype: torch.dtype) -> None:
    h, y, x = (rand(*shape, dtype=dtype) for _ in range(3))
    mask = torch.rand(shape[-1]) if has_mask else None
    gate = torch.tensor(0.37) if has_gate else None
    check(ops.gated_residual, [h, y, mask, gate, x if has_gate else None], wanted)


@DTYPES
@pytest.mark.parametrize(
    "rows, n, sizes",
    [(1, 2, [2]), (2, 7, [3, 1, 7]), (3, 24, [8, 16, 24]), (5, 100, [100, 37, 64]),
     (4, 384, [128, 256, 384]), (6, 130, [96, 128]), (5, 256, [256])],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_mixed_rmsnorm(rows: int, n: int, sizes: list[int], masked: bool, dtype: torch.dtype) -> None:
    def call(x, w, alpha, mask, backend):
        return ops.mixed_rmsnorm(x, w, alpha, sizes, 1e-5, mask, backend=backend)

    mask = torch.rand(n) if masked else None
    tensors = [rand(rows, n, dtype=dtype), rand(n, dtype=dtype), torch.rand(len(sizes)), mask]
    for wanted in ([0], [0, 2], [0, 1, 2, 3] if masked else [0, 1, 2]):
        # dx is a difference that cancels when few channels share one norm: allow for it below 16
        check(call, tensors, wanted, 1e-2 if n < 16 else None)


@DTYPES
@pytest.mark.parametrize(
    "shape, sizes",
    [((1, 1), [1]), ((2, 7), [3, 1, 7]), ((3, 24), [8, 16, 24]), ((5, 100), [100, 37, 64]), ((4, 384), [128, 256, 384]),
     ((2, 3, 130), [96, 128])],
    ids=str,
)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_mixed_rmsnorm_quant(shape: tuple[int, ...], sizes: list[int], symmetric: bool, dtype: torch.dtype) -> None:
    x, weight, alpha, mask, probs = range(5)
    for bits, masked in (((2, 4, 8, 16), True), ((3, 16), False), ((4,), True)):
        tensors = norm_quant.inputs(shape, len(sizes), bits, masked, dtype)
        every = [i for i, t in enumerate(tensors) if t is not None]
        subsets = ([x], [x, probs], [x, alpha], [x, weight], [x, mask] if masked else [x], every)
        norm_quant.check(tensors, sizes, 0.5, bits, symmetric, "triton", subsets)


@DTYPES
@pytest.mark.parametrize(
    "tokens, h, d, dims", [(1, 1, 2, [2]), (3, 3, 24, [8, 24, 12]), (9, 2, 16, [4, 16]), (7, 5, 96, [32, 48])], ids=str
)
@pytest.mark.parametrize("wanted", [[0], [0, 2], [0, 3], [0, 2, 3]], ids=str)
def test_head_rmsnorm(tokens: int, h: int, d: int, dims: list[int], wanted: list[int], dtype: torch.dtype) -> None:
    def call(x, w, mask, alpha, backend):
        return ops.head_rmsnorm(x, w, mask, alpha, dims, 1e-2, backend=backend)

    tensors = [rand(2, tokens, h, d, dtype=dtype), rand(d, dtype=dtype), torch.rand(h, d), torch.rand(len(dims))]
    check(call, tensors, wanted, 1e-2 if d < 16 else None)


def test_head_rmsnorm_of_strided_views() -> None:
    def call(x, w, mask, alpha, backend):
        return ops.head_rmsnorm(x, w, mask, alpha, [4, 8], 1e-2, backend=backend)

    check(call, [rand(2, 3, 6, 8)[:, :, 1:5], rand(8), torch.rand(4, 8), torch.rand(2)], [0, 2, 3])


@DTYPES
@pytest.mark.parametrize(
    "b, t, h, hkv, d", [(1, 1, 1, 1, 2), (2, 3, 4, 2, 6), (1, 7, 3, 1, 16), (2, 5, 8, 8, 32)], ids=str
)
@pytest.mark.parametrize("wanted", [[0, 1], [0, 1, 4, 5], [0, 1, 5]], ids=str)
def test_masked_rope(b: int, t: int, h: int, hkv: int, d: int, wanted: list[int], dtype: torch.dtype) -> None:
    cos, sin = rand(1, t, d, dtype=dtype), rand(b, t, d, dtype=dtype)
    check(ops.masked_rope, [rand(b, t, h, d, dtype=dtype), rand(b, t, hkv, d, dtype=dtype), cos, sin,
                              torch.rand(h, d), torch.rand(hkv, d)], wanted)


def test_masked_rope_of_strided_views() -> None:
    fused = rand(2, 3, 6, 8)
    check(ops.masked_rope, [fused[:, :, :4], fused[:, :, 4:], rand(1, 3, 8), rand(1, 3, 8), torch.rand(4, 8),
                              torch.rand(2, 8)], [0, 1, 4, 5])


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (7, 31), (2, 3, 1030)], ids=str)
def test_two_in_one_pass(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The values of the two apart, bit for bit."""
    for one in (False, True):
        test_fused.check_swiglu(shape, dtype, "triton", one)
        test_fused.check_residual(shape, dtype, "triton", one)


def test_gradients_of_one_linear_lie_beside_each_other() -> None:
    """One product then makes its dx, and one its dW."""
    q, k, v, gate, up = leaves = [rand(*shape).requires_grad_() for shape in ((2, 3, 4, 8), *[(2, 3, 2, 8)] * 2)] + [
        rand(2, 3, 20).requires_grad_() for _ in range(2)
    ]
    table, mask = rand(1, 3, 8), torch.rand(20)
    outs = ops.masked_rope(q, k, table, table, torch.rand(4, 8), torch.rand(2, 8), "triton", v)
    outs = (*outs, ops.masked_swiglu(gate, up, mask, mask, "triton"))
    grads = torch.autograd.grad(outs, leaves, [torch.randn_like(out) for out in outs])
    flat = [g.flatten(2).flatten(0, 1) for g in grads]
    assert [g.shape for g in beside(flat[:3])] == [(6, 64)]
    assert [g.shape for g in beside(flat[3:])] == [(6, 40)]


@DTYPES
@pytest.mark.parametrize("impl", ["factored", "masks", "loop"])
@pytest.mark.parametrize(
    "m, n, sizes_in, sizes_out", [(1, 1, [1], [1]), (9, 33, [7, 33], [3, 5, 9]), (20, 520, [128, 512, 520], [20])],
    ids=str,
)
def test_mixed_weight(m: int, n: int, sizes_in: list[int], sizes_out: list[int], impl: str,
                      dtype: torch.dtype) -> None:
    def call(w, a, b, backend):
        return ops.mixed_weight(w, a, sizes_in, b, sizes_out, impl, backend)

    tensors = [rand(m, n, dtype=dtype), torch.rand(len(sizes_in)), torch.rand(len(sizes_out))]
    for wanted in ([1, 2], [0, 1, 2]):
        check(call, tensors, wanted)


@pytest.mark.parametrize("wanted", [[0], [0, 1, 2, 3, 4, 5]], ids=["dx", "all"])
def test_mixed_linear_masks(wanted: list[int]) -> None:
    def call(x, w, c, r, a, b, backend):
        return ops.mixed_linear(x, w, c, r, a, b, 0.5, backend=backend)

    check(call, [rand(2, 5, 33), rand(17, 33), torch.rand(33), torch.rand(17), rand(4, 33), rand(17, 4)], wanted)
