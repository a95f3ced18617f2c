"""gated_residual: the residual add, with the hidden OUT mask and the depth gate folded in.

    z = h + m * y                          h, y, x [..., N] any float; m [N] fp32 or None (all ones)
    out = z                                without a gate
    out = gate * z + (1 - gate) * x        gate a 0-dim tensor; x the block's input

The gated form equals x + gate * (z - x) but is exact at gate = 0 and 1, so a kept block is the plain block and a
skipped one the identity, bit for bit. With g = dL/dout:

    dh = gate g    dy = gate m g    dx = (1 - gate) g    dm = sum over rows of gate g y    dgate = sum g (z - x)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core import cpu_calls as cpu
from jointnas_kernels.ops.core.columns import STAGES, column_sums, row_tiles
from jointnas_kernels.ops.core.dispatch import bad, compute_dtype, custom_op, no_grad_slot, resolve, rows
from jointnas_kernels.ops.width.channel import _channel_mask_backward


def reference(h: Tensor, y: Tensor, mask: Tensor | None, gate: Tensor | None, x: Tensor | None) -> Tensor:
    acc = compute_dtype(h)
    z = h.to(acc) + (y.to(acc) if mask is None else mask.to(acc) * y.to(acc))
    if gate is not None and x is not None:
        k = gate.to(acc)
        z = k * z + (1 - k) * x.to(acc)
    return z.to(h.dtype)


def reference_backward(
    grad: Tensor, h: Tensor, y: Tensor, mask: Tensor | None, gate: Tensor, x: Tensor, need_mask: bool, need_gate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    acc = compute_dtype(grad)
    g, k = grad.to(acc), gate.to(acc)
    dh, dx = (k * g).to(grad.dtype), ((1 - k) * g).to(grad.dtype)
    dy = no_grad_slot(grad) if mask is None else (k * g * mask.to(acc)).to(grad.dtype)
    dmask, dgate = no_grad_slot(grad), no_grad_slot(grad)
    if need_mask and mask is not None:
        dmask = (k * g * y.to(acc)).reshape(-1, grad.shape[-1]).sum(0).to(mask.dtype)
    if need_gate:
        z = h.to(acc) + (y.to(acc) if mask is None else mask.to(acc) * y.to(acc))
        dgate = (g * (z - x.to(acc))).sum().to(gate.dtype)
    return dh, dy, dx, dmask, dgate


@triton.jit
def residual_forward_kernel(
    h_ptr, y_ptr, mask_ptr, gate_ptr, x_ptr, out_ptr, count, width, column_blocks, h_stride, y_stride, x_stride,
    HAS_MASK: tl.constexpr, HAS_GATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = ((pid // column_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    col = (pid % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = (row < count)[:, None] & (col < width)[None, :]
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
    g_ptr, h_ptr, y_ptr, mask_ptr, gate_ptr, x_ptr, dh_ptr, dy_ptr, dx_ptr, dmask_ptr, dgate_ptr, count, width,
    column_blocks, per_program, g_stride, h_stride, y_stride, x_stride,
    HAS_MASK: tl.constexpr, NEED_MASK: tl.constexpr, NEED_GATE: tl.constexpr, LOOP_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dh, dx and (HAS_MASK) dy; with the flags also this program's column sums for dmask and its share of dgate."""
    pid = tl.program_id(0)
    chunk = pid // column_blocks
    col = (pid % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = col < width
    gate = tl.load(gate_ptr).to(tl.float32)
    mask = tl.full([1, BLOCK_N], 1.0, tl.float32)
    if HAS_MASK:
        mask = tl.load(mask_ptr + col, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    dmask = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dgate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    last = min((chunk + 1) * per_program, count)
    for first in tl.range(chunk * per_program, last, BLOCK_M, num_stages=LOOP_STAGES):
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
        tl.store(dmask_ptr + chunk * width + col, tl.sum(dmask, axis=0), mask=col_ok)
    if NEED_GATE:
        tl.store(dgate_ptr + pid, tl.sum(tl.sum(dgate, axis=1), axis=0))


def _launch_forward(h: Tensor, y: Tensor, mask: Tensor | None, gate: Tensor | None, x: Tensor | None) -> Tensor:
    h2, y2, x2 = rows(h), rows(y), None if x is None else rows(x)
    mask = None if mask is None else mask.contiguous()
    count, width = h2.shape
    out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    grid, column_blocks, _, block_m, block_n = row_tiles(h, count, width, False)
    if grid > 0:
        with torch.cuda.device_of(h):
            residual_forward_kernel[(grid,)](
                h2, y2, mask, gate, x2, out, count, width, column_blocks, h2.stride(0), y2.stride(0),
                0 if x2 is None else x2.stride(0), HAS_MASK=mask is not None, HAS_GATE=gate is not None,
                BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8,
            )  # fmt: skip
    return out


def _launch_backward(
    grad: Tensor, h: Tensor, y: Tensor, mask: Tensor | None, gate: Tensor, x: Tensor, need_mask: bool, need_gate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g, h2, y2, x2 = rows(grad), rows(h), rows(y), rows(x)
    mask = None if mask is None else mask.contiguous()
    count, width = g.shape
    dh = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    dx = torch.empty_like(dh)
    dy = no_grad_slot(grad) if mask is None else torch.empty_like(dh)
    grid, column_blocks, per_program, block_m, block_n = row_tiles(grad, count, width, need_mask or need_gate)
    dmask = g.new_empty(grid // column_blocks, width, dtype=torch.float32) if need_mask else None
    dgate = g.new_empty(grid, 1, dtype=torch.float32) if need_gate else None
    if grid > 0:
        with torch.cuda.device_of(grad):
            residual_backward_kernel[(grid,)](
                g, h2, y2, mask, gate, x2, dh, dy, dx, dmask, dgate, count, width, column_blocks, per_program,
                g.stride(0), h2.stride(0), y2.stride(0), x2.stride(0), HAS_MASK=mask is not None,
                NEED_MASK=need_mask, NEED_GATE=need_gate, LOOP_STAGES=STAGES if need_mask or need_gate else 1,
                BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8,
            )  # fmt: skip
    slot = no_grad_slot(grad)
    if dmask is None or mask is None:
        return dh, dy, dx, slot, no_grad_slot(grad) if dgate is None else column_sums(dgate)[0].view(()).to(gate.dtype)
    first, second = column_sums(dmask, dgate)
    return dh, dy, dx, first.to(mask.dtype), slot if second is None else second.view(()).to(gate.dtype)


@custom_op(
    "gated_residual",
    "(Tensor h, Tensor y, Tensor? mask, Tensor? gate, Tensor? x, str? backend) -> Tensor",
)
def _gated_residual(
    h: Tensor, y: Tensor, mask: Tensor | None, gate: Tensor | None, x: Tensor | None, backend: str | None
) -> Tensor:
    how = resolve("gated_residual", backend, h)
    if how == "triton":
        return _launch_forward(h, y, mask, gate, x)
    if how == "cpu":
        return cpu.gated_residual(h, y, mask, gate, x)
    return reference(h, y, mask, gate, x).contiguous()


@_gated_residual.register_fake
def _(
    h: Tensor, y: Tensor, mask: Tensor | None, gate: Tensor | None, x: Tensor | None, backend: str | None
) -> Tensor:
    return torch.empty(h.shape, dtype=h.dtype, device=h.device)


@custom_op(
    "gated_residual_backward",
    "(Tensor grad, Tensor h, Tensor y, Tensor? mask, Tensor gate, Tensor x, bool need_mask, bool need_gate, "
    "str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _gated_residual_backward(
    grad: Tensor, h: Tensor, y: Tensor, mask: Tensor | None, gate: Tensor, x: Tensor, need_mask: bool,
    need_gate: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dh, dy (empty when mask is None: it equals dh), dx, dmask, dgate. Without need_gate, h and x are not read."""
    how = resolve("gated_residual", backend, grad)
    if how == "triton":
        return _launch_backward(grad, h, y, mask, gate, x, need_mask, need_gate)
    if how == "cpu":
        return cpu.gated_residual_backward(grad, h, y, mask, gate, x, need_mask, need_gate)
    dh, dy, dx, dmask, dgate = reference_backward(grad, h, y, mask, gate, x, need_mask, need_gate)
    return dh.contiguous(), dy.contiguous(), dx.contiguous(), dmask, dgate


@_gated_residual_backward.register_fake
def _(
    grad: Tensor, h: Tensor, y: Tensor, mask: Tensor | None, gate: Tensor, x: Tensor, need_mask: bool,
    need_gate: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like() -> Tensor:
        return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)

    dy = no_grad_slot(grad) if mask is None else like()
    dmask = torch.empty_like(mask) if need_mask and mask is not None else no_grad_slot(grad)
    return like(), dy, like(), dmask, torch.empty_like(gate) if need_gate else no_grad_slot(grad)


def _setup(ctx, inputs, output):
    h, y, mask, gate, x, backend = inputs
    need_mask, need_gate = ctx.needs_input_grad[2:4]
    # arch steps need the activations for dmask and dgate; weight steps keep nothing but the vectors
    ctx.save_for_backward(h if need_gate else None, y if need_mask or need_gate else None, mask, gate,
                          x if need_gate else None)
    ctx.backend = backend


def _backward(ctx, grad):
    h, y, mask, gate, x = ctx.saved_tensors
    need_mask, need_gate = ctx.needs_input_grad[2:4]
    if gate is None:
        if mask is None:
            return grad, grad, None, None, None, None
        dy, dmask = _channel_mask_backward(
            grad, grad if y is None else y, mask, need_mask, ctx.backend
        )
        return grad, dy, dmask if need_mask else None, None, None, None
    dh, dy, dx, dmask, dgate = _gated_residual_backward(
        grad, grad if h is None else h, grad if y is None else y, mask, gate, grad if x is None else x,
        need_mask, need_gate, ctx.backend,
    )
    return (dh, dh if mask is None else dy, dmask if need_mask else None, dgate if need_gate else None, dx, None)


_gated_residual.register_autograd(_backward, setup_context=_setup)


def gated_residual(
    h: Tensor,
    y: Tensor,
    mask: Tensor | None = None,
    gate: Tensor | None = None,
    x: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """h + mask * y, or with a gate its blend x + gate * (h + mask * y - x) with the block input x."""
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
    return _gated_residual(h, y, mask, gate, x, backend)
