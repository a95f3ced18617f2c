"""mixed_weight: the weight-mixing supernet's expected weight, three ways (Fig. 3 of arXiv 2606.04063).

    W [M, N], K1 input choices (alpha_in, sizes_in), K2 output choices (alpha_out, sizes_out)
    out = sum_ij alpha_in_i alpha_out_j pad(W[:M_j, :N_i])                             "loop"      K1 K2 passes over W
        = W * sum_ij alpha_in_i alpha_out_j G_ij,  G_ij the 0/1 mask of that block     "masks"     reads K1 K2 masks
        = W * (r c^T),  c_n = sum_{i: n < N_i} alpha_in_i,  r_m likewise               "factored"  one read, one write

Equal in value and in every gradient (the mask sum is rank 1). Backward, with E = dL/dout * W:

    loop, masks: D_ij = <E, G_ij>, dalpha_in_i = sum_j alpha_out_j D_ij, dalpha_out_j = sum_i alpha_in_i D_ij
    factored:    dc = E^T r, dr = E c, then prefix sums           dW = dL/dout * mask, only if W requires it

The supernet never calls this (``mixed_linear`` needs no mixed weight); it is the benchmark's subject and a check.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels.errors import unknown
from jointnas_kernels.ops._dispatch import check, compute_dtype, no_grad_slot, resolve
from jointnas_kernels.ops.masks import membership

IMPLS = ("factored", "masks", "loop")


def choice_masks(
    sizes_in: Sequence[int], sizes_out: Sequence[int], shape: tuple[int, int],
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[K2 K1, M, N]: G_ij for every pair, output choice major: what the paper keeps in memory."""
    rows, cols = membership(sizes_out, shape[0], device, dtype), membership(sizes_in, shape[1], device, dtype)
    return (rows.t()[:, None, :, None] * cols.t()[None, :, None, :]).reshape(-1, *shape)


