"""masked_rope: rotary embedding of masked queries and keys, written where SDPA wants them.

    q [B, T, H, D], k [B, T, Hkv, D] any float; cos, sin [B or 1, T, D]; q_mask [H, D], k_mask [Hkv, D] fp32
    p = mask * q;  out = p cos + rot(p) sin,  rot(p)_i = -p_{i+D/2} for i < D/2, p_{i-D/2} else   (rotate-half)

The inner op keeps [B, T, heads, D] in memory (one contiguous read, one contiguous write); the public function returns
the transposed views [B, heads, T, D]. Queries and keys share one launch. The attention scale is folded into q_mask by
the caller, so SDPA runs with scale=1. Backward, with halves 1, 2 and G = dL/dout:

    dp1 = G1 cos1 + G2 sin2     dp2 = G2 cos2 - G1 sin1     dq = mask dp     dmask = sum over B, T of q dp
"""

import torch
from torch import Tensor

from jointnas_kernels.ops._dispatch import check, compute_dtype, no_grad_slot, resolve


def _rotate(p: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = p.chunk(2, dim=-1)
    return p * cos + torch.cat([-second, first], dim=-1) * sin


def _rotate_transposed(g: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = (g * sin).chunk(2, dim=-1)
    return g * cos + torch.cat([second, -first], dim=-1)


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_mask: Tensor, k_mask: Tensor) -> tuple[Tensor, Tensor]:
    acc = compute_dtype(q)
    c, s = cos.to(acc).unsqueeze(2), sin.to(acc).unsqueeze(2)  # [B or 1, T, 1, D]
    q_out = _rotate(q.to(acc) * q_mask.to(acc), c, s).to(q.dtype)
    return q_out, _rotate(k.to(acc) * k_mask.to(acc), c, s).to(k.dtype)


def reference_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_mask: Tensor, k_mask: Tensor,
    need_q_mask: bool, need_k_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = compute_dtype(dq_out)
    c, s = cos.to(acc).unsqueeze(2), sin.to(acc).unsqueeze(2)
    dp, dr = _rotate_transposed(dq_out.to(acc), c, s), _rotate_transposed(dk_out.to(acc), c, s)
    dq, dk = (dp * q_mask.to(acc)).to(dq_out.dtype), (dr * k_mask.to(acc)).to(dk_out.dtype)
    dqm = (q.to(acc) * dp).sum((0, 1)).to(q_mask.dtype) if need_q_mask else no_grad_slot(dq_out)
    dkm = (k.to(acc) * dr).sum((0, 1)).to(k_mask.dtype) if need_k_mask else no_grad_slot(dq_out)
    return dq, dk, dqm, dkm


@torch.library.custom_op(
    "jointnas::masked_rope",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor q_mask, Tensor k_mask, str? backend) "
    "-> (Tensor, Tensor)",
)
def _masked_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_mask: Tensor, k_mask: Tensor, backend: str | None
) -> tuple[Tensor, Tensor]:
    resolve("masked_rope", backend, q, ("reference",))
    q_out, k_out = reference(q, k, cos, sin, q_mask, k_mask)
    return q_out.contiguous(), k_out.contiguous()


@_masked_rope.register_fake
def _(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_mask: Tensor, k_mask: Tensor, backend: str | None
) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)


@torch.library.custom_op(
    "jointnas::masked_rope_backward",
    mutates_args=(),
    schema="(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor q_mask, Tensor k_mask, "
    "bool need_q_mask, bool need_k_mask, str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _masked_rope_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_mask: Tensor, k_mask: Tensor,
    need_q_mask: bool, need_k_mask: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dq_mask, dk_mask. Without the mask flags q and k are not read (any tensor may stand for them)."""
    resolve("masked_rope", backend, dq_out, ("reference",))
    dq, dk, dqm, dkm = reference_backward(
        dq_out, dk_out, q, k, cos, sin, q_mask, k_mask, need_q_mask, need_k_mask
    )
    return dq.contiguous(), dk.contiguous(), dqm, dkm


@_masked_rope_backward.register_fake
def _(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_mask: Tensor, k_mask: Tensor,
    need_q_mask: bool, need_k_mask: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq = torch.empty(dq_out.shape, dtype=dq_out.dtype, device=dq_out.device)
    dk = torch.empty(dk_out.shape, dtype=dk_out.dtype, device=dk_out.device)
    dqm = torch.empty_like(q_mask) if need_q_mask else no_grad_slot(dq_out)
    dkm = torch.empty_like(k_mask) if need_k_mask else no_grad_slot(dq_out)
    return dq, dk, dqm, dkm


def _setup(ctx, inputs, output):
    q, k, cos, sin, q_mask, k_mask, backend = inputs
    need = ctx.needs_input_grad
    ctx.save_for_backward(q if need[4] else None, k if need[5] else None, cos, sin, q_mask, k_mask)
    ctx.backend = backend


def _backward(ctx, dq_out, dk_out):
    q, k, cos, sin, q_mask, k_mask = ctx.saved_tensors
    need_q_mask, need_k_mask = ctx.needs_input_grad[4:6]
    dq, dk, dqm, dkm = torch.ops.jointnas.masked_rope_backward(
        dq_out, dk_out, dq_out if q is None else q, dk_out if k is None else k, cos, sin, q_mask, k_mask,
        need_q_mask, need_k_mask, ctx.backend,
    )
    return dq, dk, None, None, dqm if need_q_mask else None, dkm if need_k_mask else None, None


_masked_rope.register_autograd(_backward, setup_context=_setup)


def masked_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_mask: Tensor, k_mask: Tensor, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """rope(q * q_mask), rope(k * k_mask) as [B, H, T, D] and [B, Hkv, T, D]; gradients to q, k and the masks.

    The results are transposed views of [B, T, heads, D] memory, the layout fused attention reads fastest. cos and sin
    follow Hugging Face (both halves filled) and get no gradient.
    """
    op = "masked_rope"
    check(q.dim() == 4 and k.dim() == 4 and q.shape[:2] == k.shape[:2] and q.shape[-1] == k.shape[-1], op,
          f"q {tuple(q.shape)} and k {tuple(k.shape)} must be [B, T, heads, D] with equal B, T, D")
    check(q.shape[-1] % 2 == 0, op, f"head_dim {q.shape[-1]} must be even")
    check(q.dtype == k.dtype, op, f"q is {q.dtype}, k is {k.dtype}")
    for name, table in (("cos", cos), ("sin", sin)):
        check(table.dim() == 3 and table.shape[0] in (1, q.shape[0]) and table.shape[1] == q.shape[1]
              and table.shape[2] == q.shape[3], op, f"{name} {tuple(table.shape)} must be [B or 1, T, D] for q "
              f"{tuple(q.shape)}")
    check(q_mask.shape == q.shape[2:], op, f"q_mask {tuple(q_mask.shape)} must be {tuple(q.shape[2:])}")
    check(k_mask.shape == k.shape[2:], op, f"k_mask {tuple(k_mask.shape)} must be {tuple(k.shape[2:])}")
    q_out, k_out = torch.ops.jointnas.masked_rope(q, k, cos, sin, q_mask, k_mask, backend)
    return q_out.transpose(1, 2), k_out.transpose(1, 2)
