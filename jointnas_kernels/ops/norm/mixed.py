"""mixed_rmsnorm, alone (rms.py) or with the activation quantizer behind it in the same pass (rms_quant.py)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from jointnas_kernels.ops.core.tensors import bad
from jointnas_kernels.ops.norm import rms, rms_quant
from jointnas_kernels.ops.quant.activations import check_precisions


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
    """in_mask * weight * sum_i alpha_i RMSNorm(x over its first sizes[i] channels), which are 0 beyond.

    With act_bits and act_probs, ``act_quant_mix`` of that in the same pass: sum_q act_probs[q] Q_q(..).

    Args:
        x: [..., N] in any floating dtype.
        weight: [N], any floating dtype.
        alpha: [K], fp32: probabilities of the sizes.
        sizes: K of them, each in 1..N, in any order.
        eps: added to the mean of squares.
        in_mask: [N], fp32: the next layers' IN mask; None: all ones.
        backend: "triton" (N up to 32768), "cpu" or "reference"; None: by device and dtype.
        act_bits: one to four of 2, .., 8 and 16; None: no quantization.
        act_probs: [Q], fp32: one for each of act_bits.
        act_symmetric: whether the quantizer has no zero point.

    Returns:
        [..., N] in the dtype of x; computed in fp32 (fp64 for fp64). Gradients to all tensors, each only if it requires
        one.

    Raises:
        JointNASError: shapes, sizes or bits that do not fit, half of a quantizer, or a backend that cannot run.
    """
    n = x.shape[-1]
    if weight.shape != (n,):
        raise bad("mixed_rmsnorm", f"weight {tuple(weight.shape)} does not match x {tuple(x.shape)}")
    if len(sizes) <= 0 or alpha.shape != (len(sizes),):
        raise bad("mixed_rmsnorm", f"alpha {tuple(alpha.shape)} does not match {len(sizes)} sizes")
    if min(sizes) <= 0 or max(sizes) > n:
        raise bad("mixed_rmsnorm", f"sizes {tuple(sizes)} must lie in 1..{n}")
    if in_mask is not None and in_mask.shape != (n,):
        raise bad("mixed_rmsnorm", f"in_mask must be [{n}]")
    if (act_bits is None) != (act_probs is None):
        raise bad("mixed_rmsnorm", "act_bits and act_probs go together")
    if act_bits is None or act_probs is None:
        y: Tensor = rms.op(x, weight, alpha, in_mask, list(sizes), eps, backend)[0]
        return y
    check_precisions("mixed_rmsnorm", act_bits, act_probs)
    y = rms_quant.op(
        x, weight, alpha, in_mask, act_probs, list(sizes), eps, list(act_bits), act_symmetric, backend
    )[0]  # fmt: skip
    return y
