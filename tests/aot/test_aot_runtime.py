"""The kernels of a GPU's decode step at sizes of real models, compiled for sm_80 and sm_90: nothing spills, shared
memory fits, keys and values are loaded 16 bytes at once, products are those of tensor cores."""

from __future__ import annotations

import pytest
import triton

from jointnas_kernels.ops.core.tensors import power_of_two
from jointnas_kernels.runtime import kernels
from tests.aot.harness import ARCHES, Compiled, compile_kernel

ARCH = pytest.mark.parametrize("arch", ARCHES, ids=lambda a: f"sm_{a}")
DTYPE = pytest.mark.parametrize("dtype", ["bf16", "fp32"])
# heads of a key-value head, head dim: Llama-3.1-8B, Qwen2-7B, SmolLM2-135M, Phi-3-mini, a narrow one
HEADS = pytest.mark.parametrize("share, dim", [(4, 128), (7, 128), (3, 64), (1, 96), (16, 16)], ids=str)
KINDS = {
    "where_ptr": "*i64:16", "positions_ptr": "*i64:16", "starts_ptr": "*i64:16", "part_ptr": "*fp32:16",
    "stat_ptr": "*fp32:16", "eps": "fp32", "scale": "fp32", "block": "i32", "window": "i32", "count": "i32",
}  # fmt: skip


def build(kernel: triton.JITFunction, arch: int, dtype: str, num_warps: int = 4, **given: object) -> Compiled:
    """Sound, of tensors in `dtype` and aligned integers where it is not said otherwise."""
    names = [p.name for p in kernel.params]
    usual = {n: KINDS.get(n, f"*{dtype}:16" if n.endswith("_ptr") else "i32:16") for n in names}
    compiled = compile_kernel(kernel, {**usual, **given}, arch, num_warps)
    compiled.assert_sound()
    return compiled


@ARCH
@DTYPE
@pytest.mark.parametrize("width", [576, 4096, 8192])
@pytest.mark.parametrize("absent", [{}, {"y_ptr": None}], ids=["add-norm", "norm"])
def test_add_norm(arch: int, dtype: str, width: int, absent: dict[str, object]) -> None:
    block = power_of_two(width)
    compiled = build(kernels.add_norm_kernel, arch, dtype, 4 if block <= 2048 else 8, BLOCK=block, **absent)
    assert compiled.has("LDG.E.128")
    assert compiled.has("STG.E.128")


@ARCH
@DTYPE
def test_swiglu(arch: int, dtype: str) -> None:
    compiled = build(kernels.swiglu_kernel, arch, dtype, BLOCK=1024)
    assert compiled.has("LDG.E.128")
    assert compiled.has("STG.E.128")


@ARCH
@DTYPE
@HEADS
@pytest.mark.parametrize(
    ("parts", "absent"), [(1, {"part_ptr": None, "stat_ptr": None, "q_norm_ptr": None, "k_norm_ptr": None}), (32, {})]
)
def test_attend(arch: int, dtype: str, share: int, dim: int, parts: int, absent: dict[str, object]) -> None:
    """In all, and in parts with norms of heads; addresses that are read from memory count as aligned."""
    shape = kernels.attend_shape(share, dim, 2 if dtype == "bf16" else 4)
    compiled = build(kernels.attend_kernel, arch, dtype, PARTS=parts, **shape, **absent)
    if dim > 16:
        assert compiled.count("LDGSTS.E.BYPASS.128") >= 2 * (kernels.STAGES - 1)
    if dtype == "bf16":
        assert compiled.has("HMMA")


@ARCH
@DTYPE
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("parts", [2, kernels.MOST_PARTS])
def test_merge(arch: int, dtype: str, dim: int, parts: int) -> None:
    build(kernels.merge_kernel, arch, dtype, PARTS=parts, D=dim, DP=power_of_two(dim))


@ARCH
@DTYPE
@HEADS
def test_rotate(arch: int, dtype: str, share: int, dim: int) -> None:
    sizes = {"SHARE": share, "ROWS": power_of_two(share), "D": dim, "DP": power_of_two(dim)}
    build(kernels.rotate_kernel, arch, dtype, **sizes)
