"""mixed_linear and mixed_linear_group against the paper's sum over sliced layers, and against each other."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from jointnas_kernels import ops
from jointnas_kernels.testing import relative_error
from tests.comparison import compare
from tests.ops import naive

# every addmm rounds its result to the storage dtype, and u = x A^T is rounded once more: a few times one rounding
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp64", "fp32", "bf16"])


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("rows, i, o, r", [(1, 1, 1, 1), (5, 33, 17, 3), (6, 64, 128, 8)], ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_equals_the_sum_over_sliced_layers(rows: int, i: int, o: int, r: int, lora: bool, bias: bool) -> None:
    sizes_in, sizes_out = sorted({1, (i + 1) // 2, i}), sorted({1, (2 * o + 2) // 3, o})
    tensors = [rand(2, rows, i), rand(o, i), rand(len(sizes_in)), rand(len(sizes_out)), rand(r, i) if lora else None,
               rand(o, r) if lora else None, rand(o) if bias else None]

    def op(x, w, alpha_in, alpha_out, a, b, beta, backend):
        c, out = ops.prefix_mask(alpha_in, sizes_in, i), ops.prefix_mask(alpha_out, sizes_out, o)
        return ops.mixed_linear(x, w, c, out, a, b, 0.5, beta, backend=backend)

    def plain(x, w, alpha_in, alpha_out, a, b, beta):
        return naive.mixed_linear(x, w, alpha_in, sizes_in, alpha_out, sizes_out, a, b, 0.5, beta)

    everything = [k for k in range(7) if tensors[k] is not None]
    for wanted in ([0], [2], [3], [k for k in everything if k != 1], everything):
        compare(op, tensors, wanted, None, 1e-10, reference=plain)


@DTYPES
@pytest.mark.parametrize("lora", [None, torch.float32], ids=["lora-same", "lora-fp32"])
def test_dtypes(dtype: torch.dtype, lora: torch.dtype | None) -> None:
    if dtype == torch.float64 and lora is not None:
        pytest.skip("fp32 LoRA under fp64 would lose the precision the comparison needs")
    kind = lora or dtype
    mask = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [rand(3, 7, 65, dtype=dtype), rand(31, 65, dtype=dtype), rand(65, dtype=mask), rand(31, dtype=mask),
               rand(4, 65, dtype=kind), rand(31, 4, dtype=kind), rand(31, dtype=dtype)]

    def op(x, w, c, r, a, b, bias, backend):
        return ops.mixed_linear(x, w, c, r, a, b, 0.5, bias, backend=backend)

    def plain(x, w, c, r, a, b, bias):
        return r * ((c * x) @ (w + 0.5 * b @ a).T + bias)

    compare(op, tensors, [0, 2, 3, 4, 5, 6], None, TOLERANCE[dtype], reference=plain)


def test_a_frozen_weight_gets_no_gradient_and_lora_keeps_its_dtype() -> None:
    x, w = rand(4, 16, dtype=torch.bfloat16).requires_grad_(), rand(8, 16, dtype=torch.bfloat16)
    a, b = rand(2, 16, dtype=torch.float32).requires_grad_(), rand(8, 2, dtype=torch.float32).requires_grad_()
    out = ops.mixed_linear(x, w, None, None, a, b)
    out.float().sum().backward()
    assert w.grad is None
    assert (x.grad.dtype, a.grad.dtype, b.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("group", [False, True], ids=["single", "group"])
def test_autocast_runs_in_bf16_with_fp32_leaves(group: bool) -> None:
    x, w = rand(6, 32, dtype=torch.float32).requires_grad_(), rand(8, 32, dtype=torch.float32)
    a, b = rand(2, 32, dtype=torch.float32).requires_grad_(), rand(8, 2, dtype=torch.float32).requires_grad_()
    mask = torch.rand(8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        if group:
            out = ops.mixed_linear_group(x, [w], [a], [b], 0.5)[0] * mask
        else:
            out = ops.mixed_linear(x, w, None, mask, a, b, 0.5)
    assert group or out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().square().sum(), [x, a, b, mask])
    want = (x @ (w + 0.5 * b @ a).T) * mask
    expected = torch.autograd.grad(want.square().sum(), [x, a, b, mask])
    assert relative_error(out, want) < 2e-2
    for grad, ref in zip(grads, expected, strict=True):
        assert grad.dtype == torch.float32
        assert relative_error(grad, ref) < 3e-2


@DTYPES
@pytest.mark.parametrize("biased", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("outs", [(5,), (17, 3, 3), (31, 30)], ids=str)
def test_a_group_equals_its_layers(outs: tuple[int, ...], biased: bool, dtype: torch.dtype) -> None:
    k, i = len(outs), 33
    frozen = [rand(o, i, dtype=dtype) for o in outs]
    ranks = range(2, 2 + k)
    tensors = [rand(2, 5, i, dtype=dtype), *(rand(r, i, dtype=dtype) for r in ranks),
               *(rand(o, r, dtype=dtype) for o, r in zip(outs, ranks, strict=True)),
               *(rand(o, dtype=dtype) for o in (outs if biased else ()))]

    def op(x, *rest, backend):
        return ops.mixed_linear_group(x, frozen, rest[:k], rest[k : 2 * k], 0.5, rest[2 * k :] or None)

    def plain(x, *rest):
        out = []
        for j, w in enumerate(frozen):
            y = x @ (w.double() + 0.5 * rest[k + j] @ rest[j]).T
            out.append(y + rest[2 * k + j] if biased else y)
        return tuple(out)

    for wanted in ([0], [1], list(range(1, 1 + 2 * k)), list(range(len(tensors)))):
        compare(op, tensors, wanted, None, TOLERANCE[dtype], reference=plain)


def test_a_group_with_an_unused_output() -> None:
    x, a, b = leaf(4, 9), leaf(2, 9), leaf(5, 2)
    weight = rand(5, 9, dtype=torch.float32)
    out = ops.mixed_linear_group(x, [weight, weight], [a, a.detach()], [b, b.detach()])[0]
    alone = ops.mixed_linear(x, weight, None, None, a, b)
    for got, want in zip(torch.autograd.grad(out.sum(), [x, a, b]), torch.autograd.grad(alone.sum(), [x, a, b]),
                         strict=True):
        torch.testing.assert_close(got, want)


def leaf(*shape: int) -> Tensor:
    return rand(*shape, dtype=torch.float32).requires_grad_()


@pytest.mark.parametrize("absent", [(), (2, 3), (4, 5), (6,), (2, 3, 4, 5, 6)], ids=str)
def test_opcheck(absent: tuple[int, ...]) -> None:
    weight = rand(5, 9, dtype=torch.float32)
    case = [leaf(2, 3, 9), weight, leaf(9), leaf(5), leaf(2, 9), leaf(5, 2), leaf(5), 0.5, None]
    opcheck(torch.ops.jointnas.mixed_linear, tuple(None if i in absent else a for i, a in enumerate(case)))


@pytest.mark.parametrize("biased", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_opcheck_group(k: int, biased: bool) -> None:
    layers = [t for o in range(4, 4 + k) for t in (rand(o, 9, dtype=torch.float32), leaf(2, 9), leaf(o, 2))]
    biases = [leaf(o) for o in range(4, 4 + k)] if biased else []
    case = (leaf(2, 3, 9), *layers, *[None] * (9 - len(layers)), *biases, *[None] * (3 - len(biases)), 0.5, None)
    opcheck(torch.ops.jointnas.mixed_linear_group, case)


def test_fullgraph_compile() -> None:
    torch._dynamo.reset()
    frozen = [rand(8, 8, dtype=torch.float32) for _ in range(3)]
    inputs = [leaf(2, 3, 8), leaf(2, 8), leaf(8, 2), leaf(8)]

    def layer(x: Tensor, a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        q, k = ops.mixed_linear_group(x, frozen[:2], [a, a], [b, b], 0.5)
        return ops.mixed_linear(q * k, frozen[2], mask, mask, a, b, 0.5)

    eager, compiled = layer(*inputs), torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, eager)
    grad = torch.randn_like(eager)
    for a, b in zip(torch.autograd.grad(compiled, inputs, grad), torch.autograd.grad(eager, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.mixed_linear(leaf(2, 3), leaf(4, 5)), "x (2, 3) does not match weight (4, 5)"),
        (lambda: ops.mixed_linear(leaf(2, 5), leaf(4, 5), lora_a=leaf(1, 5)), "go together"),
        (lambda: ops.mixed_linear(leaf(2, 5), leaf(4, 5), lora_a=leaf(2, 5), lora_b=leaf(4, 3)), "must be [r, 5]"),
        (lambda: ops.mixed_linear(leaf(2, 5), leaf(4, 5), in_mask=leaf(4)), "in_mask must be [5]"),
        (lambda: ops.mixed_linear(leaf(2, 5), leaf(4, 5).bfloat16()), "must agree outside autocast"),
        (lambda: ops.mixed_linear_group(leaf(2, 5), [leaf(4, 5)], [], []), "counts must agree"),
        (lambda: ops.mixed_linear_group(leaf(2, 5), [leaf(4, 5)] * 4, [], []), "a group has 1 to 3"),
        (lambda: ops.mixed_linear_group(leaf(2, 5), [leaf(4, 5)], [leaf(1, 5)], [leaf(4, 1)]), "use mixed_linear"),
    ],
)
def test_bad_input_is_one_clear_error(call, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)
