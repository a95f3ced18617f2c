"""mixed_linear_group: several LoRA linears of one input (q/k/v, gate/up) as one autograd op.

    y_j = x W_j^T + u_j B_j^T + bias_j,   [u_1 .. u_k] = s x [A_1; ..; A_k]^T        one GEMM for all u
    with g_j = dL/dy_j and v = s [g_1 B_1 .. g_k B_k]:
    dx = sum_j g_j W_j + v [A_1; ..; A_k]         one accumulator (addmm, beta = 1) instead of k tensors and k - 1 adds
    [dA_1; ..; dA_k] = v^T x                      one GEMM          dB_j = g_j^T u_j

Prefer it wherever linears share an input: for q/k/v it launches 8 GEMMs forward and 11 backward where separate
``mixed_linear`` calls launch 9 and 15 plus two adds over [rows, I], and it reads x for LoRA once. Masks are left to the
neighbouring elementwise ops, which carry them for free.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels.ops._dispatch import check, no_grad_slot, rows
from jointnas_kernels.ops.mixed_linear import autocast_dtype, check_shapes, mm_as, scaled_mm


def _stack(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return tensors[0].to(dtype) if len(tensors) == 1 else torch.cat([t.to(dtype) for t in tensors])


@torch.library.custom_op(
    "jointnas::mixed_linear_group",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] lora_as, Tensor[] lora_bs, float scaling, Tensor[] biases) "
    "-> Tensor[]",
)
def _group(
    x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], scaling: float,
    biases: Sequence[Tensor],
) -> list[Tensor]:
    """[y_1, .., y_k, u]."""
    flat = rows(x)
    u = scaled_mm(flat, _stack(lora_as, x.dtype).t(), scaling)
    outputs, start = [], 0
    for j, (weight, b) in enumerate(zip(weights, lora_bs, strict=True)):
        y = torch.addmm(biases[j], flat, weight.t()) if biases else flat @ weight.t()
        y.addmm_(u[:, start : start + b.shape[1]], b.to(x.dtype).t())
        start += b.shape[1]
        outputs.append(y.view(*x.shape[:-1], weight.shape[0]))
    return [*outputs, u]


@_group.register_fake
def _(
    x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], scaling: float,
    biases: Sequence[Tensor],
) -> list[Tensor]:
    outputs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    return [*outputs, x.new_empty(x.numel() // x.shape[-1], sum(a.shape[0] for a in lora_as))]


@torch.library.custom_op(
    "jointnas::mixed_linear_group_backward",
    mutates_args=(),
    schema="(Tensor[] grads, Tensor? x, Tensor? u, Tensor[] weights, Tensor[] lora_as, Tensor[] lora_bs, "
    "float scaling, Tensor[] biases, bool need_x, bool need_a, bool need_b, bool need_bias) -> Tensor[]",
)
def _group_backward(
    grads: Sequence[Tensor], x: Tensor | None, u: Tensor | None, weights: Sequence[Tensor],
    lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], scaling: float, biases: Sequence[Tensor], need_x: bool,
    need_a: bool, need_b: bool, need_bias: bool,
) -> list[Tensor]:
    """[dx, all dA stacked, the dB, the dbias]; what is not needed is empty."""
    dtype = grads[0].dtype
    flat = [rows(g) for g in grads]
    ranks = [b.shape[1] for b in lora_bs]
    dx = no_grad_slot(grads[0])
    da = no_grad_slot(grads[0])
    v = flat[0].new_empty(flat[0].shape[0], sum(ranks))
    if need_x or need_a:
        for g, b, part in zip(flat, lora_bs, v.split(ranks, dim=1), strict=True):
            part.addmm_(g, b.to(dtype), beta=0, alpha=scaling)
    if need_x:
        dx = v @ _stack(lora_as, dtype)
        for g, weight in zip(flat, weights, strict=True):
            dx.addmm_(g, weight)
        dx = dx.view(*grads[0].shape[:-1], weights[0].shape[1])
    if need_a and x is not None:
        da = mm_as(v.t(), rows(x), lora_as[0].dtype)
    if need_b and u is not None:
        parts = u.split(ranks, dim=1)
        dbs = [mm_as(g.t(), p, b.dtype) for g, p, b in zip(flat, parts, lora_bs, strict=True)]
    else:
        dbs = [no_grad_slot(b) for b in lora_bs]
    total = torch.promote_types(dtype, torch.float32)
    dbiases = [g.sum(0, dtype=total).to(b.dtype) if need_bias else no_grad_slot(b)
               for g, b in zip(flat, biases, strict=False)]
    return [dx, da, *dbs, *dbiases]


@_group_backward.register_fake
def _(
    grads: Sequence[Tensor], x: Tensor | None, u: Tensor | None, weights: Sequence[Tensor],
    lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], scaling: float, biases: Sequence[Tensor], need_x: bool,
    need_a: bool, need_b: bool, need_bias: bool,
) -> list[Tensor]:
    def like(tensors: Sequence[Tensor], wanted: bool) -> list[Tensor]:
        return [t.new_empty(t.shape) if wanted else no_grad_slot(t) for t in tensors]

    dx = grads[0].new_empty(*grads[0].shape[:-1], weights[0].shape[1]) if need_x else no_grad_slot(grads[0])
    da = no_grad_slot(dx)
    if need_a:
        da = lora_as[0].new_empty(sum(a.shape[0] for a in lora_as), lora_as[0].shape[1])
    return [dx, da, *like(lora_bs, need_b), *like(biases, need_bias)]


def _setup(ctx, inputs, output):
    x, weights, lora_as, lora_bs, scaling, biases = inputs
    # needs_input_grad is flat here and nested in backward, so the tensors are asked instead
    ctx.need = [any(t.requires_grad for t in group) for group in ([x], lora_as, lora_bs, biases)]
    ctx.counts = len(weights), len(biases)
    ctx.save_for_backward(x if ctx.need[1] else None, output[-1] if ctx.need[2] else None, *weights, *lora_as,
                          *lora_bs, *biases)
    ctx.scaling = scaling


def _backward(ctx, grads):
    x, u, *rest = ctx.saved_tensors
    k, n_bias = ctx.counts
    weights, lora_as, lora_bs, biases = rest[:k], rest[k : 2 * k], rest[2 * k : 3 * k], rest[3 * k :]
    out = torch.ops.jointnas.mixed_linear_group_backward(
        list(grads[:k]), x, u, weights, lora_as, lora_bs, ctx.scaling, biases, *ctx.need
    )
    need_x, need_a, need_b, need_bias = ctx.need
    das = list(out[1].split([a.shape[0] for a in lora_as])) if need_a else [None] * k
    return (out[0] if need_x else None, [None] * k, das, out[2 : k + 2] if need_b else [None] * k, None,
            out[k + 2 :] if need_bias else [None] * n_bias)


_group.register_autograd(_backward, setup_context=_setup)


def mixed_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scaling: float = 1.0,
    biases: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """(x (W_j + scaling B_j A_j)^T + bias_j for each j); gradients to x, LoRA and biases. Weights are frozen.

    Runs in x's dtype (under autocast in its dtype); LoRA may be fp32 beside half weights.
    """
    op = "mixed_linear_group"
    k = len(weights)
    biases = [] if biases is None else biases
    check(k > 0 and len(lora_as) == k and len(lora_bs) == k and len(biases) in (0, k), op,
          f"{k} weights, {len(lora_as)} lora_as, {len(lora_bs)} lora_bs, {len(biases)} biases: counts must agree")
    for j in range(k):
        check_shapes(op, x, weights[j], lora_as[j], lora_bs[j], biases[j] if biases else None)
        check(not weights[j].requires_grad, op, f"weight {j} requires a gradient; use mixed_linear for trained weights")
    dtype = autocast_dtype(x)
    if torch.is_autocast_enabled(x.device.type):
        x, weights = x.to(dtype), [w.to(dtype) for w in weights]
    check(all(w.dtype == dtype for w in weights), op,
          f"x is {dtype} and a weight {weights[0].dtype}; they must agree outside autocast")
    biases = [b.to(dtype) for b in biases]
    outputs = torch.ops.jointnas.mixed_linear_group(x, list(weights), list(lora_as), list(lora_bs), scaling, biases)
    return tuple(outputs[:k])
