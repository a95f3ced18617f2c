"""Automatic choice among the CUDA low-bit kernels: what verifies itself is used, what computes otherwise is not."""

from __future__ import annotations

import pytest
import torch

from jointnas_kernels import _ext
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.nn.packed import PackedLinear
from jointnas_kernels.ops import LowbitWeight, lowbit_matmul
from jointnas_kernels.ops.core import cuda
from jointnas_kernels.ops.lowbit import check as lowbit_check
from jointnas_kernels.ops.lowbit import cuda as lowbit_cuda
from jointnas_kernels.ops.lowbit.choice import kernel_for
from jointnas_kernels.ops.lowbit.pack import pack_weight
from jointnas_kernels.ops.lowbit.reference import reference
from jointnas_kernels.ops.quant.spec import quantize_tokens
from jointnas_kernels.testing import assert_close, poisoned

pytestmark = pytest.mark.usefixtures("on_cpu")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowbit_check, "_results", {})


def build(rows: int, inputs: int, bits: int, planes: bool = False):
    q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, inputs), dtype=torch.int8)
    packed, scale = pack_weight(q, bits), (torch.rand(rows, inputs // 128) * 0.02 + 0.01).half()
    return packed, scale, LowbitWeight.pack(packed, scale, bits, 128, layout="cuda", planes=planes)


@pytest.mark.parametrize("kernel", list(lowbit_check.KERNELS))
def test_kernels_verify_themselves(kernel):
    with poisoned():
        assert lowbit_check.differences(kernel, 4, torch.float16, CPU) == ""


@pytest.mark.parametrize("kernel", list(lowbit_check.KERNELS))
def test_one_wrong_output_is_enough(kernel, monkeypatch):
    right = lowbit_cuda.multiply

    def wrong(*args):
        y = right(*args)
        y[1, 2] += 0.05 * y.abs().max()
        return y

    monkeypatch.setattr(lowbit_cuda, "multiply", wrong)
    assert not lowbit_check.verified(kernel, 4, torch.float16, CPU)
    assert lowbit_check._results[(kernel, 4, torch.float16, CPU)].startswith("1 of ")


def test_launch_failure_is_reported_and_not_repeated(monkeypatch):
    calls = []

    def fail(*args):
        calls.append(args)
        _ext.check(209, "lowbit_int8")

    monkeypatch.setattr(lowbit_cuda, "multiply", fail)
    for _ in range(2):
        assert not lowbit_check.verified("int8", 4, torch.float16, CPU)
    assert len(calls) == 1
    assert "209" in lowbit_check._results[("int8", 4, torch.float16, CPU)]


def test_a_captured_call_takes_the_kernel_that_an_eager_one_takes(monkeypatch):
    _, _, weight = build(300, 128, 4)
    monkeypatch.setattr(lowbit_check, "capturing", lambda device: True)
    for tokens in (64, 4096):
        with pytest.raises(JointNASError, match=r"was not checked on cpu yet.* once before the capture"):
            kernel_for(tokens, weight, 8)
    assert kernel_for(1, weight, 8) == "stream"  # runs everywhere
    monkeypatch.setattr(lowbit_check, "capturing", lambda device: False)
    monkeypatch.setattr(lowbit_check, "differences", lambda *key: "")
    lowbit_check.prepare(weight)
    eager = [kernel_for(tokens, weight, 8) for tokens in (64, 4096)]
    monkeypatch.setattr(lowbit_check, "capturing", lambda device: True)
    assert [kernel_for(tokens, weight, 8) for tokens in (64, 4096)] == eager == ["wgmma", "int8"]


def test_packed_layers_are_checked_when_they_are_made(monkeypatch):
    checked = []
    monkeypatch.setattr(lowbit_check, "differences", lambda *key: checked.append(key[:2]) or "")
    packed, scale, _ = build(20, 128, 4)
    PackedLinear(packed, scale, None, 4, 8, backend="cuda")
    assert sorted(checked) == [("half", 4), ("int8", 4), ("wgmma", 4)]


@pytest.mark.parametrize("trusted", [True, False])
def test_choice(trusted, monkeypatch):
    monkeypatch.setattr(lowbit_check, "verified", lambda *key: trusted)
    _, _, weight = build(300, 128, 4)
    chosen = [kernel_for(tokens, weight, 8) for tokens in (1, 32, 33, 127, 128, 4096)]
    some, many = ("wgmma", "int8") if trusted else ("tile", "tile")
    assert chosen == ["stream", "stream", some, some, many, many]
    mid = ["half", "half"] if trusted else ["stripe", "dense"]
    assert [kernel_for(n, weight, 16) for n in (16, 17, 128, 129, 2048)] == ["stream", "stripe", *mid, "dense"]
    monkeypatch.setattr(cuda, "multiprocessors", lambda tensor: 132)  # too few blocks, and no splits
    assert kernel_for(128, weight, 8) == some
    _, _, planes = build(20, 128, 2, planes=True)
    assert kernel_for(1, planes, 4) == "bitplane"
    with pytest.raises(JointNASError, match="bit-plane weights take activations of"):
        kernel_for(1, planes, 16)


@pytest.mark.parametrize(("tokens", "planes", "a_bits"), [(150, False, 4), (3, True, 2)], ids=["int8", "bitplane"])
def test_matmul_with_the_chosen_kernel(tokens, planes, a_bits):
    packed, scale, weight = build(150, 256, 4, planes)
    x = torch.randn(2, tokens, 256).half()
    with poisoned():
        y = lowbit_matmul(x, weight, a_bits)
    a, s, z = quantize_tokens(x, a_bits)
    assert_close(y, reference((a.double() - z.double()) * s.double(), packed, scale, 4, 16, 128, False))


@pytest.mark.parametrize("sms", [108, 132])
def test_int8_plans_never_lose_a_wave_to_wide_blocks(sms):
    for rows in (1, 128, 129, 1024, 4096, 8192, 14336):
        for tokens in (128, 200, 256, 512, 1000, 4096):
            plan = lowbit_cuda.int8_plan(tokens, rows, sms)
            cost = {t: t * -(-lowbit_cuda.Plan(t, cluster=plan.cluster).blocks(tokens, rows) // sms) for t in (16, 32)}
            assert cost[plan.token_tiles] <= 1.1 * min(cost.values())
            assert plan.blocks(tokens, rows) % plan.cluster == 0
