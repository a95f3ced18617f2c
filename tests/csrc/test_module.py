"""The compiled module itself: what it depends on, how it threads, how it refuses."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from jointnas_kernels import ops
from jointnas_kernels._ext import check, load
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.ops.core import cpu
from tests.csrc.kernels import LEVELS, force, supported

MODULE = Path(str(load().__file__))


def test_links_neither_torch_nor_an_openmp_runtime() -> None:
    linked = subprocess.run(["ldd", str(MODULE)], capture_output=True, text=True, check=True).stdout
    linked = re.sub(r"\(0x\w+\)", "", linked)  # an address may hold "c10"
    assert not [name for name in ("torch", "c10", "gomp", "iomp", "libomp") if name in linked], linked


def test_runs_without_torch_in_the_process() -> None:
    """Then there is no OpenMP runtime to share and threads are its own."""
    code = f"""
import ctypes, importlib.util
spec = importlib.util.spec_from_file_location("jointnas_kernels._C", {str(MODULE)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.parallel_backend() == "std::thread"
floats = ctypes.c_float * 2000
x, mask, y = floats(*range(2000)), floats(*[2.0] * 2000), floats()
address = ctypes.addressof
assert module.cpu_channel_mask(address(x), 0, address(mask), address(y), 0, 20, 100, 3, 0, 3, 0) == 0
assert list(y) == [2.0 * v for v in range(2000)]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_shares_the_threads_of_torch() -> None:
    assert load().parallel_backend() == "openmp"


def test_features_are_those_of_the_system() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    features = load().cpu_features()
    for name in ("avx2", "avx_vnni", "avx512_bf16", "avx512_vnni"):
        assert features[name] == (name in flags)
    assert features["amx"] <= ({"avx512f", "amx_tile", "amx_int8", "amx_bf16"} <= flags)  # less where Linux refuses


def test_unknown_instruction_set_is_refused() -> None:
    x = torch.ones(4)
    code = load().cpu_channel_mask(x.data_ptr(), 0, x.data_ptr(), x.data_ptr(), 0, 1, 4, 1, 0, 1, 9)
    assert load().ERRORS[code] == "this processor lacks the instructions"
    with pytest.raises(JointNASError, match="lacks the instructions"):
        cpu.call("channel_mask", x, None, x, x, None, 1, 4, 1, 0, isa=-1)


def test_errors_have_names() -> None:
    with pytest.raises(TypeError, match="cpu_read takes 4 numbers, got 1"):
        load().cpu_read(0)
    assert load().ERRORS[load().cpu_read(0.5, 4, 1, 0)] == "an argument it does not support"
    with pytest.raises(JointNASError, match="reading: out of memory"):
        check(-3, "reading")
    if load().has_cuda:
        with pytest.raises(JointNASError, match=r"launching: CUDA error 209 \(cudaErrorNoKernelImageForDevice\)"):
            check(209, "launching")


@pytest.mark.parametrize("isa", LEVELS.values(), ids=list(LEVELS))
def test_results_do_not_depend_on_the_thread_count(isa: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not supported(isa):
        pytest.skip(f"this processor lacks {cpu.ISAS[isa]}")
    torch.manual_seed(0)
    x, g, mask = torch.randn(300, 257), torch.randn(300, 257), torch.rand(257)
    w, a, b = torch.randn(50, 256), torch.randn(3, 8, 256) * 0.1, torch.randn(3, 50, 8) * 0.1
    half, levels = torch.full((300, 2), 0.5), torch.tensor([0.3, -2.0]).expand(300, 2, 2)
    registered, norm = torch.ops.jointnas, (x, mask, mask[:2], mask)
    results = []
    for threads in (1, 2, 3, 7):
        with monkeypatch.context() as patch:
            force(patch, isa, threads)
            results.append([
                *registered.masked_swiglu_backward(g, x, x, mask, mask, [True] * 4, "cpu"),
                *registered.mixed_rmsnorm_backward(g, *norm, half, [100, 257], 1e-5, [True] * 4, "cpu"),
                *registered.mixed_rmsnorm_quant_backward(g, *norm, mask[:2], half, levels, [100, 257], 1e-5, [4, 16],
                                                         False, [True] * 5, "cpu"),
                ops.quant_lora_mix(w, a, b, 0.5, [2, 4, 8], torch.tensor([0.2, 0.3, 0.5]), 64, backend="cpu"),
            ])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_callable_from_several_threads_at_once() -> None:
    x, mask = torch.randn(2000, 130), torch.rand(130)
    expected, wrong = x * mask, []

    def work() -> None:
        for _ in range(20):
            if not torch.equal(ops.channel_mask(x, mask, backend="cpu"), expected):
                wrong.append(threading.get_ident())

    team = [threading.Thread(target=work) for _ in range(4)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("offset", [0, 4, 8, 60], ids=lambda o: f"{o} bytes off")
def test_never_writes_beyond_the_output(offset: int) -> None:
    """Unaligned outputs with guards on both sides, for the kernels that store whole cache lines."""
    rows, width = 1100, 4097  # above the size from which outputs are written past the cache
    memory = torch.full((rows * width + 64,), 7.0)
    start = 16 + offset // 4
    out = memory[start : start + rows * width].view(rows, width)
    w, r, c = torch.randn(rows, width), torch.rand(rows), torch.rand(width)
    cpu.call("mixed_weight", w, r, c, out, rows, width, 0)
    assert torch.equal(out, w * (r[:, None] * c))
    assert (memory[:start] == 7).all()
    assert (memory[start + rows * width :] == 7).all()


def test_empty_inputs() -> None:
    mask = torch.rand(8)
    assert ops.channel_mask(torch.empty(0, 8), mask, backend="cpu").shape == (0, 8)
    packed, scale = torch.zeros(4, 4, dtype=torch.int32), torch.ones(4, 1)
    assert ops.lowbit_linear(torch.empty(0, 32), packed, scale, 4, 8, 32).shape == (0, 4)


def test_pointers_are_plain_integers() -> None:
    """No tensor type crosses the boundary: any buffer will do."""
    buffer = (ctypes.c_float * 8)(*range(8))
    assert load().cpu_huge_pages(ctypes.addressof(buffer), 32) == 0
