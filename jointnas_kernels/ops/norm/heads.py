"""head_rmsnorm: the expectation, over head-dim choices, of RMSNorm over the dims of each head (Qwen3's q_norm, k_norm).

With S_j the dims of the rotary pairs (i, i + D/2) with i a multiple of D/d_j, those that a d_j-wide head keeps:

    p = mask * x     inv_j = rsqrt(mean over S_j of p^2 + eps)     t_k = sum_{j: k in S_j} alpha_j inv_j     y = w p t

At one-hot alpha this is RMSNorm over the kept dims, and 0 in the others. Backward, with g = dL/dy, h = w g and
A_j = sum over S_j of h p:

    dp_k = h_k t_k - p_k sum_{j: k in S_j} alpha_j A_j inv_j^3 / d_j
    dx = mask dp      dmask = sum over tokens of x dp      dalpha_j = sum over tokens and heads of inv_j A_j

inv [tokens, H, K] is the only thing saved beside the inputs.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from jointnas_kernels.ops.core.columns import STAGES, column_sums, partial_sums
from jointnas_kernels.ops.core.op import Op
from jointnas_kernels.ops.core.tensors import bad, compute_dtype, dense_like, in_dtype_of, power_of_two
from jointnas_kernels.ops.width.masks import check_head_dim
from jointnas_kernels.ops.width.rope import load_halves, store_halves, tokens_per_program

Gradients = tuple[Tensor, Tensor | None, Tensor | None]  # dx, dmask, dalpha


def _subset_sums(v: Tensor, dims: Sequence[int]) -> Tensor:
    """[..., K]: sum over S_j of v [..., D]."""
    half = v.shape[-1] // 2
    pairs = v[..., :half] + v[..., half:]
    return torch.stack([pairs[..., :: 2 * half // d].sum(-1) for d in dims], dim=-1)


def _spread(value: Tensor, dims: Sequence[int], D: int) -> Tensor:
    """[..., D]: sum of value[..., j] over the choices that keep the dim."""
    pairs = value.new_zeros(*value.shape[:-1], D // 2)
    for j, d in enumerate(dims):
        pairs[..., :: D // d] += value[..., j : j + 1]
    return torch.cat([pairs, pairs], dim=-1)


def _reference(
    x: Tensor, weight: Tensor, mask: Tensor, alpha: Tensor, dims: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """y like x and inv [tokens, H, K]."""
    acc = compute_dtype(x.dtype)
    p = x.to(acc) * mask.to(acc)
    inv = torch.rsqrt(_subset_sums(p.square(), dims) / p.new_tensor(dims) + eps)
    t = _spread(inv * alpha.to(acc), dims, x.shape[-1])
    return (p * t * weight.to(acc)).to(x.dtype), inv.reshape(-1, *inv.shape[-2:])


def _reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, alpha: Tensor, inv: Tensor, dims: Sequence[int],
    eps: float, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    acc, shape, dim = compute_dtype(x.dtype), x.shape, x.shape[-1]
    v, m, a = x.to(acc).reshape(-1, *shape[-2:]), mask.to(acc), alpha.to(acc)
    h = grad.to(acc).reshape(v.shape) * weight.to(acc)
    p = v * m
    sums = _subset_sums(h * p, dims)
    dp = h * _spread(inv * a, dims, dim) - p * _spread(a * sums * inv**3 / v.new_tensor(dims), dims, dim)
    dmask = (v * dp).sum(0).to(mask.dtype) if need[1] else None
    dalpha = (inv * sums).sum((0, 1)).to(alpha.dtype) if need[2] else None
    return (m * dp).to(x.dtype).reshape(shape), dmask, dalpha


@triton.jit
def head_rmsnorm_kernel(
    x_ptr, w_ptr, mask_ptr, alpha_ptr, y_ptr, inv_ptr, tokens, H, half, x_st, x_sh, eps, per_program,
    DIMS: tl.constexpr, K: tl.constexpr, LOOP_STAGES: tl.constexpr, HP: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """``per_program`` tokens, all heads."""
    pid = tl.program_id(0)
    d = tl.arange(0, HALF)
    head = tl.arange(0, HP)
    m1, m2 = load_halves(mask_ptr, 2 * half, H, half, HP, HALF)
    w1 = tl.load(w_ptr + d, mask=d < half, other=0.0).to(tl.float32)[None, :]  # [1, HALF]
    w2 = tl.load(w_ptr + half + d, mask=d < half, other=0.0).to(tl.float32)[None, :]
    for i in tl.range(0, per_program, num_stages=LOOP_STAGES):
        token = (pid * per_program + i).to(tl.int64)
        heads = (token < tokens).to(tl.int32) * H  # past the last token no head is loaded or stored
        x1, x2 = load_halves(x_ptr + token * x_st, x_sh, heads, half, HP, HALF)
        p1, p2 = m1 * x1, m2 * x2
        squares = p1 * p1 + p2 * p2
        t = tl.zeros([HP, HALF], tl.float32)
        for j in tl.static_range(K):
            kept = (d % (2 * half // DIMS[j]) == 0)[None, :]  # chosen, not multiplied: NaN elsewhere stays there
            inv = tl.rsqrt(tl.sum(tl.where(kept, squares, 0.0), axis=1) / DIMS[j] + eps)  # [HP]
            tl.store(inv_ptr + (token * H + head) * K + j, inv, mask=head < heads)
            t += tl.where(kept, (tl.load(alpha_ptr + j).to(tl.float32) * inv)[:, None], 0.0)
        store_halves(y_ptr + token * H * (2 * half), p1 * w1 * t, p2 * w2 * t, heads, half, HP, HALF)


@triton.jit
def head_rmsnorm_backward_kernel(
    g_ptr, x_ptr, w_ptr, mask_ptr, alpha_ptr, inv_ptr, dx_ptr, dmask_ptr, dalpha_ptr, tokens, H, half, g_st, g_sh,
    x_st, x_sh, per_program,
    DIMS: tl.constexpr, K: tl.constexpr, NEED_MASK: tl.constexpr, NEED_ALPHA: tl.constexpr, LOOP_STAGES: tl.constexpr,
    HP: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """dx of ``per_program`` tokens, and this program's share of dmask (NEED_MASK) and dalpha (NEED_ALPHA)."""
    pid = tl.program_id(0)
    d = tl.arange(0, HALF)
    head = tl.arange(0, HP)
    choice = tl.arange(0, 16)
    m1, m2 = load_halves(mask_ptr, 2 * half, H, half, HP, HALF)
    w1 = tl.load(w_ptr + d, mask=d < half, other=0.0).to(tl.float32)[None, :]  # [1, HALF]
    w2 = tl.load(w_ptr + half + d, mask=d < half, other=0.0).to(tl.float32)[None, :]
    dm1 = tl.zeros([HP, HALF], tl.float32)
    dm2 = tl.zeros([HP, HALF], tl.float32)
    dalpha = tl.zeros([16], tl.float32)
    for i in tl.range(0, per_program, num_stages=LOOP_STAGES):
        token = (pid * per_program + i).to(tl.int64)
        heads = (token < tokens).to(tl.int32) * H
        x1, x2 = load_halves(x_ptr + token * x_st, x_sh, heads, half, HP, HALF)
        g1, g2 = load_halves(g_ptr + token * g_st, g_sh, heads, half, HP, HALF)
        p1, p2 = m1 * x1, m2 * x2
        h1, h2 = w1 * g1, w2 * g2
        products = h1 * p1 + h2 * p2
        t = tl.zeros([HP, HALF], tl.float32)
        back = tl.zeros([HP, HALF], tl.float32)
        for j in tl.static_range(K):
            kept = (d % (2 * half // DIMS[j]) == 0)[None, :]  # chosen, not multiplied: NaN elsewhere stays there
            inv = tl.load(inv_ptr + (token * H + head) * K + j, mask=head < heads, other=0.0)  # [HP]
            alpha = tl.load(alpha_ptr + j).to(tl.float32)
            share = inv * tl.sum(tl.where(kept, products, 0.0), axis=1)  # [HP], inv_j A_j
            t += tl.where(kept, (alpha * inv)[:, None], 0.0)
            back += tl.where(kept, (alpha * share * inv * inv / DIMS[j])[:, None], 0.0)
            if NEED_ALPHA:
                dalpha += tl.where(choice == j, tl.sum(share, axis=0), 0.0)
        dp1, dp2 = h1 * t - p1 * back, h2 * t - p2 * back
        store_halves(dx_ptr + token * H * (2 * half), m1 * dp1, m2 * dp2, heads, half, HP, HALF)
        if NEED_MASK:
            dm1 += x1 * dp1
            dm2 += x2 * dp2
    if NEED_MASK:
        store_halves(dmask_ptr + pid * H * (2 * half), dm1, dm2, H, half, HP, HALF)
    if NEED_ALPHA:
        tl.store(dalpha_ptr + pid * K + choice, dalpha, mask=choice < K)


def _tokens(x: Tensor) -> Tensor:
    """[tokens, H, D] with unit stride along D; a view whenever the layout allows it."""
    flat = x.reshape(-1, *x.shape[-2:])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _launch(
    x: Tensor, weight: Tensor, mask: Tensor, alpha: Tensor, dims: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    flat = _tokens(x)
    count, heads, dim = flat.shape
    y, inv = dense_like(x), torch.empty(count, heads, len(dims), dtype=torch.float32, device=x.device)
    per_program = tokens_per_program(x, count, False)
    hp, half = power_of_two(heads), power_of_two(dim // 2)
    if count > 0:
        with torch.cuda.device_of(x):
            head_rmsnorm_kernel[(-(-count // per_program),)](
                flat, weight.contiguous(), mask.contiguous(), alpha.contiguous(), y, inv, count, heads, dim // 2,
                flat.stride(0), flat.stride(1), eps, per_program, DIMS=tuple(dims), K=len(dims),
                LOOP_STAGES=STAGES if per_program > 1 else 1, HP=hp, HALF=half, num_warps=4 if hp * half < 2048 else 8,
            )  # fmt: skip
    return y, inv


def _launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, alpha: Tensor, inv: Tensor, dims: Sequence[int],
    eps: float, need: Sequence[bool],
) -> Gradients:  # fmt: skip
    g, flat, (_, need_mask, need_alpha) = _tokens(grad), _tokens(x), need
    count, heads, dim = flat.shape
    dx, per_program = dense_like(x), tokens_per_program(x, count, need_mask or need_alpha)
    programs = -(-count // per_program)
    masks = partial_sums(need_mask, programs, heads * dim, x.device)
    shares = partial_sums(need_alpha, programs, len(dims), x.device)
    hp, half = power_of_two(heads), power_of_two(dim // 2)
    if count > 0:
        with torch.cuda.device_of(x):
            head_rmsnorm_backward_kernel[(programs,)](
                g, flat, weight.contiguous(), mask.contiguous(), alpha.contiguous(), inv, dx, masks, shares, count,
                heads, dim // 2, g.stride(0), g.stride(1), flat.stride(0), flat.stride(1), per_program,
                DIMS=tuple(dims), K=len(dims), NEED_MASK=need_mask, NEED_ALPHA=need_alpha,
                LOOP_STAGES=2 if per_program > 1 else 1, HP=hp, HALF=half,
                num_warps=4 if hp * half < 2048 else 16 if need_mask else 8,
            )  # fmt: skip
    dmask, dalpha = column_sums(masks, shares)
    return dx, in_dtype_of(dmask, mask), in_dtype_of(dalpha, alpha)


_op = Op(
    "head_rmsnorm",
    {"triton": _launch, "reference": _reference},
    {"triton": _launch_backward, "reference": _reference_backward},
    frozen=("weight",),
)


def head_rmsnorm(
    x: Tensor, weight: Tensor, mask: Tensor, alpha: Tensor, dims: Sequence[int], eps: float, backend: str | None = None
) -> Tensor:
    """weight * sum_j alpha_j RMSNorm(mask * x over the dims that a dims[j]-wide head keeps), which is 0 in the others.

    Args:
        x: [..., H, D] in any floating dtype, D even.
        weight: [D], any floating dtype; frozen, it gets no gradient.
        mask: [H, D], fp32: the OUT mask of the projection that made x.
        alpha: [K], fp32: weights of the choices, K up to 16. They need not sum to 1: attention folds its scale into
            them.
        dims: K of them, even divisors of D. Kept are the rotary pairs (i, i + D/2) with i a multiple of D/dims[j].
        eps: added to the mean of squares.
        backend: "triton" or "reference"; None: by device and dtype.

    Returns:
        [..., H, D] in the dtype of x; computed in fp32 (fp64 for fp64). Gradients to x, mask and alpha.

    Raises:
        JointNASError: shapes or dims that do not fit, or a backend that cannot run.
    """
    op = "head_rmsnorm"
    if x.dim() < 2 or x.shape[-1] % 2 != 0:
        raise bad(op, f"x {tuple(x.shape)} must be [..., heads, head_dim] with an even head_dim")
    if weight.shape != x.shape[-1:] or mask.shape != x.shape[-2:]:
        raise bad(op, f"weight {tuple(weight.shape)} and mask {tuple(mask.shape)} do not match x {tuple(x.shape)}")
    if not 0 < len(dims) <= 16 or alpha.shape != (len(dims),):
        raise bad(op, f"alpha {tuple(alpha.shape)} does not match {len(dims)} dims, of which there are 1 to 16")
    for d in dims:
        check_head_dim(op, d, x.shape[-1])
    return _op(x, weight, mask, alpha, list(dims), eps, backend)[0]
