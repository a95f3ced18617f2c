"""mixed_rmsnorm: the expectation of RMSNorm over hidden-size choices, with the next layers' IN mask folded in.

    x [..., N] any float, weight [N], alpha [K] fp32, sizes N_1..N_K, in_mask m [N] fp32 or None (all ones)
    inv_i = rsqrt(mean_{k < N_i} x_k^2 + eps)           t_k = sum_{i: k < N_i} alpha_i inv_i
    y_k = m_k w_k x_k t_k

At one-hot alpha this is RMSNorm over the first N_i channels; full-width statistics would be off by sqrt(N_i / N).
Backward, with g = dL/dy, h = m w g and prefix sums S_i = sum_{k < N_i} h_k x_k:

    dx_k = h_k t_k - x_k sum_{i: k < N_i} alpha_i S_i inv_i^3 / N_i        dalpha_i = sum over rows of inv_i S_i
    P_k = sum over rows of g_k x_k t_k,   dm = w P,   dw = m P             (only when asked for)

inv [rows, K] is the only thing saved beside the inputs.
"""

import functools
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core.columns import STAGES, column_sums
from jointnas_kernels.ops.core.dispatch import (
    bad,
    compute_dtype,
    custom_op,
    no_grad_slot,
    power_of_two,
    processors,
    resolve,
    rows,
)
from jointnas_kernels.ops.norm import cpu as cpu_norm

MAX_WIDTH = 32768  # a row is held in the registers of one program: 64 fp32 values per thread at 16 warps


def _segments(sizes: Sequence[int]) -> list[tuple[int, int, list[int]]]:
    """(start, end, choices that keep it) for each stretch of channels kept by the same choices."""
    bounds = [0, *sorted(set(sizes))]
    return [
        (lo, hi, [i for i, size in enumerate(sizes) if size >= hi]) for lo, hi in pairwise(bounds)
    ]


def _counts(sizes: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(sizes), dtype=like.dtype, device=like.device)


def _prefix_sums(v: Tensor, sizes: Sequence[int]) -> Tensor:
    """[rows, K]: sum of the first sizes[i] channels, each channel read once."""
    out = v.new_zeros(v.shape[0], len(sizes))
    for lo, hi, kept_by in _segments(sizes):
        out[:, kept_by] += v[:, lo:hi].sum(-1, keepdim=True)
    return out


def _spread(value: Tensor, sizes: Sequence[int], n: int) -> Tensor:
    """[rows, n]: sum of value[:, i] over the choices that keep the channel."""
    parts = [value[:, kept_by].sum(-1, keepdim=True).expand(-1, hi - lo) for lo, hi, kept_by in _segments(sizes)]
    parts.append(value.new_zeros(value.shape[0], n - max(sizes)))
    return torch.cat(parts, dim=-1)


