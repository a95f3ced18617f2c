"""What the elementwise kernels share: launch shapes over [rows, width], and sums of their partial column sums.

A mask's gradient is a sum over all rows. Programs keep column sums of the rows they walk down and write them out,
[programs, width] in fp32. Where some 66 programs share 512 columns the last of them adds those up (arrival.py). Where a
program holds whole rows (norms, rope: 2 to 5 MB of partial sums, 20 us for one multiprocessor, predicted) one small
launch does. The order is fixed either way, so results repeat bit for bit.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core.tensors import power_of_two

STAGES = 3  # rows in flight per program where it walks down rows: cp.async hides the ~1 us a load takes


@functools.lru_cache(maxsize=1024)
def row_tiles(count: int, width: int, reduce: bool, units: int) -> tuple[int, int, int, int, int]:
    """Launch shape of an elementwise kernel over [count, width] on so many processors: (grid, column blocks, rows per
    program, BLOCK_M, BLOCK_N), for a 1-D grid in which consecutive programs take consecutive column blocks.

    8 x 1024 elements keep the fp32 mask vectors at 1/4 of the bytes read; fewer rows when that leaves processors idle.
    With ``reduce`` a program walks down many rows, 4 x 512 elements at a time (registers for four programs per
    processor), so that the partial column sums stay a few percent of the data.
    """
    block_n = min(512 if reduce else 1024, power_of_two(width))
    column_blocks = -(-width // block_n)
    block_m = 4 if reduce else 8
    while block_m > 1 and -(-count // block_m) * column_blocks < 2 * units:
        block_m //= 2
    per_program = block_m
    if reduce:
        chunks = max(1, min(-(-count // block_m), 4 * units // column_blocks))
        per_program = max(1, -(-count // (chunks * block_m))) * block_m  # of no rows: an empty grid, whose sums are 0
    grid = -(-count // per_program) * column_blocks
    return grid, column_blocks, per_program, block_m, block_n


@triton.jit
def tile(count, width, column_blocks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(rows, columns, which elements exist) of this program's tile."""
    pid = tl.program_id(0)
    row = ((pid // column_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    col = (pid % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    return row, col, (row < count)[:, None] & (col < width)[None, :]


@triton.jit
def strip(count, width, column_blocks, per_program, BLOCK_N: tl.constexpr):
    """(number, first and last row, columns, which columns exist) of the rows that this program walks down."""
    pid = tl.program_id(0)
    chunk = pid // column_blocks
    col = (pid % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    return chunk, chunk * per_program, min((chunk + 1) * per_program, count), col, col < width


@triton.jit
def _sum_rows(
    part_ptr, scale_ptr, out_ptr, count, width, block, HAS_SCALE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    col = block * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, count, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        ok = (row < count)[:, None] & (col < width)[None, :]
        total += tl.load(part_ptr + row[:, None] * width + col[None, :], mask=ok, other=0.0)  # [BLOCK_M, BLOCK_N]
    out = tl.sum(total, axis=0)
    if HAS_SCALE:
        out *= tl.load(scale_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + col, out, mask=col < width)


@triton.jit
def column_sums_kernel(
    a_ptr, scale_ptr, a_out_ptr, a_count, a_width, a_blocks, b_ptr, b_out_ptr, b_count, b_width,
    HAS_SCALE: tl.constexpr, HAS_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """scale * column sums of a; the programs past a's blocks do b's."""
    pid = tl.program_id(0)
    if pid < a_blocks:
        _sum_rows(a_ptr, scale_ptr, a_out_ptr, a_count, a_width, pid, HAS_SCALE, BLOCK_M, BLOCK_N)
    elif HAS_B:
        _sum_rows(b_ptr, None, b_out_ptr, b_count, b_width, pid - a_blocks, False, BLOCK_M, BLOCK_N)


def column_sums(
    a: Tensor | None, b: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """scale * a.sum(0), b.sum(0) of contiguous fp32 partial sums [programs, width], in one launch; None of None."""
    if a is None:
        return (None, None) if b is None else column_sums(b)[::-1]
    block_n = 32
    a_out = torch.empty(a.shape[1], dtype=torch.float32, device=a.device)
    b_out = None if b is None else torch.empty(b.shape[1], dtype=torch.float32, device=a.device)
    a_blocks = -(-a.shape[1] // block_n)
    b_blocks = 0 if b is None else -(-b.shape[1] // block_n)
    with torch.cuda.device_of(a):
        column_sums_kernel[(a_blocks + b_blocks,)](
            a, scale, a_out, a.shape[0], a.shape[1], a_blocks, b, b_out, 0 if b is None else b.shape[0],
            0 if b is None else b.shape[1], HAS_SCALE=scale is not None, HAS_B=b is not None, BLOCK_M=128,
            BLOCK_N=block_n, num_warps=8,
        )  # fmt: skip
    return a_out, b_out


def total_of(partial: Tensor | None) -> Tensor | None:
    """Room for the sum of partial sums, which the kernel adds up; zeros of no programs; None of None."""
    if partial is None:
        return None
    return partial.new_empty(partial.shape[1]) if len(partial) else partial.new_zeros(partial.shape[1])


def partial_sums(need: bool, programs: int, width: int, device: torch.device) -> Tensor | None:
    """Room for the partial column sums of so many programs."""
    return torch.empty(programs, width, dtype=torch.float32, device=device) if need else None
