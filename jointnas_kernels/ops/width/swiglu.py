"""masked_swiglu: the MLP's gate, with the intermediate OUT mask and down_proj's IN mask folded in.

Backward, with a = r * gate, v = r * up, s = sigmoid(a), f = a s, f' = s (1 + a (1 - s)) and g = dL/dout:

    dgate = g c v f' r      dup = g c f r
    dc = sum g f v          dr = sum g c (v f' gate + f up)    (sums over rows; only when asked for)

Nothing but gate and up is saved: the backward recomputes the sigmoid.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core import cpu
from jointnas_kernels.ops.core.arrival import counters, last_to_arrive, sum_columns
from jointnas_kernels.ops.core.columns import STAGES, partial_sums, row_tiles, strip, tile, total_of
from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import bad, compute_dtype, dense_like, in_dtype_of, processors, rows

Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # dgate, dup, dr, dc


def _reference(gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor) -> Tensor:
    acc = compute_dtype(gate.dtype)
    r, c = out_mask.to(acc), in_mask.to(acc)
    return (torch.nn.functional.silu(r * gate.to(acc)) * (r * up.to(acc)) * c).to(gate.dtype)


def _reference_backward(
    grad: Tensor, gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, need: Sequence[bool]
) -> Gradients:
    acc = compute_dtype(gate.dtype)
    g, x, u, r, c = grad.to(acc), gate.to(acc), up.to(acc), out_mask.to(acc), in_mask.to(acc)
    a, v = r * x, r * u
    s = torch.sigmoid(a)
    f, slope = a * s, s * (1 + a * (1 - s))
    gc = g * c
    dgate, dup = (gc * v * slope * r).to(gate.dtype), (gc * f * r).to(up.dtype)
    dr = rows(gc * (v * slope * x + f * u)).sum(0).to(out_mask.dtype) if need[2] else None
    dc = rows(g * f * v).sum(0).to(in_mask.dtype) if need[3] else None
    return dgate, dup, dr, dc


@triton.jit
def swiglu_forward_kernel(
    gate_ptr, up_ptr, r_ptr, c_ptr, out_ptr, count, width, column_blocks, gate_stride, up_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of silu(r * gate) * (r * up) * c."""
    row, col, ok = tile(count, width, column_blocks, BLOCK_M, BLOCK_N)
    r = tl.load(r_ptr + col, mask=col < width, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_N]
    c = tl.load(c_ptr + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    a = r * tl.load(gate_ptr + row[:, None] * gate_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
    v = r * tl.load(up_ptr + row[:, None] * up_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + row[:, None] * width + col[None, :], a / (1.0 + tl.exp(-a)) * v * c, mask=ok)


@triton.jit
def swiglu_backward_kernel(
    g_ptr, gate_ptr, up_ptr, r_ptr, c_ptr, dgate_ptr, dup_ptr, dr_part_ptr, dc_part_ptr, dr_ptr, dc_ptr, counter_ptr,
    count, width, column_blocks, per_program, g_stride, gate_stride, up_stride,
    NEED_OUT: tl.constexpr, NEED_IN: tl.constexpr, LOOP_STAGES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dgate, dup; with the flags also the column sums dr (NEED_OUT) and dc (NEED_IN): each program's, and their sum by
    the last of those with the same columns."""
    chunk, start, last, col, col_ok = strip(count, width, column_blocks, per_program, BLOCK_N)
    r = tl.load(r_ptr + col, mask=col_ok, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_N]
    c = tl.load(c_ptr + col, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    dr = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(start, last, BLOCK_M, num_stages=LOOP_STAGES):
        row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        ok = (row < count)[:, None] & col_ok[None, :]
        g = tl.load(g_ptr + row[:, None] * g_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
        x = tl.load(gate_ptr + row[:, None] * gate_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
        u = tl.load(up_ptr + row[:, None] * up_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
        a = r * x
        s = 1.0 / (1.0 + tl.exp(-a))
        f = a * s
        slope = s + f * (1.0 - s)
        v = r * u
        gc = g * c
        at = row[:, None] * width + col[None, :]
        tl.store(dgate_ptr + at, gc * v * slope * r, mask=ok)
        tl.store(dup_ptr + at, gc * f * r, mask=ok)
        if NEED_OUT:
            dr += gc * (v * slope * x + f * u)
        if NEED_IN:
            dc += g * f * v
    if NEED_OUT:
        tl.store(dr_part_ptr + chunk * width + col, tl.sum(dr, axis=0), mask=col_ok)
    if NEED_IN:
        tl.store(dc_part_ptr + chunk * width + col, tl.sum(dc, axis=0), mask=col_ok)
    if NEED_OUT or NEED_IN:
        chunks = tl.num_programs(0) // column_blocks
        if last_to_arrive(counter_ptr + tl.program_id(0) % column_blocks, chunks):
            if NEED_OUT:
                sum_columns(dr_part_ptr, dr_ptr, chunks, width, col, col_ok, BLOCK_N)
            if NEED_IN:
                sum_columns(dc_part_ptr, dc_ptr, chunks, width, col, col_ok, BLOCK_N)


def _launch(gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor) -> Tensor:
    x, u, out_mask, in_mask = rows(gate), rows(up), out_mask.contiguous(), in_mask.contiguous()
    count, width = x.shape
    out = dense_like(gate)
    grid, column_blocks, _, block_m, block_n = row_tiles(count, width, False, processors(gate))
    if grid > 0:
        with torch.cuda.device_of(gate):
            swiglu_forward_kernel[(grid,)](
                x, u, out_mask, in_mask, out, count, width, column_blocks, x.stride(0), u.stride(0),
                BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8,
            )  # fmt: skip
    return out


def _launch_backward(
    grad: Tensor, gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, need: Sequence[bool]
) -> Gradients:
    g, x, u = rows(grad), rows(gate), rows(up)
    out_mask, in_mask = out_mask.contiguous(), in_mask.contiguous()
    count, width = x.shape
    dgate, dup, (_, _, need_out, need_in) = dense_like(gate), dense_like(gate), need
    reduce = need_out or need_in
    grid, column_blocks, per_program, block_m, block_n = row_tiles(count, width, reduce, processors(gate))
    parts = [partial_sums(n, grid // column_blocks, width, gate.device) for n in (need_out, need_in)]
    dr, dc = map(total_of, parts)
    if grid > 0:
        with torch.cuda.device_of(gate):
            swiglu_backward_kernel[(grid,)](
                g, x, u, out_mask, in_mask, dgate, dup, *parts, dr, dc, counters(g, column_blocks) if reduce else None,
                count, width, column_blocks, per_program, g.stride(0), x.stride(0), u.stride(0), NEED_OUT=need_out,
                NEED_IN=need_in, LOOP_STAGES=STAGES if reduce else 1, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8,
            )  # fmt: skip
    return dgate, dup, in_dtype_of(dr, out_mask), in_dtype_of(dc, in_mask)


def _cpu(gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = cpu.empty_like(gate)
    cpu.call("masked_swiglu", gate, up, cpu.vector(out_mask), cpu.vector(in_mask), out, *cpu.chunking(gate)[:3],
             cpu.DTYPES[gate.dtype])
    return out


def _cpu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, need: Sequence[bool]
) -> Gradients:
    g, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    count, width, per_chunk, chunks = cpu.chunking(g, need[2] or need[3])
    dgate, dup = cpu.empty_like(g), cpu.empty_like(g)
    dr, dc = cpu.partial_sums(need[2], chunks, width), cpu.partial_sums(need[3], chunks, width)
    cpu.call("masked_swiglu_backward", g, gate, up, cpu.vector(out_mask), cpu.vector(in_mask), dgate, dup, dr, dc,
             count, width, per_chunk, cpu.DTYPES[g.dtype])
    return dgate, dup, cpu.total(dr, out_mask), cpu.total(dc, in_mask)


_op = Op(
    "masked_swiglu",
    {"triton": _launch, "cpu": _cpu, "reference": _reference},
    {"triton": _launch_backward, "cpu": _cpu_backward, "reference": _reference_backward},
)


def masked_swiglu(gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, backend: str | None = None) -> Tensor:
    """The gate of an MLP with masked neurons, silu(r * gate) * (r * up) * c along the last dim.

    Args:
        gate, up: [..., I] in any floating dtype, both alike.
        out_mask, in_mask: r and c, [I], fp32: the OUT mask of gate_proj and up_proj, the IN mask of down_proj.
        backend: "triton", "cpu" or "reference"; None: by device and dtype.

    Returns:
        [..., I] in the dtype of gate; computed in fp32 (fp64 for fp64) and rounded once. Gradients to all four.

    Raises:
        JointNASError: shapes or dtypes that do not fit, or a backend that cannot run.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise bad("masked_swiglu", f"gate {gate.dtype} {tuple(gate.shape)} and up {up.dtype} {tuple(up.shape)} differ")
    for name, mask in (("out_mask", out_mask), ("in_mask", in_mask)):
        if mask.shape != gate.shape[-1:]:
            raise bad("masked_swiglu", f"{name} {tuple(mask.shape)} does not match gate {tuple(gate.shape)}")
    return _op(gate, up, out_mask, in_mask, backend)
