"""The quantizer ops on the device: levels bit for bit, values, gradients; odd sizes, poisoned outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jointnas_kernels import _ext
from jointnas_kernels.ops.quant.activations import act_quant_mix, act_quant_mix_reference
from jointnas_kernels.ops.quant.mixture import cuda
from jointnas_kernels.ops.quant.mixture.linear import quant_lora_linear
from jointnas_kernels.ops.quant.mixture.op import quant_lora_mix
from jointnas_kernels.ops.quant.mixture.reference import Mixture, forward
from jointnas_kernels.ops.quant.weights import fake_quant_weight, fake_quant_weight_reference
from jointnas_kernels.testing import assert_close

pytestmark = pytest.mark.usefixtures("poison")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BITS = (2, 4, 8)
# (rows, inputs, rank, group): tile-sized, odd rows, groups that are no power of two, groups wider than a tile
SHAPES = [
    *((256, 512, 32, 128), (65, 384, 32, 128), (1, 128, 1, 128)),
    *((33, 160, 5, 32), (17, 96, 4, 48), (40, 768, 8, 256)),
]
# Every Triton kernel is compiled anew for each type, shape and set of gradients (about 2 s): no full product of them.
CASES = [*((BF16, shape) for shape in SHAPES), (FP16, SHAPES[1]), (FP32, SHAPES[1]), (FP16, SHAPES[4])]
LINEAR = [
    *(("full", "clip", *case) for case in CASES),
    *((mode, ste, BF16, SHAPES[1]) for mode in ("weight", "arch", "full") for ste in ("identity", "clip")),
][:-1]  # the last combination is among the cases


def make(shape, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Random inputs on a coarse grid, so that W + B'A is exact in fp32 in any order of summation.

    Then all implementations see the same numbers, and every level can be compared: without that, a difference in the
    last bit moves the extreme weight of a group, which lies on a tie by construction, by a whole level. The grid also
    makes more ties, and one group is all zeros.
    """
    o, i, r, g = shape
    weight = (torch.randn(o, i, device=device) * 256).round() / 256
    weight[: o // 2] = (weight[: o // 2] * 8).round() / 8
    weight[-1, :g] = 0
    b = torch.randint(-8, 9, (3, o, r), device=device) / 32
    b[:, -1] = 0
    return {
        "weight": weight.to(dtype),
        "lora_a": (torch.randint(-8, 9, (3, r, i), device=device) / 16).to(dtype),
        "lora_b": b.to(dtype),
        "probs": torch.tensor([0.2, 0.3, 0.5], device=device),
        "clip": torch.rand(3, o, i // g, device=device) * 0.5 + 0.5,
    }


def compiled_cuda(t: dict[str, Tensor], group: int) -> bool:
    """Whether the CUDA C++ forward is there and takes these inputs."""
    there = _ext.available() and _ext.load().has_cuda
    mix = Mixture(t["weight"], t["lora_a"], t["lora_b"], t["probs"], None, 0.5, BITS, group)
    return there and cuda.unsupported(mix) is None


def widened(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """fp32 copies for the eager reference, which then differs only by the final rounding of W~."""
    return {k: v.detach().float().requires_grad_(v.requires_grad) for k, v in inputs.items()}


@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
@pytest.mark.parametrize("with_clip", [False, True])
def test_mix_levels_are_exact(shape, with_clip, dtype, device):
    """One precision on: every level equals the reference's true division and rounding."""
    t = make(shape, dtype, device)
    clip = t["clip"] if with_clip else None
    for p in range(3):
        probs = torch.eye(3, device=device)[p]
        args = (t["weight"], t["lora_a"], t["lora_b"], 0.5, BITS, probs, shape[3], clip)
        expected = quant_lora_mix(*args, backend="reference")
        assert torch.equal(quant_lora_mix(*args, backend="triton"), expected)
        if compiled_cuda(t, shape[3]):
            assert torch.equal(quant_lora_mix(*args, backend="cuda"), expected)
        args = (t["weight"], t["lora_a"], t["lora_b"] * 0, 0.5, BITS, probs, shape[3], clip)
        ratio = None if clip is None else clip[p]
        fake = fake_quant_weight(t["weight"], BITS[p], shape[3], True, ratio, backend="triton")
        assert torch.equal(fake, quant_lora_mix(*args, backend="reference"))


@pytest.mark.parametrize(("dtype", "shape"), [case for case in CASES if case[0] != FP32], ids=str)
@pytest.mark.parametrize("with_clip", [False, True])
def test_mix_values_off_the_grid(shape, with_clip, dtype, device):
    """Any LoRA, against fp64. A few scales round the other way and move single levels: hence the wide tolerance."""
    t = make(shape, dtype, device)
    t["lora_a"], t["lora_b"] = (torch.randn_like(t[n]) * 0.2 for n in ("lora_a", "lora_b"))
    ratios = t.pop("clip")
    clip = ratios if with_clip else None
    out = quant_lora_mix(scaling=0.7, bits=BITS, group_size=shape[3], clip=clip, backend="triton", **t)
    b = (t["lora_b"].float() * 0.7).to(dtype)  # scaling · B is rounded to the weight's dtype
    wide = {k: v.double() for k, v in (t | {"lora_b": b}).items()}
    wide["clip"] = None if clip is None else clip.double()
    ref = forward(Mixture(scaling=1.0, bits=BITS, group_size=shape[3], **wide), dtype)
    assert_close(out, ref, 1e-2)
    if compiled_cuda(t, shape[3]):
        out = quant_lora_mix(scaling=0.7, bits=BITS, group_size=shape[3], clip=clip, backend="cuda", **t)
        assert_close(out, ref, 1e-2)


@pytest.mark.skipif(not (_ext.available() and _ext.load().has_cuda), reason="jointnas_kernels._C has no CUDA part")
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("rank", [8, 16, 24, 32])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_cuda_mix_plans(group, rank, dtype, device):
    """Every launch plan writes the same bits: rows off the tile, columns off the block."""
    t = make((83, 640, rank, group), dtype, device)
    mix = Mixture(t["weight"], t["lora_a"], t["lora_b"], t["probs"], t["clip"], 0.5, BITS, group)
    first = cuda.forward(mix)
    assert_close(first, quant_lora_mix(scaling=0.5, bits=BITS, group_size=group, backend="reference", **t))
    for plan in ((1, 1), (1, 7), (2, 9), (3, 2), (4, 1)):
        assert torch.equal(first, cuda.forward(mix, how=cuda.Plan(*plan)))


@pytest.mark.skipif(not (_ext.available() and _ext.load().has_cuda), reason="jointnas_kernels._C has no CUDA part")
@pytest.mark.parametrize("shape", [(2500, 4096, 32, 128), (600, 14336, 32, 128), (300, 256, 8, 64)], ids=str)
def test_cuda_probs_over_several_chunks(shape, device, monkeypatch):
    monkeypatch.setattr(cuda, "CHUNK", 4 << 20)
    t = make(shape, torch.bfloat16, device)
    grad = torch.randn(70, shape[0], device=device).bfloat16()
    x = torch.randn(70, shape[1], device=device).bfloat16()
    t["probs"].requires_grad_()
    options = {"scaling": 0.5, "bits": BITS, "group_size": shape[3], "mode": "arch"}
    got, expected = (
        torch.autograd.grad(quant_lora_linear(x, backend=b, **options, **t), t["probs"], grad)[0]
        for b in ("cuda", "reference")
    )
    assert_close(got, expected, 1e-2)


@pytest.mark.parametrize(("mode", "ste", "dtype", "shape"), LINEAR, ids=str)
@pytest.mark.parametrize("tokens", [3, 130])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_linear_gradients(backend, tokens, shape, mode, ste, dtype, device):
    o, i, _, g = shape
    t = make(shape, dtype, device)
    if backend == "cuda" and not compiled_cuda(t, g):
        pytest.skip("not a shape or type of the CUDA C++ kernel, or it is not built")
    t["x"] = torch.randn(tokens, i, device=device).to(dtype)
    names = ["x"]
    names += ["lora_a", "lora_b"] if mode != "arch" else []
    names += ["probs"] if mode != "weight" else []
    names += ["clip"] if mode != "arch" and ste == "clip" else []
    for name in names:
        t[name].requires_grad_()
    y = quant_lora_linear(scaling=0.5, bits=BITS, group_size=g, ste=ste, mode=mode, backend=backend, **t)
    wide = widened(t)
    x32 = wide.pop("x")
    mixed = forward(Mixture(scaling=0.5, bits=BITS, group_size=g, ste=ste, **wide), dtype)
    expected = x32 @ mixed.T
    # W~ is rounded to the model dtype before the product, as any stored weight is; so is dW where LoRA reads it.
    tol = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    assert_close(y, expected, tol, "y")
    grad = torch.randn(tokens, o, device=device).to(dtype)
    got = torch.autograd.grad(y, [t[n] for n in names], grad)
    ref = torch.autograd.grad(expected, [x32 if n == "x" else wide[n] for n in names], grad.float())
    for name, a, b in zip(names, got, ref, strict=True):
        assert_close(a, b, tol, name)


@pytest.mark.parametrize(("dtype", "shape"), [CASES[0], CASES[3], *CASES[-3:]], ids=str)
@pytest.mark.parametrize("ste", ["identity", "clip"])
def test_mix_gradients_of_a_given_weight_gradient(shape, ste, dtype, device):
    t = make(shape, dtype, device)
    names = ["lora_a", "lora_b", "probs"] + (["clip"] if ste == "clip" else [])
    for name in names:
        t[name].requires_grad_()
    out = quant_lora_mix(scaling=0.5, bits=BITS, group_size=shape[3], ste=ste, backend="triton", **t)
    wide = widened(t)
    ref = forward(Mixture(scaling=0.5, bits=BITS, group_size=shape[3], ste=ste, **wide), dtype)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, [t[n] for n in names], grad)
    expected = torch.autograd.grad(ref, [wide[n] for n in names], grad.float())
    for name, a, b in zip(names, got, expected, strict=True):
        assert_close(a, b, {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype], name)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_fake_quant_gradients(symmetric, dtype, device):
    weight = torch.randn(37, 384, device=device).to(dtype).requires_grad_()
    clip = (torch.rand(37, 3, device=device) * 0.5 + 0.5).requires_grad_()
    for bits in BITS:
        out = fake_quant_weight(weight, bits, 128, symmetric, clip, "clip", backend="triton")
        ref = fake_quant_weight_reference(weight, bits, 128, symmetric, clip, "clip")
        assert torch.equal(out, ref)
        grad = torch.randn_like(out)
        got, expected = (torch.autograd.grad(y, (weight, clip), grad) for y in (out, ref))
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, 1e-5 if a.dtype == torch.float32 else None)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        *((BF16, shape) for shape in ((3, 1), (2, 3, 64), (300, 129), (9, 4096), (5, 2600), (3, 14336))),
        *((dtype, (40, 1000)) for dtype in (FP16, FP32)),
    ],
    ids=str,
)
def test_act_levels_and_gradients(shape, symmetric, dtype, device):
    x = (torch.randn(shape) * torch.rand((*shape[:-1], 1)) * 3).to(dtype)
    x[0], x[-1] = 0, x[-1].abs()
    mask = torch.rand(shape[-1])
    for q, bits in enumerate((2, 4, 8, 16)):  # one-hot: the CPU reference is what compressed-tensors executes
        probs = torch.eye(4)[q]
        expected = act_quant_mix_reference(x, (2, 4, 8, 16), probs, symmetric, mask)
        got = act_quant_mix(x.to(device), (2, 4, 8, 16), probs.to(device), symmetric, mask.to(device), backend="triton")
        assert torch.equal(got.cpu(), expected), f"{bits} bits"
    leaves = [t.to(device).requires_grad_() for t in (x, torch.rand(4), mask)]
    out = act_quant_mix(leaves[0], (2, 4, 8, 16), leaves[1], symmetric, leaves[2], backend="triton")
    ref = act_quant_mix_reference(leaves[0], (2, 4, 8, 16), leaves[1], symmetric, leaves[2])
    assert_close(out, ref)
    grad = torch.randn_like(out)
    got, expected = (torch.autograd.grad(y, leaves, grad) for y in (out, ref))
    for name, a, b in zip(("x", "probs", "mask"), got, expected, strict=True):
        assert_close(a, b, {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype], name)
