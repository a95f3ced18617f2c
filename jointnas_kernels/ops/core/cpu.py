"""Calling the compiled CPU kernels (csrc/cpu), torch tensors in and out.

Each op has a function with the arguments and results of its reference that makes tensors dense, allocates the results
and passes addresses and sizes. Shapes were checked by the op; tensors are float32 or bfloat16, vectors become float32.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels._ext import check, load

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ISAS = ("the best of this processor", "scalar", "AVX2", "AVX-VNNI", "AVX-512", "AVX-512 with the kernel's extension",
        "AMX")
HUGE_FROM = 4 << 20  # bytes; glibc serves smaller blocks from memory that is already mapped


def call(name: str, *args: Tensor | array[int] | float | None, threads: int | None = None, isa: int = 0) -> None:
    """``_C.cpu_NAME(args..., threads, isa)``; tensors and arrays become addresses, None null, bool int. Results do not
    depend on ``threads``, torch's number by default; ``isa``, an index into ISAS, forces an instruction set."""
    # plain numbers first: of a product that takes 150 us, every microsecond here is visible
    values = [
        a if type(a) in (int, float, bool)
        else a.data_ptr() if isinstance(a, Tensor)
        else a.buffer_info()[0] if isinstance(a, array)
        else int(a or 0)
        for a in args
    ]  # fmt: skip
    code = getattr(load(), f"cpu_{name}")(*values, threads or torch.get_num_threads(), isa)
    if code:
        check(code, f"CPU kernel {name!r} with {ISAS[isa]}")


def empty_like(tensor: Tensor, rows: int | None = None) -> Tensor:
    """A dense result like ``tensor``, or with so many rows; large ones on huge pages (csrc/cpu/memory.cpp says why)."""
    shape = tensor.shape if rows is None else (rows, *tensor.shape[1:])
    out = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    size = out.numel() * out.element_size()
    if size >= HUGE_FROM:
        load().cpu_huge_pages(out.data_ptr(), size)
    return out


def floats(*shape: int) -> Tensor:
    """An fp32 array, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def integers(values: Sequence[int], wide: bool = False) -> array[int]:
    """int32 for a kernel to read, or int64; a tensor would cost 3 us."""
    return array("q" if wide else "i", values)


def vector(tensor: Tensor) -> Tensor:
    """A dense fp32 view or copy."""
    if tensor.dtype == torch.float32 and tensor.is_contiguous():  # saves three calls, 1 us
        return tensor
    return tensor.detach().to(torch.float32).contiguous()


def optional(tensor: Tensor | None) -> Tensor | None:
    """`vector` of what may be absent."""
    return None if tensor is None else vector(tensor)


def chunking(tensor: Tensor, reduces: bool = False, last: int = 1) -> tuple[int, int, int, int]:
    """(rows, width, rows per chunk, chunks) of a tensor whose ``last`` dimensions make up the width.

    Chunks have about 32k elements each; with column sums there are at most 32 of them, as each has its own.
    """
    width = tensor.shape[-1] if last == 1 else tensor.shape[-last:].numel()
    rows = tensor.numel() // max(1, width)
    per_chunk = max(1, 32768 // max(1, width), -(-rows // 32) if reduces else 1)
    return rows, width, per_chunk, -(-rows // per_chunk)


def partial_sums(need: bool, chunks: int, *shape: int) -> Tensor | None:
    """Room for the sums of each chunk, if they are wanted."""
    return floats(chunks, *shape) if need else None


def total(partial: Tensor | None, like: Tensor | None) -> Tensor | None:
    """The sum over chunks in the dtype of ``like``; None of None."""
    return None if partial is None or like is None else partial.sum(0).to(like.dtype)
