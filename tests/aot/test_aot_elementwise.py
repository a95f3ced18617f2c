"""The elementwise kernels at Llama-3.1-8B shapes in bf16, compiled for sm_80 and sm_90: nothing spills, shared memory
fits, and loads and stores are 16 bytes wide."""

import pytest
import torch

from jointnas_kernels.ops.core.columns import STAGES, column_sums_kernel
from jointnas_kernels.ops.norm.heads import head_rmsnorm_backward_kernel, head_rmsnorm_kernel
from jointnas_kernels.ops.norm.rms.kernels import launch_shape, rmsnorm_backward_kernel, rmsnorm_forward_kernel
from jointnas_kernels.ops.quant.kernels import constants
from jointnas_kernels.ops.width.channel import channel_mask_kernel
from jointnas_kernels.ops.width.residual import residual_backward_kernel, residual_forward_kernel
from jointnas_kernels.ops.width.rope import rope_kernel
from jointnas_kernels.ops.width.swiglu import swiglu_backward_kernel, swiglu_forward_kernel
from jointnas_kernels.ops.width.weight import factored_backward_kernel, factored_kernel, loop_kernel, masks_kernel
from tests.aot.harness import ARCHES, Compiled, compile_kernel

ARCH = pytest.mark.parametrize("arch", ARCHES, ids=lambda a: f"sm_{a}")
HIDDEN = tuple(2**i for i in range(5, 13))  # of the llama3 space
HALF, VECTOR, COUNT = "*bf16:16", "*fp32:16", "i32:16"


def types(kernel, values: dict[str, object]) -> dict[str, object]:
    """Arguments for compile_kernel: by name where given, else bf16 tensors, fp32 vectors and aligned integers."""
    out: dict[str, object] = {}
    for parameter in kernel.params:
        name = parameter.name
        if name in values:
            out[name] = values[name]
        elif not name.endswith("_ptr"):
            out[name] = "i32" if name == "column_blocks" else COUNT
        elif name.removesuffix("_ptr") in ("x", "g", "h", "y", "up", "w", "out", "dx", "dh", "dy", "dup", "dgate"):
            out[name] = HALF
        else:
            out[name] = "*i32:16" if name == "counter_ptr" else VECTOR
    return out


def tile(reduce: bool) -> dict[str, object]:
    """The tile ``row_tiles`` chooses at these sizes."""
    return {"LOOP_STAGES": STAGES if reduce else 1, "BLOCK_M": 4 if reduce else 8, "BLOCK_N": 512 if reduce else 1024}


def check(compiled: Compiled, wide: bool = True) -> None:
    compiled.assert_sound()
    if wide:
        assert compiled.has("LDG.E.128", "LDGSTS.E.BYPASS.128"), "loads are not 16 bytes wide"
        assert compiled.count("STG.E.128") > 0, "stores are not 16 bytes wide"


@ARCH
@pytest.mark.parametrize("reduce", [False, True], ids=["dx", "dmask"])
def test_channel_mask(arch: int, reduce: bool) -> None:
    values = {"REDUCE": reduce, "mask_ptr": VECTOR} | tile(reduce)
    if not reduce:
        values |= {"x_ptr": None, "partial_ptr": None, "dmask_ptr": None, "counter_ptr": None}
    check(compile_kernel(channel_mask_kernel, types(channel_mask_kernel, values), arch, num_warps=8))


@ARCH
def test_swiglu_forward(arch: int) -> None:
    values = {"gate_ptr": HALF, "BLOCK_M": 8, "BLOCK_N": 1024}
    check(compile_kernel(swiglu_forward_kernel, types(swiglu_forward_kernel, values), arch, num_warps=8))


@ARCH
@pytest.mark.parametrize("need", [False, True], ids=["dx", "dmasks"])
def test_swiglu_backward(arch: int, need: bool) -> None:
    values: dict[str, object] = {"gate_ptr": HALF, "NEED_OUT": need, "NEED_IN": need, "NEED_PROBS": False} | tile(need)
    values |= dict.fromkeys(("probs_ptr", "levels_ptr", "dprobs_part_ptr", "dprobs_ptr"))
    values |= constants(torch.bfloat16, (), False, True, False)
    if not need:
        values |= dict.fromkeys(("dr_part_ptr", "dc_part_ptr", "dr_ptr", "dc_ptr", "counter_ptr"))
    check(compile_kernel(swiglu_backward_kernel, types(swiglu_backward_kernel, values), arch, num_warps=8))


