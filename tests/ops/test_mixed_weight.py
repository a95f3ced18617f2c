"""loop = masks = factored, in values and every gradient, to 1e-10 in fp64 at sizes that are multiples of nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from jointnas_kernels import ops
from jointnas_kernels.ops.width.weight import IMPLS
from jointnas_kernels.testing import relative_error
from tests.comparison import compare


def plain(w: Tensor, a: Tensor, sizes_in: list[int], b: Tensor, sizes_out: list[int]) -> Tensor:
    out = torch.zeros_like(w)
    for i, cols in enumerate(sizes_in):
        for j, rows in enumerate(sizes_out):
            block = torch.zeros_like(w)
            block[:rows, :cols] = 1
            out = out + a[i] * b[j] * block * w
    return out


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, list[int], list[int], int]:
    m, n = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    sizes_in = draw(st.lists(st.integers(1, n), min_size=1, max_size=5))
    sizes_out = draw(st.lists(st.integers(1, m), min_size=1, max_size=5))
    return m, n, sizes_in, sizes_out, draw(st.integers(0, 1 << 16))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems())
def test_all_three_agree_in_fp64(problem: tuple[int, int, list[int], list[int], int]) -> None:
    m, n, sizes_in, sizes_out, seed = problem
    torch.manual_seed(seed)
    w, a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True)
               for s in ((m, n), (len(sizes_in),), (len(sizes_out),)))
    grad = torch.randn(m, n, dtype=torch.float64)
    want = plain(w, a, sizes_in, b, sizes_out)
    expected = [want, *torch.autograd.grad(want, [w, a, b], grad)]
    # <grad, W> sums cancel by chance; measure them against the sums of their magnitudes
    scale = (grad * w).abs().sum().item()
    for impl in IMPLS:
        out = ops.mixed_weight(w, a, sizes_in, b, sizes_out, impl)
        for i, (got, ref) in enumerate(zip([out, *torch.autograd.grad(out, [w, a, b], grad)], expected, strict=True)):
            bound = 1e-10 * max(ref.norm().item(), scale if i >= 2 else 0.0)
            assert (got - ref).norm() <= bound, (impl, i, relative_error(got, ref))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("impl", IMPLS)
def test_dtypes(impl: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes_in, sizes_out = [31, 100, 129], [17, 65]

    def op(w, a, b, backend):
        return ops.mixed_weight(w, a, sizes_in, b, sizes_out, impl, backend)

    tensors = [torch.randn(65, 129).to(dtype), torch.rand(3), torch.rand(2)]
    for backend in (None, "reference"):
        compare(op, tensors, [0, 1, 2], backend, None, 2e-5, lambda w, a, b: plain(w, a, sizes_in, b, sizes_out))


def test_stored_masks_give_the_same() -> None:
    w, a, b = torch.randn(9, 7), torch.rand(2), torch.rand(3)
    stored = ops.choice_masks([3, 7], [2, 5, 9], (9, 7))
    assert stored.shape == (6, 9, 7)
    out = ops.mixed_weight(w, a, [3, 7], b, [2, 5, 9], "masks", masks=stored)
    torch.testing.assert_close(out, ops.mixed_weight(w, a, [3, 7], b, [2, 5, 9], "factored"))


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_and_compile(impl: str) -> None:
    w, a, b = (torch.randn(*s, requires_grad=True) for s in ((9, 7), (2,), (3,)))
    masks = ops.choice_masks([3, 7], [2, 5, 9], (9, 7)) if impl == "masks" else None
    opcheck(torch.ops.jointnas.mixed_weight, (w, a, b, masks, [3, 7], [2, 5, 9], impl, None))
    torch._dynamo.reset()
    compiled = torch.compile(ops.mixed_weight, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(w, a, [3, 7], b, [2, 5, 9], impl), ops.mixed_weight(w, a, [3, 7], b, [2, 5, 9]))


@pytest.mark.parametrize(
    "arguments, message",
    [(([9], [9], "factord"), "Did you mean 'factored'?"), (([10], [9], "loop"), "must lie in 1..9"),
     (([9, 3], [9], "loop"), "does not match 2 sizes")],
)
def test_bad_input_is_one_clear_error(arguments: tuple[list[int], list[int], str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ops.mixed_weight(torch.ones(9, 9), torch.ones(1), arguments[0], torch.ones(1), arguments[1], arguments[2])
    assert message in str(caught.value)
