"""mixed_weight: the weight-mixing supernet's expected weight, three ways (Fig. 3 of arXiv 2606.04063).

    W [M, N], K1 input choices (alpha_in, sizes_in), K2 output choices (alpha_out, sizes_out)
    out = sum_ij alpha_in_i alpha_out_j pad(W[:M_j, :N_i])                             "loop"      K1 K2 passes over W
        = W * sum_ij alpha_in_i alpha_out_j G_ij,  G_ij the 0/1 mask of that block     "masks"     reads K1 K2 masks
        = W * (r c^T),  c_n = sum_{i: n < N_i} alpha_in_i,  r_m likewise               "factored"  one read, one write

Equal in value and in every gradient (the mask sum is rank 1). Backward, with E = dL/dout * W:

    loop, masks: D_ij = <E, G_ij>, dalpha_in_i = sum_j alpha_out_j D_ij, dalpha_out_j = sum_i alpha_in_i D_ij
    factored:    dc = E^T r, dr = E c, then prefix sums           dW = dL/dout * mask, only if W requires it

The supernet never calls this (``mixed_linear`` needs no mixed weight); it is the benchmark's subject and a check.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.errors import unknown
from jointnas_kernels.ops.core import cpu_calls as cpu
from jointnas_kernels.ops.core.dispatch import (
    bad,
    compute_dtype,
    custom_op,
    no_grad_slot,
    power_of_two,
    processors,
    resolve,
)
from jointnas_kernels.ops.width.masks import membership

IMPLS = ("factored", "masks", "loop")


def choice_masks(
    sizes_in: Sequence[int], sizes_out: Sequence[int], shape: tuple[int, int],
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[K2 K1, M, N]: G_ij for every pair, output choice major: what the paper keeps in memory."""
    rows, cols = membership(sizes_out, shape[0], device, dtype), membership(sizes_in, shape[1], device, dtype)
    return (rows.t()[:, None, :, None] * cols.t()[None, :, None, :]).reshape(-1, *shape)


