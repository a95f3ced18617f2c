"""The CUDA forward of quant_lora_mix, executed on the CPU (conftest.py), bit for bit against the torch reference."""

from __future__ import annotations

import pytest
import torch

from jointnas_kernels.ops.quant.mixture import cuda
from jointnas_kernels.ops.quant.mixture.cuda import WARPS, Plan, most_columns, plan
from jointnas_kernels.ops.quant.mixture.reference import Mixture, Upstream, Want, forward, gradients
from jointnas_kernels.testing import poisoned
from tests.ops.test_quant_lora_mix import tiny_weights

pytestmark = pytest.mark.usefixtures("on_cpu")
BITS = (2, 4, 8)


def inputs(rows: int, channels: int, rank: int, group: int, dtype: torch.dtype, precisions: int = 3):
    """On a coarse grid: W + B'A is exact in any order, so that every level can be compared; many exact ties."""
    weight = (torch.randn(rows, channels) * 64).round() / 64
    weight[-1, :group] = 0
    a = torch.randint(-8, 9, (precisions, rank, channels)) / 16
    b = torch.randint(-8, 9, (precisions, rows, rank)) / 32
    b[:, -1] = 0
    clip = torch.rand(precisions, rows, channels // group) * 0.5 + 0.5
    return weight.to(dtype), a.to(dtype), b.to(dtype), clip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_clip", [False, True])
@pytest.mark.parametrize(
    ("rows", "channels", "rank", "group", "columns", "blocks"),
    [
        *((16, 128, 32, 128, 1, 1), (83, 384, 32, 128, 2, 2), (1, 128, 8, 64, 1, 1), (300, 384, 32, 128, 1, 4)),
        *((70, 256, 16, 32, 1, 3), (33, 384, 24, 64, 3, 1)),
    ],
)
def test_levels(rows, channels, rank, group, columns, blocks, with_clip, dtype):
    weight, a, b, clip = inputs(rows, channels, rank, group, dtype)
    ratio = clip if with_clip else None
    for p in range(3):  # one-hot: no rounding but the quantizer's
        probs = torch.eye(3)[p]
        with poisoned():
            mix = Mixture(weight, a, b, probs, ratio, 0.5, BITS, group)
            out = cuda.forward(mix, how=Plan(columns, blocks))
        assert torch.equal(out, forward(mix))


@pytest.mark.parametrize("blocks", [1, 5])
@pytest.mark.parametrize("with_clip", [False, True])
@pytest.mark.parametrize("lora", [torch.bfloat16, torch.float32], ids=str)
def test_several_weights_in_one_launch(lora: torch.dtype, with_clip: bool, blocks: int) -> None:
    """As each alone, also where a block goes on from one to the next; fp32 pairs that a power of two scales are cast by
    one launch, to the same values."""
    drawn = [inputs(rows, 256, 16, 64, torch.bfloat16) for rows in (83, 1, 300)]
    probs = torch.rand(3)
    mixes = [
        Mixture(w, a.to(lora) * 1.01, b.to(lora) * 1.01, probs, clip if with_clip else None, 0.5, BITS, 64)
        for w, a, b, clip in drawn
    ]
    rounded = [m._replace(lora_a=m.lora_a.bfloat16(), lora_b=(m.lora_b * 0.5).bfloat16(), scaling=1.0) for m in mixes]
    with poisoned():
        outs = [torch.empty_like(m.weight) for m in mixes]
        cuda.forward_all(mixes, outs, Plan(1, blocks))
    assert all(torch.equal(out, cuda.forward(m)) for out, m in zip(outs, rounded, strict=True))


@pytest.mark.parametrize("rows", [(4096, 1024, 1024), (14336, 14336)], ids=str)
def test_a_group_fills_the_device_as_one_weight_does(rows: tuple[int, ...]) -> None:
    """In one wave busiest warps have at most a fifth more tiles than an even share."""
    how = plan(rows, 4096, most_columns(128, 3, False, False, 227 * 1024), 132)
    assert how.blocks <= 132
    assert how.busiest(rows, 4096)[0] * how.columns <= 1.2 * sum(rows) / 16 * 32 / (132 * WARPS) + 1


def test_levels_of_subnormal_scales():
    """fp16 scales below 2^-14 are coarse: the largest weights of a group lie beyond the lowest level."""
    weight, a, b = tiny_weights(256).values()
    for p in range(3):
        mix = Mixture(weight, a, b, torch.eye(3)[p], None, 0.5, BITS, 32)
        assert torch.equal(cuda.forward(mix), forward(mix))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_clip", [False, True])
@pytest.mark.parametrize(
    ("rows", "begin", "end", "channels", "group", "columns", "blocks"),
    [(16, 0, 16, 128, 128, 1, 1), (83, 5, 80, 384, 128, 2, 2), (70, 32, 33, 256, 32, 1, 3), (33, 0, 33, 384, 64, 3, 1)],
)
def test_reduction(rows, begin, end, channels, group, columns, blocks, with_clip, dtype):
    """sum(dW * Q_p) of some rows, for every precision."""
    weight, a, b, clip = inputs(rows, channels, 24, group, dtype)
    ratio = clip if with_clip else None
    grad = torch.randn(end - begin, channels).to(dtype)
    with poisoned():
        (mix,) = cuda.operands([Mixture(weight, a, b, torch.rand(3), ratio, 0.5, BITS, group)])
        partial = torch.empty(blocks * WARPS, 3)
        cuda.run([mix], Plan(columns, blocks), grad=grad, begin=begin, end=end, partial=partial)
    for p in range(3):
        quantized = forward(Mixture(weight.float(), a, b, torch.eye(3)[p], ratio, 0.5, BITS, group), dtype)
        expected = (grad.double() * quantized[begin:end].double()).sum()
        scale = (grad.double() * quantized[begin:end].double()).norm()
        assert abs(partial[:, p].double().sum() - expected) <= 1e-5 * scale


@pytest.mark.parametrize("given", [False, True], ids=["from x", "given"])
def test_probability_gradient(given, monkeypatch):
    monkeypatch.setattr(cuda, "CHUNK", 256 * 256)  # two chunks of rows
    weight, a, b, clip = inputs(300, 256, 8, 128, torch.bfloat16)
    grad, x = torch.randn(9, 300).bfloat16(), torch.randn(9, 256).bfloat16()
    dw = (grad.float().T @ x.float()).bfloat16()
    probs = torch.rand(3)
    mix = Mixture(weight, a, b, probs, clip, 0.5, BITS, 128)
    upstream = Upstream(dw) if given else Upstream(grad, x)
    got = cuda.probs_gradient([mix, mix], [upstream] * 2)  # of two linears
    _, _, expected, _ = gradients(mix, Upstream(dw), Want(False, True, False))
    expected = 2 * expected
    assert (got - expected).norm() <= 2e-3 * expected.norm()


def test_mixture_and_scaling():
    """Scalings that the weight's dtype cannot hold, fp32 LoRA, one and four precisions."""
    for bits, scaling in (((4,), 0.7), ((2, 3, 5, 8), 1 / 3)):
        weight, a, b, _ = inputs(40, 256, 16, 128, torch.bfloat16, len(bits))
        probs = torch.rand(len(bits))
        for lora in (torch.bfloat16, torch.float32):
            mix = Mixture(weight, a.to(lora), b.to(lora), probs, None, scaling, bits, 128)
            out, reference = cuda.forward(mix), forward(mix)
            assert (out.float() - reference.float()).norm() <= 4e-3 * reference.float().norm()


@pytest.mark.parametrize(
    ("rows", "channels", "steps"),  # of the busiest warp
    [(4096, 4096, 8), (14336, 4096, 28), (4096, 14336, 28), (1024, 4096, 2), (11008, 4096, 21), (1, 128, 1)],
)
def test_launch_plan_fills_the_device(rows: int, channels: int, steps: int) -> None:
    """In one wave of 132 blocks no warp has two tiles more than an even share, and no block fetches A thrice."""
    how = plan((rows,), channels, most_columns(128, 3, True, False, 227 * 1024), 132)
    units, groups = how.busiest((rows,), channels)
    assert how.blocks <= 132
    assert units * how.columns == steps < rows / 16 * channels / 128 / (132 * 8) + 1.2
    assert groups <= 2