@ARCH
@pytest.mark.parametrize("bits", [(2, 4, 8, 16), (4, 8, 16)], ids=str)
@pytest.mark.parametrize("need", [False, True], ids=["dx", "all"])
def test_swiglu_quant_backward(arch: int, need: bool, bits: tuple[int, ...]) -> None:
    values: dict[str, object] = {"gate_ptr": HALF, "NEED_OUT": need, "NEED_IN": need, "NEED_PROBS": need} | tile(need)
    values |= constants(torch.bfloat16, bits, False, True, False)
    if not need:
        names = ("dr_part", "dc_part", "dprobs_part", "dr", "dc", "dprobs", "counter", "levels")
        values |= {f"{name}_ptr": None for name in names}
    compiled = compile_kernel(swiglu_backward_kernel, types(swiglu_backward_kernel, values), arch, num_warps=8)
    check(compiled)
    assert compiled.count("F2F.") < 16, "elements are converted one by one, at an eighth of the packed rate"


@ARCH
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_residual_forward(arch: int, gated: bool) -> None:
    values: dict[str, object] = {"HAS_MASK": True, "HAS_GATE": gated, "BLOCK_M": 8, "BLOCK_N": 1024}
    if not gated:
        values |= {"gate_ptr": None, "x_ptr": None}
    check(compile_kernel(residual_forward_kernel, types(residual_forward_kernel, values), arch, num_warps=8))


@ARCH
@pytest.mark.parametrize("need", [False, True], ids=["dx", "all"])
def test_residual_backward(arch: int, need: bool) -> None:
    values: dict[str, object] = {"HAS_MASK": True, "NEED_MASK": need, "NEED_GATE": need} | tile(need)
    values["dgate_ptr"] = VECTOR
    if not need:
        values |= dict.fromkeys(("mask_part_ptr", "gate_part_ptr", "dmask_ptr", "dgate_ptr", "counter_ptr"))
    check(compile_kernel(residual_backward_kernel, types(residual_backward_kernel, values), arch, num_warps=8))


# a norm of what is there, and that without quantization
HERE: dict[str, object] = {"ADDS": False, **dict.fromkeys(("add_ptr", "gh_ptr", "dadd_ptr"))}
ALONE: dict[str, object] = {
    "probs_ptr": None, "levels_ptr": None, **HERE, **constants(torch.bfloat16, (), False, True, False)
}  # fmt: skip
WIDTHS = pytest.mark.parametrize("width, sizes", [(4096, HIDDEN), (8192, (4096, 6144, 8192)), (4096, (4096,))], ids=str)


@ARCH
@WIDTHS
def test_rmsnorm_forward(arch: int, width: int, sizes: tuple[int, ...]) -> None:
    s, seg, warps, stages = launch_shape(sizes, width, 2 * width)
    values = ALONE | {"w_ptr": HALF, "norm_eps": "fp32", "SIZES": sizes, "K": len(sizes), "S": s, "SEG": seg,
                      "LOOP_STAGES": stages}
    check(compile_kernel(rmsnorm_forward_kernel, types(rmsnorm_forward_kernel, values), arch, num_warps=warps))


@ARCH
@WIDTHS
@pytest.mark.parametrize("need", [False, True], ids=["dx", "all"])
def test_rmsnorm_backward(arch: int, need: bool, width: int, sizes: tuple[int, ...]) -> None:
    s, seg, warps, stages = launch_shape(sizes, width, 4 * width)
    values = ALONE | {"w_ptr": HALF, "SIZES": sizes, "K": len(sizes), "S": s, "SEG": seg, "NEED_ALPHA": need,
                      "NEED_COLUMN": need, "NEED_PROBS": False, "LOOP_STAGES": stages}
    if not need:
        values |= {"shares_ptr": None, "column_ptr": None}
    check(compile_kernel(rmsnorm_backward_kernel, types(rmsnorm_backward_kernel, values), arch, num_warps=warps))


