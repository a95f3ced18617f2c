"""The CUDA low-bit kernels (csrc/cuda/lowbit_*.cu): plans and launches, without choosing among them (choice.py)."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jointnas_kernels.ops.core import cuda
from jointnas_kernels.ops.core.cuda import DTYPES
from jointnas_kernels.ops.core.tensors import without_autocast
from jointnas_kernels.ops.lowbit.tiles import INPUTS
from jointnas_kernels.ops.lowbit.weight import LowbitWeight

# the order each reads quantized activations in
ACT_LAYOUTS = {"stream": 0, "tile": 0, "wgmma": 1, "int8": 2, "bitplane": 3}
STRIP_ROWS = 64  # rows of one warp
BLOCK_STRIPS = 2  # of the tile, wgmma, int8 and half kernels
STRIPE_ROWS = 256  # of a row block of the stripe kernel


class Plan(NamedTuple):
    """How a kernel splits the work.

    token_tiles: 8-token tiles per block (stream and bitplane: per pass, 1, 2 or, of quantized activations, 4; stripe:
    per pass, 4 or 8; tile and wgmma: 8 or 16; int8: 16 or 32; half: 2, 4, 8, 16 or 32). warp_rows: 64-row strips per
    block. splits: blocks along the inputs; stripe: blocks that share all rows and inputs of a pass evenly. cluster:
    blocks that share their tokens.
    """

    token_tiles: int
    warp_rows: int = BLOCK_STRIPS
    splits: int = 1
    cluster: int = 1

    def blocks(self, tokens: int, rows: int) -> int:
        """How many parts an output [tokens, rows] has: a block each, or, of int8, whose blocks stay, one of a few."""
        row_blocks = -(-rows // (STRIP_ROWS * self.warp_rows * self.cluster)) * self.cluster
        return row_blocks * self.splits * -(-tokens // (8 * self.token_tiles))


def stream_warps(kernel: str, bits: int, token_tiles: int) -> int:
    """Warps of a block, as in lowbit_stream.cu and lowbit_bitplane.cu."""
    if kernel == "bitplane":
        return 16 if token_tiles < 4 else 8
    return 8 if bits == 8 or token_tiles > 1 else 16


@functools.cache
def stream_plan(tokens: int, rows: int, inputs: int, bits: int, a_bits: int, sms: int) -> Plan:
    """One wave of blocks: as few strips per block as fit the chip at once, then as many splits as are left over."""
    token_tiles = 1 if tokens <= 8 else 2 if tokens <= 16 or a_bits == 16 else 4
    block_warps = stream_warps("stream", bits, token_tiles)
    passes = -(-tokens // (8 * token_tiles))
    strips = -(-rows // STRIP_ROWS)
    warp_rows = next((w for w in (1, 2, 4, 8) if -(-strips // w) * passes <= sms), 8)
    row_blocks = -(-strips // warp_rows) * passes
    # a split is worth its reduction only while every warp still gets a group
    most = max(1, inputs // INPUTS // (block_warps // warp_rows))
    return Plan(token_tiles, warp_rows, max(1, min(sms // row_blocks, most)))


def stripe_steps(rows: int, inputs: int) -> int:
    """Groups of all row blocks, which stripes share."""
    return -(-rows // STRIPE_ROWS) * (inputs // INPUTS)


def stripe_shares(rows: int, inputs: int, stripes: int) -> int:
    """The most stripes that have steps of one row block, when none is longer than another by more than a step."""
    return (inputs // INPUTS - 2) // max(1, stripe_steps(rows, inputs) // stripes) + 2


@functools.cache
def stripe_plan(tokens: int, rows: int, inputs: int, sms: int, token_tiles: int | None = None) -> Plan:
    """As many stripes as make the longest of them short; adding a share up is predicted to cost a quarter of a step
    (64 tokens: 64 KB from L2 at 64 bytes per clock, where products take 2048 clocks)."""
    token_tiles = token_tiles or (4 if tokens <= 32 else 8)
    steps, passes = stripe_steps(rows, inputs), -(-tokens // (8 * token_tiles))

    def cost(stripes: int) -> float:
        shares = stripe_shares(rows, inputs, stripes)
        return -(-steps // stripes) + (shares / 4 if shares > 1 else 0)

    return Plan(token_tiles, splits=min(range(1, max(1, min(sms // passes, steps)) + 1), key=cost))


@functools.cache
def tile_plan(tokens: int, rows: int, inputs: int, sms: int) -> Plan:
    """64-token blocks until 128-token blocks fill the chip; splits only while they fit one wave."""
    plan = Plan(16 if Plan(16).blocks(tokens, rows) >= sms else 8)
    return plan._replace(splits=max(1, min(sms // plan.blocks(tokens, rows), inputs // INPUTS // 4)))


@functools.cache
def int8_plan(tokens: int, rows: int, sms: int) -> Plan:
    """256-token blocks read a third less than 128-token blocks, so those must save more than a tenth in whole waves."""
    cluster = 2 if rows > STRIP_ROWS * BLOCK_STRIPS else 1
    wide, narrow = Plan(32, cluster=cluster), Plan(16, cluster=cluster)
    return wide if 2 * -(-wide.blocks(tokens, rows) // sms) <= 1.1 * -(-narrow.blocks(tokens, rows) // sms) else narrow


@functools.cache
def half_plan(tokens: int, rows: int, inputs: int, sms: int) -> Plan:
    """The narrowest block that takes all tokens, or as `int8_plan`; splits only while they fit one wave."""
    plan = int8_plan(tokens, rows, sms)
    narrow = next((t for t in (2, 4, 8, 16) if tokens <= 8 * t), None)
    plan = plan if narrow is None else plan._replace(token_tiles=narrow)
    return plan._replace(splits=max(1, min(sms // plan.blocks(tokens, rows), inputs // INPUTS // 4)))


def usual_plan(kernel: str, tokens: int, rows: int, inputs: int, w_bits: int, a_bits: int, sms: int) -> Plan:
    """The plan that a kernel takes where none is given."""
    if kernel in ("stream", "bitplane"):
        return stream_plan(tokens * (a_bits if kernel == "bitplane" else 1), rows, inputs, w_bits, a_bits, sms)
    if kernel == "stripe":
        return stripe_plan(tokens, rows, inputs, sms)
    if kernel == "int8":
        return int8_plan(tokens, rows, sms)
    return (half_plan if kernel == "half" else tile_plan)(tokens, rows, inputs, sms)


def quantize_pack(x: Tensor, bits: int, symmetric: bool = False, layout: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, I] to (a int8 [M, I], scale fp32 [M], zero int32 [M]) in one of ACT_LAYOUTS; for int8 a is [8 * ceil(M/8),
    I], for bitplane [M, I * bits / 8]."""
    tokens, inputs = x.shape
    rows = -(-tokens // 8) * 8 if layout == ACT_LAYOUTS["int8"] else tokens
    columns = inputs // 8 * bits if layout == ACT_LAYOUTS["bitplane"] else inputs
    a = x.new_empty(rows, columns, dtype=torch.int8)
    scale, zero = x.new_empty(tokens, dtype=torch.float32), x.new_empty(tokens, dtype=torch.int32)
    cuda.call("act_quant_pack", x, a, scale, zero, tokens, inputs, bits, symmetric, layout, DTYPES[x.dtype], on=x)
    return a, scale, zero


def multiply(
    kernel: str, x: Tensor, weight: LowbitWeight, activation: Sequence[Tensor] | None = None, plan: Plan | None = None,
    early: bool = True, a_bits: int = 8,
) -> Tensor:  # fmt: skip
    """y [M, O] in the scales' dtype of x [M, I], or of a and ``activation`` (scale, zero) of `quantize_pack` in
    ACT_LAYOUTS[kernel].

    Kernels are "stream" and "bitplane" (few tokens), "stripe" (more), "tile" and on sm_90a "wgmma", "int8" and "half"
    (many); bitplane, wgmma and int8 take quantized activations only, stripe and half others only, and bitplane alone
    weights of bit-planes. ``early``: stream, bitplane and stripe may fetch weights before the previous kernel has ended
    (sm_90); it must not have written them. ``a_bits`` of the levels: tile multiplies 4 and less as such before sm_90.
    """
    tiles, scale, row_sum, locks = weight.tensors
    (act_scale, act_zero), rows, inputs = activation or (None, None), weight.outputs, weight.inputs
    tokens = len(x) if act_scale is None else act_scale.numel()
    if act_scale is None or kernel == "bitplane":
        a_bits = 16 if act_scale is None else x.shape[1] * 8 // inputs
    early = early and kernel in ("stream", "bitplane", "stripe")
    plan = plan or usual_plan(kernel, tokens, rows, inputs, weight.w_bits, a_bits, cuda.multiprocessors(x))
    if kernel == "half" and activation is None:
        ordered = x.new_empty(inputs // 64, -(-tokens // 8), 8, 64)
        cuda.call("token_layout", x, ordered, *x.shape, on=x)  # beside which weights may be fetched
        x, early = ordered, True
    y = scale.new_empty(tokens, rows)
    partial = _partial(kernel, plan, tokens, weight) if plan.splits > 1 else None
    cuda.call(
        f"lowbit_{kernel}", tiles, scale, x, act_scale, act_zero, row_sum, y, partial, locks, tokens, rows, inputs,
        weight.w_bits, DTYPES[scale.dtype], *plan[:3], early, a_bits, plan.cluster, on=x,
    )  # fmt: skip
    return y


def _partial(kernel: str, plan: Plan, tokens: int, weight: LowbitWeight) -> Tensor:
    """Room for the blocks' shares of y."""
    shares, rows = plan.splits, weight.outputs
    if kernel == "stripe":  # as threads hold them, of whole blocks
        shares = stripe_shares(rows, weight.inputs, shares)
        width = 8 * plan.token_tiles
        rows, tokens = -(-rows // STRIPE_ROWS) * STRIPE_ROWS, -(-tokens // width) * width
    return weight.tensors[1].new_empty(shares, tokens, rows, dtype=torch.float32)


def dense(weight: LowbitWeight) -> Tensor:
    """q * scale as [O, I], rounded once to the scales' dtype."""
    tiles, scale, *_ = weight.tensors
    out = torch.empty(weight.outputs, weight.inputs, dtype=scale.dtype, device=scale.device)
    cuda.call("lowbit_dequant", tiles, scale, out, *out.shape, weight.w_bits, DTYPES[scale.dtype], on=out)
    return out


def product(
    kernel: str, x: Tensor, weight: LowbitWeight, a_bits: int, symmetric: bool = False, plan: Plan | None = None
) -> Tensor:
    """y [M, O] in the scales' dtype of x [M, I], quantized first if ``a_bits`` < 16.

    ``kernel``: one of `multiply`, or "dense": the library's product with the dequantised weight.
    """
    if kernel == "dense":
        with without_autocast(x):
            return x @ dense(weight).t()
    if a_bits == 16:
        return multiply(kernel, x, weight, None, plan)
    a, *activation = quantize_pack(x, a_bits, symmetric, ACT_LAYOUTS[kernel])
    return multiply(kernel, a, weight, activation, plan, a_bits=a_bits)
