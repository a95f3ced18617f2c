"""The portable Triton low-bit kernels compiled for GPUs that are not there."""

from __future__ import annotations

import pytest

from jointnas_kernels.ops.lowbit import portable as lowbit_triton
from tests.aot.harness import ARCHES, compile_kernel


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("operand", "tokens", "group"), [("bf16", 1, 128), ("fp16", 64, 128), ("bf16", 64, 32)])
def test_matmul(operand, tokens, group, bits, arch):
    bm, bn, bk, whole = lowbit_triton.blocks(tokens, group)
    arguments: dict[str, object] = {
        "x_ptr": f"*{operand}:16",
        "packed_ptr": "*i32:16",
        "scale_ptr": "*bf16:16",
        "row_scale_ptr": "*fp32:16" if operand == "fp16" else None,
        "y_ptr": "*bf16:16",
        **{"M": "i32", "N": "i32:16", "K": "i32:16", "x_stride": "i32:16", "group": "i32:16"},
        **{"BITS": bits, "PER_GROUP": whole, "BM": bm, "BN": bn, "BK": bk},
    }
    compiled = compile_kernel(lowbit_triton.matmul_kernel, arguments, arch, num_warps=4, num_stages=3)
    compiled.assert_sound()
    assert compiled.has("HMMA", "HGMMA")


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_quantize(symmetric, arch):
    arguments: dict[str, object] = {
        **{"x_ptr": "*bf16:16", "level_ptr": "*fp16:16", "scale_ptr": "*fp32:16", "K": "i32:16", "stride": "i32:16"},
        **{"LOW": -8.0, "TINY": 2.0**-7, "SYMMETRIC": symmetric, "BLOCK": 2048},
    }
    compile_kernel(lowbit_triton.quantize_kernel, arguments, arch).assert_sound()
