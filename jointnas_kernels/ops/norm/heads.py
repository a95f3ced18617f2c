"""head_rmsnorm: the expectation, over head-dim choices, of RMSNorm over the dims of each head (Qwen3's q_norm, k_norm).

    x [..., H, D] any float, weight [D], mask [H, D] fp32, alpha [K] fp32, dims d_1..d_K
    S_j: the dims of the rotary pairs (i, i + D/2) with i a multiple of D/d_j, those that a d_j-wide head keeps
    p = mask * x                                          the OUT mask of the projection that made x
    inv_j = rsqrt(mean over S_j of p^2 + eps)             t_k = sum_{j: k in S_j} alpha_j inv_j
    y = weight * p * t

At one-hot alpha this is RMSNorm over the kept dims, and 0 in the others. alpha need not sum to 1: attention folds its
scale into it. Backward, with g = dL/dy, h = weight g and A_j = sum over S_j of h p:

    dp_k = h_k t_k - p_k sum_{j: k in S_j} alpha_j A_j inv_j^3 / d_j
    dx = mask dp      dmask = sum over tokens of x dp      dalpha_j = sum over tokens and heads of inv_j A_j

inv [tokens, H, K] is the only thing saved beside the inputs; the weight is frozen and gets no gradient.
"""

from collections.abc import Sequence

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
)
from jointnas_kernels.ops.width.rope import load_halves, store_halves

AVAILABLE = ("triton", "reference")


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


def _counts(dims: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(dims), dtype=like.dtype, device=like.device)