def _vectors(alpha_in: Tensor, sizes_in: Sequence[int], alpha_out: Tensor, sizes_out: Sequence[int],
             shape: torch.Size, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """c [N] and r [M]."""
    columns = membership(sizes_in, shape[1], alpha_in.device, acc) * alpha_in.to(acc)
    lines = membership(sizes_out, shape[0], alpha_out.device, acc) * alpha_out.to(acc)
    return columns.sum(-1), lines.sum(-1)


def reference(
    weight: Tensor, alpha_in: Tensor, sizes_in: Sequence[int], alpha_out: Tensor, sizes_out: Sequence[int],
    impl: str, masks: Tensor | None = None,
) -> Tensor:
    """Differentiable torch; "loop" pads every block to full size as TangleNAS does."""
    acc = compute_dtype(weight)
    w, a, b = weight.to(acc), alpha_in.to(acc), alpha_out.to(acc)
    m, n = weight.shape
    if impl == "factored":
        c, r = _vectors(alpha_in, sizes_in, alpha_out, sizes_out, weight.shape, acc)
        return (w * r[:, None] * c).to(weight.dtype)
    if impl == "masks":
        stored = choice_masks(sizes_in, sizes_out, (m, n), weight.device, weight.dtype) if masks is None else masks
        mixed = torch.zeros_like(w)
        for coefficient, mask in zip((b[:, None] * a).reshape(-1, 1, 1), stored, strict=True):
            mixed = mixed + coefficient * mask
        return (w * mixed).to(weight.dtype)
    out = torch.zeros_like(w)
    for j, rows in enumerate(sizes_out):
        for i, cols in enumerate(sizes_in):
            out = out + torch.nn.functional.pad(a[i] * b[j] * w[:rows, :cols], (0, n - cols, 0, m - rows))
    return out.to(weight.dtype)


def reference_backward(
    grad: Tensor, weight: Tensor, alpha_in: Tensor, sizes_in: Sequence[int], alpha_out: Tensor,
    sizes_out: Sequence[int], impl: str, masks: Tensor | None, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dW (empty unless asked for), dalpha_in, dalpha_out, in the way of ``impl``."""
    acc = compute_dtype(weight)
    a, b, g = alpha_in.to(acc), alpha_out.to(acc), grad.to(acc)
    dw = reference(grad, alpha_in, sizes_in, alpha_out, sizes_out, impl, masks).to(weight.dtype)
    e = g * weight.to(acc)
    if impl == "factored":
        c, r = _vectors(alpha_in, sizes_in, alpha_out, sizes_out, weight.shape, acc)
        dc, dr = (e * r[:, None]).sum(0), (e * c).sum(1)
        da = torch.stack([dc[:cols].sum() for cols in sizes_in])
        db = torch.stack([dr[:rows].sum() for rows in sizes_out])
    else:
        if impl == "masks":
            stored = masks if masks is not None else choice_masks(
                sizes_in, sizes_out, (weight.shape[0], weight.shape[1]), weight.device, weight.dtype)
            d = torch.stack([(e * mask).sum() for mask in stored]).reshape(len(sizes_out), len(sizes_in))
        else:
            d = torch.stack([e[:rows, :cols].sum() for rows in sizes_out for cols in sizes_in])
            d = d.reshape(len(sizes_out), len(sizes_in))
        da, db = (d * b[:, None]).sum(0), (d * a).sum(1)
    return dw if need_weight else no_grad_slot(weight), da.to(alpha_in.dtype), db.to(alpha_out.dtype)


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
    pid = tl.program_id(0)
    row = ((pid // column_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    col = (pid % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = (row < M)[:, None] & (col < N)[None, :]
    e = tl.load(w_ptr + row[:, None] * w_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
    if BACKWARD:
        e *= tl.load(g_ptr + row[:, None] * g_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
    at = row[:, None] * N + col[None, :]
    mixed = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for p in range(PAIRS):
        mask = tl.load(masks_ptr + tl.cast(p, tl.int64) * M * N + at, mask=ok, other=0.0).to(tl.float32)
        if BACKWARD:
            tl.store(partial_ptr + pid * PAIRS + p, tl.sum(tl.sum(e * mask, axis=1), axis=0))
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
    pid = tl.program_id(0)
    row = ((pid // column_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    col = (pid % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = (row < rows)[:, None] & (col < cols)[None, :]
    w = tl.load(w_ptr + row[:, None] * w_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
    if BACKWARD:
        g = tl.load(g_ptr + row[:, None] * g_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
        tl.store(partial_ptr + pid, tl.sum(tl.sum(g * w, axis=1), axis=0))
    else:
        at = out_ptr + row[:, None] * N + col[None, :]
        coefficient = tl.load(alpha_in_ptr + i).to(tl.float32) * tl.load(alpha_out_ptr + j).to(tl.float32)
        tl.store(at, tl.load(at, mask=ok, other=0.0) + coefficient * w, mask=ok)


def _launch_forward(
    weight: Tensor, alpha_in: Tensor, sizes_in: Sequence[int], alpha_out: Tensor, sizes_out: Sequence[int],
    impl: str, masks: Tensor | None,
) -> Tensor:
    w = weight if weight.stride(1) == 1 else weight.contiguous()
    alpha_in, alpha_out = alpha_in.contiguous(), alpha_out.contiguous()
    m, n = w.shape
    block_m, block_n = 8, 1024
    blocks = -(-n // block_n)
    grid = (-(-m // block_m) * blocks,)
    block = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 8}
    k_in, k_out = len(sizes_in), len(sizes_out)
    with torch.cuda.device_of(w):
        if impl == "loop":  # K1 K2 read-modify-writes of an fp32 accumulator
            total = torch.zeros(m, n, dtype=torch.float32, device=w.device)
            for j, rows in enumerate(sizes_out):
                for i, cols in enumerate(sizes_in):
                    blocks = -(-cols // block_n)
                    loop_kernel[(-(-rows // block_m) * blocks,)](
                        w, None, alpha_in, alpha_out, total, None, i, j, rows, cols, n, blocks, w.stride(0), 0,
                        BACKWARD=False, **block,
                    )  # fmt: skip
            return total.to(weight.dtype)
        out = torch.empty(m, n, dtype=w.dtype, device=w.device)
        if impl == "masks":
            stored = choice_masks(sizes_in, sizes_out, (m, n), w.device, w.dtype) if masks is None else masks
            masks_kernel[grid](
                w, None, stored.contiguous(), alpha_in, alpha_out, out, None, m, n, blocks, w.stride(0), 0,
                K_IN=k_in, PAIRS=k_in * k_out, BACKWARD=False, **block,
            )  # fmt: skip
        else:
            factored_kernel[grid](
                w, alpha_in, alpha_out, out, m, n, blocks, w.stride(0), SIZES_IN=tuple(sizes_in),
                SIZES_OUT=tuple(sizes_out), K_IN=k_in, K_OUT=k_out, **block,
            )  # fmt: skip
    return out


def _launch_backward(
    grad: Tensor, weight: Tensor, alpha_in: Tensor, sizes_in: Sequence[int], alpha_out: Tensor,
    sizes_out: Sequence[int], impl: str, masks: Tensor | None, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dw = no_grad_slot(weight)
    if need_weight:
        dw = _launch_forward(grad, alpha_in, sizes_in, alpha_out, sizes_out, impl, masks).to(weight.dtype)
    w = weight if weight.stride(1) == 1 else weight.contiguous()
    alpha_in, alpha_out = alpha_in.contiguous(), alpha_out.contiguous()
    g = grad if grad.stride(1) == 1 else grad.contiguous()
    m, n = w.shape
    block_m, block_n = 8, 512
    blocks, row_blocks = -(-n // block_n), -(-m // block_m)
    block = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 8}
    k_in, k_out = len(sizes_in), len(sizes_out)
    with torch.cuda.device_of(w):
        if impl == "factored":
            chunks = max(1, min(row_blocks, 4 * processors(w) // blocks))
            per_program = -(-row_blocks // chunks) * block_m
            programs = -(-m // per_program) * blocks
            shares = torch.empty(programs, k_in + k_out, dtype=torch.float32, device=w.device)
            factored_backward_kernel[(programs,)](
                g, w, alpha_in, alpha_out, shares, m, n, blocks, per_program, g.stride(0), w.stride(0),
                SIZES_IN=tuple(sizes_in), SIZES_OUT=tuple(sizes_out), K_IN=k_in, K_OUT=k_out,
                KP_IN=power_of_two(k_in), KP_OUT=power_of_two(k_out), **block,
            )  # fmt: skip
            both = shares.sum(0)
            return dw, both[:k_in].to(alpha_in.dtype, copy=True), both[k_in:].to(alpha_out.dtype, copy=True)
        if impl == "masks":
            stored = choice_masks(sizes_in, sizes_out, (m, n), w.device, w.dtype) if masks is None else masks
            shares = torch.empty(row_blocks * blocks, k_in * k_out, dtype=torch.float32, device=w.device)
            masks_kernel[(row_blocks * blocks,)](
                w, g, stored.contiguous(), alpha_in, alpha_out, None, shares, m, n, blocks, w.stride(0), g.stride(0),
                K_IN=k_in, PAIRS=k_in * k_out, BACKWARD=True, **block,
            )  # fmt: skip
            d = shares.sum(0).view(k_out, k_in)
        else:
            sums = []
            for j, rows in enumerate(sizes_out):
                for i, cols in enumerate(sizes_in):
                    blocks, row_blocks = -(-cols // block_n), -(-rows // block_m)
                    shares = torch.empty(row_blocks * blocks, dtype=torch.float32, device=w.device)
                    loop_kernel[(row_blocks * blocks,)](
                        w, g, alpha_in, alpha_out, None, shares, i, j, rows, cols, n, blocks, w.stride(0),
                        g.stride(0), BACKWARD=True, **block,
                    )  # fmt: skip
                    sums.append(shares.sum())
            d = torch.stack(sums).view(k_out, k_in)
    return dw, (d * alpha_out[:, None]).sum(0).to(alpha_in.dtype), (d * alpha_in).sum(1).to(alpha_out.dtype)


def _available(impl: str) -> tuple[str, ...]:
    """C++ exists for "factored" only: the other two are there to be compared with, and torch does them well."""
    return ("triton", "cpu", "reference") if impl == "factored" else ("triton", "reference")


@custom_op(
    "mixed_weight",
    "(Tensor weight, Tensor alpha_in, int[] sizes_in, Tensor alpha_out, int[] sizes_out, str impl, "
    "Tensor? masks, str? backend) -> Tensor",
)
def _mixed_weight(
    weight: Tensor, alpha_in: Tensor, sizes_in: Sequence[int], alpha_out: Tensor, sizes_out: Sequence[int],
    impl: str, masks: Tensor | None, backend: str | None,
) -> Tensor:
    how = resolve("mixed_weight", backend, weight, _available(impl))
    if how == "triton":
        return _launch_forward(weight, alpha_in, sizes_in, alpha_out, sizes_out, impl, masks)
    if how == "cpu":
        c, r = _vectors(alpha_in, sizes_in, alpha_out, sizes_out, weight.shape, torch.float32)
        return cpu.mixed_weight(weight, r, c)
    return reference(weight, alpha_in, sizes_in, alpha_out, sizes_out, impl, masks).contiguous()


@_mixed_weight.register_fake
def _(
    weight: Tensor, alpha_in: Tensor, sizes_in: Sequence[int], alpha_out: Tensor, sizes_out: Sequence[int],
    impl: str, masks: Tensor | None, backend: str | None,
) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


@custom_op(
    "mixed_weight_backward",
    "(Tensor grad, Tensor weight, Tensor alpha_in, int[] sizes_in, Tensor alpha_out, int[] sizes_out, "
    "str impl, Tensor? masks, bool need_weight, str? backend) -> (Tensor, Tensor, Tensor)",
)
def _mixed_weight_backward(
    grad: Tensor, weight: Tensor, alpha_in: Tensor, sizes_in: Sequence[int], alpha_out: Tensor,
    sizes_out: Sequence[int], impl: str, masks: Tensor | None, need_weight: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    how = resolve("mixed_weight", backend, weight, _available(impl))
    if how == "triton":
        return _launch_backward(grad, weight, alpha_in, sizes_in, alpha_out, sizes_out, impl, masks, need_weight)
    if how == "cpu":
        c, r = _vectors(alpha_in, sizes_in, alpha_out, sizes_out, weight.shape, torch.float32)
        dw, dc, dr = cpu.mixed_weight_backward(grad, weight, r, c, need_weight)
        from_c, from_r = (torch.stack([d[:size].sum() for size in s]) for d, s in ((dc, sizes_in), (dr, sizes_out)))
        return dw, from_c.to(alpha_in.dtype), from_r.to(alpha_out.dtype)
    dw, da, db = reference_backward(
        grad, weight, alpha_in, sizes_in, alpha_out, sizes_out, impl, masks, need_weight
    )
    return dw.contiguous(), da, db


@_mixed_weight_backward.register_fake
def _(
    grad: Tensor, weight: Tensor, alpha_in: Tensor, sizes_in: Sequence[int], alpha_out: Tensor,
    sizes_out: Sequence[int], impl: str, masks: Tensor | None, need_weight: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else no_grad_slot(weight)
    return dw, torch.empty_like(alpha_in), torch.empty_like(alpha_out)


def _setup(ctx, inputs, output):
    weight, alpha_in, sizes_in, alpha_out, sizes_out, impl, masks, backend = inputs
    ctx.save_for_backward(weight, alpha_in, alpha_out, masks)
    ctx.sizes_in, ctx.sizes_out, ctx.impl, ctx.backend = sizes_in, sizes_out, impl, backend


def _backward(ctx, grad):
    weight, alpha_in, alpha_out, masks = ctx.saved_tensors
    need = ctx.needs_input_grad
    dw, da, db = _mixed_weight_backward(
        grad, weight, alpha_in, ctx.sizes_in, alpha_out, ctx.sizes_out, ctx.impl, masks, need[0], ctx.backend
    )
    return dw if need[0] else None, da if need[1] else None, None, db if need[3] else None, None, None, None, None


_mixed_weight.register_autograd(_backward, setup_context=_setup)


def mixed_weight(
    weight: Tensor,
    alpha_in: Tensor,
    sizes_in: Sequence[int],
    alpha_out: Tensor,
    sizes_out: Sequence[int],
    impl: str = "factored",
    backend: str | None = None,
    masks: Tensor | None = None,
) -> Tensor:
    """Expected weight under independent input and output choices; gradients to both alphas and weight.

    Args:
        impl: "factored" (default), "masks" or "loop"; equal results, different cost.
        masks: for "masks", the stored ``choice_masks``; built on the fly (slow, K1 K2 times the weight) when absent.
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
    return _mixed_weight(
        weight, alpha_in, list(sizes_in), alpha_out, list(sizes_out), impl, masks, backend
    )
