"""mixed_rmsnorm, head_rmsnorm, masked_rope, masked_swiglu, gated_residual, channel_mask: values and all gradients
against autograd of an independent formulation in fp64, in every CPU dtype; opcheck; fullgraph compilation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from jointnas_kernels import ops
from tests.comparison import compare
from tests.ops import naive

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=["fp64", "fp32", "fp16", "bf16"]
)
SHAPES = pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 5, 129), (31, 251)], ids=str)
TOLERANCE = {torch.float64: 1e-11}


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def masks(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32) + 0.1


def check(op, plain, tensors: list[Tensor | None], *subsets: list[int], fp32: float = 2e-5) -> None:
    """Both paths of the op on CPU: what it chooses by itself, and the reference."""
    first = next(t for t in tensors if t is not None)
    for wanted in subsets:
        for backend in (None, "reference"):
            compare(op, tensors, wanted, backend, TOLERANCE.get(first.dtype), fp32, plain)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@DTYPES
@SHAPES
def test_channel_mask(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(ops.channel_mask, naive.channel_mask, [rand(*shape, dtype=dtype), masks(shape[-1], dtype=dtype)], [0], [0, 1])


@DTYPES
@SHAPES
def test_masked_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n = shape[-1]
    tensors = [rand(*shape, dtype=dtype), rand(*shape, dtype=dtype), masks(n, dtype=dtype), masks(n, dtype=dtype)]
    check(ops.masked_swiglu, naive.masked_swiglu, tensors, [0, 1], [0, 1, 2], [3], [0, 1, 2, 3])


@DTYPES
@SHAPES
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("gated", [False, True], ids=["add", "gated"])
def test_gated_residual(shape: tuple[int, ...], gated: bool, masked: bool, dtype: torch.dtype) -> None:
    h, y, x = (rand(*shape, dtype=dtype) for _ in range(3))
    mask, gate = masks(shape[-1], dtype=dtype), masks(1, dtype=dtype)[0]
    tensors = [h, y, mask if masked else None, gate if gated else None, x if gated else None]
    given_ = [i for i in range(5) if tensors[i] is not None]
    # the gate's gradient is one sum of terms of both signs, which cancel by chance
    check(ops.gated_residual, naive.gated_residual, tensors, [i for i in given_ if i in (0, 1, 4)], given_,
          fp32=1e-3 if gated else 2e-5)


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_a_hard_gate_is_exact(gate: float) -> None:
    h, y, x = (rand(7, 33) for _ in range(3))
    out = ops.gated_residual(h, y, None, torch.tensor(gate), x)
    assert torch.equal(out, ops.gated_residual(h, y) if gate else x)


@DTYPES
@pytest.mark.parametrize(
    "rows, n, sizes",
    [(2, 16, [16]), (3, 24, [8, 16, 24]), (5, 100, [100, 37, 64]), (4, 130, [96, 128]), (2, 17, [13, 13])], ids=str,
)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_mixed_rmsnorm(rows: int, n: int, sizes: list[int], masked: bool, dtype: torch.dtype) -> None:
    def op(x, w, alpha, mask, backend):
        return ops.mixed_rmsnorm(x, w, alpha, sizes, 1e-5, mask, backend=backend)

    def plain(x, w, alpha, mask):
        return naive.mixed_rmsnorm(x, w, alpha, sizes, 1e-5, mask)

    tensors = [rand(rows, 2, n, dtype=dtype), rand(n, dtype=dtype), masks(len(sizes), dtype=dtype),
               masks(n, dtype=dtype) if masked else None]
    check(op, plain, tensors, [0], [2], [0, 1, 2, 3] if masked else [0, 1, 2])


def test_one_hot_rmsnorm_is_the_pruned_norm() -> None:
    x, w = rand(6, 96), rand(96)
    for i, n in enumerate(sizes := [32, 64, 96]):
        out = ops.mixed_rmsnorm(x, w, torch.eye(3)[i], sizes, 1e-6)
        pruned = torch.nn.functional.rms_norm(x[:, :n], (n,), w[:n], 1e-6)
        torch.testing.assert_close(out[:, :n], pruned)
        assert out[:, n:].abs().sum() == 0


@DTYPES
@pytest.mark.parametrize(
    "tokens, h, d, dims", [(1, 1, 2, [2]), (3, 3, 24, [8, 24, 12]), (5, 2, 16, [4, 16]), (7, 4, 96, [32, 48])], ids=str
)
def test_head_rmsnorm(tokens: int, h: int, d: int, dims: list[int], dtype: torch.dtype) -> None:
    """dims need not be nested: 32 and 48 of 96 share every third pair of the one, every second of the other."""

    def op(x, w, mask, alpha, backend):
        return ops.head_rmsnorm(x, w, mask, alpha, dims, 1e-2, backend=backend)

    def plain(x, w, mask, alpha):
        return naive.head_rmsnorm(x, w, mask, alpha, dims, 1e-2)

    tensors = [rand(tokens, 2, h, d, dtype=dtype), rand(d, dtype=dtype), masks(h, d, dtype=dtype),
               masks(len(dims), dtype=dtype)]
    check(op, plain, tensors, [0], [0, 2], [3], [0, 2, 3], fp32=1e-4)


def test_one_hot_head_rmsnorm_is_the_pruned_norm() -> None:
    x, w = rand(6, 3, 32), rand(32)
    for i, d in enumerate(dims := [8, 16, 32]):
        index = naive.strided_pair_index(32, d)
        mask = naive.strided_pair_mask(torch.eye(3)[i], dims, 32).expand(3, -1)
        out = ops.head_rmsnorm(x, w, mask, torch.eye(3)[i], dims, 1e-6)
        torch.testing.assert_close(out[..., index], torch.nn.functional.rms_norm(x[..., index], (d,), w[index], 1e-6))
        assert out.count_nonzero() == 6 * 3 * d


@DTYPES
@pytest.mark.parametrize("b, t, h, hkv, d", [(1, 1, 1, 1, 2), (2, 3, 4, 2, 6), (1, 7, 3, 1, 16)], ids=str)
@pytest.mark.parametrize("tables", ["shared", "own"])
def test_masked_rope(b: int, t: int, h: int, hkv: int, d: int, tables: str, dtype: torch.dtype) -> None:
    period = b if tables == "own" else 1
    tensors = [rand(b, t, h, d, dtype=dtype), rand(b, t, hkv, d, dtype=dtype), rand(period, t, d, dtype=dtype),
               rand(period, t, d, dtype=dtype), masks(h, d, dtype=dtype), masks(hkv, d, dtype=dtype)]
    check(ops.masked_rope, naive.masked_rope, tensors, [0, 1], [0, 4], [0, 1, 4, 5])


def test_masked_rope_is_hugging_face_rope_at_full_width() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = rand(2, 5, 4, 8), rand(2, 5, 2, 8)
    angle = torch.outer(torch.arange(5.0), 0.5 ** torch.arange(4)).repeat(1, 2)[None]
    out = ops.masked_rope(q, k, angle.cos(), angle.sin(), torch.ones(4, 8), torch.ones(2, 8))
    want = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), angle.cos(), angle.sin())
    for mine, theirs in zip(out, want, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("full, kept", [(8, 4), (128, 64), (128, 32), (96, 32)], ids=str)
def test_strided_pairs_make_the_small_head_exact(full: int, kept: int) -> None:
    """A head masked to ``kept`` dims attends as a plain head of that size, with that size's own frequencies."""
    index, t = naive.strided_pair_index(full, kept), 6
    mask = naive.strided_pair_mask(torch.tensor([1.0, 0.0]), [kept, full], full)
    assert mask.sum() == kept
    assert torch.equal(mask.nonzero().flatten(), index.sort().values)

    def table(d: int) -> Tensor:
        angle = torch.outer(torch.arange(t), 10000.0 ** (-torch.arange(0, d, 2) / d).double()).repeat(1, 2)[None]
        return angle

    q, k = rand(1, t, 2, full, dtype=torch.float64), rand(1, t, 2, full, dtype=torch.float64)
    m = mask.double().expand(2, -1)
    a = ops.masked_rope(q, k, table(full).cos(), table(full).sin(), m, m)
    ones = torch.ones(2, kept, dtype=torch.float64)
    b = ops.masked_rope(q[..., index], k[..., index], table(kept).cos(), table(kept).sin(), ones, ones)
    torch.testing.assert_close(a[0] @ a[1].mT, b[0] @ b[1].mT, rtol=1e-12, atol=1e-12)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_cases(data: st.DataObject) -> None:
    """Any op, any small shape, any subset of gradients."""
    rows, n = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    name = data.draw(st.sampled_from(["channel_mask", "masked_swiglu", "gated_residual"]))
    torch.manual_seed(data.draw(st.integers(0, 1 << 16)))
    x = [rand(rows, n, dtype=dtype) for _ in range(3)]
    m = [masks(n, dtype=dtype) for _ in range(2)]
    tensors: dict[str, list[Tensor]] = {
        "channel_mask": [x[0], m[0]], "masked_swiglu": [x[0], x[1], *m],
        "gated_residual": [x[0], x[1], m[0], masks(1, dtype=dtype)[0], x[2]],
    }
    chosen = tensors[name]
    wanted = data.draw(st.sets(st.integers(0, len(chosen) - 1), min_size=1).filter(lambda s: 3 not in s or n > 8))
    compare(getattr(ops, name), chosen, sorted(wanted), None, None if dtype != torch.float64 else 1e-11, 1e-3,
            getattr(naive, name))


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return rand(*shape, dtype=dtype).requires_grad_()