def reference(
    x: Tensor, weight: Tensor, alpha: Tensor, sizes: Sequence[int], eps: float, in_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y like x and inv [rows, K]."""
    v = rows(x).to(compute_dtype(x))
    inv = torch.rsqrt(_prefix_sums(v.square(), sizes) / _counts(sizes, v) + eps)
    return normalised(x, weight, alpha, inv, sizes, in_mask), inv


def normalised(
    x: Tensor, weight: Tensor, alpha: Tensor, inv: Tensor, sizes: Sequence[int], in_mask: Tensor | None
) -> Tensor:
    """y like x from inv [rows, K]."""
    acc = compute_dtype(x)
    t = _spread(inv * alpha.to(acc), sizes, x.shape[-1])
    scale = weight.to(acc) if in_mask is None else weight.to(acc) * in_mask.to(acc)
    return (rows(x).to(acc) * t * scale).to(x.dtype).reshape(x.shape)


def reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, inv: Tensor, sizes: Sequence[int],
    in_mask: Tensor | None, need_weight: bool, need_alpha: bool, need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = compute_dtype(x)
    n = x.shape[-1]
    v, g = rows(x).to(acc), rows(grad).to(acc)
    w, a = weight.to(acc), alpha.to(acc)
    scale = w if in_mask is None else w * in_mask.to(acc)
    h = g * scale
    prefix = _prefix_sums(h * v, sizes)
    t = _spread(inv * a, sizes, n)
    dx = h * t - v * _spread(a * prefix * inv**3 / _counts(sizes, v), sizes, n)
    dw, dalpha, dmask = (no_grad_slot(x) for _ in range(3))
    if need_alpha:
        dalpha = (inv * prefix).sum(0).to(alpha.dtype)
    if need_weight or need_mask:
        column = (g * v * t).sum(0)
        if need_weight:
            dw = (column if in_mask is None else column * in_mask.to(acc)).to(weight.dtype)
        if need_mask and in_mask is not None:
            dmask = (column * w).to(in_mask.dtype)
    return dx.to(x.dtype).reshape(x.shape), dw, dalpha, dmask


@triton.jit
def channel_scale(w_ptr, mask_ptr, col, ok, HAS_MASK: tl.constexpr):
    """w, times the mask if there is one."""
    scale = tl.load(w_ptr + col, mask=ok, other=0.0).to(tl.float32)
    if HAS_MASK:
        scale *= tl.load(mask_ptr + col, mask=ok, other=0.0).to(tl.float32)
    return scale


@triton.jit
def alpha_at_ends(alpha_ptr, segment, SIZES: tl.constexpr, K: tl.constexpr, SEG: tl.constexpr):
    """[S]: the sum of alpha_i over the sizes that end in a segment."""
    at_end = tl.zeros(segment.shape, tl.float32)
    for i in tl.static_range(K):
        at_end += tl.where(segment == (SIZES[i] - 1) // SEG, tl.load(alpha_ptr + i).to(tl.float32), 0.0)
    return at_end


@triton.jit
def choice_at_ends(segment, SIZES: tl.constexpr, K: tl.constexpr, SEG: tl.constexpr):
    """[S]: the choice whose size ends in a segment, for one load of all inv_i; where none does, any: at_end is 0."""
    which = tl.zeros(segment.shape, tl.int32)
    for i in tl.static_range(K):
        which = tl.where(segment == (SIZES[i] - 1) // SEG, i, which)
    return which


@triton.jit
def rmsnorm_forward_kernel(
    x_ptr, w_ptr, alpha_ptr, mask_ptr, y_ptr, inv_ptr, count, width, x_stride, eps,
    SIZES: tl.constexpr, K: tl.constexpr, S: tl.constexpr, SEG: tl.constexpr, HAS_MASK: tl.constexpr,
    LOOP_STAGES: tl.constexpr,
):  # fmt: skip
    """Rows pid, pid + programs, .., each seen as S segments of SEG channels. No size ends inside a segment, so all K
    prefix sums are one scan of S numbers, and t is the suffix scan of alpha_i inv_i placed where the sizes end."""
    segment = tl.arange(0, S)
    col = segment[:, None] * SEG + tl.arange(0, SEG)[None, :]  # [S, SEG]
    ok = col < width
    end = tl.minimum((segment + 1) * SEG, width).to(tl.float32)
    scale = channel_scale(w_ptr, mask_ptr, col, ok, HAS_MASK)
    at_end = alpha_at_ends(alpha_ptr, segment, SIZES, K, SEG)
    for index in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=LOOP_STAGES):
        row = tl.cast(index, tl.int64)
        x = tl.load(x_ptr + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
        inv = tl.rsqrt(tl.cumsum(tl.sum(x * x, axis=1), axis=0) / end + eps)  # [S]
        t = tl.cumsum(at_end * inv, axis=0, reverse=True)
        tl.store(y_ptr + row * width + col, x * scale * t[:, None], mask=ok)
        for i in tl.static_range(K):
            tl.store(inv_ptr + row * K + i + segment * 0, inv, mask=segment == (SIZES[i] - 1) // SEG)


@triton.jit
def rmsnorm_backward_kernel(
    g_ptr, x_ptr, w_ptr, alpha_ptr, mask_ptr, inv_ptr, dx_ptr, dalpha_ptr, column_ptr, count, width, g_stride,
    x_stride,
    SIZES: tl.constexpr, K: tl.constexpr, S: tl.constexpr, SEG: tl.constexpr, HAS_MASK: tl.constexpr,
    NEED_ALPHA: tl.constexpr, NEED_COLUMN: tl.constexpr, LOOP_STAGES: tl.constexpr,
):  # fmt: skip
    """dx of the rows pid, pid + programs, .., and this program's share of dalpha (NEED_ALPHA) and P (NEED_COLUMN)."""
    segment = tl.arange(0, S)
    col = segment[:, None] * SEG + tl.arange(0, SEG)[None, :]  # [S, SEG]
    ok = col < width
    end = tl.minimum((segment + 1) * SEG, width).to(tl.float32)
    scale = channel_scale(w_ptr, mask_ptr, col, ok, HAS_MASK)
    at_end = alpha_at_ends(alpha_ptr, segment, SIZES, K, SEG)
    which = choice_at_ends(segment, SIZES, K, SEG)
    column = tl.zeros([S, SEG], tl.float32)
    dalpha = tl.zeros([S], tl.float32)
    for index in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=LOOP_STAGES):
        row = tl.cast(index, tl.int64)
        inv = tl.load(inv_ptr + row * K + which)  # [S]
        x = tl.load(x_ptr + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + row * g_stride + col, mask=ok, other=0.0).to(tl.float32)
        h = g * scale
        share = tl.cumsum(tl.sum(h * x, axis=1), axis=0) * inv  # [S], inv_i S_i where sizes end
        t = tl.cumsum(at_end * inv, axis=0, reverse=True)
        back = tl.cumsum(at_end * inv * inv * share / end, axis=0, reverse=True)
        tl.store(dx_ptr + row * width + col, h * t[:, None] - x * back[:, None], mask=ok)
        if NEED_ALPHA:
            dalpha += share
        if NEED_COLUMN:
            column += g * x * t[:, None]
    if NEED_ALPHA:
        for i in tl.static_range(K):
            at = dalpha_ptr + tl.program_id(0) * K + i + segment * 0
            tl.store(at, dalpha, mask=segment == (SIZES[i] - 1) // SEG)
    if NEED_COLUMN:
        tl.store(column_ptr + tl.program_id(0).to(tl.int64) * width + col, column, mask=ok)


@functools.lru_cache(maxsize=1024)
def launch_shape(sizes: tuple[int, ...], width: int, row_bytes: int) -> tuple[int, int, int, int]:
    """(S, SEG, warps, stages): the widest power-of-two segments that no size cuts; 16 fp32 values of a row per thread
    up to 8192 channels, then more; rows in flight up to 64 KB of shared memory per program."""
    inner = [size for size in sizes if size < width]
    divisor = math.gcd(*inner) if inner else power_of_two(width)
    seg = min(divisor & -divisor, power_of_two(width))
    warps = max(1, min(16, power_of_two(width) // 512))
    return power_of_two(-(-width // seg)), seg, warps, max(1, min(STAGES, 65536 // row_bytes))


def _launch_forward(
    x: Tensor, weight: Tensor, alpha: Tensor, sizes: Sequence[int], eps: float, in_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    flat, weight, alpha = rows(x), weight.contiguous(), alpha.contiguous()
    in_mask = None if in_mask is None else in_mask.contiguous()
    count, width = flat.shape
    if width > MAX_WIDTH:
        raise bad("mixed_rmsnorm", f"the Triton kernel holds rows of at most {MAX_WIDTH}, got {width}")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inv = torch.empty(count, len(sizes), dtype=torch.float32, device=x.device)
    sizes = tuple(sizes)
    s, seg, warps, stages = launch_shape(sizes, width, width * x.element_size())
    if count > 0:
        with torch.cuda.device_of(x):
            rmsnorm_forward_kernel[(min(count, 32 // warps * processors(x)),)](
                flat, weight, alpha, in_mask, y, inv, count, width, flat.stride(0), eps, SIZES=sizes, K=len(sizes),
                S=s, SEG=seg, HAS_MASK=in_mask is not None, LOOP_STAGES=stages, num_warps=warps,
            )  # fmt: skip
    return y, inv


def _launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, inv: Tensor, sizes: Sequence[int],
    in_mask: Tensor | None, need_weight: bool, need_alpha: bool, need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g, v, weight, alpha = rows(grad), rows(x), weight.contiguous(), alpha.contiguous()
    in_mask = None if in_mask is None else in_mask.contiguous()
    count, width = v.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    need_column = need_weight or need_mask
    sizes = tuple(sizes)
    s, seg, warps, stages = launch_shape(sizes, width, 2 * width * x.element_size())
    # what fits beside ~90 registers per thread; beside few rows, half of it keeps the partial column sums small
    programs = min(count, 16 // warps * processors(x))
    if need_column and count < 4096:
        programs = min(count, max(1, 8 // warps) * processors(x))
    shares = torch.empty(programs, len(sizes), dtype=torch.float32, device=x.device) if need_alpha else None
    column = torch.empty(programs, width, dtype=torch.float32, device=x.device) if need_column else None
    if count > 0:
        with torch.cuda.device_of(x):
            rmsnorm_backward_kernel[(programs,)](
                g, v, weight, alpha, in_mask, inv, dx, shares, column, count, width, g.stride(0), v.stride(0),
                SIZES=sizes, K=len(sizes), S=s, SEG=seg, HAS_MASK=in_mask is not None, NEED_ALPHA=need_alpha,
                NEED_COLUMN=need_column, LOOP_STAGES=stages, num_warps=warps,
            )  # fmt: skip
    dw, dalpha, dmask = (no_grad_slot(x) for _ in range(3))
    if column is not None:
        # dm = w P; with a weight gradient too, P itself is needed and scaled by torch
        total, extra = column_sums(column, shares, None if need_weight else weight)
        dalpha = dalpha if extra is None else extra.to(alpha.dtype)
        if need_mask and in_mask is not None:
            dmask = (total * weight if need_weight else total).to(in_mask.dtype)
        if need_weight:
            dw = (total if in_mask is None else total * in_mask).to(weight.dtype)
    elif shares is not None:
        dalpha = column_sums(shares)[0].to(alpha.dtype)
    return dx, dw, dalpha, dmask


@custom_op(
    "mixed_rmsnorm",
    "(Tensor x, Tensor weight, Tensor alpha, int[] sizes, float eps, Tensor? in_mask, str? backend) "
    "-> (Tensor, Tensor)",
)
def _mixed_rmsnorm(
    x: Tensor, weight: Tensor, alpha: Tensor, sizes: Sequence[int], eps: float, in_mask: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    how = resolve("mixed_rmsnorm", backend, x)
    if how == "triton":
        return _launch_forward(x, weight, alpha, sizes, eps, in_mask)
    if how == "cpu":
        return cpu_norm.mixed_rmsnorm(x, weight, alpha, sizes, eps, in_mask)
    y, inv = reference(x, weight, alpha, sizes, eps, in_mask)
    return y.contiguous(), inv


@_mixed_rmsnorm.register_fake
def _(
    x: Tensor, weight: Tensor, alpha: Tensor, sizes: Sequence[int], eps: float, in_mask: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, torch.empty(x.numel() // x.shape[-1], len(sizes), dtype=compute_dtype(x), device=x.device)


@custom_op(
    "mixed_rmsnorm_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor alpha, Tensor inv, int[] sizes, Tensor? in_mask, "
    "bool need_weight, bool need_alpha, bool need_mask, str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _mixed_rmsnorm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, inv: Tensor, sizes: Sequence[int],
    in_mask: Tensor | None, need_weight: bool, need_alpha: bool, need_mask: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    how = resolve("mixed_rmsnorm", backend, x)
    if how == "triton":
        return _launch_backward(grad, x, weight, alpha, inv, sizes, in_mask, need_weight, need_alpha, need_mask)
    if how == "cpu":
        return cpu_norm.mixed_rmsnorm_backward(
            grad, x, weight, alpha, inv, sizes, in_mask, need_weight, need_alpha, need_mask
        )
    dx, dw, dalpha, dmask = reference_backward(
        grad, x, weight, alpha, inv, sizes, in_mask, need_weight, need_alpha, need_mask
    )
    return dx.contiguous(), dw, dalpha, dmask


@_mixed_rmsnorm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, alpha: Tensor, inv: Tensor, sizes: Sequence[int],
    in_mask: Tensor | None, need_weight: bool, need_alpha: bool, need_mask: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dw = torch.empty_like(weight) if need_weight else no_grad_slot(x)
    dalpha = torch.empty_like(alpha) if need_alpha else no_grad_slot(x)
    dmask = torch.empty_like(in_mask) if need_mask and in_mask is not None else no_grad_slot(x)
    return dx, dw, dalpha, dmask


def _setup(ctx, inputs, output):
    x, weight, alpha, sizes, _, in_mask, backend = inputs
    ctx.save_for_backward(x, weight, alpha, output[1], in_mask)
    ctx.set_materialize_grads(False)
    ctx.sizes, ctx.backend = sizes, backend


def _backward(ctx, grad, _):
    x, weight, alpha, inv, in_mask = ctx.saved_tensors
    if grad is None:
        return None, None, None, None, None, None, None
    need_weight, need_alpha = ctx.needs_input_grad[1:3]
    need_mask = ctx.needs_input_grad[5]
    dx, dw, dalpha, dmask = _mixed_rmsnorm_backward(
        grad, x, weight, alpha, inv, ctx.sizes, in_mask, need_weight, need_alpha, need_mask, ctx.backend
    )
    return (dx, dw if need_weight else None, dalpha if need_alpha else None, None, None,
            dmask if need_mask else None, None)


_mixed_rmsnorm.register_autograd(_backward, setup_context=_setup)


def mixed_rmsnorm(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor,
    sizes: Sequence[int],
    eps: float,
    in_mask: Tensor | None = None,
    backend: str | None = None,
    act_bits: Sequence[int] | None = None,
    act_probs: Tensor | None = None,
    act_symmetric: bool = False,
) -> Tensor:
    """in_mask * weight * sum_i alpha_i RMSNorm over the first sizes[i] channels; with act_bits and act_probs [Q] the
    mixture sum_q act_probs[q] Q_q of it, `act_quant_mix` in the same pass (mixed_rmsnorm_quant.py). Gradients to x,
    alpha, in_mask, weight and act_probs, each only if it requires one."""
    n = x.shape[-1]
    if weight.shape != (n,):
        raise bad("mixed_rmsnorm", f"weight {tuple(weight.shape)} does not match x {tuple(x.shape)}")
    if len(sizes) <= 0 or alpha.shape != (len(sizes),):
        raise bad("mixed_rmsnorm", f"alpha {tuple(alpha.shape)} does not match {len(sizes)} sizes")
    if min(sizes) <= 0 or max(sizes) > n:
        raise bad("mixed_rmsnorm", f"sizes {tuple(sizes)} must lie in 1..{n}")
    if in_mask is not None and in_mask.shape != (n,):
        raise bad("mixed_rmsnorm", f"in_mask must be [{n}]")
    if act_bits is None and act_probs is None:
        return _mixed_rmsnorm(x, weight, alpha, list(sizes), eps, in_mask, backend)[0]
    if act_bits is None or act_probs is None:
        raise bad("mixed_rmsnorm", "act_bits and act_probs go together")
    from jointnas_kernels.ops.norm.rms_quant import mixed_rmsnorm_quant  # late: it builds on this file

    return mixed_rmsnorm_quant(
        x, weight, alpha, list(sizes), eps, in_mask, list(act_bits), act_probs, act_symmetric, backend
    )