@ARCH
@WIDTHS
@pytest.mark.parametrize("bits", [(2, 4, 8, 16), (4, 8, 16)], ids=str)
@pytest.mark.parametrize("mode", ["forward", "dx", "all"])
def test_rmsnorm_quant(arch: int, mode: str, bits: tuple[int, ...], width: int, sizes: tuple[int, ...]) -> None:
    backward, need = mode != "forward", mode == "all"
    s, seg, warps, stages = launch_shape(sizes, width, (4 if backward else 2) * width)
    values: dict[str, object] = {"w_ptr": HALF, "SIZES": sizes, "K": len(sizes), "S": s, "SEG": seg, **HERE,
                                 "LOOP_STAGES": stages, **constants(torch.bfloat16, bits, False, True, False)}
    values |= {"NEED_ALPHA": need, "NEED_COLUMN": need, "NEED_PROBS": need} if backward else {"norm_eps": "fp32"}
    if mode == "dx":
        values |= {"shares_ptr": None, "column_ptr": None}
    kernel = rmsnorm_backward_kernel if backward else rmsnorm_forward_kernel
    compiled = compile_kernel(kernel, types(kernel, values), arch, num_warps=warps)
    if (arch, width, mode) == (90, 8192, "all"):  # 16 warps leave 128 registers per thread: two of them spill
        assert compiled.spilled <= 8
    else:
        check(compiled)
    assert compiled.count("F2F.") < 16, "elements are converted one by one, at an eighth of the packed rate"


@ARCH
@WIDTHS
@pytest.mark.parametrize("bits", [(), (2, 4, 8, 16)], ids=str)
@pytest.mark.parametrize("mode", ["forward", "dx", "all"])
def test_residual_rmsnorm(arch: int, mode: str, bits: tuple[int, ...], width: int, sizes: tuple[int, ...]) -> None:
    backward, need = mode != "forward", mode == "all"
    s, seg, warps, stages = launch_shape(sizes, width, (8 if backward else 4) * width)
    values: dict[str, object] = {"w_ptr": HALF, "SIZES": sizes, "K": len(sizes), "S": s, "SEG": seg, "ADDS": True,
                                 "LOOP_STAGES": stages, **constants(torch.bfloat16, bits, False, True, False)}
    values |= dict.fromkeys(("add_ptr", "gh_ptr", "dadd_ptr"), HALF)
    if backward:
        values |= {"NEED_ALPHA": need, "NEED_COLUMN": need, "NEED_PROBS": need and bool(bits)}
    else:
        values["norm_eps"] = "fp32"
    if not bits:
        values |= {"probs_ptr": None, "levels_ptr": None}
    if mode == "dx":
        values |= {"shares_ptr": None, "column_ptr": None}
    kernel = rmsnorm_backward_kernel if backward else rmsnorm_forward_kernel
    compiled = compile_kernel(kernel, types(kernel, values), arch, num_warps=warps)
    if (width, mode) == (8192, "all") and bits:  # 16 warps leave 128 registers per thread: six of them spill
        assert compiled.spilled <= 24
    else:
        check(compiled)


@ARCH
@WIDTHS
def test_rmsnorm_quant_normalises_as_the_norm_alone(arch: int, width: int, sizes: tuple[int, ...]) -> None:
    """The same levels with and without fusion need the same v to the last bit: the sum of squares and both scans must
    add in the same order."""
    s, seg, warps, stages = launch_shape(sizes, width, 2 * width)
    values: dict[str, object] = {"w_ptr": HALF, "SIZES": sizes, "K": len(sizes), "S": s, "SEG": seg, **HERE,
                                 "LOOP_STAGES": stages, "norm_eps": "fp32"}
    kernel = rmsnorm_forward_kernel
    alone = compile_kernel(kernel, types(kernel, values | ALONE), arch, num_warps=warps)
    values |= constants(torch.bfloat16, (2, 4, 8, 16), False, True, False)
    fused = compile_kernel(kernel, types(kernel, values), arch, num_warps=warps)
    assert len(alone.reductions()) == 3
    assert fused.reductions()[:3] == alone.reductions()


