"""The last program of a launch to finish adds up what the others left: one launch instead of two, and results that
repeat bit for bit, because the sums are taken in one order whichever program is last.

Counters of arrivals are 0 between launches: the last program sets its own back. Launches that share them must not
overlap, so every stream has its own, and what is captured in graphs others.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTERS = 1 << 16  # 256 KB


@triton.jit
def last_to_arrive(counter_ptr, programs):
    """Whether all others of so many programs have arrived here; what they stored before is then visible."""
    tl.debug_barrier()  # the atomic is one thread's: it must not overtake the stores of the others
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def sum_columns(part_ptr, out_ptr, programs, width, col, col_ok, BLOCK_N: tl.constexpr, ROWS: tl.constexpr = 16):
    """Sums over the first axis of partial sums [programs, width], of BLOCK_N columns, by the last program to arrive.
    ROWS are in flight, 0.8 us for as many: five loads for the 66 programs of some columns, and as many with 128 for the
    528 of all, of which there are few columns."""
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for first in range(0, programs, ROWS):
        row = first + tl.arange(0, ROWS)
        at = part_ptr + row[:, None] * width + col[None, :]
        ok = (row < programs)[:, None] & col_ok[None, :]
        total += tl.load(at, mask=ok, other=0.0, cache_modifier=".cg")
    tl.store(out_ptr + col, tl.sum(total, axis=0), mask=col_ok)


@functools.lru_cache(maxsize=64)
def _counters(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def counters(on: Tensor, needed: int) -> Tensor:
    """Zeros for a launch on the current stream of a tensor's device; valid for that launch."""
    if needed > COUNTERS:
        return torch.zeros(needed, dtype=torch.int32, device=on.device)
    if not on.is_cuda:
        return _counters(on.device, 0)
    captured = _counters(on.device, -1)  # made by the first launch, which is none of a capture
    if torch.cuda.is_current_stream_capturing():
        return captured
    return _counters(on.device, torch.cuda.current_stream(on.device).cuda_stream)
