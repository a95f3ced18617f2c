"""The quantizer kernels at the Llama-3.1-8B shapes, compiled for sm_80 and sm_90: no spills, tensor cores used, and the
forward's instruction count, which decides whether it is bound by memory."""

from __future__ import annotations

import re

import pytest
import torch
import triton.language as tl

from jointnas_kernels.ops.quant.activations import act_backward_kernel, act_forward_kernel, row_config
from jointnas_kernels.ops.quant.activations import backward_config as act_backward_config
from jointnas_kernels.ops.quant.kernels import constants
from jointnas_kernels.ops.quant.mixture import lora
from jointnas_kernels.ops.quant.mixture.kernels import (
    backward_config,
    forward_config,
    mix_backward_kernel,
    mix_forward_kernel,
    tile_constants,
)
from jointnas_kernels.ops.quant.weights import fake_quant_kernel
from tests.aot.harness import ARCHES, Compiled, compile_kernel

ARCH = pytest.mark.parametrize("arch", ARCHES, ids=lambda a: f"sm_{a}")
BITS = (2, 4, 8)


def compile_with(kernel, values: dict[str, object], arch: int, half: str, stages: int = 1) -> Compiled:
    """Pointers named in fp32 below, all others of the half type; integers are multiples of 16."""
    single = {"probs_ptr", "clip_ptr", "mask_ptr", "da_ptr", "db_ptr", "dprobs_ptr", "dclip_ptr", "dmask_ptr"}
    single |= {"levels_ptr", "r_ptr", "dprobs_part_ptr", "dmask_part_ptr"}
    warps = int(values.pop("num_warps", 4))  # type: ignore[call-overload]
    arguments: dict[str, object] = {}
    for parameter in kernel.params:
        name = parameter.name
        if name in values:
            arguments[name] = values[name]
        elif name.endswith("_ptr"):
            arguments[name] = "*fp32:16" if name in single else f"*{half}:16"
            if name == "counter_ptr":
                arguments[name] = "*i32:16"
        else:
            arguments[name] = "fp32" if name == "scaling" else "i32:16"
    return compile_kernel(kernel, arguments, arch, num_warps=warps, num_stages=stages)


def mix_values(group: int, clip: bool, config: dict[str, int]) -> dict[str, object]:
    return tile_constants(BITS, group, 32, clip) | config


@ARCH
@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize("clip", [False, True], ids=["", "clip"])
@pytest.mark.parametrize("group", [128, 64])
def test_mix_forward(group: int, clip: bool, half: str, arch: int) -> None:
    config = forward_config(128, clip, arch >= 90)
    rows, warps = config["BLOCK"], config["num_warps"]
    compiled = compile_with(mix_forward_kernel, mix_values(group, clip, config), arch, half)
    compiled.assert_sound()
    assert compiled.has("HMMA", "HGMMA")
    assert compiled.count("LDG.E.128") > 0
    assert compiled.count("STG.E.128") > 0
    if arch >= 90 and not clip and group == 128:  # straight-line code: instructions per lane over elements per lane
        instructions = sum(compiled.count(name) for name in ("F", "H", "I", "L", "S", "P", "M", "C", "U", "V"))
        assert instructions / (rows * 128 / (32 * warps)) < 38


@ARCH
@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize("mode", ["arch", "clip"])
def test_mix_backward(mode: str, half: str, arch: int) -> None:
    clip = mode == "clip"
    values = mix_values(128, clip, backward_config(128, clip))
    values |= {"BLOCK_T": 64, "STAGES": 3, "DENSE": False, "CLIP_STE": clip}
    values |= {"WANT_LORA": clip, "WANT_PROBS": True, "WANT_CLIP": clip}
    compiled = compile_with(mix_backward_kernel, values, arch, half, stages=3)
    compiled.assert_sound()
    assert compiled.has("HMMA", "HGMMA")
    assert compiled.count("LDGSTS") > 0, "the token loop is not pipelined"


@ARCH
@pytest.mark.parametrize("adapters", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", [lora.to_rank_kernel, lora.from_rank_kernel], ids=["to rank", "from rank"])
def test_lora_gradients(kernel, adapters: str, arch: int) -> None:
    """Tensor cores on tiles that arrive asynchronously; gradients leave in pieces of 16 bytes."""
    padded, columns = lora.width(len(BITS), 32)
    values = {"P": len(BITS), "R_PAD": padded, "N": columns, **lora.config(columns)}
    warps = values.pop("num_warps")
    if kernel is lora.to_rank_kernel:
        values |= {"SLICE": lora.SLICE, "SLICED": True, "W_DTYPE": tl.bfloat16}
    kinds = {"probs_ptr": "fp32", "partial_ptr": "fp32", "counter_ptr": "i32"}
    arguments: dict[str, object] = {}
    for parameter in kernel.params:
        name = parameter.name
        of_pairs = re.fullmatch(r"d?[ab]\d_ptr", name)
        if name.endswith("_ptr"):
            arguments[name] = f"*{adapters if of_pairs else kinds.get(name, 'bf16')}:16"
        else:
            arguments[name] = values.get(name, "fp32" if name == "scaling" else "i32:16")
    compiled = compile_kernel(kernel, arguments, arch, num_warps=warps)
    compiled.assert_sound()
    assert compiled.has("HMMA", "HGMMA")
    assert compiled.count("LDGSTS") > 0, "the loop is not pipelined"
    assert compiled.count("STG.E.128") > 0


@ARCH
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_fake_quant(backward: bool, symmetric: bool, arch: int) -> None:
    values = {"LOW": -8.0, "G": 128, "G_PAD": 128, "BLOCK": 32, "SYMMETRIC": symmetric, "HAS_CLIP": True}
    values |= {"BACKWARD": backward}
    compile_with(fake_quant_kernel, values, arch, "bf16").assert_sound()


@ARCH
@pytest.mark.parametrize("columns", [4096, 14336])
@pytest.mark.parametrize("what", ["forward", "backward", "behind swiglu"])
def test_act_quant(what: str, columns: int, arch: int) -> None:
    values: dict[str, object] = dict(constants(torch.bfloat16, (2, 4, 8, 16), False, True, False))
    backward = what == "backward"
    values |= act_backward_config(columns) if backward else row_config(columns)
    if backward:
        values |= {"WANT_X": True, "WANT_PROBS": True, "WANT_MASK": True}
    else:
        values |= {"SWIGLU": what == "behind swiglu"}
    compiled = compile_with(act_backward_kernel if backward else act_forward_kernel, values, arch, "bf16")
    compiled.assert_sound()
    assert compiled.count("LDG.E.128") > 0
    assert compiled.count("STG.E.128") > 0
    assert compiled.count("F2F.") < 16, "elements are converted one by one, at an eighth of the packed rate"
    if not backward and columns == 14336:  # of 128 threads: at least eight programs on a multiprocessor
        assert compiled.registers <= 64
