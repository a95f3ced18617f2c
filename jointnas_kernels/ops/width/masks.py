"""Width masks: the rank-1 factors of the probabilistic mask, as plain fp32 vectors.

A dimension with K choices ``sizes`` and probabilities ``alpha`` keeps the first ``sizes[i]`` channels under choice i,
so channel k survives with weight  c[k] = sum_{i: k < sizes[i]} alpha[i]  (Eq. 9 of arXiv 2606.04063 with
sum_ij a_i a_j G_ij = r c^T). Masks are computed once per step and shared by all layers; autograd takes their gradient
to alpha through ``membership``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels.ops.core.tensors import bad


def membership(
    sizes: Sequence[int], n: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Which channels each size keeps: its first.

    Args:
        sizes: K of them, each in 1..n.
        n: the full width.
        device, dtype: of the result.

    Returns:
        [n, K]: 1 where channel < sizes[i], else 0.

    Raises:
        JointNASError: no sizes, or one out of range.
    """
    if len(sizes) <= 0:
        raise bad("membership", "sizes is empty")
    for size in sizes:
        if not 0 < size <= n:
            raise bad("membership", f"size {size} is outside 1..{n}")
    channel = torch.arange(n, device=device)
    # one comparison per choice with a Python scalar: no host-to-device copy, so it can be captured in a CUDA graph
    return torch.stack([channel < size for size in sizes], dim=-1).to(dtype)


def prefix_mask(alpha: Tensor, sizes: Sequence[int], n: int) -> Tensor:
    """The mask c[k] = sum_{i: k < sizes[i]} alpha[i].

    Args:
        alpha: [K] in any floating dtype: probabilities of the sizes.
        sizes: K of them, each in 1..n.
        n: the full width.

    Returns:
        [n] in the dtype of alpha, differentiable in it.

    Raises:
        JointNASError: a size out of range, or another number of them than of alphas.
    """
    if alpha.shape != (len(sizes),):
        raise bad("prefix_mask", f"alpha has shape {tuple(alpha.shape)}, sizes {len(sizes)}")
    # a product and a sum, not a matmul: autocast would run that in bf16
    return (membership(sizes, n, alpha.device, alpha.dtype) * alpha).sum(-1)


def check_head_dim(op: str, d: int, full: int) -> None:
    """Raise unless heads of ``full`` dims can be cut to d."""
    if full % 2 != 0 or d % 2 != 0 or not 0 < d <= full or full % d != 0:
        raise bad(op, f"head_dim {d} must be even and divide the full head_dim {full}")
