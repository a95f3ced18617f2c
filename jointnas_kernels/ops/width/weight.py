"""mixed_weight: the weight-mixing supernet's expected weight, three ways (Fig. 3 of arXiv 2606.04063).

    "loop"      sum_ij alpha_in_i alpha_out_j pad(W[:M_j, :N_i])                                  K1 K2 passes over W
    "masks"     W * sum_ij alpha_in_i alpha_out_j G_ij,  G_ij the 0/1 mask of that block          reads K1 K2 masks
    "factored"  W * (r c^T),  c_n = sum_{i: n < N_i} alpha_in_i,  r_m likewise                    one read, one write

Equal in value and in every gradient (the mask sum is rank 1). Backward, with E = dL/dout * W:

    loop, masks: D_ij = <E, G_ij>, dalpha_in_i = sum_j alpha_out_j D_ij, dalpha_out_j = sum_i alpha_in_i D_ij
    factored:    dc = E^T r, dr = E c, then prefix sums           dW = dL/dout * mask, only if W requires it

The supernet never calls this (``mixed_linear`` needs no mixed weight); it is the benchmark's subject and a check.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.errors import unknown
from jointnas_kernels.ops.core import cpu
from jointnas_kernels.ops.core.backends import resolve
from jointnas_kernels.ops.core.columns import tile
from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import bad, compute_dtype, power_of_two, processors, rows
from jointnas_kernels.ops.width.masks import membership, prefix_mask

Sizes = Sequence[int]
Gradients = tuple[Tensor | None, Tensor, Tensor]  # dW, dalpha_in, dalpha_out
IMPLS = ("factored", "masks", "loop")


def choice_masks(
    sizes_in: Sizes, sizes_out: Sizes, shape: tuple[int, int], device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """What the paper keeps in memory: G_ij for every pair of choices.

    Args:
        sizes_in, sizes_out: K1 and K2 sizes, in 1..N and 1..M.
        shape: (M, N) of the weight.
        device, dtype: of the result.

    Returns:
        [K2 K1, M, N] of zeros and ones, output choice major.

    Raises:
        JointNASError: no sizes, or one that is out of range.
    """
    lines, columns = membership(sizes_out, shape[0], device, dtype), membership(sizes_in, shape[1], device, dtype)
    return (lines.t()[:, None, :, None] * columns.t()[None, :, None, :]).reshape(-1, *shape)


def _vectors(
    alpha_in: Tensor, alpha_out: Tensor, sizes_in: Sizes, sizes_out: Sizes, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """r [M] and c [N]."""
    acc, (m, n) = compute_dtype(weight.dtype), weight.shape
    return prefix_mask(alpha_out.to(acc), sizes_out, m), prefix_mask(alpha_in.to(acc), sizes_in, n)


def _of_prefixes(d: Tensor, sizes: Sizes, like: Tensor) -> Tensor:
    """dalpha from the gradient of c or r."""
    return torch.stack([d[:size].sum() for size in sizes]).to(like.dtype)


def _of_pairs(d: Tensor, alpha_in: Tensor, alpha_out: Tensor) -> tuple[Tensor, Tensor]:
    """Both dalpha from D [K2 K1]."""
    d = d.view(len(alpha_out), len(alpha_in))
    return (d * alpha_out[:, None]).sum(0).to(alpha_in.dtype), (d * alpha_in).sum(1).to(alpha_out.dtype)


def _reference(
    weight: Tensor, alpha_in: Tensor, alpha_out: Tensor, masks: Tensor | None, sizes_in: Sizes, sizes_out: Sizes,
    impl: str,
) -> Tensor:  # fmt: skip
    """"loop" pads every block to full size as TangleNAS does."""
    acc = compute_dtype(weight.dtype)
    w, a, b = weight.to(acc), alpha_in.to(acc), alpha_out.to(acc)
    m, n = weight.shape
    if impl == "factored":
        r, c = _vectors(alpha_in, alpha_out, sizes_in, sizes_out, weight)
        return (w * r[:, None] * c).to(weight.dtype)
    mixed = torch.zeros_like(w)
    if masks is not None:
        for coefficient, mask in zip((b[:, None] * a).reshape(-1, 1, 1), masks, strict=True):
            mixed = mixed + coefficient * mask
        return (w * mixed).to(weight.dtype)
    for (j, lines), (i, columns) in product(enumerate(sizes_out), enumerate(sizes_in)):
        block = a[i] * b[j] * w[:lines, :columns]
        mixed = mixed + torch.nn.functional.pad(block, (0, n - columns, 0, m - lines))
    return mixed.to(weight.dtype)


def _reference_backward(
    grad: Tensor, weight: Tensor, alpha_in: Tensor, alpha_out: Tensor, masks: Tensor | None, sizes_in: Sizes,
    sizes_out: Sizes, impl: str, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    acc = compute_dtype(weight.dtype)
    a, b, e = alpha_in.to(acc), alpha_out.to(acc), grad.to(acc) * weight.to(acc)
    dw = _reference(grad, alpha_in, alpha_out, masks, sizes_in, sizes_out, impl) if need[0] else None
    if impl == "factored":
        r, c = _vectors(alpha_in, alpha_out, sizes_in, sizes_out, weight)
        dc, dr = (e * r[:, None]).sum(0), (e * c).sum(1)
        return dw, _of_prefixes(dc, sizes_in, alpha_in), _of_prefixes(dr, sizes_out, alpha_out)
    if masks is not None:
        sums = [(e * mask).sum() for mask in masks]
    else:
        sums = [e[:lines, :columns].sum() for lines, columns in product(sizes_out, sizes_in)]
    da, db = _of_pairs(torch.stack(sums), a, b)
    return dw, da.to(alpha_in.dtype), db.to(alpha_out.dtype)


@triton.jit
def mask_vector(alpha_ptr, index, SIZES: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """c[index] = sum_{i: index < SIZES[i]} alpha_i, [BLOCK]."""
    vector = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(K):
        vector += tl.where(index < SIZES[i], tl.load(alpha_ptr + i).to(tl.float32), 0.0)
    return vector


@triton.jit
def shares_of(value, index, SIZES: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """[KP]: sum of value [BLOCK] over index < SIZES[i]; zero for i >= K."""
    choice = tl.arange(0, KP)
    sizes = tl.zeros([KP], tl.int32)
    for i in tl.static_range(K):
        sizes = tl.where(choice == i, SIZES[i], sizes)
    return tl.sum(tl.where(index[:, None] < sizes[None, :], value[:, None], 0.0), axis=0)


@triton.jit
def factored_kernel(
    w_ptr, alpha_in_ptr, alpha_out_ptr, out_ptr, M, N, column_blocks, w_stride,
    SIZES_IN: tl.constexpr, SIZES_OUT: tl.constexpr, K_IN: tl.constexpr, K_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One read of W, one write; serves dW too (W = incoming gradient)."""
    pid = tl.program_id(0)
    row = (pid // column_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = (pid % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = (row < M)[:, None] & (col < N)[None, :]
    c = mask_vector(alpha_in_ptr, col, SIZES_IN, K_IN, BLOCK_N)
    r = mask_vector(alpha_out_ptr, row, SIZES_OUT, K_OUT, BLOCK_M)
    row64 = row.to(tl.int64)
    w = tl.load(w_ptr + row64[:, None] * w_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + row64[:, None] * N + col[None, :], w * r[:, None] * c[None, :], mask=ok)


@triton.jit
def factored_backward_kernel(
    g_ptr, w_ptr, alpha_in_ptr, alpha_out_ptr, partial_ptr, M, N, column_blocks, per_program, g_stride, w_stride,
    SIZES_IN: tl.constexpr, SIZES_OUT: tl.constexpr, K_IN: tl.constexpr, K_OUT: tl.constexpr,
    KP_IN: tl.constexpr, KP_OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """This program's share of [dalpha_in, dalpha_out], K_IN + K_OUT numbers."""
    pid = tl.program_id(0)
    chunk = pid // column_blocks
    col = (pid % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = mask_vector(alpha_in_ptr, col, SIZES_IN, K_IN, BLOCK_N)
    column = tl.zeros([BLOCK_N], tl.float32)
    lines = tl.zeros([KP_OUT], tl.float32)
    for first in range(chunk * per_program, min((chunk + 1) * per_program, M), BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        ok = (row < M)[:, None] & (col < N)[None, :]
        row64 = row.to(tl.int64)
        g = tl.load(g_ptr + row64[:, None] * g_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + row64[:, None] * w_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
        r = mask_vector(alpha_out_ptr, row, SIZES_OUT, K_OUT, BLOCK_M)
        e = g * w
        column += tl.sum(e * r[:, None], axis=0)
        lines += shares_of(tl.sum(e * c[None, :], axis=1), row, SIZES_OUT, K_OUT, KP_OUT)
    columns = shares_of(column, col, SIZES_IN, K_IN, KP_IN)
    at = partial_ptr + pid * (K_IN + K_OUT)
    tl.store(at + tl.arange(0, KP_IN), columns, mask=tl.arange(0, KP_IN) < K_IN)
    tl.store(at + K_IN + tl.arange(0, KP_OUT), lines, mask=tl.arange(0, KP_OUT) < K_OUT)


@triton.jit
def masks_kernel(
    w_ptr, g_ptr, masks_ptr, alpha_in_ptr, alpha_out_ptr, out_ptr, partial_ptr, M, N, column_blocks, w_stride,
    g_stride, K_IN: tl.constexpr, PAIRS: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Forward: W times the mixture of the PAIRS stored masks. BACKWARD: sums of g W G_p over this tile."""
    row, col, ok = tile(M, N, column_blocks, BLOCK_M, BLOCK_N)
    e = tl.load(w_ptr + row[:, None] * w_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
    if BACKWARD:
        e *= tl.load(g_ptr + row[:, None] * g_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
    at = row[:, None] * N + col[None, :]
    mixed = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for p in range(PAIRS):
        mask = tl.load(masks_ptr + tl.cast(p, tl.int64) * M * N + at, mask=ok, other=0.0).to(tl.float32)
        if BACKWARD:
            tl.store(partial_ptr + tl.program_id(0) * PAIRS + p, tl.sum(tl.sum(e * mask, axis=1), axis=0))
        else:
            a = tl.load(alpha_in_ptr + p % K_IN).to(tl.float32)
            mixed += a * tl.load(alpha_out_ptr + p // K_IN).to(tl.float32) * mask
    if not BACKWARD:
        tl.store(out_ptr + at, e * mixed, mask=ok)


@triton.jit
def loop_kernel(
    w_ptr, g_ptr, alpha_in_ptr, alpha_out_ptr, out_ptr, partial_ptr, i, j, rows, cols, N, column_blocks, w_stride,
    g_stride, BACKWARD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Forward: out[:rows, :cols] += alpha_in_i alpha_out_j W. BACKWARD: sum of g W over this tile of the block."""
    row, col, ok = tile(rows, cols, column_blocks, BLOCK_M, BLOCK_N)
    w = tl.load(w_ptr + row[:, None] * w_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
    if BACKWARD:
        g = tl.load(g_ptr + row[:, None] * g_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
        tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(g * w, axis=1), axis=0))
    else:
        at = out_ptr + row[:, None] * N + col[None, :]
        coefficient = tl.load(alpha_in_ptr + i).to(tl.float32) * tl.load(alpha_out_ptr + j).to(tl.float32)
        tl.store(at, tl.load(at, mask=ok, other=0.0) + coefficient * w, mask=ok)


def _tiles(lines: int, columns: int, block_n: int) -> tuple[int, int]:
    """(programs, column blocks) of a kernel over [lines, columns] in tiles of 8 x block_n."""
    blocks = -(-columns // block_n)
    return -(-lines // 8) * blocks, blocks


def _launch(
    weight: Tensor, alpha_in: Tensor, alpha_out: Tensor, masks: Tensor | None, sizes_in: Sizes, sizes_out: Sizes,
    impl: str,
) -> Tensor:  # fmt: skip
    w, alpha_in, alpha_out = rows(weight), alpha_in.contiguous(), alpha_out.contiguous()
    (m, n), k_in, k_out = w.shape, len(sizes_in), len(sizes_out)
    programs, blocks = _tiles(m, n, 1024)
    block = {"BLOCK_M": 8, "BLOCK_N": 1024, "num_warps": 8}
    with torch.cuda.device_of(w):
        if impl == "loop":  # K1 K2 read-modify-writes of an fp32 accumulator
            total = torch.zeros(m, n, dtype=torch.float32, device=w.device)
            for (j, lines), (i, columns) in product(enumerate(sizes_out), enumerate(sizes_in)):
                programs, blocks = _tiles(lines, columns, 1024)
                loop_kernel[(programs,)](
                    w, None, alpha_in, alpha_out, total, None, i, j, lines, columns, n, blocks, w.stride(0), 0,
                    BACKWARD=False, **block,
                )  # fmt: skip
            return total.to(weight.dtype)
        out = torch.empty(m, n, dtype=w.dtype, device=w.device)
        if masks is not None:
            masks_kernel[(programs,)](
                w, None, masks.contiguous(), alpha_in, alpha_out, out, None, m, n, blocks, w.stride(0), 0,
                K_IN=k_in, PAIRS=k_in * k_out, BACKWARD=False, **block,
            )  # fmt: skip
        else:
            factored_kernel[(programs,)](
                w, alpha_in, alpha_out, out, m, n, blocks, w.stride(0), SIZES_IN=tuple(sizes_in),
                SIZES_OUT=tuple(sizes_out), K_IN=k_in, K_OUT=k_out, **block,
            )  # fmt: skip
    return out


def _launch_backward(
    grad: Tensor, weight: Tensor, alpha_in: Tensor, alpha_out: Tensor, masks: Tensor | None, sizes_in: Sizes,
    sizes_out: Sizes, impl: str, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    dw = _launch(grad, alpha_in, alpha_out, masks, sizes_in, sizes_out, impl) if need[0] else None
    g, w, alpha_in, alpha_out = rows(grad), rows(weight), alpha_in.contiguous(), alpha_out.contiguous()
    (m, n), k_in, k_out = w.shape, len(sizes_in), len(sizes_out)
    programs, blocks = _tiles(m, n, 512)
    block = {"BLOCK_M": 8, "BLOCK_N": 512, "num_warps": 8}
    with torch.cuda.device_of(w):
        if impl == "factored":
            row_blocks = programs // blocks
            per_program = -(-row_blocks // max(1, min(row_blocks, 4 * processors(w) // blocks))) * 8
            programs = -(-m // per_program) * blocks
            of_both = w.new_empty(programs, k_in + k_out, dtype=torch.float32)
            factored_backward_kernel[(programs,)](
                g, w, alpha_in, alpha_out, of_both, m, n, blocks, per_program, g.stride(0), w.stride(0),
                SIZES_IN=tuple(sizes_in), SIZES_OUT=tuple(sizes_out), K_IN=k_in, K_OUT=k_out,
                KP_IN=power_of_two(k_in), KP_OUT=power_of_two(k_out), **block,
            )  # fmt: skip
            da, db = of_both.sum(0).split([k_in, k_out])
            return dw, da.to(alpha_in.dtype), db.to(alpha_out.dtype)
        if masks is not None:
            of_pairs = w.new_empty(programs, k_in * k_out, dtype=torch.float32)
            masks_kernel[(programs,)](
                w, g, masks.contiguous(), alpha_in, alpha_out, None, of_pairs, m, n, blocks, w.stride(0), g.stride(0),
                K_IN=k_in, PAIRS=k_in * k_out, BACKWARD=True, **block,
            )  # fmt: skip
            return dw, *_of_pairs(of_pairs.sum(0), alpha_in, alpha_out)
        sums = []
        for (j, lines), (i, columns) in product(enumerate(sizes_out), enumerate(sizes_in)):
            programs, blocks = _tiles(lines, columns, 512)
            of_pair = w.new_empty(programs, dtype=torch.float32)
            loop_kernel[(programs,)](
                w, g, alpha_in, alpha_out, None, of_pair, i, j, lines, columns, n, blocks, w.stride(0), g.stride(0),
                BACKWARD=True, **block,
            )  # fmt: skip
            sums.append(of_pair.sum())
    return dw, *_of_pairs(torch.stack(sums), alpha_in, alpha_out)


def _cpu(
    weight: Tensor, alpha_in: Tensor, alpha_out: Tensor, masks: None, sizes_in: Sizes, sizes_out: Sizes, impl: str
) -> Tensor:  # fmt: skip
    w = weight.contiguous()
    r, c = _vectors(alpha_in, alpha_out, sizes_in, sizes_out, w)
    out = cpu.empty_like(w)
    cpu.call("mixed_weight", w, r, c, out, *w.shape, cpu.DTYPES[w.dtype])
    return out


def _cpu_backward(
    grad: Tensor, weight: Tensor, alpha_in: Tensor, alpha_out: Tensor, masks: None, sizes_in: Sizes,
    sizes_out: Sizes, impl: str, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    g, w = grad.contiguous(), weight.contiguous()
    r, c = _vectors(alpha_in, alpha_out, sizes_in, sizes_out, w)
    count, width, per_chunk, chunks = cpu.chunking(w, True)
    dw, dr, partial = cpu.empty_like(w) if need[0] else None, cpu.floats(count), cpu.floats(chunks, width)
    cpu.call("mixed_weight_backward", g, w, r, c, dw, dr, partial, count, width, per_chunk, cpu.DTYPES[w.dtype])
    return dw, _of_prefixes(partial.sum(0), sizes_in, alpha_in), _of_prefixes(dr, sizes_out, alpha_out)


def _choose(weight: Tensor, *args: Any) -> str:
    """C++ exists for "factored" only: the other two are there to be compared with, and torch does them well."""
    *_, impl, backend = args
    available = ("triton", "cpu", "reference") if impl == "factored" else ("triton", "reference")
    return resolve("mixed_weight", backend, weight, available)


_op = Op(
    "mixed_weight",
    {"triton": _launch, "cpu": _cpu, "reference": _reference},
    {"triton": _launch_backward, "cpu": _cpu_backward, "reference": _reference_backward},
    frozen=("masks",),
    choose=_choose,
)


def mixed_weight(
    weight: Tensor, alpha_in: Tensor, sizes_in: Sequence[int], alpha_out: Tensor, sizes_out: Sequence[int],
    impl: str = "factored", backend: str | None = None, masks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Expected weight sum_ij alpha_in_i alpha_out_j G_ij * weight under independent input and output choices.

    G_ij is 1 in the first sizes_out[j] rows and sizes_in[i] columns (Eq. 9 of arXiv 2606.04063).

    Args:
        weight: [M, N] in any floating dtype.
        alpha_in, alpha_out: [K1] and [K2], fp32: probabilities of the choices.
        sizes_in, sizes_out: K1 sizes in 1..N and K2 in 1..M.
        impl: "factored" (default), "masks" or "loop"; equal results, different cost.
        backend: "triton", "cpu" (of "factored") or "reference"; None: by device and dtype.
        masks: for "masks", the stored ``choice_masks`` [K2 K1, M, N]; made on the fly (slow, and as large) when absent.

    Returns:
        [M, N] in the dtype of weight; computed in fp32 (fp64 for fp64). Gradients to both alphas and weight.

    Raises:
        JointNASError: an unknown impl, shapes or sizes that do not fit, or a backend that cannot run.
    """
    op = "mixed_weight"
    if impl not in IMPLS:
        raise unknown("impl", impl, IMPLS, where=op)
    if weight.dim() != 2:
        raise bad(op, f"weight must be [M, N], got {tuple(weight.shape)}")
    m, n = weight.shape
    for name, alpha, sizes, full in (("in", alpha_in, sizes_in, n), ("out", alpha_out, sizes_out, m)):
        if len(sizes) <= 0 or alpha.shape != (len(sizes),):
            raise bad(op, f"alpha_{name} {tuple(alpha.shape)} does not match {len(sizes)} sizes")
        if min(sizes) <= 0 or max(sizes) > full:
            raise bad(op, f"sizes_{name} {tuple(sizes)} must lie in 1..{full}")
    if masks is not None and (impl != "masks" or masks.shape != (len(sizes_in) * len(sizes_out), m, n)):
        raise bad(op, "masks must be choice_masks(sizes_in, sizes_out, weight.shape) and go with impl='masks'")
    if impl == "masks" and masks is None:
        masks = choice_masks(sizes_in, sizes_out, (m, n), weight.device, weight.dtype)
    return _op(weight, alpha_in, alpha_out, masks, list(sizes_in), list(sizes_out), impl, backend)
