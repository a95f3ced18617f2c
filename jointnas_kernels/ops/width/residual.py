"""gated_residual: the residual add, with the hidden OUT mask and the depth gate folded in.

The gated form gate * z + (1 - gate) * x equals x + gate * (z - x) but is exact at gate = 0 and 1, so a kept block is
the plain block and a skipped one the identity, bit for bit. Backward, with g = dL/dout:

    dh = gate g    dy = gate m g    dx = (1 - gate) g    dm = sum over rows of gate g y    dgate = sum g (z - x)

Without a gate dh is g itself, and dy and dm are those of channel_mask: an op of its own (masked_residual). Arch steps
need the activations for dm and dgate; weight steps keep nothing but the vectors.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core import cpu
from jointnas_kernels.ops.core.arrival import counters, last_to_arrive, sum_columns
from jointnas_kernels.ops.core.backends import resolve
from jointnas_kernels.ops.core.columns import STAGES, partial_sums, row_tiles, strip, tile, total_of
from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import bad, compute_dtype, dense, dense_like, in_dtype_of, processors, rows
from jointnas_kernels.ops.width import channel

Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]  # dh, dy, dmask, dgate, dx


def _sum(h: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    acc = compute_dtype(h.dtype)
    return h.to(acc) + (y.to(acc) if mask is None else mask.to(acc) * y.to(acc))


def _reference(h: Tensor, y: Tensor, mask: Tensor | None, gate: Tensor, x: Tensor) -> Tensor:
    z = _sum(h, y, mask)
    k = gate.to(z.dtype)
    return (k * z + (1 - k) * x.to(z.dtype)).to(h.dtype)


def _reference_backward(
    grad: Tensor, h: Tensor | None, y: Tensor | None, mask: Tensor | None, gate: Tensor, x: Tensor | None,
    need: Sequence[bool],
) -> Gradients:  # fmt: skip
    acc = compute_dtype(grad.dtype)
    g, k = grad.to(acc), gate.to(acc)
    dh, dx = (k * g).to(grad.dtype), ((1 - k) * g).to(grad.dtype)
    dy = dh if mask is None else (k * g * mask.to(acc)).to(grad.dtype)
    dmask = dgate = None
    if need[2] and mask is not None and y is not None:
        dmask = rows(k * g * y.to(acc)).sum(0).to(mask.dtype)
    if need[3] and h is not None and y is not None and x is not None:
        dgate = (g * (_sum(h, y, mask) - x.to(acc))).sum().to(gate.dtype)
    return dh, dy, dmask, dgate, dx


def _reference_masked(h: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return _sum(h, y, mask).to(h.dtype)


@triton.jit
def residual_forward_kernel(
    h_ptr, y_ptr, mask_ptr, gate_ptr, x_ptr, out_ptr, count, width, column_blocks, h_stride, y_stride, x_stride,
    HAS_MASK: tl.constexpr, HAS_GATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of the blend, or of the sum."""
    row, col, ok = tile(count, width, column_blocks, BLOCK_M, BLOCK_N)
    z = tl.load(y_ptr + row[:, None] * y_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
    if HAS_MASK:
        z *= tl.load(mask_ptr + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    z += tl.load(h_ptr + row[:, None] * h_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
    if HAS_GATE:
        gate = tl.load(gate_ptr).to(tl.float32)
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
        z = gate * z + (1.0 - gate) * x
    tl.store(out_ptr + row[:, None] * width + col[None, :], z, mask=ok)


@triton.jit
def residual_backward_kernel(
    g_ptr, h_ptr, y_ptr, mask_ptr, gate_ptr, x_ptr, dh_ptr, dy_ptr, dx_ptr, mask_part_ptr, gate_part_ptr, dmask_ptr,
    dgate_ptr, counter_ptr, count, width, column_blocks, per_program, g_stride, h_stride, y_stride, x_stride,
    HAS_MASK: tl.constexpr, NEED_MASK: tl.constexpr, NEED_GATE: tl.constexpr, LOOP_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dh, dx and (HAS_MASK) dy; with the flags also dmask and dgate: each program's column sums and its share, and
    their sums by the last of those with the same columns, and by the last of all."""
    chunk, start, last, col, col_ok = strip(count, width, column_blocks, per_program, BLOCK_N)
    gate = tl.load(gate_ptr).to(tl.float32)
    mask = tl.full([1, BLOCK_N], 1.0, tl.float32)
    if HAS_MASK:
        mask = tl.load(mask_ptr + col, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    dmask = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dgate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(start, last, BLOCK_M, num_stages=LOOP_STAGES):
        row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        ok = (row < count)[:, None] & col_ok[None, :]
        at = row[:, None] * width + col[None, :]
        g = tl.load(g_ptr + row[:, None] * g_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
        tl.store(dh_ptr + at, gate * g, mask=ok)
        tl.store(dx_ptr + at, (1.0 - gate) * g, mask=ok)
        if HAS_MASK:
            tl.store(dy_ptr + at, gate * g * mask, mask=ok)
        if NEED_MASK or NEED_GATE:
            y = tl.load(y_ptr + row[:, None] * y_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
            if NEED_MASK:
                dmask += gate * g * y
            if NEED_GATE:
                h = tl.load(h_ptr + row[:, None] * h_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
                x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
                dgate += g * (h + mask * y - x)
    if NEED_MASK:
        tl.store(mask_part_ptr + chunk * width + col, tl.sum(dmask, axis=0), mask=col_ok)
        chunks = tl.num_programs(0) // column_blocks
        if last_to_arrive(counter_ptr + 1 + tl.program_id(0) % column_blocks, chunks):
            sum_columns(mask_part_ptr, dmask_ptr, chunks, width, col, col_ok, BLOCK_N)
    if NEED_GATE:
        tl.store(gate_part_ptr + tl.program_id(0), tl.sum(tl.sum(dgate, axis=1), axis=0))
        if last_to_arrive(counter_ptr, tl.num_programs(0)):
            one = tl.arange(0, 16)
            sum_columns(gate_part_ptr, dgate_ptr, tl.num_programs(0), 1, one, one < 1, 16, 128)


def _launch(h: Tensor, y: Tensor, mask: Tensor | None, gate: Tensor | None = None, x: Tensor | None = None) -> Tensor:
    h2, y2, x2, mask = rows(h), rows(y), None if x is None else rows(x), dense(mask)
    count, width = h2.shape
    out = dense_like(h)
    grid, column_blocks, _, block_m, block_n = row_tiles(count, width, False, processors(h))
    if grid > 0:
        with torch.cuda.device_of(h):
            residual_forward_kernel[(grid,)](
                h2, y2, mask, gate, x2, out, count, width, column_blocks, h2.stride(0), y2.stride(0),
                0 if x2 is None else x2.stride(0), HAS_MASK=mask is not None, HAS_GATE=gate is not None,
                BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8,
            )  # fmt: skip
    return out


def _launch_backward(
    grad: Tensor, h: Tensor | None, y: Tensor | None, mask: Tensor | None, gate: Tensor, x: Tensor | None,
    need: Sequence[bool],
) -> Gradients:  # fmt: skip
    g, mask = rows(grad), dense(mask)
    h2, y2, x2 = (g if t is None else rows(t) for t in (h, y, x))  # absent ones are not read
    count, width = g.shape
    dh, dx = dense_like(grad), dense_like(grad)
    dy = dh if mask is None else dense_like(grad)
    need_mask, need_gate = need[2] and mask is not None, need[3]
    reduce = need_mask or need_gate
    grid, column_blocks, per_program, block_m, block_n = row_tiles(count, width, reduce, processors(grad))
    parts = partial_sums(need_mask, grid // column_blocks, width, g.device), partial_sums(need_gate, grid, 1, g.device)
    of_mask, of_gate = map(total_of, parts)
    if grid > 0:
        with torch.cuda.device_of(grad):
            residual_backward_kernel[(grid,)](
                g, h2, y2, mask, gate, x2, dh, dy, dx, *parts, of_mask, of_gate,
                counters(g, 1 + column_blocks) if reduce else None, count, width, column_blocks, per_program,
                g.stride(0), h2.stride(0), y2.stride(0), x2.stride(0), HAS_MASK=mask is not None,
                NEED_MASK=need_mask, NEED_GATE=need_gate, LOOP_STAGES=STAGES if reduce else 1,
                BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8,
            )  # fmt: skip
    return dh, dy, in_dtype_of(of_mask, mask), in_dtype_of(of_gate, gate), dx


def _cpu(h: Tensor, y: Tensor, mask: Tensor | None, gate: Tensor | None = None, x: Tensor | None = None) -> Tensor:
    h, y, x = h.contiguous(), y.contiguous(), dense(x)
    out = cpu.empty_like(h)
    cpu.call("gated_residual", h, y, cpu.optional(mask), cpu.optional(gate), x, out, *cpu.chunking(h)[:3],
             cpu.DTYPES[h.dtype])
    return out


def _cpu_backward(
    grad: Tensor, h: Tensor | None, y: Tensor | None, mask: Tensor | None, gate: Tensor, x: Tensor | None,
    need: Sequence[bool],
) -> Gradients:  # fmt: skip
    g, h, y, x = grad.contiguous(), dense(h), dense(y), dense(x)
    need_mask = need[2] and mask is not None
    count, width, per_chunk, chunks = cpu.chunking(g, need_mask)
    dh, dx, dy = cpu.empty_like(g), cpu.empty_like(g), None if mask is None else cpu.empty_like(g)
    dmask, dgate = cpu.partial_sums(need_mask, chunks, width), cpu.partial_sums(need[3], chunks)
    cpu.call("gated_residual_backward", g, h, y, cpu.optional(mask), cpu.vector(gate), x, dh, dy, dx, dmask, dgate,
             count, width, per_chunk, cpu.DTYPES[g.dtype])
    return dh, dh if dy is None else dy, cpu.total(dmask, mask), cpu.total(dgate, gate), dx


_gated = Op(
    "gated_residual",
    {"triton": _launch, "cpu": _cpu, "reference": _reference},
    {"triton": _launch_backward, "cpu": _cpu_backward, "reference": _reference_backward},
    read_for={"h": ("gate",), "y": ("mask", "gate"), "x": ("gate",)},
)
FORWARD = {"triton": _launch, "cpu": _cpu, "reference": _reference_masked}  # without a gate; also of residual_rmsnorm
_masked = Op(
    "masked_residual",
    FORWARD,
    {how: lambda g, h, y, mask, need, of=of: of(g, y, mask, need) for how, of in channel.BACKWARD.items()},
    identity=("h",),
    read_for={"h": (), "y": ("mask",)},
    public="gated_residual",
)


def gated_residual(
    h: Tensor, y: Tensor, mask: Tensor | None = None, gate: Tensor | None = None, x: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """z = h + mask * y, or with a gate its blend with the block's input, gate * z + (1 - gate) * x.

    Args:
        h, y: [..., N] in any floating dtype, both alike: what is added to, and what attention or the MLP made.
        mask: [N], fp32: the hidden size's OUT mask; None: all ones.
        gate: 0-dim, fp32: how much of the block is kept. Comes with x.
        x: like h: the block's input.
        backend: "triton", "cpu" or "reference"; None: by device and dtype.

    Returns:
        [..., N] in the dtype of h; computed in fp32 (fp64 for fp64) and rounded once. Gradients to all tensors.

    Raises:
        JointNASError: shapes or dtypes that do not fit, a gate without x, or a backend that cannot run.
    """
    if h.shape != y.shape or h.dtype != y.dtype:
        raise bad("gated_residual", f"h {h.dtype} {tuple(h.shape)} and y {y.dtype} {tuple(y.shape)} differ")
    if mask is not None and mask.shape != h.shape[-1:]:
        raise bad("gated_residual", f"mask does not match h {tuple(h.shape)}: it must be [{h.shape[-1]}]")
    if (gate is None) != (x is None):
        raise bad("gated_residual", "gate and x go together: give both or neither")
    if gate is not None and x is not None:
        if gate.dim() != 0:
            raise bad("gated_residual", f"gate must be a 0-dim tensor, got {tuple(gate.shape)}")
        if x.shape != h.shape or x.dtype != h.dtype:
            raise bad("gated_residual", f"x {x.dtype} {tuple(x.shape)} and h {h.dtype} {tuple(h.shape)} differ")
        return _gated(h, y, mask, gate, x, backend)
    if mask is not None:
        return _masked(h, y, mask, backend)
    resolve("gated_residual", backend, h)  # torch does it on every backend; one that cannot run is still an error
    return (h + y).contiguous()
