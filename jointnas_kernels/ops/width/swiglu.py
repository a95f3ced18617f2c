"""masked_swiglu: the MLP's gate, with the intermediate OUT mask and down_proj's IN mask folded in.

    a = r * gate,  v = r * up,  out = silu(a) * v * c         gate, up [..., I] any float; r, c [I] fp32
    with s = sigmoid(a), f = a s, f' = s (1 + a (1 - s)) and g = dL/dout:
    dgate = g c v f' r      dup = g c f r
    dc = sum g f v          dr = sum g c (v f' gate + f up)    (sums over rows; only when asked for)

Nothing but gate and up is saved: the backward recomputes the sigmoid.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core import cpu
from jointnas_kernels.ops.core.columns import STAGES, column_sums, row_tiles
from jointnas_kernels.ops.core.dispatch import bad, compute_dtype, custom_op, no_grad_slot, resolve, rows


def reference(gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor) -> Tensor:
    acc = compute_dtype(gate)
    r, c = out_mask.to(acc), in_mask.to(acc)
    return (torch.nn.functional.silu(r * gate.to(acc)) * (r * up.to(acc)) * c).to(gate.dtype)


def reference_backward(
    grad: Tensor, gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, need_out: bool, need_in: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = compute_dtype(gate)
    width = gate.shape[-1]
    g, x, u, r, c = grad.to(acc), gate.to(acc), up.to(acc), out_mask.to(acc), in_mask.to(acc)
    a, v = r * x, r * u
    s = torch.sigmoid(a)
    f, slope = a * s, s * (1 + a * (1 - s))
    gc = g * c
    dgate, dup = (gc * v * slope * r).to(gate.dtype), (gc * f * r).to(up.dtype)
    dr = (gc * (v * slope * x + f * u)).reshape(-1, width).sum(0).to(out_mask.dtype) if need_out else no_grad_slot(gate)
    dc = (g * f * v).reshape(-1, width).sum(0).to(in_mask.dtype) if need_in else no_grad_slot(gate)
    return dgate, dup, dr, dc


@triton.jit
def swiglu_forward_kernel(
    gate_ptr, up_ptr, r_ptr, c_ptr, out_ptr, count, width, column_blocks, gate_stride, up_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = ((pid // column_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    col = (pid % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = (row < count)[:, None] & (col < width)[None, :]
    r = tl.load(r_ptr + col, mask=col < width, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_N]
    c = tl.load(c_ptr + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    a = r * tl.load(gate_ptr + row[:, None] * gate_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
    v = r * tl.load(up_ptr + row[:, None] * up_stride + col[None, :], mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + row[:, None] * width + col[None, :], a / (1.0 + tl.exp(-a)) * v * c, mask=ok)


@triton.jit
def swiglu_backward_kernel(
    g_ptr, gate_ptr, up_ptr, r_ptr, c_ptr, dgate_ptr, dup_ptr, dr_ptr, dc_ptr, count, width, column_blocks,
    per_program, g_stride, gate_stride, up_stride,
    NEED_OUT: tl.constexpr, NEED_IN: tl.constexpr, LOOP_STAGES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dgate, dup; with the flags also this program's column sums for dr (NEED_OUT) and dc (NEED_IN)."""
    pid = tl.program_id(0)
    chunk = pid // column_blocks
    col = (pid % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = col < width
    r = tl.load(r_ptr + col, mask=col_ok, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_N]
    c = tl.load(c_ptr + col, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    dr = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    last = min((chunk + 1) * per_program, count)
    for first in tl.range(chunk * per_program, last, BLOCK_M, num_stages=LOOP_STAGES):
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
        tl.store(dr_ptr + chunk * width + col, tl.sum(dr, axis=0), mask=col_ok)
    if NEED_IN:
        tl.store(dc_ptr + chunk * width + col, tl.sum(dc, axis=0), mask=col_ok)


def _launch_forward(gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor) -> Tensor:
    x, u, out_mask, in_mask = rows(gate), rows(up), out_mask.contiguous(), in_mask.contiguous()
    count, width = x.shape
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grid, column_blocks, _, block_m, block_n = row_tiles(gate, count, width, False)
    if grid > 0:
        with torch.cuda.device_of(gate):
            swiglu_forward_kernel[(grid,)](
                x, u, out_mask, in_mask, out, count, width, column_blocks, x.stride(0), u.stride(0),
                BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8,
            )  # fmt: skip
    return out


def _launch_backward(
    grad: Tensor, gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, need_out: bool, need_in: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g, x, u = rows(grad), rows(gate), rows(up)
    out_mask, in_mask = out_mask.contiguous(), in_mask.contiguous()
    count, width = x.shape
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty_like(dgate)
    grid, column_blocks, per_program, block_m, block_n = row_tiles(gate, count, width, need_out or need_in)

    def partials(need: bool) -> Tensor | None:
        if not need:
            return None
        return torch.empty(grid // column_blocks, width, dtype=torch.float32, device=gate.device)

    dr, dc = partials(need_out), partials(need_in)
    if grid > 0:
        with torch.cuda.device_of(gate):
            swiglu_backward_kernel[(grid,)](
                g, x, u, out_mask, in_mask, dgate, dup, dr, dc, count, width, column_blocks, per_program,
                g.stride(0), x.stride(0), u.stride(0), NEED_OUT=need_out, NEED_IN=need_in,
                LOOP_STAGES=STAGES if need_out or need_in else 1, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8,
            )  # fmt: skip
    slot = no_grad_slot(gate)
    if dr is None:
        return dgate, dup, slot, no_grad_slot(gate) if dc is None else column_sums(dc)[0].to(in_mask.dtype)
    first, second = column_sums(dr, dc)
    return dgate, dup, first.to(out_mask.dtype), slot if second is None else second.to(in_mask.dtype)


@custom_op(
    "masked_swiglu",
    "(Tensor gate, Tensor up, Tensor out_mask, Tensor in_mask, str? backend) -> Tensor",
)
def _masked_swiglu(gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, backend: str | None) -> Tensor:
    how = resolve("masked_swiglu", backend, gate)
    if how == "triton":
        return _launch_forward(gate, up, out_mask, in_mask)
    if how == "cpu":
        return cpu.masked_swiglu(gate, up, out_mask, in_mask)
    return reference(gate, up, out_mask, in_mask).contiguous()


@_masked_swiglu.register_fake
def _(gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, backend: str | None) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@custom_op(
    "masked_swiglu_backward",
    "(Tensor grad, Tensor gate, Tensor up, Tensor out_mask, Tensor in_mask, bool need_out, bool need_in, "
    "str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _masked_swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, need_out: bool, need_in: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    how = resolve("masked_swiglu", backend, gate)
    if how == "triton":
        return _launch_backward(grad, gate, up, out_mask, in_mask, need_out, need_in)
    if how == "cpu":
        return cpu.masked_swiglu_backward(grad, gate, up, out_mask, in_mask, need_out, need_in)
    dgate, dup, dr, dc = reference_backward(grad, gate, up, out_mask, in_mask, need_out, need_in)
    return dgate.contiguous(), dup.contiguous(), dr, dc


@_masked_swiglu_backward.register_fake
def _(
    grad: Tensor, gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, need_out: bool, need_in: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    dr = torch.empty_like(out_mask) if need_out else no_grad_slot(gate)
    dc = torch.empty_like(in_mask) if need_in else no_grad_slot(gate)
    return dgate, dup, dr, dc


def _setup(ctx, inputs, output):
    gate, up, out_mask, in_mask, backend = inputs
    ctx.save_for_backward(gate, up, out_mask, in_mask)
    ctx.backend = backend


def _backward(ctx, grad):
    gate, up, out_mask, in_mask = ctx.saved_tensors
    need_out, need_in = ctx.needs_input_grad[2:4]
    dgate, dup, dr, dc = _masked_swiglu_backward(
        grad, gate, up, out_mask, in_mask, need_out, need_in, ctx.backend
    )
    return dgate, dup, dr if need_out else None, dc if need_in else None, None


_masked_swiglu.register_autograd(_backward, setup_context=_setup)


def masked_swiglu(gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, backend: str | None = None) -> Tensor:
    """silu(out_mask * gate) * (out_mask * up) * in_mask along the last dim; gradients to all four."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise bad("masked_swiglu", f"gate {gate.dtype} {tuple(gate.shape)} and up {up.dtype} {tuple(up.shape)} differ")
    for name, mask in (("out_mask", out_mask), ("in_mask", in_mask)):
        if mask.shape != gate.shape[-1:]:
            raise bad("masked_swiglu", f"{name} {tuple(mask.shape)} does not match gate {tuple(gate.shape)}")
    return _masked_swiglu(gate, up, out_mask, in_mask, backend)
