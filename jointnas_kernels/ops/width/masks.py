"""Width masks: the rank-1 factors of the probabilistic mask, as plain fp32 vectors.

A dimension with K choices ``sizes`` and probabilities ``alpha`` keeps the first ``sizes[i]`` channels under choice i,
so channel k survives with weight  c[k] = sum_{i: k < sizes[i]} alpha[i]  (Eq. 9 of arXiv 2606.04063 with
sum_ij a_i a_j G_ij = r c^T). Masks are computed once per step and shared by all layers; autograd takes their gradient
to alpha through ``membership``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jointnas_kernels.ops.core.dispatch import bad


def membership(
    sizes: Sequence[int], n: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[n, K]: 1 where channel < sizes[i]."""
    if len(sizes) <= 0:
        raise bad("membership", "sizes is empty")
    for size in sizes:
        if not 0 < size <= n:
            raise bad("membership", f"size {size} is outside 1..{n}")
    channel = torch.arange(n, device=device)
    # one comparison per choice with a Python scalar: no host-to-device copy, so it can be captured in a CUDA graph
    return torch.stack([channel < size for size in sizes], dim=-1).to(dtype)


def prefix_mask(alpha: Tensor, sizes: Sequence[int], n: int) -> Tensor:
    """[n]: c[k] = sum_{i: k < sizes[i]} alpha[i]; differentiable in alpha."""
    if alpha.shape != (len(sizes),):
        raise bad("prefix_mask", f"alpha has shape {tuple(alpha.shape)}, sizes {len(sizes)}")
    # a product and a sum, not a matmul: autocast would run that in bf16
    return (membership(sizes, n, alpha.device, alpha.dtype) * alpha).sum(-1)


def strided_pair_index(D: int, d: int, device: torch.device | str | None = None) -> Tensor:
    """[d]: the dims of a D-wide head that a d-wide head keeps, in the order a plain ``head_dim=d`` Llama expects.

    Rotate-half pairs (i, i + D/2) for i in multiples of D/d, because inv_freq(D)[::D/d] == inv_freq(d): any other
    choice of pairs would change the rotary frequencies of the extracted model.
    """
    if D % 2 != 0 or d % 2 != 0 or (not 0 < d <= D) or (D % d != 0):
        raise bad("strided_pair_index", f"head_dim {d} must be even and divide the full head_dim {D}")
    first = torch.arange(0, D // 2, D // d, device=device)
    return torch.cat([first, first + D // 2])


def strided_pair_mask(alpha: Tensor, dims: Sequence[int], D: int) -> Tensor:
    """[D]: weight of each dim of a D-wide head under head_dim choices ``dims``; differentiable in alpha."""
    if alpha.shape != (len(dims),):
        raise bad("strided_pair_mask", f"alpha has shape {tuple(alpha.shape)}, dims {len(dims)}")
    pair = torch.arange(D, device=alpha.device) % (D // 2)
    columns = []
    for d in dims:
        if D % 2 != 0 or d % 2 != 0 or (not 0 < d <= D) or (D % d != 0):
            raise bad("strided_pair_mask", f"head_dim {d} must be even and divide the full head_dim {D}")
        columns.append(pair % (D // d) == 0)
    return (torch.stack(columns, dim=-1).to(alpha.dtype) * alpha).sum(-1)
