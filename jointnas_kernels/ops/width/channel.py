"""channel_mask: a mask where no other elementwise kernel runs next to it.

Used for the attention output (V's OUT mask folded with o_proj's IN mask) and the masks of ``mixed_linear``. Backward,
with g = dL/dy:

    dx = g * mask          dmask = sum over rows of g * x   (only when asked for; x is kept only then)
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core import cpu
from jointnas_kernels.ops.core.arrival import counters, last_to_arrive, sum_columns
from jointnas_kernels.ops.core.columns import STAGES, partial_sums, row_tiles, strip, total_of
from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import bad, compute_dtype, dense_like, in_dtype_of, processors, rows

Gradients = tuple[Tensor, Tensor | None]  # dx, dmask


def _reference(x: Tensor, mask: Tensor) -> Tensor:
    acc = compute_dtype(x.dtype)
    return (x.to(acc) * mask.to(acc)).to(x.dtype)


def _reference_backward(grad: Tensor, x: Tensor | None, mask: Tensor, need: Sequence[bool]) -> Gradients:
    acc = compute_dtype(grad.dtype)
    dmask = None if x is None or not need[1] else rows(grad.to(acc) * x.to(acc)).sum(0).to(mask.dtype)
    return _reference(grad, mask), dmask


@triton.jit
def channel_mask_kernel(
    g_ptr, x_ptr, mask_ptr, out_ptr, partial_ptr, dmask_ptr, counter_ptr, count, width, column_blocks, per_program,
    g_stride, x_stride,
    REDUCE: tl.constexpr, LOOP_STAGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = g * mask; with REDUCE also the column sums of g * x: each program's, and their sum by the last of those
    with the same columns. x is read only then."""
    chunk, start, last, col, col_ok = strip(count, width, column_blocks, per_program, BLOCK_N)
    mask = tl.load(mask_ptr + col, mask=col_ok, other=0.0).to(tl.float32)  # [BLOCK_N]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(start, last, BLOCK_M, num_stages=LOOP_STAGES):
        row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        ok = (row < count)[:, None] & col_ok[None, :]
        g = tl.load(g_ptr + row[:, None] * g_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
        tl.store(out_ptr + row[:, None] * width + col[None, :], g * mask[None, :], mask=ok)
        if REDUCE:
            total += g * tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
    if REDUCE:
        tl.store(partial_ptr + chunk * width + col, tl.sum(total, axis=0), mask=col_ok)
        chunks = tl.num_programs(0) // column_blocks
        if last_to_arrive(counter_ptr + tl.program_id(0) % column_blocks, chunks):
            sum_columns(partial_ptr, dmask_ptr, chunks, width, col, col_ok, BLOCK_N)


def _launch(grad: Tensor, x: Tensor | None, mask: Tensor, need: Sequence[bool]) -> Gradients:
    g, mask, reduce = rows(grad), mask.contiguous(), need[1]
    other = rows(x) if reduce and x is not None else None
    count, width = g.shape
    dx = dense_like(grad)
    grid, column_blocks, per_program, block_m, block_n = row_tiles(count, width, reduce, processors(g))
    partial = partial_sums(reduce, grid // column_blocks, width, g.device)
    dmask = total_of(partial)
    if grid > 0:
        with torch.cuda.device_of(g):
            channel_mask_kernel[(grid,)](
                g, other, mask, dx, partial, dmask, counters(g, column_blocks) if reduce else None, count, width,
                column_blocks, per_program, g.stride(0), 0 if other is None else other.stride(0), REDUCE=reduce,
                LOOP_STAGES=STAGES if reduce else 1, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8,
            )  # fmt: skip
    return dx, in_dtype_of(dmask, mask)


def _cpu(grad: Tensor, x: Tensor | None, mask: Tensor, need: Sequence[bool]) -> Gradients:
    g, source = grad.contiguous(), x.contiguous() if need[1] and x is not None else None
    count, width, per_chunk, chunks = cpu.chunking(g, need[1])
    dx, partial = cpu.empty_like(g), cpu.partial_sums(need[1], chunks, width)
    cpu.call("channel_mask", g, source, cpu.vector(mask), dx, partial, count, width, per_chunk, cpu.DTYPES[g.dtype])
    return dx, cpu.total(partial, mask)


# of channel_mask and of ops that contain it; y of x is dx of a gradient x
FORWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "triton": lambda x, mask: _launch(x, None, mask, (True, False))[0],
    "cpu": lambda x, mask: _cpu(x, None, mask, (True, False))[0],
    "reference": _reference,
}
BACKWARD = {"triton": _launch, "cpu": _cpu, "reference": _reference_backward}
_op = Op("channel_mask", FORWARD, BACKWARD, read_for={"x": ("mask",)})


def channel_mask(x: Tensor, mask: Tensor, backend: str | None = None) -> Tensor:
    """x * mask along the last dim.

    Args:
        x: [..., N] in any floating dtype.
        mask: [N], fp32.
        backend: "triton", "cpu" or "reference"; None: by device and dtype.

    Returns:
        [..., N] in the dtype of x; computed in fp32 (fp64 for fp64) and rounded once. Gradients to x and mask.

    Raises:
        JointNASError: shapes that do not fit, or a backend that cannot run.
    """
    if mask.shape != x.shape[-1:]:
        raise bad("channel_mask", f"mask {tuple(mask.shape)} does not match x {tuple(x.shape)}")
    return _op(x, mask, backend)
