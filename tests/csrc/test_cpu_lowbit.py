"""The compiled low-bit products: levels and integer sums exact, floats within fp32 rounding, per instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops import LowbitWeight, lowbit_linear, lowbit_matmul
from jointnas_kernels.ops.lowbit.pack import pack_weight, unpack_weight
from jointnas_kernels.ops.quant.spec import quantize_tokens
from jointnas_kernels.testing import assert_close, poisoned

pytestmark = pytest.mark.usefixtures("lowbit_kernels")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
A_BITS = pytest.mark.parametrize("a_bits", [2, 4, 8, 16], ids=lambda a: f"A{a}")
W_BITS = pytest.mark.parametrize("w_bits", [2, 4, 8], ids=lambda w: f"W{w}")
# tokens, outputs, inputs, group: one row, odd rows, one and several blocks of 64, odd groups, groups stored as several
SHAPES = [(1, 1, 32, 32), (1, 37, 384, 128), (3, 65, 256, 64), (4, 33, 512, 256), (2, 7, 96, 32), (1, 19, 240, 48),
          (5, 19, 256, 128), (17, 130, 128, 128), (13, 9, 480, 96), (63, 3, 1024, 512),
          # one token times runs of blocks; tiles of tokens, an odd number of them and two passes of five
          (1, 330, 256, 128), (40, 70, 128, 64), (99, 5, 128, 128), (131, 66, 64, 32)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def weights(o: int, i: int, group: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (o, i), dtype=torch.int8)
    return q, pack_weight(q, bits), torch.rand(o, i // group) + 0.1


def exact(x: Tensor, q: Tensor, scale: Tensor, group: int, a_bits: int, symmetric: bool) -> Tensor:
    """In fp64, from the quantized tokens of the reference."""
    a, s, z = quantize_tokens(x, a_bits, symmetric) if a_bits < 16 else (x, torch.ones(1), torch.zeros(1))
    w = (q.double().unflatten(-1, (-1, group)) * scale.double().unsqueeze(-1)).flatten(-2)
    return ((a.double() - z.double()) * s.double()) @ w.T


@DTYPES
@A_BITS
@W_BITS
def test_values(w_bits: int, a_bits: int, dtype: torch.dtype) -> None:
    for m, o, i, group in SHAPES:
        q, packed, scale = weights(o, i, group, w_bits)
        x = torch.randn(m, i).to(dtype)
        if m > 2:
            x[0], x[1] = 0, x[1].abs()
        for symmetric, scale_dtype in ((False, torch.float32), (True, torch.bfloat16)):
            scales = scale.to(scale_dtype)
            want = exact(x, q, scales, group, a_bits, symmetric)
            prepared = LowbitWeight.pack(packed, scales, w_bits, group)
            with poisoned():
                out = lowbit_linear(x, packed, scales, w_bits, a_bits, group, "cpu", symmetric)
                again = lowbit_matmul(x, prepared, a_bits, symmetric)
            assert_close(out, want, what=f"{(m, o, i, group)}")
            assert torch.equal(out, again)


@DTYPES
@pytest.mark.parametrize("a_bits", [2, 4], ids=lambda a: f"A{a}")
@pytest.mark.parametrize("w_bits", [2, 4], ids=lambda w: f"W{w}")
def test_bit_planes(w_bits: int, a_bits: int, dtype: torch.dtype) -> None:
    """The popcount kernel is the same function, to the bit: its sums are the same integers."""
    for m, o, i, group in [shape for shape in SHAPES if shape[3] % 32 == 0]:
        _, packed, scale = weights(o, i, group, w_bits)
        x = torch.randn(m, i).to(dtype)
        prepared = LowbitWeight.pack(packed, scale, w_bits, group, planes=True)
        for symmetric in (False, True):
            with poisoned():
                out = lowbit_matmul(x, prepared, a_bits, symmetric)
            assert torch.equal(out, lowbit_linear(x, packed, scale, w_bits, a_bits, group, "cpu", symmetric))


@W_BITS
def test_packing_round_trips(w_bits: int) -> None:
    for _, o, i, group in SHAPES:
        _, packed, scale = weights(o, i, group, w_bits)
        for planes in (False, True) if w_bits < 8 and group % 32 == 0 else (False,):
            for scales in (scale - 0.6, (scale - 0.6).bfloat16()):
                back, scale_back = LowbitWeight.pack(packed, scales, w_bits, group, planes=planes).unpack()
                assert torch.equal(back, packed)
                assert torch.equal(scale_back, scales)
                assert scale_back.dtype == scales.dtype


def test_every_byte_keeps_its_level() -> None:
    """All 256 bytes in all four places of a word, through each width's product with a unit vector per input."""
    stored = torch.arange(256, dtype=torch.int32)
    packed = (stored | (255 - stored) << 8 | (stored ^ 0x55) << 16 | (stored ^ 0xAA) << 24)[:, None].repeat(1, 2)
    for w_bits in (2, 4, 8):
        i = 64 // w_bits
        q = unpack_weight(packed, w_bits, (256, i))
        prepared = LowbitWeight.pack(packed, torch.ones(256, 1), w_bits, i)
        for a_bits in (8, 16):
            assert torch.equal(lowbit_matmul(torch.eye(i) * 255, prepared, a_bits), q.T.float() * 255)