def reference(
    x: Tensor, weight: Tensor, mask: Tensor, alpha: Tensor, dims: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """y like x and inv [tokens, H, K]."""
    acc = compute_dtype(x)
    p = x.to(acc) * mask.to(acc)
    inv = torch.rsqrt(_subset_sums(p.square(), dims) / _counts(dims, p) + eps)
    t = _spread(inv * alpha.to(acc), dims, x.shape[-1])
    return (p * t * weight.to(acc)).to(x.dtype), inv.reshape(-1, *inv.shape[-2:])


def reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, alpha: Tensor, inv: Tensor, dims: Sequence[int],
    need_mask: bool, need_alpha: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    acc, shape, dim = compute_dtype(x), x.shape, x.shape[-1]
    v, m, a = x.to(acc).reshape(-1, *shape[-2:]), mask.to(acc), alpha.to(acc)
    h = grad.to(acc).reshape(v.shape) * weight.to(acc)
    p = v * m
    sums = _subset_sums(h * p, dims)
    dp = h * _spread(inv * a, dims, dim) - p * _spread(a * sums * inv**3 / _counts(dims, v), dims, dim)
    dmask = (v * dp).sum(0).to(mask.dtype) if need_mask else no_grad_slot(x)
    dalpha = (inv * sums).sum((0, 1)).to(alpha.dtype) if need_alpha else no_grad_slot(x)
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
            member = (d % (2 * half // DIMS[j]) == 0).to(tl.float32)[None, :]
            inv = tl.rsqrt(tl.sum(squares * member, axis=1) / DIMS[j] + eps)  # [HP]
            tl.store(inv_ptr + (token * H + head) * K + j, inv, mask=head < heads)
            t += tl.load(alpha_ptr + j).to(tl.float32) * inv[:, None] * member
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
            member = (d % (2 * half // DIMS[j]) == 0).to(tl.float32)[None, :]
            inv = tl.load(inv_ptr + (token * H + head) * K + j, mask=head < heads, other=0.0)  # [HP]
            alpha = tl.load(alpha_ptr + j).to(tl.float32)
            share = inv * tl.sum(products * member, axis=1)  # [HP], inv_j A_j
            t += alpha * inv[:, None] * member
            back += (alpha * share * inv * inv / DIMS[j])[:, None] * member
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


def _launch_forward(
    x: Tensor, weight: Tensor, mask: Tensor, alpha: Tensor, dims: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    flat = _tokens(x)
    count, heads, dim = flat.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inv = torch.empty(count, heads, len(dims), dtype=torch.float32, device=x.device)
    per_program = max(1, min(8, count // (2 * processors(x))))  # the masks in registers over up to 8 tokens
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
    need_mask: bool, need_alpha: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    g, flat = _tokens(grad), _tokens(x)
    count, heads, dim = flat.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    per_program = max(1, min(8, count // (2 * processors(x))))
    if need_mask or need_alpha:  # two programs per processor bound the partial sums
        per_program = max(1, -(-count // (2 * processors(x))))
    programs = -(-count // per_program)
    masks = torch.empty(programs, heads * dim, dtype=torch.float32, device=x.device) if need_mask else None
    shares = torch.empty(programs, len(dims), dtype=torch.float32, device=x.device) if need_alpha else None
    hp, half = power_of_two(heads), power_of_two(dim // 2)
    if count > 0:
        with torch.cuda.device_of(x):
            head_rmsnorm_backward_kernel[(programs,)](
                g, flat, weight.contiguous(), mask.contiguous(), alpha.contiguous(), inv, dx, masks, shares, count,
                heads, dim // 2, g.stride(0), g.stride(1), flat.stride(0), flat.stride(1), per_program,
                DIMS=tuple(dims), K=len(dims), NEED_MASK=need_mask, NEED_ALPHA=need_alpha,
                LOOP_STAGES=2 if per_program > 1 else 1, HP=hp, HALF=half,
                num_warps=4 if hp * half < 2048 else 8 if masks is None else 16,
            )  # fmt: skip
    dmask = dalpha = no_grad_slot(x)
    if masks is not None:
        total, extra = column_sums(masks, shares)
        dmask = total.view(heads, dim).to(mask.dtype)
        dalpha = dalpha if extra is None else extra.to(alpha.dtype)
    elif shares is not None:
        dalpha = column_sums(shares)[0].to(alpha.dtype)
    return dx, dmask, dalpha


@custom_op(
    "head_rmsnorm",
    "(Tensor x, Tensor weight, Tensor mask, Tensor alpha, int[] dims, float eps, str? backend) -> (Tensor, Tensor)",
)
def _head_rmsnorm(
    x: Tensor, weight: Tensor, mask: Tensor, alpha: Tensor, dims: Sequence[int], eps: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    if resolve("head_rmsnorm", backend, x, AVAILABLE) == "triton":
        return _launch_forward(x, weight, mask, alpha, dims, eps)
    y, inv = reference(x, weight, mask, alpha, dims, eps)
    return y.contiguous(), inv


@_head_rmsnorm.register_fake
def _(
    x: Tensor, weight: Tensor, mask: Tensor, alpha: Tensor, dims: Sequence[int], eps: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    heads, dim = x.shape[-2:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, torch.empty(x.numel() // (heads * dim), heads, len(dims), dtype=compute_dtype(x), device=x.device)


@custom_op(
    "head_rmsnorm_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor mask, Tensor alpha, Tensor inv, int[] dims, bool need_mask, "
    "bool need_alpha, str? backend) -> (Tensor, Tensor, Tensor)",
)
def _head_rmsnorm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, alpha: Tensor, inv: Tensor, dims: Sequence[int],
    need_mask: bool, need_alpha: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if resolve("head_rmsnorm", backend, x, AVAILABLE) == "triton":
        return _launch_backward(grad, x, weight, mask, alpha, inv, dims, need_mask, need_alpha)
    dx, dmask, dalpha = reference_backward(grad, x, weight, mask, alpha, inv, dims, need_mask, need_alpha)
    return dx.contiguous(), dmask, dalpha


@_head_rmsnorm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, alpha: Tensor, inv: Tensor, dims: Sequence[int],
    need_mask: bool, need_alpha: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return (dx, torch.empty_like(mask) if need_mask else no_grad_slot(x),
            torch.empty_like(alpha) if need_alpha else no_grad_slot(x))


def _setup(ctx, inputs, output):
    x, weight, mask, alpha, dims, _, backend = inputs
    ctx.save_for_backward(x, weight, mask, alpha, output[1])
    ctx.set_materialize_grads(False)
    ctx.dims, ctx.backend = dims, backend


def _backward(ctx, grad, _):
    x, weight, mask, alpha, inv = ctx.saved_tensors
    if grad is None:
        return None, None, None, None, None, None, None
    need_mask, need_alpha = ctx.needs_input_grad[2:4]
    dx, dmask, dalpha = _head_rmsnorm_backward(
        grad, x, weight, mask, alpha, inv, ctx.dims, need_mask, need_alpha, ctx.backend
    )
    return dx, None, dmask if need_mask else None, dalpha if need_alpha else None, None, None, None


_head_rmsnorm.register_autograd(_backward, setup_context=_setup)


def head_rmsnorm(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    alpha: Tensor,
    dims: Sequence[int],
    eps: float,
    backend: str | None = None,
) -> Tensor:
    """weight * sum_j alpha_j RMSNorm of mask * x over the dims that a dims[j]-wide head keeps; gradients to x, mask and
    alpha."""
    op = "head_rmsnorm"
    if x.dim() < 2 or x.shape[-1] % 2 != 0:
        raise bad(op, f"x {tuple(x.shape)} must be [..., heads, head_dim] with an even head_dim")
    if weight.shape != x.shape[-1:] or mask.shape != x.shape[-2:]:
        raise bad(op, f"weight {tuple(weight.shape)} and mask {tuple(mask.shape)} do not match x {tuple(x.shape)}")
    if not 0 < len(dims) <= 16 or alpha.shape != (len(dims),):
        raise bad(op, f"alpha {tuple(alpha.shape)} does not match {len(dims)} dims, of which there are 1 to 16")
    for d in dims:
        if not 0 < d <= x.shape[-1] or d % 2 != 0 or x.shape[-1] % d != 0:
            raise bad(op, f"head_dim {d} must be even and divide the full head_dim {x.shape[-1]}")
    return _head_rmsnorm(x, weight, mask, alpha, list(dims), eps, backend)[0]