@ARCH
def test_column_sums(arch: int) -> None:
    values: dict[str, object] = {"HAS_SCALE": True, "HAS_B": True, "BLOCK_M": 128, "BLOCK_N": 32}
    values |= {name: "*fp32:16" for name in ("a_ptr", "b_ptr", "scale_ptr", "a_out_ptr", "b_out_ptr")}
    check(compile_kernel(column_sums_kernel, types(column_sums_kernel, values), arch, num_warps=8), wide=False)


@ARCH
@pytest.mark.parametrize("heads", [32, 8])
@pytest.mark.parametrize("mode", ["forward", "dx", "all"])
def test_head_rmsnorm(arch: int, mode: str, heads: int) -> None:
    """Queries and keys of Qwen3-8B."""
    need, dims = mode == "all", (32, 64, 128)
    warps = 4 if heads * 64 < 2048 else 16 if need else 8
    values: dict[str, object] = {"DIMS": dims, "K": 3, "HP": heads, "HALF": 64, "per_program": "i32"}
    kernel = head_rmsnorm_kernel
    if mode == "forward":
        values |= {"eps": "fp32", "LOOP_STAGES": STAGES}
    else:
        kernel = head_rmsnorm_backward_kernel
        values |= {"NEED_MASK": need, "NEED_ALPHA": need, "LOOP_STAGES": 2}
        if not need:
            values |= {"dmask_ptr": None, "dalpha_ptr": None}
    # 8 heads are 4 values per thread and half: 8 bytes
    check(compile_kernel(kernel, types(kernel, values), arch, num_warps=warps), wide=heads == 32)


@ARCH
@pytest.mark.parametrize("mode", ["forward", "dx", "all"])
def test_rope(arch: int, mode: str) -> None:
    need, backward = mode == "all", mode != "forward"
    values: dict[str, object] = {"BACKWARD": backward, "HAS_V": backward, "NEED_Q": need, "NEED_K": need, "HP": 32,
                                 "KP": 8, "HALF": 64, "per_program": "i32", "LOOP_STAGES": STAGES}
    tensors = ("q", "k", "v", "xq", "xk", "cos", "sin", "q_out", "k_out", "v_out")
    values |= {f"{name}_ptr": HALF for name in tensors}
    if not backward:
        values |= {"v_ptr": None, "v_out_ptr": None}
    if not need:
        values |= dict.fromkeys(("xq_ptr", "xk_ptr", "dqm_ptr", "dkm_ptr"))
    check(compile_kernel(rope_kernel, types(rope_kernel, values), arch, num_warps=16 if need else 8))


@ARCH
def test_mixed_weight(arch: int) -> None:
    sizes = {"SIZES_IN": HIDDEN, "SIZES_OUT": (4096, 8192, 14336), "K_IN": len(HIDDEN), "K_OUT": 3}
    forward = sizes | {"BLOCK_M": 8, "BLOCK_N": 1024}
    check(compile_kernel(factored_kernel, types(factored_kernel, forward), arch, num_warps=8))
    backward = sizes | {"BLOCK_M": 8, "BLOCK_N": 512, "KP_IN": 8, "KP_OUT": 4}
    kernel = factored_backward_kernel
    check(compile_kernel(kernel, types(kernel, backward), arch, num_warps=8), wide=False)


@ARCH
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_mixed_weight_baselines(arch: int, backward: bool) -> None:
    block = {"BACKWARD": backward, "BLOCK_M": 8, "BLOCK_N": 512 if backward else 1024}
    absent = {"out_ptr": None} if backward else {"g_ptr": None, "partial_ptr": None}
    masks = block | absent | {"masks_ptr": HALF, "K_IN": 8, "PAIRS": 24}
    check(compile_kernel(masks_kernel, types(masks_kernel, masks), arch, num_warps=8), wide=not backward)
    loop = block | absent | ({} if backward else {"out_ptr": VECTOR})
    check(compile_kernel(loop_kernel, types(loop_kernel, loop), arch, num_warps=8), wide=not backward)
