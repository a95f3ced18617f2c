"""mixed_rmsnorm with a mixture of activation precisions behind it: the two ops in one pass."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from jointnas_kernels import ops
from jointnas_kernels.errors import JointNASError
from tests.ops.norm_quant import ALPHA, MASK, PROBS, WEIGHT, X, check, inputs

BITS = (2, 4, 8, 16)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=["fp64", "fp32", "fp16", "bf16"]
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@DTYPES
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(
    "shape, sizes",
    [((1, 1), [1]), ((2, 3, 17), [13, 13]), ((5, 100), [100, 37, 64]), ((2, 31, 130), [96, 128])], ids=str,
)  # fmt: skip
def test_values_and_gradients(
    shape: tuple[int, ...], sizes: list[int], masked: bool, symmetric: bool, dtype: torch.dtype
) -> None:
    every = [X, WEIGHT, ALPHA, MASK, PROBS] if masked else [X, WEIGHT, ALPHA, PROBS]
    tol = 1e-11 if dtype == torch.float64 else None
    for bits in (BITS, (4,), (3, 16)):
        tensors = inputs(shape, len(sizes), bits, masked, dtype)
        for backend in (None, "reference"):
            check(tensors, sizes, 0.5, bits, symmetric, backend, [[X], [PROBS], [X, ALPHA], every], tol)


def leaves() -> dict[str, Tensor]:
    x, weight, alpha, mask, probs = inputs((3, 2, 24), 3, BITS, True, torch.float32)
    named = {"x": x, "alpha": alpha, "mask": mask, "probs": probs, "weight": weight}
    return {name: t.requires_grad_() for name, t in named.items()}


def layer(x: Tensor, alpha: Tensor, mask: Tensor, probs: Tensor, weight: Tensor) -> Tensor:
    out = ops.mixed_rmsnorm(x, weight, alpha, [8, 16, 24], 1e-5, mask, act_bits=BITS, act_probs=probs)
    return out.square().sum()


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "plain"])
def test_opcheck(masked: bool, backend: str | None) -> None:
    t = leaves()
    arguments = (t["x"], t["weight"], t["alpha"], t["mask"] if masked else None, t["probs"], [8, 16, 24], 1e-5,
                 list(BITS), False, backend)  # fmt: skip
    opcheck(torch.ops.jointnas.mixed_rmsnorm_quant.default, arguments)


def test_compiles_as_one_graph_and_checkpoints() -> None:
    torch._dynamo.reset()
    t = leaves()
    expected = torch.autograd.grad(layer(**t), tuple(t.values()))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for loss in (compiled(**t), checkpoint(layer, *t.values(), use_reentrant=False)):
        got = torch.autograd.grad(loss, tuple(t.values()))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_compiles_where_it_was_never_called() -> None:
    """The first call is traced."""
    code = """
import torch
from jointnas_kernels import ops

def norm(x, w, alpha, probs):
    return ops.mixed_rmsnorm(x, w, alpha, [4, 8], 1e-5, act_bits=(4, 8), act_probs=probs)

arguments = torch.randn(3, 8), torch.rand(8), torch.rand(2), torch.rand(2)
compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")(*arguments)
assert torch.equal(compiled, norm(*arguments))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_empty_and_strided_inputs() -> None:
    x, weight, alpha, mask, probs = inputs((6, 5, 40), 2, BITS, True, torch.float32)
    view, rest = x[..., 3:20], (alpha, [9, 17], 1e-5, mask[:17], None, BITS, probs)
    assert torch.equal(
        ops.mixed_rmsnorm(view, weight[:17], *rest), ops.mixed_rmsnorm(view.contiguous(), weight[:17], *rest)
    )
    assert ops.mixed_rmsnorm(torch.empty(0, 17), weight[:17], *rest).shape == (0, 17)


def test_a_weight_step_saves_no_levels() -> None:
    t = leaves()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        layer(t["x"], *(t[name].detach() for name in ("alpha", "mask", "probs", "weight")))
    assert (6, 4, 2) not in [tuple(s.shape) for s in saved]


@pytest.mark.parametrize(
    "bits, probs, message",
    [
        ((4, 9), torch.rand(2), "activation bit width '9'"),
        ((4, 8), torch.rand(3), "one entry per bit width"),
        ((2, 3, 4, 5, 6), torch.rand(5), "one to four bit widths"),
        ((4, 8), None, "act_bits and act_probs go together"),
        (None, torch.rand(2), "act_bits and act_probs go together"),
    ],
)
def test_bad_arguments(bits: tuple[int, ...] | None, probs: Tensor | None, message: str) -> None:
    with pytest.raises(JointNASError, match=f"mixed_rmsnorm.*{message}|{message}.*mixed_rmsnorm"):
        ops.mixed_rmsnorm(torch.rand(2, 3), torch.rand(3), torch.rand(1), [3], 1e-5, act_bits=bits, act_probs=probs)