CASES = {
    "channel_mask": lambda: (leaf(3, 17), leaf(17), None),
    "masked_swiglu": lambda: (leaf(3, 17), leaf(3, 17), leaf(17), leaf(17), None),
    "gated_residual": lambda: (leaf(3, 17), leaf(3, 17), leaf(17), torch.tensor(0.3, requires_grad=True),
                               leaf(3, 17), None),
    "masked_residual": lambda: (leaf(3, 17), leaf(3, 17), leaf(17), None),
    "mixed_rmsnorm": lambda: (leaf(3, 17), leaf(17), leaf(2), leaf(17), [9, 17], 1e-5, None),
    "head_rmsnorm": lambda: (leaf(2, 3, 4, 6), rand(6), leaf(4, 6), leaf(2), [2, 6], 1e-5, None),
    "masked_rope": lambda: (leaf(2, 3, 4, 6), leaf(2, 3, 2, 6), rand(1, 3, 6), rand(1, 3, 6), leaf(4, 6), leaf(2, 6),
                            leaf(2, 3, 2, 6), None),
    "masked_swiglu_quant": lambda: (leaf(3, 17), leaf(3, 17), leaf(17), leaf(17), leaf(2), [4, 16], False, None),
    "residual_rmsnorm": lambda: (leaf(3, 17), leaf(3, 17), rand(17), leaf(2), leaf(17), leaf(2), [8, 17], 1e-5, [4, 16],
                                 False, None),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    opcheck(getattr(torch.ops.jointnas, name), CASES[name]())


@pytest.mark.parametrize("name", ["gated_residual", "mixed_rmsnorm"])
def test_opcheck_with_absent_inputs(name: str) -> None:
    arguments = [a if i not in {"gated_residual": (2,), "mixed_rmsnorm": (3,)}[name] else None
                 for i, a in enumerate(CASES[name]())]
    opcheck(getattr(torch.ops.jointnas, name), tuple(arguments))


def test_a_layer_of_ops_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    w, table = rand(16), rand(1, 3, 4)

    def layer(x: Tensor, alpha: Tensor, mask: Tensor) -> Tensor:
        c = ops.prefix_mask(mask[:2], [8, 16], 16)
        h = ops.mixed_rmsnorm(x, w, alpha, [8, 16], 1e-5, c)
        head = h.view(2, 3, 4, 4)
        q, k = ops.masked_rope(head, head, table, table, c.view(4, 4), c.view(4, 4))
        y = ops.masked_swiglu(h, (q + k).transpose(1, 2).reshape(2, 3, 16), c, c)
        return ops.gated_residual(x, ops.channel_mask(y, c), c, alpha[0], x)

    inputs = [leaf(2, 3, 16), leaf(2), leaf(2)]
    eager = layer(*inputs)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, eager)
    grad = torch.randn_like(eager)
    for a, b in zip(torch.autograd.grad(compiled, inputs, grad), torch.autograd.grad(eager, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_a_weight_step_keeps_no_activation_alive() -> None:
    """With a frozen mask the backward needs the mask only."""
    x, mask = leaf(4, 9), rand(9)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = ops.channel_mask(x, mask)
        ops.gated_residual(x, out, mask)
    assert [t.shape for t in saved] == [mask.shape, mask.shape]
    (dx,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(dx, mask.expand(4, 9))


def test_modes_and_fake_tensors_see_the_registered_op() -> None:
    """The short way of eager mode must not hide the op from tracing."""
    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Log():
        ops.channel_mask(rand(2, 3), rand(3))
    assert any("jointnas.channel_mask" in name for name in seen)
    with FakeTensorMode() as mode:
        x = mode.from_tensor(leaf(2, 3))
        assert ops.channel_mask(x, mode.from_tensor(rand(3))).shape == (2, 3)
    assert ops.channel_mask(leaf(2, 3).to("meta"), rand(3).to("meta")).shape == (2, 3)


def test_gradient_checkpointing() -> None:
    x, w, alpha, mask = leaf(3, 16), rand(16), leaf(2), leaf(16)

    def layer(x: Tensor) -> Tensor:
        h = ops.mixed_rmsnorm(x, w, alpha, [8, 16], 1e-5, mask)
        return ops.gated_residual(x, ops.masked_swiglu(h, h, mask, mask), mask, alpha[0], x)

    plain = torch.autograd.grad(layer(x).square().sum(), [x, alpha, mask])
    saved = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), [x, alpha, mask])
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.channel_mask(rand(2, 3), rand(4)), "mask (4,) does not match x (2, 3)"),
        (lambda: ops.masked_swiglu(rand(2, 3), rand(2, 4), rand(3), rand(3)), "differ"),
        (lambda: ops.masked_swiglu(rand(2, 3), rand(2, 3), rand(3), rand(2)), "in_mask (2,)"),
        (lambda: ops.gated_residual(rand(2, 3), rand(2, 3), None, torch.tensor(0.5)), "gate and x go together"),
        (lambda: ops.gated_residual(rand(2, 3), rand(2, 3), rand(2)), "it must be [3]"),
        (lambda: ops.mixed_rmsnorm(rand(2, 3), rand(3), rand(1), [4], 1e-5), "must lie in 1..3"),
        (lambda: ops.mixed_rmsnorm(rand(2, 3), rand(3), rand(2), [3], 1e-5), "does not match 1 sizes"),
        (lambda: ops.head_rmsnorm(rand(2, 3), rand(3), rand(2, 3), rand(1), [2], 1e-5), "even head_dim"),
        (lambda: ops.head_rmsnorm(rand(2, 8), rand(8), rand(8), rand(1), [4], 1e-5), "do not match x (2, 8)"),
        (lambda: ops.head_rmsnorm(rand(2, 8), rand(8), rand(2, 8), rand(1), [6], 1e-5), "must be even and divide"),
        (lambda: ops.head_rmsnorm(rand(2, 8), rand(8), rand(2, 8), rand(1), [4, 8], 1e-5), "does not match 2 dims"),
        (lambda: ops.masked_rope(rand(1, 2, 1, 3), rand(1, 2, 1, 3), rand(1, 2, 3), rand(1, 2, 3), rand(1, 3),
                                 rand(1, 3)), "must be even"),
        (lambda: ops.prefix_mask(rand(2), [1], 4), "alpha has shape"),
        (lambda: ops.membership([5], 4), "outside 1..4"),
    ],
)
def test_bad_input_is_one_clear_error(call, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)


@pytest.mark.parametrize("backend, message", [("triton", "needs a CUDA tensor"), ("cuda", "unknown backend"),
                                              ("tritn", "Did you mean 'triton'?")])
def test_a_backend_that_cannot_run_says_why(backend: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ops.channel_mask(rand(2, 3), rand(3), backend=backend)
    assert message in str(caught.value)


def test_prefix_mask_is_the_sum_of_memberships() -> None:
    alpha = torch.rand(3, dtype=torch.float64, requires_grad=True)
    mask = ops.prefix_mask(alpha, sizes := [2, 7, 5], 9)
    for k in range(9):
        assert math.isclose(mask[k].item(), sum(alpha[i].item() for i in range(3) if k < sizes[i]))
    (grad,) = torch.autograd.grad(mask.sum(), alpha)
    assert grad.tolist() == sizes
