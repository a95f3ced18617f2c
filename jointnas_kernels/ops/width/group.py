"""mixed_linear_group: two or three LoRA linears of one input (gate/up, q/k/v) as one autograd op.

    y_j = x W_j^T + u_j B_j^T + bias_j,   [u_1 .. u_k] = s x [A_1; ..; A_k]^T        one GEMM for all u
    with g_j = dL/dy_j and v = s [g_1 B_1 .. g_k B_k]:
    dx = sum_j g_j W_j + v [A_1; ..; A_k]         one accumulator (addmm, beta = 1) instead of k tensors and k - 1 adds
    [dA_1; ..; dA_k] = v^T x                      one GEMM          dB_j = g_j^T u_j

Prefer it wherever linears share an input: for q/k/v it launches 7 GEMMs forward and 11 backward where separate
``mixed_linear`` calls launch 9 and 15 plus two adds over [rows, I], and it reads x for LoRA once. Masks are left to the
neighbouring elementwise ops, which carry them for free.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels.ops.core.dispatch import bad, custom_op, no_grad_slot, rows
from jointnas_kernels.ops.width.linear import autocast_dtype, check_shapes, lora_operands, mm_as, scaled_mm

MOST = 3
# tensor lists would cost 200 us of flattening per call: the op takes three of everything, absent ones as None
_LAYERS = (
    "Tensor w0, Tensor a0, Tensor b0, Tensor? w1, Tensor? a1, Tensor? b1, Tensor? w2, Tensor? a2, Tensor? b2"
)
_BIASES = "Tensor? bias0, Tensor? bias1, Tensor? bias2"


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


@custom_op(
    "mixed_linear_group", f"(Tensor x, float scaling, {_LAYERS}, {_BIASES}) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _group(x: Tensor, scaling: float, *layers: Tensor | None) -> tuple[Tensor | None, ...]:
    """y_1, y_2, y_3 (None where absent), u."""
    weights, lora_as, lora_bs = (_present(layers[i:9:3]) for i in range(3))
    flat = rows(x)
    a, lora_bs = lora_operands(lora_as, lora_bs, x.dtype)
    u = scaled_mm(flat, a.t(), scaling)
    outputs, start = [], 0
    for weight, b, bias in zip(weights, lora_bs, layers[9:], strict=False):
        y = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
        y.addmm_(u[:, start : start + b.shape[1]], b.t())
        start += b.shape[1]
        outputs.append(y.view(*x.shape[:-1], weight.shape[0]))
    return (*outputs, *[None] * (MOST - len(outputs)), u)


@_group.register_fake
def _(x: Tensor, scaling: float, *layers: Tensor | None) -> tuple[Tensor, ...]:
    outputs = [no_grad_slot(x) if w is None else x.new_empty(*x.shape[:-1], w.shape[0]) for w in layers[0:9:3]]
    return (*outputs, x.new_empty(x.numel() // x.shape[-1], sum(a.shape[0] for a in _present(layers[1:9:3]))))


@custom_op(
    "mixed_linear_group_backward",
    f"(Tensor g0, Tensor? g1, Tensor? g2, Tensor? x, Tensor? u, float scaling, {_LAYERS}, {_BIASES}, "
    "bool need_x, bool need_a, bool need_b, bool need_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _group_backward(
    g0: Tensor, g1: Tensor | None, g2: Tensor | None, x: Tensor | None, u: Tensor | None, scaling: float, *rest
) -> tuple[Tensor | None, ...]:
    """dx, all dA stacked, three dB, three dbias; what is not needed or absent is None."""
    need_x, need_a, need_b, need_bias = rest[12:]
    grads = [rows(g) for g in _present((g0, g1, g2))]
    weights, lora_as, lora_bs = (_present(rest[i:9:3]) for i in range(3))
    dtype, ranks = g0.dtype, [b.shape[1] for b in lora_bs]
    dx = da = None
    others: list[Tensor | None] = [None] * (2 * MOST)
    v = torch.empty(grads[0].shape[0], sum(ranks), dtype=dtype, device=g0.device)
    a, casts = lora_operands(lora_as, lora_bs, dtype)
    if need_x or need_a:
        for g, b, part in zip(grads, casts, v.split(ranks, dim=1), strict=True):
            part.addmm_(g, b, beta=0, alpha=scaling)
    if need_x:
        dx = v @ a
        for g, weight in zip(grads, weights, strict=True):
            dx.addmm_(g, weight)
        dx = dx.view(*g0.shape[:-1], weights[0].shape[1])
    if need_a and x is not None:
        da = mm_as(v.t(), rows(x), lora_as[0].dtype)
    if need_b and u is not None:
        for j, (g, part) in enumerate(zip(grads, u.split(ranks, dim=1), strict=True)):
            others[j] = mm_as(g.t(), part, lora_bs[j].dtype)
    if need_bias:
        for j, (g, bias) in enumerate(zip(grads, rest[9:12], strict=False)):
            others[MOST + j] = g.sum(0, dtype=torch.promote_types(dtype, torch.float32)).to(bias.dtype)
    return dx, da, *others


@_group_backward.register_fake
def _(
    g0: Tensor, g1: Tensor | None, g2: Tensor | None, x: Tensor | None, u: Tensor | None, scaling: float, *rest
) -> tuple[Tensor, ...]:
    def like(tensor: Tensor | None, wanted: bool) -> Tensor:
        return no_grad_slot(g0) if tensor is None or not wanted else tensor.new_empty(tensor.shape)

    need_x, need_a, need_b, need_bias = rest[12:]
    lora_as = _present(rest[1:9:3])
    dx = g0.new_empty(*g0.shape[:-1], rest[0].shape[1]) if need_x else no_grad_slot(g0)
    da = no_grad_slot(g0)
    if need_a:
        da = lora_as[0].new_empty(sum(a.shape[0] for a in lora_as), lora_as[0].shape[1])
    return dx, da, *(like(b, need_b) for b in rest[2:9:3]), *(like(b, need_bias) for b in rest[9:12])


def _setup(ctx, inputs, output):
    x, scaling, *layers = inputs
    need = ctx.needs_input_grad[2:14]
    ctx.need = [ctx.needs_input_grad[0], any(need[1:9:3]), any(need[2:9:3]), any(need[9:])]
    ctx.save_for_backward(x if ctx.need[1] else None, output[-1] if ctx.need[2] else None, *layers)
    ctx.scaling = scaling
    ctx.set_materialize_grads(False)


def _backward(ctx, g0, g1, g2, _u):
    x, u, *layers = ctx.saved_tensors
    grads = [g0, g1, g2]
    given = _present(grads)
    if not given:
        return (None,) * 14
    for j, weight in enumerate(layers[0:9:3]):  # an output nobody used has no gradient, an absent one no output
        if weight is None:
            grads[j] = None
        elif grads[j] is None:
            grads[j] = given[0].new_zeros(*given[0].shape[:-1], weight.shape[0])
    dx, da, *others = _group_backward(*grads, x, u, ctx.scaling, *layers, *ctx.need)
    need_x, need_a, need_b, need_bias = ctx.need
    lora_as = _present(layers[1:9:3])
    das = [*da.split([a.shape[0] for a in lora_as]), None, None] if need_a else [None] * MOST
    result = [dx if need_x else None, None]
    for j in range(MOST):
        result += [None, das[j], others[j] if need_b and layers[3 * j] is not None else None]
    return *result, *(
        d if need_bias and bias is not None else None for d, bias in zip(others[MOST:], layers[9:], strict=True)
    )


_group.register_autograd(_backward, setup_context=_setup)


def mixed_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scaling: float = 1.0,
    biases: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """(x (W_j + scaling B_j A_j)^T + bias_j for each j), at most three; gradients to x, LoRA and biases. Weights are
    frozen.

    Runs in x's dtype (under autocast in its dtype); LoRA may be fp32 beside half weights.
    """
    op = "mixed_linear_group"
    k = len(weights)
    biases = [] if biases is None else biases
    if not 0 < k <= MOST:
        raise bad(op, f"{k} weights; a group has 1 to {MOST}")
    if len(lora_as) != k or len(lora_bs) != k or len(biases) not in (0, k):
        raise bad(
            op,
            f"{k} weights, {len(lora_as)} lora_as, {len(lora_bs)} lora_bs, {len(biases)} biases: counts must agree",
        )
    for j in range(k):
        check_shapes(op, x, weights[j], lora_as[j], lora_bs[j], biases[j] if biases else None)
        if weights[j].requires_grad:
            raise bad(op, f"weight {j} requires a gradient; use mixed_linear for trained weights")
    dtype = autocast_dtype(x)
    if torch.is_autocast_enabled(x.device.type):
        x, weights = x.to(dtype), [w.to(dtype) for w in weights]
    layers: list[Tensor | None] = []
    for weight, a, b in zip(weights, lora_as, lora_bs, strict=True):
        if weight.dtype != dtype:
            raise bad(op, f"x is {dtype} and a weight {weight.dtype}; they must agree outside autocast")
        layers += [weight, a, b]
    layers += [None] * (3 * (MOST - k))
    layers += [*(b.to(dtype) for b in biases), *[None] * (MOST - len(biases))]
    return _group(x, scaling, *layers)[:k]