@W_BITS
def test_integer_part_is_exact(w_bits: int) -> None:
    """With unit scales and integer activations everything is an integer below 2^24: no rounding may happen at all."""
    for m, o, i, group in ((1, 21, 512, 128), (9, 21, 512, 128), (4, 3, 1024, 512), (6, 70, 1024, 512)):
        q, packed, _ = weights(o, i, group, w_bits)
        x = torch.randint(-128, 128, (m, i)).float()
        x[:, 0], x[:, 1] = -128, 127  # the range is exactly that of 8 bits: scale 1, zero point 0
        x[m // 2] += 128  # here zero point -128, levels from -128 to 127
        out = lowbit_linear(x, packed, torch.ones(o, i // group), w_bits, 8, group, "cpu")
        assert torch.equal(out, x @ q.float().T)


def test_extreme_levels_do_not_saturate() -> None:
    """Every product at its largest magnitude of one sign."""
    for w_bits in (2, 4, 8):
        low, high = -(1 << (w_bits - 1)), (1 << (w_bits - 1)) - 1
        q = torch.tensor([low, high], dtype=torch.int8).repeat_interleave(2)[:, None].expand(4, 512).contiguous()
        packed = pack_weight(q, w_bits)
        for m in (1, 8):
            x = torch.full((m, 512), 127.0)
            x[:, ::128] = -128.0
            out = lowbit_linear(x, packed, torch.ones(4, 4), w_bits, 8, 128, "cpu")
            assert torch.equal(out, x @ q.float().T)


@DTYPES
def test_the_op_chooses_it(dtype: torch.dtype) -> None:
    q, packed, scale = weights(12, 256, 128, 4)
    x = torch.randn(2, 3, 256).to(dtype)
    scale = scale.to(dtype)
    out = lowbit_linear(x, packed, scale, 4, 8, 128)
    assert out.shape == (2, 3, 12)
    assert torch.equal(out, lowbit_linear(x, packed, scale, 4, 8, 128, backend="cpu"))
    assert_close(out.flatten(0, 1), exact(x.flatten(0, 1), q, scale, 128, 8, False))


def test_prepared_weights_in_a_compiled_graph() -> None:
    q, packed, scale = weights(12, 256, 128, 4)
    prepared = LowbitWeight.pack(packed, scale, 4, 128)
    x = torch.randn(2, 3, 256)
    compiled = torch.compile(lambda x: lowbit_matmul(x, prepared, 8), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), lowbit_matmul(x, prepared, 8))
    arguments = (x, *prepared, 8, False, None)
    torch.library.opcheck(torch.ops.jointnas.lowbit_matmul.default, arguments)
    for dtype in (torch.float64, torch.float16):  # no kernel: the reference, from the same weights
        out = lowbit_matmul(x.to(dtype), prepared, 16).flatten(0, 1)
        assert_close(out, exact(x.flatten(0, 1), q, scale, 128, 16, False), tol=1e-2)
    assert lowbit_matmul(x[:0], prepared, 8).shape == (0, 3, 12)


def test_bad_preparation() -> None:
    _, packed, scale = weights(12, 256, 128, 4)
    prepared, planes = (LowbitWeight.pack(packed, scale, 4, 128, planes=planes) for planes in (False, True))
    for call, message in [
        (lambda: LowbitWeight.pack(packed, scale, 3, 128), "w_bits must be one of 2, 4, 8"),
        (lambda: LowbitWeight.pack(packed, scale, 8, 128, planes=True), "w_bits must be one of 2, 4"),
        (lambda: LowbitWeight.pack(packed, scale, 4, 100), "group_size must divide"),
        (lambda: LowbitWeight.pack(packed, scale, 4, 64), "scale must be"),
        (lambda: LowbitWeight.pack(packed.float(), scale, 4, 128), "packed must be int32"),
        (lambda: lowbit_matmul(torch.randn(1, 128), prepared, 8), "256 inputs"),
        (lambda: lowbit_matmul(torch.randn(1, 256), prepared, 3), "a_bits must be one of"),
        (lambda: lowbit_matmul(torch.randn(1, 256), planes, 8), "a_bits must"),
    ]:
        with pytest.raises(JointNASError, match=message):
            call()