def _vectors(alpha_in: Tensor, sizes_in: Sequence[int], alpha_out: Tensor, sizes_out: Sequence[int],
             shape: torch.Size, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """c [N] and r [M]."""
    columns = membership(sizes_in, shape[1], alpha_in.device, acc) * alpha_in.to(acc)
    lines = membership(sizes_out, shape[0], alpha_out.device, acc) * alpha_out.to(acc)
    return columns.sum(-1), lines.sum(-1)


def reference(
    weight: Tensor, alpha_in: Tensor, sizes_in: Sequence[int], alpha_out: Tensor, sizes_out: Sequence[int],
    impl: str, masks: Tensor | None = None,
) -> Tensor:
    """Differentiable torch; "loop" pads every block to full size as TangleNAS does."""
    acc = compute_dtype(weight)
    w, a, b = weight.to(acc), alpha_in.to(acc), alpha_out.to(acc)
    m, n = weight.shape
    if impl == "factored":
        c, r = _vectors(alpha_in, sizes_in, alpha_out, sizes_out, weight.shape, acc)
        return (w * r[:, None] * c).to(weight.dtype)
    if impl == "masks":
        stored = choice_masks(sizes_in, sizes_out, (m, n), weight.device, weight.dtype) if masks is None else masks
        mixed = torch.zeros_like(w)
        for coefficient, mask in zip((b[:, None] * a).reshape(-1), stored, strict=True):
            mixed = mixed + coefficient * mask
        return (w * mixed).to(weight.dtype)
    out = torch.zeros_like(w)
    for j, rows in enumerate(sizes_out):
        for i, cols in enumerate(sizes_in):
            out = out + torch.nn.functional.pad(a[i] * b[j] * w[:rows, :cols], (0, n - cols, 0, m - rows))
    return out.to(weight.dtype)


def reference_backward(
    grad: Tensor, weight: Tensor, alpha_in: Tensor, sizes_in: Sequence[int], alpha_out: Tensor,
    sizes_out: Sequence[int], impl: str, masks: Tensor | None, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dW (empty unless asked for), dalpha_in, dalpha_out, in the way of ``impl``."""
    acc = compute_dtype(weight)
    a, b, g = alpha_in.to(acc), alpha_out.to(acc), grad.to(acc)
    dw = reference(grad, alpha_in, sizes_in, alpha_out, sizes_out, impl, masks).to(weight.dtype)
    e = g * weight.to(acc)
    if impl == "factored":
        c, r = _vectors(alpha_in, sizes_in, alpha_out, sizes_out, weight.shape, acc)
        dc, dr = (e * r[:, None]).sum(0), (e * c).sum(1)
        da = torch.stack([dc[:cols].sum() for cols in sizes_in])
        db = torch.stack([dr[:rows].sum() for rows in sizes_out])
    else:
        if impl == "masks":
            stored = masks if masks is not None else choice_masks(
                sizes_in, sizes_out, (weight.shape[0], weight.shape[1]), weight.device, weight.dtype)
            d = torch.stack([(e * mask).sum() for mask in stored]).reshape(len(sizes_out), len(sizes_in))
        else:
            d = torch.stack([e[:rows, :cols].sum() for rows in sizes_out for cols in sizes_in])
            d = d.reshape(len(sizes_out), len(sizes_in))
        da, db = (d * b[:, None]).sum(0), (d * a).sum(1)
    return dw if need_weight else no_grad_slot(weight), da.to(alpha_in.dtype), db.to(alpha_out.dtype)


@torch.library.custom_op(
    "jointnas::mixed_weight",
    mutates_args=(),
    schema="(Tensor weight, Tensor alpha_in, int[] sizes_in, Tensor alpha_out, int[] sizes_out, str impl, "
    "Tensor? masks, str? backend) -> Tensor",
)
def _mixed_weight(
    weight: Tensor, alpha_in: Tensor, sizes_in: Sequence[int], alpha_out: Tensor, sizes_out: Sequence[int],
    impl: str, masks: Tensor | None, backend: str | None,
) -> Tensor:
    resolve("mixed_weight", backend, weight, ("reference",))
    return reference(weight, alpha_in, sizes_in, alpha_out, sizes_out, impl, masks).contiguous()


@_mixed_weight.register_fake
def _(
    weight: Tensor, alpha_in: Tensor, sizes_in: Sequence[int], alpha_out: Tensor, sizes_out: Sequence[int],
    impl: str, masks: Tensor | None, backend: str | None,
) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


@torch.library.custom_op(
    "jointnas::mixed_weight_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor weight, Tensor alpha_in, int[] sizes_in, Tensor alpha_out, int[] sizes_out, "
    "str impl, Tensor? masks, bool need_weight, str? backend) -> (Tensor, Tensor, Tensor)",
)
def _mixed_weight_backward(
    grad: Tensor, weight: Tensor, alpha_in: Tensor, sizes_in: Sequence[int], alpha_out: Tensor,
    sizes_out: Sequence[int], impl: str, masks: Tensor | None, need_weight: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    resolve("mixed_weight", backend, weight, ("reference",))
    dw, da, db = reference_backward(
        grad, weight, alpha_in, sizes_in, alpha_out, sizes_out, impl, masks, need_weight
    )
    return dw.contiguous(), da, db


@_mixed_weight_backward.register_fake
def _(
    grad: Tensor, weight: Tensor, alpha_in: Tensor, sizes_in: Sequence[int], alpha_out: Tensor,
    sizes_out: Sequence[int], impl: str, masks: Tensor | None, need_weight: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else no_grad_slot(weight)
    return dw, torch.empty_like(alpha_in), torch.empty_like(alpha_out)


def _setup(ctx, inputs, output):
    weight, alpha_in, sizes_in, alpha_out, sizes_out, impl, masks, backend = inputs
    ctx.save_for_backward(weight, alpha_in, alpha_out, masks)
    ctx.sizes_in, ctx.sizes_out, ctx.impl, ctx.backend = sizes_in, sizes_out, impl, backend


def _backward(ctx, grad):
    weight, alpha_in, alpha_out, masks = ctx.saved_tensors
    need = ctx.needs_input_grad
    dw, da, db = torch.ops.jointnas.mixed_weight_backward(
        grad, weight, alpha_in, ctx.sizes_in, alpha_out, ctx.sizes_out, ctx.impl, masks, need[0], ctx.backend
    )
    return dw if need[0] else None, da if need[1] else None, None, db if need[3] else None, None, None, None, None


_mixed_weight.register_autograd(_backward, setup_context=_setup)


def mixed_weight(
    weight: Tensor,
    alpha_in: Tensor,
    sizes_in: Sequence[int],
    alpha_out: Tensor,
    sizes_out: Sequence[int],
    impl: str = "factored",
    backend: str | None = None,
    masks: Tensor | None = None,
) -> Tensor:
    """Expected weight under independent input and output choices; gradients to both alphas and weight.

    Args:
        impl: "factored" (default), "masks" or "loop"; equal results, different cost.
        masks: for "masks", the stored ``choice_masks``; built on the fly (slow, K1 K2 times the weight) when absent.
    """
    op = "mixed_weight"
    if impl not in IMPLS:
        raise unknown("impl", impl, IMPLS, where=op)
    check(weight.dim() == 2, op, f"weight must be [M, N], got {tuple(weight.shape)}")
    m, n = weight.shape
    for name, alpha, sizes, full in (("in", alpha_in, sizes_in, n), ("out", alpha_out, sizes_out, m)):
        check(len(sizes) > 0 and alpha.shape == (len(sizes),), op,
              f"alpha_{name} {tuple(alpha.shape)} does not match {len(sizes)} sizes")
        check(min(sizes) > 0 and max(sizes) <= full, op, f"sizes_{name} {tuple(sizes)} must lie in 1..{full}")
    check(masks is None or (impl == "masks" and masks.shape == (len(sizes_in) * len(sizes_out), m, n)), op,
          "masks must be choice_masks(sizes_in, sizes_out, weight.shape) and go with impl='masks'")
    return torch.ops.jointnas.mixed_weight(
        weight, alpha_in, list(sizes_in), alpha_out, list(sizes_out), impl, masks, backend
    )
