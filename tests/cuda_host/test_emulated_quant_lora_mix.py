"""The CUDA forward of quant_lora_mix, executed on the CPU (conftest.py), bit for bit against the torch reference."""

from __future__ import annotations

import pytest
import torch

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.quant.mixture import cuda
from jointnas_kernels.ops.quant.mixture.cuda import WARPS, Piece, Plan, most_columns, plan
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


def block(with_clip: bool, dtype: torch.dtype = torch.bfloat16) -> list[Mixture]:
    """A block's weights in small: inputs, rows and groups of their own."""
    shapes = ((83, 256, 128), (1, 256, 128), (300, 256, 128), (40, 128, 32), (33, 384, 64), (16, 128, 128))
    found, probs = [], torch.rand(3)
    for rows, channels, group in shapes:
        w, a, b, clip = inputs(rows, channels, 16, group, dtype)
        found.append(Mixture(w, a, b, probs, clip if with_clip else None, 0.5, BITS, group))
    return found


@pytest.mark.parametrize(("columns", "blocks"), [(1, 1), (2, 5), (3, 4)])
@pytest.mark.parametrize("with_clip", [False, True])
@pytest.mark.parametrize("finest", [32, 64])
def test_the_weights_of_a_block_in_one_launch(finest: int, with_clip: bool, columns: int, blocks: int) -> None:
    """Of other inputs and groups: each as alone, and that is the reference where no rounding is but the quantizer's."""
    mixes = [mix for mix in block(with_clip) if mix.group_size >= finest]
    for probs in (mixes[0].probs, *torch.eye(3)):
        own = [mix._replace(probs=probs) for mix in mixes]
        with poisoned():
            outs = [torch.empty_like(mix.weight) for mix in own]
            cuda.forward_all(own, outs, Plan(columns, blocks))
        assert all(torch.equal(out, cuda.forward(mix)) for out, mix in zip(outs, own, strict=True))
        if probs is not mixes[0].probs:
            assert all(torch.equal(out, forward(mix)) for out, mix in zip(outs, own, strict=True))


def test_more_weights_than_a_launch_takes() -> None:
    mixes = block(False) * 2
    outs = [torch.empty_like(mix.weight) for mix in mixes]
    cuda.forward_all(mixes, outs)
    assert all(torch.equal(out, cuda.forward(mix)) for out, mix in zip(outs, mixes, strict=True))


@pytest.mark.parametrize(
    "shapes",
    [
        ((4096, 4096), (1024, 4096), (1024, 4096)), ((14336, 4096), (14336, 4096)),
        ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)),
    ],
    ids=["q, k, v", "gate, up", "a block"],
)  # fmt: skip
def test_a_group_fills_the_device_as_one_weight_does(shapes: tuple[tuple[int, int], ...]) -> None:
    """In one wave busiest warps have at most a fifth more tiles than an even share; of a whole block a twentieth."""
    how = plan(shapes, most_columns(128, 3, False, False, 227 * 1024), 132)
    assert how.blocks <= 132
    share = sum(rows * inputs for rows, inputs in shapes) / 16 / 128 / (132 * WARPS)
    assert how.busiest(shapes)[0] * how.columns <= (1.05 if len(shapes) == 7 else 1.2) * share + 1


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
        total = torch.empty(3)
        cuda.run([Piece(mix, slice(begin, end), grad)], Plan(columns, blocks), total)
    for p in range(3):
        quantized = forward(Mixture(weight.float(), a, b, torch.eye(3)[p], ratio, 0.5, BITS, group), dtype)
        expected = (grad.double() * quantized[begin:end].double()).sum()
        scale = (grad.double() * quantized[begin:end].double()).norm()
        assert abs(total[p].double() - expected) <= 1e-5 * scale


@pytest.mark.parametrize("with_clip", [False, True])
def test_reduction_of_several_weights(with_clip: bool) -> None:
    """One launch, one sum; twice the same bits, because the last block adds in one order."""
    mixes = [mix for mix in cuda.operands(block(with_clip)) if mix.group_size != 64]
    grads = [torch.randn_like(mix.weight) for mix in mixes]
    totals = torch.empty(2, 3)
    for total in totals:
        with poisoned():
            pieces = [Piece(m, slice(0, len(m.weight)), g) for m, g in zip(mixes, grads, strict=True)]
            cuda.run(pieces, Plan(2, 5), total)
    assert torch.equal(totals[0], totals[1])
    of_each = [gradients(m, Upstream(g), Want(False, True, False))[2] for m, g in zip(mixes, grads, strict=True)]
    expected = torch.stack(of_each).sum(0)
    assert (totals[0] - expected).norm() <= 2e-3 * torch.stack(of_each).norm()


def test_what_does_not_fit_together() -> None:
    first, _, _, narrow, other, last = cuda.operands(block(False))
    pieces = [Piece(mix, slice(0, len(mix.weight)), mix.weight.clone()) for mix in (first, narrow, other)]
    with pytest.raises(JointNASError, match="an argument it does not support"):
        cuda.run(pieces)  # groups of 128, 32 and 64
    with pytest.raises(JointNASError, match="an argument it does not support"):
        cuda.forward_all([first, last._replace(clip=torch.rand(3, 16, 1))], [first.weight, last.weight])


@pytest.mark.parametrize("given", [False, True], ids=["from x", "given"])
def test_probability_gradient(given, monkeypatch):
    monkeypatch.setattr(cuda, "CHUNK", 256 * 256)  # two chunks of rows
    weight, a, b, clip = inputs(300, 256, 8, 128, torch.bfloat16)
    grad, x = torch.randn(9, 300).bfloat16(), torch.randn(9, 256).bfloat16()
    dw = (grad.float().T @ x.float()).bfloat16()
    probs = torch.rand(3)
    mix = Mixture(weight, a, b, probs, clip, 0.5, BITS, 128)
    upstream = Upstream(dw) if given else Upstream(grad, x)
    _, _, expected, _ = gradients(mix, Upstream(dw), Want(False, True, False))
    expected = 2 * expected
    both = Upstream(torch.cat((dw, dw))) if given else Upstream(torch.cat((grad, grad), 1), x)
    for upstreams in ([upstream] * 2, [both]):  # of two linears, apart and beside each other
        got = cuda.probs_gradient([mix, mix], upstreams)
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
    how = plan(((rows, channels),), most_columns(128, 3, True, False, 227 * 1024), 132)
    units, groups = how.busiest(((rows, channels),))
    assert how.blocks <= 132
    assert units * how.columns == steps < rows / 16 * channels / 128 / (132 * 8) + 1.2
    assert groups <= 2
