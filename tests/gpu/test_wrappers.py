"""Every PTX wrapper on the device against its host twin, on random bits: what the emulated tests rest on."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "cuda_host" / "wrappers.cu"
NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
NAMES = ["mma f16", "mma bf16", "integer mma", "scalars f16", "scalars bf16", "tiles f16", "tiles bf16"]
HOPPER = ["wgmma f16", "wgmma bf16", "stmatrix"]
WORDS = 512
pytestmark = pytest.mark.skipif(not Path(NVCC).exists(), reason="nvcc is not installed")


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> tuple[ctypes.CDLL, ctypes.CDLL]:
    folder = tmp_path_factory.mktemp("wrappers")
    capability = torch.cuda.get_device_capability()
    arch = f"{capability[0]}{capability[1]}" + ("a" if capability == (9, 0) else "")
    common = ["-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", "-shared"]
    device, host = folder / "device.so", folder / "host.so"
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    subprocess.run([NVCC, *common, "-Xcompiler", "-fPIC", target, str(SOURCE), "-o", str(device)], check=True)
    subprocess.run(["g++", *common, "-fPIC", "-DJN_EMULATE", "-x", "c++", str(SOURCE), "-o", str(host)], check=True)
    return ctypes.CDLL(str(device)), ctypes.CDLL(str(host))


def operands(name: str) -> torch.Tensor:
    """Random bits; halves that enter a product are kept finite and of moderate size."""
    bits = torch.randint(-(2**31), 2**31, (128, WORDS), dtype=torch.int64).to(torch.int32)
    if name.startswith(("mma", "wgmma")):
        dtype = torch.bfloat16 if "bf16" in name else torch.float16
        halves = torch.randn(128, 2 * 20).to(dtype).view(torch.int32)
        bits[:, :6] = halves[:, :6]
        if name.startswith("wgmma"):
            bits[:, :20] = halves
    return bits


@pytest.mark.parametrize("name", NAMES + HOPPER)
def test_wrapper(name, builds):
    if name in HOPPER and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only Hopper has it")
    given = operands(name)
    results = []
    for library, tensor in zip(builds, (given.cuda(), given.clone()), strict=True):
        out = torch.zeros_like(tensor)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (tensor, out)]
        stream = torch.cuda.current_stream().cuda_stream if tensor.is_cuda else 0
        assert library.run_wrapper((NAMES + HOPPER).index(name), *pointers, ctypes.c_void_p(stream)) == 0
        torch.cuda.synchronize()
        results.append(out.cpu())
    device, host = results
    assert host.any()
    if name.startswith("mma"):  # fp32 sums, in the hardware's own order
        sums = [t.view(torch.float32)[:32, :4] for t in (device, host)]
        torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-5)
    elif name.startswith("wgmma"):
        assert torch.equal(device[:, :32], host[:, :32])
        sums = [t.view(torch.float32)[:, 32:64] for t in (device, host)]
        torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-4)
    else:
        nan = torch.zeros_like(host, dtype=torch.bool)
        if name.startswith("scalars"):  # which NaN comes out is not specified
            as_float = host.view(torch.float32).isnan()
            dtype = torch.bfloat16 if "bf16" in name else torch.float16
            as_half = host.view(dtype).isnan().view(*host.shape, 2).any(2)
            nan = as_float | as_half
        assert torch.equal(device[~nan], host[~nan])
