"""Every CUDA low-bit kernel on the device against the fp64 product of the dequantised weights: odd shapes, poison."""

from __future__ import annotations

import pytest
import torch

from jointnas_kernels import _ext
from jointnas_kernels.ops import LowbitWeight, lowbit_linear, lowbit_matmul
from jointnas_kernels.ops.lowbit import check as lowbit_check
from jointnas_kernels.ops.lowbit import cuda as lowbit_cuda
from jointnas_kernels.ops.lowbit.choice import kernel_for
from jointnas_kernels.ops.lowbit.pack import pack_weight
from jointnas_kernels.ops.lowbit.reference import dequantize, reference
from jointnas_kernels.ops.quant.spec import quantize_tokens
from jointnas_kernels.testing import assert_close
from tests import packed_tokens

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not (_ext.available() and _ext.load().has_cuda), reason="jointnas_kernels._C has no CUDA part"),
]
DTYPES = [torch.float16, torch.bfloat16]
# (tokens, rows, inputs): token counts off every tile, rows off 16 and 64, one and many groups
SHAPES = [
    *[(1, 1, 128), (3, 80, 1280), (17, 200, 512), (63, 1000, 1152)],
    *[(8, 4096, 4096), (16, 33, 8192), (65, 129, 2048), (300, 1000, 4096)],
]


def make(rows: int, inputs: int, bits: int, dtype: torch.dtype, device: torch.device):
    q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, inputs), dtype=torch.int8, device=device)
    scale = (torch.rand(rows, inputs // 128, device=device) * 0.02 + 0.01).to(dtype)
    return pack_weight(q, bits), scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("a_bits", [16, 8, 4, 2], ids=lambda b: f"A{b}")
@pytest.mark.parametrize("w_bits", [2, 4, 8], ids=lambda b: f"W{b}")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_cuda_matches_reference(shape, w_bits, a_bits, dtype, device):
    tokens, rows, inputs = shape
    packed, scale = make(rows, inputs, w_bits, dtype, device)
    x = torch.randn(tokens, inputs, device=device).to(dtype)
    y = lowbit_linear(x, packed, scale, w_bits, a_bits, 128, backend="cuda")
    if a_bits == 16:
        expected = reference(x.double(), packed, scale, w_bits, 16, 128, False)
    else:  # quantize in x's dtype, as the kernel does, then multiply exactly
        a, s, z = quantize_tokens(x, a_bits)
        expected = reference((a.double() - z.double()) * s.double(), packed, scale, w_bits, 16, 128, False)
    assert_close(y, expected, what=f"W{w_bits}A{a_bits}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kernel", "plan"),
    [
        *(("stream", plan) for plan in ((1, 1, 3), (1, 2, 4), (2, 4, 2), (2, 8, 1))),
        *(("stripe", plan) for plan in ((4, 2, 1), (4, 2, 11), (8, 2, 5), (8, 2, 32))),
    ],
    ids=str,
)
@pytest.mark.parametrize("early", [False, True])
def test_plans_of_few_tokens(kernel, plan, early, dtype, device):
    packed, scale = make(300, 2048, 4, dtype, device)
    weight = LowbitWeight.pack(packed, scale, 4, 128, layout="cuda")
    x = torch.randn(21, 2048, device=device).to(dtype)
    torch.cuda.synchronize()
    first = lowbit_cuda.multiply(kernel, x, weight, plan=lowbit_cuda.Plan(*plan), early=early)
    assert_close(first, reference(x.double(), packed, scale, 4, 16, 128, False))
    assert not weight.tensors[3].any()
    for _ in range(20):  # the order of the final sum is fixed
        again = lowbit_cuda.multiply(kernel, x, weight, plan=lowbit_cuda.Plan(*plan), early=early)
        assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("a_bits", [16, 8], ids=lambda b: f"A{b}")
@pytest.mark.parametrize("w_bits", [2, 4, 8], ids=lambda b: f"W{b}")
@pytest.mark.parametrize("plan", [(8, 1), (8, 3), (16, 1), (16, 4)], ids=str)
@pytest.mark.parametrize("kernel", ["tile", "wgmma"])
def test_many_tokens(kernel, plan, w_bits, a_bits, dtype, device):
    if kernel == "wgmma" and (a_bits == 16 or torch.cuda.get_device_capability() != (9, 0)):
        pytest.skip("wgmma is Hopper's, for quantized tokens")
    packed, scale = make(300, 2048, w_bits, dtype, device)
    weight = LowbitWeight.pack(packed, scale, w_bits, 128, layout="cuda")
    x = torch.randn(133, 2048, device=device).to(dtype)
    operand, activation = x, None
    target = x.double()
    if a_bits < 16:
        operand, s, z = lowbit_cuda.quantize_pack(x, a_bits, layout=int(kernel == "wgmma"))
        activation = (s, z)
        a, sx, zx = quantize_tokens(x, a_bits)
        target = (a.double() - zx.double()) * sx.double()
    y = lowbit_cuda.multiply(kernel, operand, weight, activation, lowbit_cuda.Plan(plan[0], splits=plan[1]))
    assert_close(y, reference(target, packed, scale, w_bits, 16, 128, False))
    assert not weight.tensors[3].any()


IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
HOPPER = pytest.mark.skipif(not IS_HOPPER, reason="the kernel is Hopper's")


@HOPPER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w_bits", [2, 4, 8], ids=lambda b: f"W{b}")
@pytest.mark.parametrize(
    "plan", [(2, 5, 2), (4, 1, 1), (8, 2, 4), (16, 1, 2), (16, 3, 4), (32, 1, 2), (32, 2, 4)], ids=str
)
def test_half(plan, w_bits, dtype, device):
    packed, scale = make(1100, 4096, w_bits, dtype, device)
    weight = LowbitWeight.pack(packed, scale, w_bits, 128, layout="cuda")
    tiles, splits, cluster = plan
    for tokens in (8 * tiles - 3, 8 * tiles + 5):
        x = torch.randn(tokens, 4096, device=device).to(dtype)
        y = lowbit_cuda.multiply("half", x, weight, None, lowbit_cuda.Plan(tiles, splits=splits, cluster=cluster))
        assert_close(y, reference(x.double(), packed, scale, w_bits, 16, 128, False))
        assert not weight.tensors[3].any()


@HOPPER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("w_bits", "a_bits"), [(2, 8), (4, 8), (8, 8), (4, 4), (2, 2)])
@pytest.mark.parametrize("plan", [(16, 1), (16, 2), (16, 4), (32, 1), (32, 2), (32, 4)], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 17, 128), (133, 300, 2048), (521, 1000, 1152), (300, 2500, 640), (2050, 5003, 128)], ids=str
)
def test_int8(shape, plan, a_bits, w_bits, dtype, device):
    tokens, rows, inputs = shape
    packed, scale = make(rows, inputs, w_bits, dtype, device)
    weight = LowbitWeight.pack(packed, scale, w_bits, 128, layout="cuda")
    x = (torch.randn(tokens, inputs, device=device) + 0.5).to(dtype)
    a, s, z = quantize_tokens(x, a_bits)
    expected = reference((a.double() - z.double()) * s.double(), packed, scale, w_bits, 16, 128, False)
    operand, sx, zx = lowbit_cuda.quantize_pack(x, a_bits, layout=2)
    p = lowbit_cuda.Plan(plan[0], cluster=plan[1])
    y = lowbit_cuda.multiply("int8", operand, weight, (sx, zx), p)
    assert_close(y, expected)
    for _ in range(5):
        assert torch.equal(y, lowbit_cuda.multiply("int8", operand, weight, (sx, zx), p))


