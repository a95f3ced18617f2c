"""Plans that are measured, and followed: every candidate computes the reference, a wrong one is noticed, and a product
takes what a file says. The kernels run on the CPU (conftest.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jointnas_kernels import tuned
from jointnas_kernels.ops import LowbitWeight, lowbit_matmul
from jointnas_kernels.ops.lowbit import check as lowbit_check
from jointnas_kernels.ops.lowbit import cuda as lowbit_cuda
from jointnas_kernels.ops.lowbit.choice import Candidate, chosen, kernel_for, usual
from jointnas_kernels.ops.lowbit.cuda import Plan
from jointnas_kernels.ops.lowbit.reference import product
from jointnas_kernels.testing import assert_close, poisoned
from jointnas_kernels.tuned import Shape
from jointnas_kernels.tuning import Job, Products, lowbit, tune
from tests.tuned import samples
from tests.tuned.samples import H200, KERNELS, row

pytestmark = pytest.mark.usefixtures("on_cpu")
CPU = torch.device("cpu")
SHAPES = [
    Shape(4, 16, 150, 768), Shape(2, 8, 80, 512, "float16"), Shape(8, 8, 129, 384), Shape(8, 16, 17, 128, "float16"),
    Shape(2, 4, 150, 768, planes=True), Shape(4, 8, 70, 384, "float16", planes=True),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowbit, "copies", lambda *_: 1)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [3, 21])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_candidate_computes_the_reference(shape: Shape, tokens: int) -> None:
    contest = Products(CPU)(shape, tokens)
    assert len(contest.candidates) >= 2
    kernels = {candidate.kernel for candidate in contest.candidates}
    several = {"tile", "stream"} | ({"stripe", "half", "dense"} if shape.a_bits == 16 else {"wgmma", "int8"})
    assert kernels == ({"bitplane"} if shape.planes else several)
    assert {c: w for c in [contest.usual, *contest.candidates] if (w := contest.wrong(c))} == {}
    assert not contest.weights[0].tensors[3].any(), "locks"


@pytest.mark.parametrize("damage", ["value", "unwritten", "refused", "failed"])
def test_a_wrong_candidate_is_noticed(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contest = Products(CPU)(SHAPES[0], 3)
    right = lowbit_cuda.multiply

    def wrong(kernel: str, x: torch.Tensor, weight: LowbitWeight, *rest: object) -> torch.Tensor:
        y = right(kernel, x, weight, *rest)  # type: ignore[arg-type]
        if damage == "value":
            y[1, 7] += 0.05 * y.abs().max()
        elif damage == "failed":
            raise RuntimeError("CUDA error 700")
        else:
            y = torch.empty_like(y)  # the allocator may hand out the result before
        return y

    assert contest.wrong(contest.usual) == ""
    plan = Plan(3) if damage == "refused" else contest.usual.plan
    if damage != "refused":
        monkeypatch.setattr(lowbit_cuda, "multiply", wrong)
    says = {"value": "1 of 450", "unwritten": "450 of 450", "refused": "does not support", "failed": "700"}[damage]
    assert says in contest.wrong(Candidate("stream", plan))


def follow(monkeypatch: pytest.MonkeyPatch, *rows: tuned.Row) -> None:
    monkeypatch.setattr(tuned, "plans", lambda device: tuned.Plans([samples.tuned(*rows)]))


def make(shape: Shape) -> tuple[LowbitWeight, torch.Tensor]:
    q = torch.randint(-(1 << (shape.w_bits - 1)), 1 << (shape.w_bits - 1), (shape.outputs, shape.inputs)).char()
    scale = (torch.rand(shape.outputs, shape.inputs // 128) * 0.02 + 0.01).to(getattr(torch, shape.dtype))
    weight = LowbitWeight.pack(q, scale, shape.w_bits, 128, layout="cuda", planes=shape.planes)
    return weight, torch.randn(9, shape.inputs).to(scale.dtype)


@pytest.mark.parametrize(
    ("shape", "a_bits", "kernel", "plan"),
    [
        (SHAPES[0], 16, "stream", (2, 2, 3, 1)), (SHAPES[0], 16, "tile", (8, 2, 2, 1)),
        (SHAPES[0], 16, "stripe", (4, 2, 3, 1)), (SHAPES[0], 16, "half", (4, 2, 2, 2)), (SHAPES[0], 16, "dense", None),
        (SHAPES[1], 8, "int8", (16, 2, 1, 2)), (SHAPES[1], 2, "tile", (8, 2, 1, 1)),
        (SHAPES[4], 4, "bitplane", (2, 4, 2, 1)),
    ],
    ids=str,
)  # fmt: skip
def test_a_product_follows_its_row(
    shape: Shape, a_bits: int, kernel: str, plan: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = make(shape)
    with poisoned():
        before = lowbit_matmul(x, weight, a_bits)
    follow(monkeypatch, row(**shape._asdict(), kernel=kernel, plan=plan))
    assert chosen(9, weight, a_bits) == (kernel, None if plan is None else Plan(*plan))
    asked = []
    right = lowbit_cuda.product

    def asking(*args: object) -> torch.Tensor:
        asked.append((args[0], args[5]))
        return right(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(lowbit_cuda, "product", asking)
    with poisoned():
        y = lowbit_matmul(x, weight, a_bits)
    assert asked == [(kernel, None if plan is None else Plan(*plan))]
    assert_close(y, before)
    expected = product(x, *weight.unpack(), shape.w_bits, a_bits, 128, False, torch.float64)
    assert_close(y, expected)
    assert all(chosen(n, weight, a_bits) == (kernel_for(n, weight, a_bits), None) for n in (8, 17))


def test_a_kernel_that_fails_its_check_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = make(SHAPES[0])
    follow(monkeypatch, row(**SHAPES[0]._asdict(), kernel="half", plan=(8, 2, 1, 1)))
    monkeypatch.setattr(lowbit_check, "_results", {})
    monkeypatch.setattr(lowbit_check, "differences", lambda *key: "wrong")
    assert chosen(9, weight, 16) == ("stream", None)
    follow(monkeypatch, row(**SHAPES[0]._asdict(), kernel="bitplane", plan=(1, 1, 1, 1)))
    assert chosen(9, weight, 16) == ("stream", None)


@pytest.mark.slow
def test_nothing_tuned_changes_nothing() -> None:
    for shape in SHAPES:
        weight, _ = make(shape)
        for tokens in (1, 33, 200):
            kernel = kernel_for(tokens, weight, shape.a_bits)
            assert chosen(tokens, weight, shape.a_bits) == (kernel, None)
            assert usual(tokens, weight, shape.a_bits).kernel == kernel


def test_what_is_tuned_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the contest of real products to the product that a file decides; only the times are made up."""
    shape, out = SHAPES[0], tmp_path / "x.json"
    best = Candidate("tile", Plan(8, splits=2))

    def sample(calls: list[object], device: torch.device, pool: object) -> object:
        plan = calls[0].args[0]  # type: ignore[attr-defined]
        return lambda: 1.0 if plan == best else 2.0

    monkeypatch.setattr(lowbit, "graph_sample", sample)
    tune([Job(shape, 5, 9)], Products(CPU), out, H200, KERNELS, progress=False)
    file = tuned.read(out)
    assert file is not None
    assert (file.rows[0].kernel, file.rows[0].plan, file.rows[0].least) == ("tile", (8, 2, 2, 1), 5)
    monkeypatch.setattr(tuned, "plans", lambda device: tuned.load(H200, KERNELS, [tmp_path]))
    out.rename(tmp_path / tuned.file_name(H200.name))
    weight, _ = make(shape)
    assert chosen(7, weight, 16) == best
    assert chosen(4, weight, 16) == ("stream", None)
