"""Plans on the device: every candidate computes the reference, what is measured is followed, captured or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jointnas_kernels import _ext, tuned
from jointnas_kernels.ops import lowbit_matmul
from jointnas_kernels.ops.lowbit import check
from jointnas_kernels.ops.lowbit.choice import Candidate, candidates, chosen, usual
from jointnas_kernels.ops.lowbit.cuda import Plan
from jointnas_kernels.testing import assert_close
from jointnas_kernels.tuned import Shape
from jointnas_kernels.tuning import Job, Products, tune
from tests.tuned.samples import MADE, row

pytestmark = pytest.mark.skipif(
    not (_ext.available() and _ext.load().has_cuda), reason="jointnas_kernels._C has no CUDA part"
)
SHAPES = [
    Shape(4, 16, 1000, 2048), Shape(2, 8, 4096, 1152), Shape(8, 8, 300, 4096, "float16"), Shape(8, 16, 129, 1024),
    Shape(2, 4, 1000, 2048, planes=True), Shape(4, 8, 200, 1152, "float16", planes=True),
]  # fmt: skip


@pytest.fixture
def here(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's, which nothing else is in."""
    monkeypatch.setenv("JOINTNAS_TUNED", str(tmp_path))
    tuned.forget()
    yield tmp_path
    tuned.forget()


@pytest.mark.parametrize("tokens", [1, 21, 133])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_candidate_computes_the_reference(shape: Shape, tokens: int, here: torch.device) -> None:
    contest = Products(here)(shape, tokens)
    sms = torch.cuda.get_device_properties(here).multi_processor_count
    kernels = {candidate.kernel for candidate in contest.candidates}
    left_out = {candidate.kernel for candidate in candidates(tokens, shape, sms)} - kernels
    assert left_out <= ({"wgmma", "int8", "half"} if torch.cuda.get_device_capability() != (9, 0) else set())
    for _ in range(2):  # again, with all that the first time left behind
        assert {c: w for c in [contest.usual, *contest.candidates] if (w := contest.wrong(c))} == {}
    assert not contest.weights[0].tensors[3].any(), "locks"


def test_times_are_of_the_call(here: torch.device) -> None:
    contest = Products(here)(Shape(4, 16, 8192, 8192), 1)
    many, few = Candidate("stream", Plan(1, 4, 4)), Candidate("stream", Plan(1, 8, 1))
    times = {c: sorted(contest.sample(c) for _ in range(5))[2] for c in (many, few)}
    assert 0.003 < times[many] < times[few], "4 times as many blocks read weights faster"


def test_what_is_measured_is_followed(here: torch.device, folder: Path) -> None:
    shape, out = Shape(4, 16, 4096, 4096), folder / tuned.file_name(torch.cuda.get_device_name(here))
    jobs = [Job(shape, 1, 8), Job(shape, 129, 256)]
    described, kernels = tuned.describe(here), tuned.kernels_here()
    file = tune(jobs, Products(here), out, described, kernels, progress=False)
    assert tuned.read(out) == file
    assert {row.tokens for row in file.rows} == {8, 256}
    assert tune(jobs, Products(here), out, described, kernels, resume=True, progress=False).rows == file.rows
    tuned.forget()
    weight = Products(here)(shape, 8).weights[0]
    for found in file.rows:
        kernel, plan = chosen(found.tokens, weight, 16)
        expected = usual(found.tokens, weight, 16).kernel if found.kernel is None else found.kernel
        assert (kernel, plan) == (expected, None if found.plan is None else Plan(*found.plan))
        assert found.ms <= found.usual_ms


@pytest.mark.parametrize(
    ("kernel", "plan"),
    [
        ("stream", (2, 2, 3, 1)), ("stripe", (4, 2, 7, 1)), ("tile", (8, 2, 2, 1)), ("half", (8, 2, 2, 2)),
        ("dense", None),
    ],
)  # fmt: skip
def test_graphs_follow_a_plan(kernel: str, plan: tuple[int, ...] | None, here: torch.device, folder: Path) -> None:
    shape = Shape(4, 16, 1000, 2048)
    product = Products(here)(shape, 9)
    weight, x = product.weights[0], product.x
    if kernel == "half" and not check.verified("half", 4, x.dtype, here):
        pytest.skip("the kernel is Hopper's")
    described = tuned.describe(here)
    rows = (row(**shape._asdict(), kernel=kernel, plan=plan),)
    tuned.write(folder / tuned.file_name(described.name), tuned.Tuned(described, tuned.kernels_here(), MADE, rows))
    tuned.forget()
    assert chosen(9, weight, 16) == (kernel, None if plan is None else Plan(*plan))
    eager = lowbit_matmul(x, weight)
    assert_close(eager, product.expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lowbit_matmul(x, weight)
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, eager)
