"""channel_mask: y = x * mask along the last dim.

    x [..., N] any float, mask [N] fp32  ->  y [..., N] in x's dtype
    dx = g * mask          dmask = sum over rows of g * x   (only when asked for)

Used where no other elementwise kernel runs next to the mask: the attention output (V's OUT mask folded with o_proj's
IN mask) and the general masks of ``mixed_linear``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core import cpu_calls as cpu
from jointnas_kernels.ops.core.columns import STAGES, column_sums, row_tiles
from jointnas_kernels.ops.core.dispatch import bad, compute_dtype, custom_op, no_grad_slot, resolve, rows


def reference(x: Tensor, mask: Tensor) -> Tensor:
    acc = compute_dtype(x)
    return (x.to(acc) * mask.to(acc)).to(x.dtype)


def reference_backward(grad: Tensor, x: Tensor, mask: Tensor, need_mask: bool) -> tuple[Tensor, Tensor]:
    acc = compute_dtype(x)
    g = grad.to(acc)
    dx = (g * mask.to(acc)).to(x.dtype)
    dmask = (g * x.to(acc)).reshape(-1, x.shape[-1]).sum(0).to(mask.dtype) if need_mask else no_grad_slot(x)
    return dx, dmask


@triton.jit
def channel_mask_kernel(
    g_ptr, x_ptr, mask_ptr, out_ptr, partial_ptr, count, width, column_blocks, per_program, g_stride, x_stride,
    REDUCE: tl.constexpr, LOOP_STAGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = g * mask; with REDUCE also this program's column sums of g * x. x is read only then."""
    pid = tl.program_id(0)
    chunk = pid // column_blocks
    col = (pid % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = col < width
    mask = tl.load(mask_ptr + col, mask=col_ok, other=0.0).to(tl.float32)  # [BLOCK_N]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    last = min((chunk + 1) * per_program, count)
    for first in tl.range(chunk * per_program, last, BLOCK_M, num_stages=LOOP_STAGES):
        row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        ok = (row < count)[:, None] & col_ok[None, :]
        g = tl.load(g_ptr + row[:, None] * g_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
        tl.store(out_ptr + row[:, None] * width + col[None, :], g * mask[None, :], mask=ok)
        if REDUCE:
            total += g * tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
    if REDUCE:
        tl.store(partial_ptr + chunk * width + col, tl.sum(total, axis=0), mask=col_ok)


def _launch(g: Tensor, x: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """g * mask and, given x, the column sums of g * x."""
    flat, other, mask = rows(g), None if x is None else rows(x), mask.contiguous()
    count, width = flat.shape
    out = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    grid, column_blocks, per_program, block_m, block_n = row_tiles(g, count, width, other is not None)
    if grid == 0:
        return out, None if other is None else mask.new_zeros(width, dtype=torch.float32)
    partial = None if other is None else mask.new_empty(grid // column_blocks, width, dtype=torch.float32)
    with torch.cuda.device_of(g):
        channel_mask_kernel[(grid,)](
            flat, other, mask, out, partial, count, width, column_blocks, per_program, flat.stride(0),
            0 if other is None else other.stride(0), REDUCE=other is not None,
            LOOP_STAGES=1 if other is None else STAGES, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8,
        )  # fmt: skip
    return out, None if partial is None else column_sums(partial)[0]


def forward(x: Tensor, mask: Tensor, backend: str) -> Tensor:
    if backend == "cpu":
        return cpu.channel_mask(x, mask)
    return _launch(x, None, mask)[0] if backend == "triton" else reference(x, mask).contiguous()


def backward(grad: Tensor, x: Tensor, mask: Tensor, need_mask: bool, backend: str) -> tuple[Tensor, Tensor]:
    """dx and dmask (empty unless asked for; then x is not read and any tensor may stand for it)."""
    if backend == "triton":
        dx, dmask = _launch(grad, x if need_mask else None, mask)
        return dx, no_grad_slot(x) if dmask is None else dmask.to(mask.dtype)
    if backend == "cpu":
        return cpu.channel_mask_backward(grad, x, mask, need_mask)
    dx, slot = reference_backward(grad, x, mask, need_mask)
    return dx.contiguous(), slot


@custom_op(
    "channel_mask",
    "(Tensor x, Tensor mask, str? backend) -> Tensor",
)
def _channel_mask(x: Tensor, mask: Tensor, backend: str | None) -> Tensor:
    return forward(x, mask, resolve("channel_mask", backend, x))


@_channel_mask.register_fake
def _(x: Tensor, mask: Tensor, backend: str | None) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@custom_op(
    "channel_mask_backward",
    "(Tensor grad, Tensor x, Tensor mask, bool need_mask, str? backend) -> (Tensor, Tensor)",
)
def _channel_mask_backward(
    grad: Tensor, x: Tensor, mask: Tensor, need_mask: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    return backward(grad, x, mask, need_mask, resolve("channel_mask", backend, x))


@_channel_mask_backward.register_fake
def _(grad: Tensor, x: Tensor, mask: Tensor, need_mask: bool, backend: str | None) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, torch.empty_like(mask) if need_mask else no_grad_slot(x)


def _setup(ctx, inputs, output):
    x, mask, backend = inputs
    ctx.need_mask = ctx.needs_input_grad[1]
    # without a mask gradient only x's metadata is needed, so x itself is not kept alive
    ctx.save_for_backward(x if ctx.need_mask else None, mask)
    ctx.backend = backend


def _backward(ctx, grad):
    x, mask = ctx.saved_tensors
    dx, dmask = _channel_mask_backward(
        grad, grad if x is None else x, mask, ctx.need_mask, ctx.backend
    )
    return dx, dmask if ctx.need_mask else None, None


_channel_mask.register_autograd(_backward, setup_context=_setup)


def channel_mask(x: Tensor, mask: Tensor, backend: str | None = None) -> Tensor:
    """x * mask along the last dim; gradients to x and mask."""
    if mask.shape != x.shape[-1:]:
        raise bad("channel_mask", f"mask {tuple(mask.shape)} does not match x {tuple(x.shape)}")
    return _channel_mask(x, mask, backend)
