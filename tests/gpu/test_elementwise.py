"""The width-mask ops on a real device: every kernel in every dtype, big and odd shapes, values and gradients.

Tolerances (comparison.py) are relative norms against fp64 on the same rounded inputs: a bf16 (fp16) result is rounded
once from fp32 math, at most 2^-9 (2^-12) per element, four times below the limit used.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from jointnas_kernels import ops
from tests.comparison import compare
from tests.ops import norm_quant

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
SHAPES = pytest.mark.parametrize(
    "shape", [(1, 1), (3, 17), (127, 251), (1024, 4096), (5, 7, 1000), (16384, 130)], ids=str
)
HIDDEN = [2**i for i in range(5, 13)]  # of the llama3 space


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def weights(*shape: int) -> Tensor:
    return torch.rand(*shape, device="cuda") + 0.1


def both(call, tensors: Sequence[Tensor | None], weight_step: list[int], everything: list[int],
         fp32: float = 2e-5) -> None:
    """A weight step asks for activations only, an arch step for everything: different kernels."""
    compare(call, tensors, weight_step, None, fp32=fp32)
    compare(call, tensors, everything, None, fp32=fp32)


def test_ops_choose_triton_on_cuda() -> None:
    from jointnas_kernels.ops.core.backends import resolve

    assert resolve("channel_mask", None, rand(1)) == "triton"
    assert resolve("channel_mask", None, rand(1).double()) == "reference"


@DTYPES
@SHAPES
def test_channel_mask(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    both(ops.channel_mask, [rand(*shape, dtype=dtype), weights(shape[-1])], [0], [0, 1])


@DTYPES
@SHAPES
def test_masked_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n = shape[-1]
    both(ops.masked_swiglu, [rand(*shape, dtype=dtype), rand(*shape, dtype=dtype), weights(n), weights(n)],
         [0, 1], [0, 1, 2, 3])


def test_masked_swiglu_at_full_size() -> None:
    x, u = (rand(1024, 14336, dtype=torch.bfloat16) for _ in range(2))
    both(ops.masked_swiglu, [x, u, weights(14336), weights(14336)], [0, 1], [0, 1, 2, 3])


def test_masked_swiglu_saturates() -> None:
    gate = torch.tensor([[-1e4, -100.0, -88.0, 0.0, 88.0, 1e4]], device="cuda", dtype=torch.bfloat16)
    ones = torch.ones(6, device="cuda")
    compare(ops.masked_swiglu, [gate, torch.ones_like(gate), ones, ones], [0, 1], None)


@DTYPES
@SHAPES
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("gated", [False, True], ids=["add", "gated"])
def test_gated_residual(shape: tuple[int, ...], gated: bool, masked: bool, dtype: torch.dtype) -> None:
    h, y, x = (rand(*shape, dtype=dtype) for _ in range(3))
    mask = weights(shape[-1]) if masked else None
    gate = torch.tensor(0.37, device="cuda") if gated else None
    tensors = [h, y, mask, gate, x if gated else None]
    activations = [0, 1, 4] if gated else [0, 1]
    # the gate's gradient is one sum of terms of both signs, which cancel by chance
    both(ops.gated_residual, tensors, activations, [i for i in range(5) if tensors[i] is not None],
         1e-3 if gated else 2e-5)


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_a_hard_gate_is_exact(gate: float) -> None:
    h, y, x = (rand(64, 4096, dtype=torch.bfloat16) for _ in range(3))
    out = ops.gated_residual(h, y, None, torch.tensor(gate, device="cuda"), x)
    assert torch.equal(out, x if gate == 0 else ops.gated_residual(h, y))


@DTYPES
@pytest.mark.parametrize(
    "rows, n, sizes",
    [(1, 16, [16]), (5, 100, [100, 37, 64]), (63, 1000, [251, 1000]), (1024, 4096, HIDDEN),
     (100, 4096, [512 * i for i in range(1, 9)]), (333, 4096, [1000, 4096]), (2048, 4096, [2048, 4096]),
     (8192, 2048, [1024, 2048]), (257, 8192, [4096, 6144, 8192]), (64, 16384, [16384])],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_mixed_rmsnorm(rows: int, n: int, sizes: list[int], masked: bool, dtype: torch.dtype) -> None:
    def call(x, w, alpha, mask, backend):
        return ops.mixed_rmsnorm(x, w, alpha, sizes, 1e-5, mask, backend=backend)

    tensors = [rand(rows, n, dtype=dtype), rand(n, dtype=dtype), weights(len(sizes)), weights(n) if masked else None]
    both(call, tensors, [0], [0, 1, 2, 3] if masked else [0, 1, 2])


@DTYPES
@pytest.mark.parametrize(
    "shape, sizes",
    [((1, 16), [16]), ((5, 100), [100, 37, 64]), ((7, 9, 1000), [251, 1000]), ((1024, 4096), HIDDEN),
     ((333, 4096), [1000, 4096]), ((100, 4096), [4096]), ((8192, 2048), [1024, 2048]),
     ((257, 8192), [4096, 6144, 8192]), ((64, 16384), [16384])],
    ids=str,
)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_mixed_rmsnorm_quant(shape: tuple[int, ...], sizes: list[int], symmetric: bool, dtype: torch.dtype) -> None:
    """Bit for bit the two kernels apart, and the gradients of a weight step, of probabilities alone and of all."""
    x, weight, alpha, mask, probs = range(5)
    for bits in ((2, 4, 8, 16), (4, 8), (4,)):
        tensors = norm_quant.inputs(shape, len(sizes), bits, True, dtype, "cuda")
        subsets = ([x], [x, probs], [x, alpha, mask, probs], [x, weight, alpha, mask, probs])
        norm_quant.check(tensors, sizes, 1e-2, bits, symmetric, None, subsets)


@DTYPES
@pytest.mark.parametrize(
    "tokens, h, d, dims",
    [(1, 1, 2, [2]), (5, 3, 96, [32, 48, 96]), (1024, 32, 128, [32, 64, 128]), (4096, 8, 128, [64, 128]),
     (333, 14, 64, [32, 64])],
    ids=str,
)
def test_head_rmsnorm(tokens: int, h: int, d: int, dims: list[int], dtype: torch.dtype) -> None:
    def call(x, w, mask, alpha, backend):
        return ops.head_rmsnorm(x, w, mask, alpha, dims, 1e-5, backend=backend)

    tensors = [rand(tokens, h, d, dtype=dtype), rand(d, dtype=dtype), weights(h, d), weights(len(dims))]
    both(call, tensors, [0], [0, 2, 3])


@DTYPES
@pytest.mark.parametrize(
    "b, t, h, hkv, d",
    [(1, 1, 1, 1, 2), (2, 3, 5, 1, 6), (8, 128, 32, 8, 128), (2, 1000, 32, 8, 64), (3, 61, 12, 4, 80)], ids=str,
)
def test_masked_rope(b: int, t: int, h: int, hkv: int, d: int, dtype: torch.dtype) -> None:
    tensors = [rand(b, t, h, d, dtype=dtype), rand(b, t, hkv, d, dtype=dtype), rand(1, t, d, dtype=dtype),
               rand(b, t, d, dtype=dtype), weights(h, d), weights(hkv, d)]
    both(ops.masked_rope, tensors, [0, 1], [0, 1, 4, 5])


def test_masked_rope_takes_views_and_transposed_gradients() -> None:
    fused = rand(4, 128, 48, 64, dtype=torch.bfloat16)

    def call(q, k, cos, sin, q_mask, k_mask, backend):
        q, k = ops.masked_rope(q, k, cos, sin, q_mask, k_mask, backend=backend)
        return q.contiguous(), k.contiguous()

    compare(call, [fused[:, :, :32], fused[:, :, 32:40], rand(1, 128, 64), rand(1, 128, 64), weights(32, 64),
                   weights(8, 64)], [0, 1, 4, 5], None)


@pytest.mark.parametrize("op", ["channel_mask", "masked_swiglu"])
def test_strided_rows(op: str) -> None:
    wide = rand(300, 2 * 1408, dtype=torch.bfloat16)
    gate, up = wide[:, :1408], wide[:, 1408:]
    if op == "channel_mask":
        compare(ops.channel_mask, [up, weights(1408)], [0, 1], None)
    else:
        compare(ops.masked_swiglu, [gate, up, weights(1408), weights(1408)], [0, 1, 2, 3], None)


@DTYPES
@pytest.mark.parametrize("impl", ["factored", "masks", "loop"])
@pytest.mark.parametrize(
    "m, n, sizes_in, sizes_out",
    [(1, 1, [1], [1]), (97, 251, [31, 100, 251], [13, 97]), (1024, 4096, HIDDEN, [256, 512, 1024])],
    ids=["1x1", "97x251", "1024x4096"],
)
def test_mixed_weight(m: int, n: int, sizes_in: list[int], sizes_out: list[int], impl: str,
                      dtype: torch.dtype) -> None:
    def call(w, a, b, backend):
        return ops.mixed_weight(w, a, sizes_in, b, sizes_out, impl, backend)

    both(call, [rand(m, n, dtype=dtype), weights(len(sizes_in)), weights(len(sizes_out))], [1, 2], [0, 1, 2])


# GEMMs of half operands accumulate in fp32 but round every addmm's result and the rank-r intermediate: three roundings.
GEMM = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 2e-5}


@DTYPES
@pytest.mark.parametrize("rows, i, o, r", [(7, 33, 17, 4), (1024, 4096, 1024, 32)], ids=str)
@pytest.mark.parametrize("lora", [torch.float32, None], ids=["lora-fp32", "lora-same"])
def test_mixed_linear(rows: int, i: int, o: int, r: int, lora: torch.dtype | None, dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    kind = lora or dtype

    def call(x, w, c, out_mask, a, b, backend):
        return ops.mixed_linear(x, w, c, out_mask, a, b, 0.5, backend=backend)

    tensors = [rand(rows, i, dtype=dtype), rand(o, i, dtype=dtype) * i**-0.5, weights(i), weights(o),
               (rand(r, i) * i**-0.5).to(kind), rand(o, r).to(kind)]
    compare(call, tensors, [0, 4, 5], None, GEMM[dtype])
    compare(call, tensors, [0, 2, 3], None, GEMM[dtype])


@DTYPES
def test_mixed_linear_group(dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    i, outs, r = 1024, (512, 128, 128), 16
    frozen = [rand(o, i, dtype=dtype) * i**-0.5 for o in outs]

    def call(x, *lora, backend):
        weight = [w.to(x.dtype) for w in frozen]
        return ops.mixed_linear_group(x, weight, lora[:3], lora[3:], 0.5)

    tensors = [rand(2, 100, i, dtype=dtype), *(rand(r, i) * i**-0.5 for _ in outs), *(rand(o, r) for o in outs)]
    compare(call, tensors, list(range(7)), None, GEMM[dtype])


def test_gradients_are_deterministic() -> None:
    x, mask = rand(4096, 4096, dtype=torch.bfloat16), weights(4096).requires_grad_()
    grads = [torch.autograd.grad(ops.channel_mask(x, mask), mask, x)[0] for _ in range(3)]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_a_block_of_ops_in_a_cuda_graph_and_under_compile() -> None:
    x, w = rand(8, 128, 1024, dtype=torch.bfloat16), rand(1024, dtype=torch.bfloat16)
    alpha, mask = weights(2).requires_grad_(), weights(1024).requires_grad_()

    def step(x: Tensor) -> Tensor:
        h = ops.mixed_rmsnorm(x, w, alpha, [512, 1024], 1e-5, mask)
        return ops.gated_residual(x, ops.channel_mask(h, mask), mask)

    eager = step(x)
    want = torch.autograd.grad(eager.float().square().sum(), [alpha, mask])
    compiled = torch.compile(step, fullgraph=True)(x)
    got = torch.autograd.grad(compiled.float().square().sum(), [alpha, mask])
    assert torch.equal(compiled, eager)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        step(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = step(x)
        x.copy_(rand(8, 128, 1024, dtype=torch.bfloat16))
        graph.replay()
        assert torch.equal(out, step(x))
