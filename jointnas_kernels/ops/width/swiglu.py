"""masked_swiglu: the MLP's gate, with the intermediate OUT mask and down_proj's IN mask folded in; alone, or with the
activation quantizer of down_proj's input behind it in the same pass.

Backward, with a = r * gate, v = r * up, s = sigmoid(a), f = a s, f' = s (1 + a (1 - s)) and g = dL/dout:

    dgate = g c v f' r      dup = g c f r
    dc = sum g f v          dr = sum g c (v f' gate + f up)    (sums over rows; only when asked for)

Nothing but gate and up is saved: the backward recomputes the sigmoid. With quantization y = sum_q probs[q] Q_q(out),
exactly act_quant_mix of it, and behind it, straight through, g = sum(probs) dL/dy, which is not rounded in between;
dprobs[q] = <dL/dy, Q_q(out)>, out made again. Saved are also the rows' scales and zero points. On a CPU the two passes
stay two.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core import cpu
from jointnas_kernels.ops.core.arrival import counters, last_to_arrive, sum_columns
from jointnas_kernels.ops.core.backends import interpreting
from jointnas_kernels.ops.core.columns import STAGES, partial_sums, row_tiles, strip, tile, total_of
from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import bad, compute_dtype, dense, dense_like, in_dtype_of, processors, rows
from jointnas_kernels.ops.quant import activations as act
from jointnas_kernels.ops.quant.activations import product, swiglu_value
from jointnas_kernels.ops.quant.kernels import constants, round_tile, store_sums

Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # dgate, dup, dr, dc
Quantized = tuple[Tensor, Tensor]  # y, levels [rows, Q, 2]


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


def _reference_quantized(
    gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, probs: Tensor, bits: Sequence[int], symmetric: bool
) -> Quantized:
    out = _reference(gate, up, out_mask, in_mask)
    return act.act_quant_mix_reference(out, bits, probs, symmetric), act.no_levels(out, bits)


def _reference_quantized_backward(
    grad: Tensor, gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, probs: Tensor, levels: Tensor | None,
    bits: Sequence[int], symmetric: bool, need: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    g, dprobs = grad.to(compute_dtype(grad.dtype)), None
    if need[4]:
        dprobs = act.probs_gradient(grad, _reference(gate, up, out_mask, in_mask), probs, bits, symmetric)
    return *_reference_backward(g * probs.to(g.dtype).sum(), gate, up, out_mask, in_mask, need), dprobs


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
    tl.store(out_ptr + row[:, None] * width + col[None, :], swiglu_value(a, v, c), mask=ok)


@triton.jit
def swiglu_backward_kernel(
    g_ptr, gate_ptr, up_ptr, r_ptr, c_ptr, probs_ptr, levels_ptr, dgate_ptr, dup_ptr, dr_part_ptr, dc_part_ptr,
    dprobs_part_ptr, dr_ptr, dc_ptr, dprobs_ptr, counter_ptr, count, width, column_blocks, per_program, g_stride,
    gate_stride, up_stride,
    Q: tl.constexpr, LOW: tl.constexpr, INVERSE: tl.constexpr, REST: tl.constexpr, eps: tl.constexpr,
    SYMMETRIC: tl.constexpr, HAS_MASK: tl.constexpr, EXACT: tl.constexpr, NEED_OUT: tl.constexpr,
    NEED_IN: tl.constexpr, NEED_PROBS: tl.constexpr, LOOP_STAGES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dgate, dup in rows of 2 width; with the flags also the column sums dr (NEED_OUT) and dc (NEED_IN) and, of Q > 0
    precisions, dprobs: each program's, and their sums by the last of those with the same columns, and of all."""
    chunk, start, last, col, col_ok = strip(count, width, column_blocks, per_program, BLOCK_N)
    r = tl.load(r_ptr + col, mask=col_ok, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_N]
    c = tl.load(c_ptr + col, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    dr = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = 1.0 if Q == 0 else 0.0
    for q in tl.static_range(Q):
        total += tl.load(probs_ptr + q).to(tl.float32)
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    if NEED_PROBS:
        sum0 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        sum1, sum2, sum3 = sum0, sum0, sum0
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
        if NEED_PROBS:
            y = round_tile(swiglu_value(a, v, c), dtype, EXACT)
            sum0 += product(g, y, levels_ptr, row, count, 0, Q, LOW, dtype, SYMMETRIC, EXACT)
            if Q > 1:
                sum1 += product(g, y, levels_ptr, row, count, 1, Q, LOW, dtype, SYMMETRIC, EXACT)
            if Q > 2:
                sum2 += product(g, y, levels_ptr, row, count, 2, Q, LOW, dtype, SYMMETRIC, EXACT)
            if Q > 3:
                sum3 += product(g, y, levels_ptr, row, count, 3, Q, LOW, dtype, SYMMETRIC, EXACT)
        g *= total
        gc = g * c
        at = 2 * row[:, None] * width + col[None, :]
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
        if last_to_arrive(counter_ptr + 1 + tl.program_id(0) % column_blocks, chunks):
            if NEED_OUT:
                sum_columns(dr_part_ptr, dr_ptr, chunks, width, col, col_ok, BLOCK_N)
            if NEED_IN:
                sum_columns(dc_part_ptr, dc_ptr, chunks, width, col, col_ok, BLOCK_N)
    if NEED_PROBS:
        at = dprobs_part_ptr + tl.program_id(0) * Q
        store_sums(at, sum0, sum1, sum2, sum3, Q)
        if last_to_arrive(counter_ptr, tl.num_programs(0)):
            one = tl.arange(0, 16)
            sum_columns(dprobs_part_ptr, dprobs_ptr, tl.num_programs(0), Q, one, one < Q, 16, 128)


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


def _launch_quantized(
    gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, probs: Tensor, bits: Sequence[int], symmetric: bool
) -> Quantized:
    return act.launch(gate, probs, in_mask, bits, symmetric, up, out_mask)


def _launch_backward(
    grad: Tensor, gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, need: Sequence[bool]
) -> Gradients:
    return _launch_quantized_backward(
        grad, gate, up, out_mask, in_mask, None, None, (), False, (*need, False)
    )[:4]  # fmt: skip


def _launch_quantized_backward(
    grad: Tensor, gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, probs: Tensor | None,
    levels: Tensor | None, bits: Sequence[int], symmetric: bool, need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Of both; without probs of the gate alone."""
    g, x, u = rows(grad), rows(gate), rows(up)
    out_mask, in_mask = out_mask.contiguous(), in_mask.contiguous()
    count, width = x.shape
    # beside each other: dx of a linear that makes both is then one product, and so is its dW
    both, (_, _, need_out, need_in, need_probs) = gate.new_empty(*gate.shape[:-1], 2 * width), need
    dgate, dup = both.chunk(2, dim=-1)
    reduce = need_out or need_in or need_probs
    grid, column_blocks, per_program, block_m, block_n = row_tiles(count, width, reduce, processors(gate))
    parts = [partial_sums(n, grid // column_blocks, width, gate.device) for n in (need_out, need_in)]
    parts.append(partial_sums(need_probs, grid, len(bits), gate.device))
    dr, dc, dprobs = map(total_of, parts)
    if grid > 0:
        with torch.cuda.device_of(gate):
            swiglu_backward_kernel[(grid,)](
                g, x, u, out_mask, in_mask, dense(probs), levels, dgate, dup, *parts, dr, dc, dprobs,
                counters(g, 1 + column_blocks) if reduce else None, count, width, column_blocks, per_program,
                g.stride(0), x.stride(0), u.stride(0), NEED_OUT=need_out, NEED_IN=need_in, NEED_PROBS=need_probs,
                LOOP_STAGES=STAGES if reduce else 1, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8,
                **constants(gate.dtype, tuple(bits), symmetric, True, interpreting()),
            )  # fmt: skip
    return dgate, dup, in_dtype_of(dr, out_mask), in_dtype_of(dc, in_mask), in_dtype_of(dprobs, probs)


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


def _cpu_quantized(
    gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, probs: Tensor, bits: Sequence[int], symmetric: bool
) -> Quantized:
    return act.on_cpu(_cpu(gate, up, out_mask, in_mask), probs, None, bits, symmetric)


def _cpu_quantized_backward(
    grad: Tensor, gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, probs: Tensor, levels: Tensor | None,
    bits: Sequence[int], symmetric: bool, need: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    out, wanted = _cpu(gate, up, out_mask, in_mask) if need[4] else None, (True, need[4], False)
    dout, dprobs, _ = act.backward_on_cpu(grad, out, probs, None, None, bits, symmetric, wanted)
    assert dout is not None
    return *_cpu_backward(dout, gate, up, out_mask, in_mask, need), dprobs


_quantized = Op(
    "masked_swiglu_quant",
    {"triton": _launch_quantized, "cpu": _cpu_quantized, "reference": _reference_quantized},
    {
        "triton": _launch_quantized_backward, "cpu": _cpu_quantized_backward,
        "reference": _reference_quantized_backward,
    },
    read_for={"saved0": ("probs",)},
    public="masked_swiglu",
)  # fmt: skip
_op = Op(
    "masked_swiglu",
    {"triton": _launch, "cpu": _cpu, "reference": _reference},
    {"triton": _launch_backward, "cpu": _cpu_backward, "reference": _reference_backward},
)


def masked_swiglu(
    gate: Tensor, up: Tensor, out_mask: Tensor, in_mask: Tensor, backend: str | None = None,
    act_bits: Sequence[int] | None = None, act_probs: Tensor | None = None, act_symmetric: bool = False,
) -> Tensor:  # fmt: skip
    """The gate of an MLP with masked neurons, silu(r * gate) * (r * up) * c along the last dim.

    With act_bits and act_probs, ``act_quant_mix`` of that in the same pass: sum_q act_probs[q] Q_q(..).

    Args:
        gate, up: [..., I] in any floating dtype, both alike.
        out_mask, in_mask: r and c, [I], fp32: the OUT mask of gate_proj and up_proj, the IN mask of down_proj.
        backend: "triton", "cpu" or "reference"; None: by device and dtype.
        act_bits: one to four of 2, .., 8 and 16; None: no quantization.
        act_probs: [Q], fp32: one for each of act_bits.
        act_symmetric: whether the quantizer has no zero point.

    Returns:
        [..., I] in the dtype of gate; computed in fp32 (fp64 for fp64). Gradients to all tensors.

    Raises:
        JointNASError: shapes, dtypes or bits that do not fit, half of a quantizer, or a backend that cannot run.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise bad("masked_swiglu", f"gate {gate.dtype} {tuple(gate.shape)} and up {up.dtype} {tuple(up.shape)} differ")
    for name, mask in (("out_mask", out_mask), ("in_mask", in_mask)):
        if mask.shape != gate.shape[-1:]:
            raise bad("masked_swiglu", f"{name} {tuple(mask.shape)} does not match gate {tuple(gate.shape)}")
    if (act_bits is None) != (act_probs is None):
        raise bad("masked_swiglu", "act_bits and act_probs go together")
    if act_bits is None or act_probs is None:
        return _op(gate, up, out_mask, in_mask, backend)
    act.check_precisions("masked_swiglu", act_bits, act_probs)
    return _quantized(gate, up, out_mask, in_mask, act_probs, list(act_bits), act_symmetric, backend)[0]