@HOPPER
@pytest.mark.parametrize("w_bits", [2, 4, 8], ids=lambda b: f"W{b}")
def test_int8_sums_are_exact(w_bits, device):
    """Unit scales and outputs below 2^11: fp16 holds every integer, so nothing may be off by one."""
    tokens, rows, inputs = 300, 700, 128
    q = torch.randint(-2, 2, (rows, inputs), dtype=torch.int8, device=device)
    scale = torch.ones(rows, 1, dtype=torch.float16, device=device)
    weight = LowbitWeight.pack(q, scale, w_bits, 128, layout="cuda")
    x = torch.randint(-7, 9, (tokens, inputs), device=device).half()
    x[:, 0], x[:, 1] = -7, 8  # 16 levels: the 4-bit step is 1
    operand, s, z = lowbit_cuda.quantize_pack(x, 4, layout=2)
    assert (s == 1).all()
    assert torch.equal(lowbit_cuda.multiply("int8", operand, weight, (s, z)).double(), x.double() @ q.double().t())


@HOPPER
@pytest.mark.parametrize("rows", [4096, 4100])
def test_int8_under_load(rows, device):
    """Every multiprocessor busy, every barrier phase wrapped many times; the same bits from run to run."""
    packed, scale = make(rows, 8192, 4, torch.bfloat16, device)
    weight = LowbitWeight.pack(packed, scale, 4, 128, layout="cuda")
    x = torch.randn(1500, 8192, device=device).bfloat16()
    y = lowbit_matmul(x, weight, 8)
    assert kernel_for(1500, weight, 8) == "int8"
    a, s, z = quantize_tokens(x, 8)
    dense = dequantize(packed, scale, 4, 128, torch.float64)
    assert_close(y, (a.double() - z.double()) * s.double() @ dense.t())
    for _ in range(20):
        assert torch.equal(y, lowbit_matmul(x, weight, 8))


def test_kernels_verify_themselves(device):
    report = lowbit_check.report(torch.device("cuda", torch.cuda.current_device()))
    expected = {name for name in report if "bitplane" in name or IS_HOPPER}
    assert {name for name, result in report.items() if result == "verified"} == expected, report


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dense(bits, dtype, device):
    packed, scale = make(1000, 1152, bits, dtype, device)
    out = lowbit_cuda.dense(LowbitWeight.pack(packed, scale, bits, 128, layout="cuda"))
    assert torch.equal(out, dequantize(packed, scale, bits, 128, torch.float32).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("a_bits", [2, 4, 8], ids=lambda b: f"A{b}")
@pytest.mark.parametrize("w_bits", [2, 4], ids=lambda b: f"W{b}")
@pytest.mark.parametrize("shape", [(1, 1, 128), (3, 1000, 4096), (17, 200, 1152)], ids=str)
def test_planes(shape, w_bits, a_bits, dtype, device):
    tokens, rows, inputs = shape
    packed, scale = make(rows, inputs, w_bits, dtype, device)
    weight = LowbitWeight.pack(packed, scale, w_bits, 128, layout="cuda", planes=True)
    x = (torch.randn(tokens, inputs, device=device) + 0.5).to(dtype)
    operand, sx, zx = lowbit_cuda.quantize_pack(x, a_bits, layout=3)
    y = lowbit_cuda.multiply("bitplane", operand, weight, (sx, zx))
    a, s, z = quantize_tokens(x, a_bits)
    expected = reference((a.double() - z.double()) * s.double(), packed, scale, w_bits, 16, 128, False)
    assert_close(y, expected)
    assert not weight.tensors[3].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("layout", packed_tokens.LAYOUTS)
def test_activation_quantization_is_exact(layout, bits, symmetric, dtype, device):
    for x in (*packed_tokens.rows(dtype, device), *packed_tokens.every_half(dtype, 8, device)):
        packed_tokens.check(x, bits, symmetric, layout)
