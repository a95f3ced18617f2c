"""The CUDA low-bit kernels, executed on the CPU (conftest.py), against the fp64 product of the dequantised weights."""

from __future__ import annotations

import pytest
import torch

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops import LowbitWeight, lowbit_matmul
from jointnas_kernels.ops.lowbit import cuda as lowbit_cuda
from jointnas_kernels.ops.lowbit.pack import pack_weight
from jointnas_kernels.ops.lowbit.reference import dequantize, reference
from jointnas_kernels.ops.quant.spec import quantize_tokens
from jointnas_kernels.testing import assert_close, poisoned

pytestmark = pytest.mark.usefixtures("on_cpu")
DTYPES = [torch.float16, torch.bfloat16]


def make(rows: int, inputs: int, bits: int, dtype: torch.dtype):
    q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, inputs), dtype=torch.int8)
    return pack_weight(q, bits), (torch.rand(rows, inputs // 128) * 0.02 + 0.01).to(dtype)


def expected(x, packed, scale, w_bits, a_bits, symmetric=False):
    if a_bits < 16:  # quantize in x's dtype, as the kernel does, then multiply exactly
        a, s, z = quantize_tokens(x, a_bits, symmetric)
        x = (a.double() - z.double()) * s.double()
    return reference(x.double(), packed, scale, w_bits, 16, 128, False)


def multiplies_halves(kernel, shape, plan, w_bits, dtype):
    """16-bit activations of a shape (tokens, rows, inputs), by a plan; locks are left as they were."""
    tokens, rows, inputs = shape
    packed, scale = make(rows, inputs, w_bits, dtype)
    weight = LowbitWeight.pack(packed, scale, w_bits, 128, layout="cuda")
    x = torch.randn(tokens, inputs).to(dtype)
    with poisoned():
        y = lowbit_cuda.multiply(kernel, x, weight, None, plan)
    assert_close(y, expected(x, packed, scale, w_bits, 16), what=f"W{w_bits}A16")
    assert not weight.tensors[3].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("a_bits", [16, 8, 4, 2], ids=lambda b: f"A{b}")
@pytest.mark.parametrize("w_bits", [2, 4, 8], ids=lambda b: f"W{b}")
@pytest.mark.parametrize("shape", [(1, 1, 128), (3, 80, 1280), (17, 200, 512)], ids=lambda s: "x".join(map(str, s)))
def test_matmul(shape, w_bits, a_bits, dtype):
    tokens, rows, inputs = shape
    packed, scale = make(rows, inputs, w_bits, dtype)
    x = torch.randn(tokens, inputs).to(dtype)
    weight = LowbitWeight.pack(packed, scale, w_bits, 128, layout="cuda")
    with poisoned():
        y = lowbit_matmul(x, weight, a_bits)
    assert_close(y, expected(x, packed, scale, w_bits, a_bits), what=f"W{w_bits}A{a_bits}")


@pytest.mark.parametrize(
    ("plan", "a_bits"),
    [
        ((1, 1, 3), 16), ((1, 2, 4), 16), ((2, 4, 2), 16), ((2, 8, 1), 16),
        ((1, 1, 3), 8), ((2, 4, 2), 8), ((2, 8, 1), 8), ((4, 2, 5), 8),
    ],
    ids=str,
)  # fmt: skip
def test_stream_plans(plan, a_bits):
    packed, scale = make(150, 1024, 4, torch.float16)
    weight = LowbitWeight.pack(packed, scale, 4, 128, layout="cuda")
    x = torch.randn(21, 1024).half()
    operand, activation = x, None
    if a_bits < 16:
        operand, s, z = lowbit_cuda.quantize_pack(x, a_bits)
        activation = (s, z)
    with poisoned():
        y = lowbit_cuda.multiply("stream", operand, weight, activation, lowbit_cuda.Plan(*plan))
    assert_close(y, expected(x, packed, scale, 4, a_bits))
    assert not weight.tensors[3].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w_bits", [2, 4, 8], ids=lambda b: f"W{b}")
@pytest.mark.parametrize(
    ("shape", "plan"),
    [  # tokens, rows, inputs; 8-token tiles, stripes: one; inside row blocks and across; one step each; passes
        ((1, 1, 128), (4, 1)), ((17, 300, 1280), (4, 1)), ((32, 600, 640), (4, 7)), ((21, 513, 896), (4, 3)),
        ((70, 300, 384), (4, 6)), ((64, 530, 1152), (8, 4)), ((33, 255, 1152), (8, 9)), ((67, 270, 640), (8, 3)),
    ],
    ids=str,
)  # fmt: skip
def test_stripe(shape, plan, w_bits, dtype):
    multiplies_halves("stripe", shape, lowbit_cuda.Plan(plan[0], splits=plan[1]), w_bits, dtype)


@pytest.mark.parametrize("sms", [1, 4, 108, 132])
def test_stripes_are_even_and_no_row_block_is_in_more_than_are_expected(sms):
    for rows in (1, 256, 1000, 1024, 4096, 8192, 14336, 128256):
        for inputs in (128, 256, 640, 4096, 14336):
            for tokens in (17, 64, 128):
                plan = lowbit_cuda.stripe_plan(tokens, rows, inputs, sms)
                passes = -(-tokens // (8 * plan.token_tiles))
                assert plan.splits * passes <= max(sms, passes)
                steps, groups = lowbit_cuda.stripe_steps(rows, inputs), inputs // 128
                for stripes in {plan.splits, min(sms, steps)}:
                    begin = [steps * i // stripes for i in range(stripes + 1)]
                    spread = [sum(begin[i] < b + groups and begin[i + 1] > b for i in range(stripes))
                              for b in range(0, steps, groups)]  # fmt: skip
                    assert max(spread) <= lowbit_cuda.stripe_shares(rows, inputs, stripes)


def test_stripes_with_nothing_to_do_are_refused():
    packed, scale = make(40, 256, 4, torch.float16)
    weight = LowbitWeight.pack(packed, scale, 4, 128, layout="cuda")
    with pytest.raises(JointNASError, match="an argument it does not support"):
        lowbit_cuda.multiply("stripe", torch.randn(20, 256).half(), weight, None, lowbit_cuda.Plan(4, splits=3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("a_bits", [16, 8], ids=lambda b: f"A{b}")
@pytest.mark.parametrize("w_bits", [2, 4, 8], ids=lambda b: f"W{b}")
@pytest.mark.parametrize(("shape", "plan"), [((70, 150, 384), (8, 1)), ((130, 129, 1280), (16, 3))], ids=str)
@pytest.mark.parametrize("kernel", ["tile", "wgmma"])
def test_many_tokens(kernel, shape, plan, w_bits, a_bits, dtype):
    if kernel == "wgmma" and a_bits == 16:
        pytest.skip("wgmma takes quantized tokens")
    tokens, rows, inputs = shape
    packed, scale = make(rows, inputs, w_bits, dtype)
    weight = LowbitWeight.pack(packed, scale, w_bits, 128, layout="cuda")
    x = torch.randn(tokens, inputs).to(dtype)
    with poisoned():
        operand, activation = x, None
        if a_bits < 16:
            operand, s, z = lowbit_cuda.quantize_pack(x, a_bits, layout=int(kernel == "wgmma"))
            activation = (s, z)
        y = lowbit_cuda.multiply(kernel, operand, weight, activation, lowbit_cuda.Plan(plan[0], splits=plan[1]))
    assert_close(y, expected(x, packed, scale, w_bits, a_bits), what=f"W{w_bits}A{a_bits}")
    assert not weight.tensors[3].any()


@pytest.mark.parametrize(
    ("w_bits", "a_bits", "dtype"), [(2, 2, DTYPES[0]), (2, 4, DTYPES[1]), (4, 4, DTYPES[0]), (8, 4, DTYPES[1])], ids=str
)
@pytest.mark.parametrize(("shape", "plan"), [((70, 150, 384), (8, 1)), ((130, 129, 1280), (16, 3))], ids=str)
def test_four_bits_multiply_as_bytes_do(shape, plan, w_bits, a_bits, dtype, monkeypatch):
    """Before sm_90 they have instructions of their own: the same results, bit for bit."""
    tokens, rows, inputs = shape
    packed, scale = make(rows, inputs, w_bits, dtype)
    weight = LowbitWeight.pack(packed, scale, w_bits, 128, layout="cuda")
    x = torch.randn(tokens, inputs).to(dtype)
    a, s, z = lowbit_cuda.quantize_pack(x, a_bits)

    def multiply(levels: torch.Tensor) -> torch.Tensor:
        how = lowbit_cuda.Plan(plan[0], splits=plan[1])
        with poisoned():
            return lowbit_cuda.multiply("tile", levels, weight, (s, z), how, a_bits=a_bits)

    bytewise = multiply(a)
    assert_close(bytewise, expected(x, packed, scale, w_bits, a_bits), what=f"W{w_bits}A{a_bits}")
    extremes = a.clone()
    extremes[0], extremes[1] = -(1 << (a_bits - 1)), (1 << (a_bits - 1)) - 1
    too_large, most = multiply(a * 8), multiply(extremes)
    monkeypatch.setenv("JN_EMULATED_CAPABILITY", "80")
    assert torch.equal(multiply(a), bytewise)
    assert torch.equal(multiply(extremes), most)
    assert torch.equal(multiply(a * 8), too_large) == (w_bits == 8), "levels of more bits are cut"


@pytest.mark.parametrize(("w_bits", "dtype"), [(2, DTYPES[0]), (4, DTYPES[1]), (8, DTYPES[0])], ids=str)
@pytest.mark.parametrize(
    ("shape", "plan"),
    [  # tokens, rows, inputs; 8-token tiles, cluster: blocks of one part and of many, few groups and many
        ((130, 300, 640), (16, 2)), ((275, 129, 896), (32, 2)), ((9, 120, 256), (16, 1)), ((140, 17, 128), (32, 2)),
        ((300, 545, 256), (16, 4)), ((513, 1004, 128), (32, 1)), ((270, 400, 1152), (32, 4)),
    ],
    ids=str,
)
def test_int8(shape, plan, w_bits, dtype):
    tokens, rows, inputs = shape
    packed, scale = make(rows, inputs, w_bits, dtype)
    weight = LowbitWeight.pack(packed, scale, w_bits, 128, layout="cuda")
    x = (torch.randn(tokens, inputs) + 0.5).to(dtype)
    with poisoned():
        a, s, z = lowbit_cuda.quantize_pack(x, 8, layout=2)
        y = lowbit_cuda.multiply("int8", a, weight, (s, z), lowbit_cuda.Plan(plan[0], cluster=plan[1]))
    assert_close(y, expected(x, packed, scale, w_bits, 8), what=f"W{w_bits}A8")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w_bits", [2, 4, 8], ids=lambda b: f"W{b}")
@pytest.mark.parametrize(
    ("shape", "plan"),
    [  # tokens, rows, inputs; 8-token tiles, splits, cluster: as many groups as stages and more, fewer than splits
        ((1, 17, 128), (2, 2, 1)), ((21, 300, 1280), (2, 3, 2)), ((27, 150, 640), (4, 1, 4)),
        ((61, 530, 1152), (8, 2, 4)), ((130, 129, 640), (16, 1, 2)), ((275, 300, 896), (32, 1, 2)),
        ((140, 120, 384), (32, 2, 1)),
    ],
    ids=str,
)  # fmt: skip
def test_half(shape, plan, w_bits, dtype):
    tiles, splits, cluster = plan
    multiplies_halves("half", shape, lowbit_cuda.Plan(tiles, splits=splits, cluster=cluster), w_bits, dtype)


@pytest.mark.parametrize("w_bits", [2, 4, 8], ids=lambda b: f"W{b}")
@pytest.mark.parametrize(("kernel", "tiles"), [("stream", 1), ("tile", 8), ("wgmma", 8), ("int8", 16)])
def test_the_largest_integer_sums_are_exact(kernel, tiles, w_bits):
    """128 products of the least weight and the least activation, 2^21 with weights scaled up to 8 bits, and others."""
    low, high = -(1 << (w_bits - 1)), (1 << (w_bits - 1)) - 1
    q = torch.tensor([[low] * 256, [high] * 256, [low] * 128 + [high] * 128], dtype=torch.int8)
    scale = torch.full((3, 2), 2.0**-10).half()
    weight = LowbitWeight.pack(pack_weight(q, w_bits), scale, w_bits, 128, layout="cuda")
    a = torch.tensor([[-128], [127]], dtype=torch.int8).expand(2, 256).contiguous()  # every layout of it is the same
    stored = torch.zeros(2, 8, 128, dtype=torch.int8)
    stored[:, :2] = a[:, :128]
    activation = torch.full((2,), 2.0**-7), torch.tensor([0, 3], dtype=torch.int32)
    with poisoned():
        plan = lowbit_cuda.Plan(tiles)
        y = lowbit_cuda.multiply(kernel, stored.view(2, -1) if kernel == "int8" else a, weight, activation, plan)
    exact = (a.double() - activation[1].double()[:, None]) @ q.double().t() * 2.0**-17
    assert torch.equal(y, exact.half())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rows", [1, 17, 130])
def test_dense(rows, bits, dtype):
    packed, scale = make(rows, 384, bits, dtype)
    with poisoned():
        out = lowbit_cuda.dense(LowbitWeight.pack(packed, scale, bits, 128, layout="cuda"))
    assert torch.equal(out, dequantize(packed, scale, bits, 128, torch.float32).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("a_bits", [2, 4, 8], ids=lambda b: f"A{b}")
@pytest.mark.parametrize("w_bits", [2, 4], ids=lambda b: f"W{b}")
@pytest.mark.parametrize(("tokens", "plan"), [(1, (1, 1, 1)), (3, (2, 2, 2)), (9, (4, 8, 1))], ids=str)
def test_planes(tokens, plan, w_bits, a_bits, dtype):
    packed, scale = make(150, 768, w_bits, dtype)
    weight = LowbitWeight.pack(packed, scale, w_bits, 128, layout="cuda", planes=True)
    x = (torch.randn(tokens, 768) + 0.5).to(dtype)
    with poisoned():
        a, s, z = lowbit_cuda.quantize_pack(x, a_bits, layout=3)
        y = lowbit_cuda.multiply("bitplane", a, weight, (s, z), lowbit_cuda.Plan(*plan))
    assert_close(y, expected(x, packed, scale, w_bits, a_bits), what=f"W{w_bits}A{a_bits}")
    assert not weight.tensors[3].any()


def test_autocast_changes_nothing():
    """With many tokens the library's product takes its dtype from x, as the kernels do."""
    packed, scale = make(20, 256, 4, torch.float16)
    weight, x = LowbitWeight.pack(packed, scale, 4, 128, layout="cuda"), torch.randn(130, 256).half()
    plain = lowbit_matmul(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lowbit_matmul(x, weight), plain)
