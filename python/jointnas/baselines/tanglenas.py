"""TangleNAS (arXiv 2312.10440): the same gradient-based search with entangled widths, but depth mixes prefixes.

Every block runs:

    x_l = block_l(x_{l-1}),    out = head(norm(Σ_l β_l x_l)),    β the probabilities of the numbers of blocks l

So fewer blocks are the first ones. Widths and their latencies are those of our search.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from jointnas.baselines.context import Context, Picked
from jointnas.baselines.ours import searched
from jointnas.data import IGNORE, Batch
from jointnas.losses import cross_entropy
from jointnas_kernels.hf import Supernet
from jointnas_kernels.nn.loss import linear_cross_entropy


def tanglenas(context: Context) -> Picked:
    """The architecture alone, under the latency that it has at the precision it gets afterwards."""
    return searched(context.run(after=context.precision, depth="last", capture=False), mixture_of_prefixes)


def mixture_of_prefixes(supernet: Supernet, batch: Batch) -> Tensor:
    """Cross-entropy, nats per token, of the mixture over depths; of a fixed choice its own."""
    sample = supernet.sample
    if supernet.choice is not None or sample is None:
        return cross_entropy(supernet, batch)
    with torch.set_grad_enabled(supernet.current_mode != "weight" and torch.is_grad_enabled()):
        beta = supernet.arch.probs()["blocks"].to(supernet.device, supernet.mask_dtype)
    weights = dict(zip(supernet.space.blocks, beta.unbind(), strict=True))
    embedding, head = supernet.tables(sample.head_probs, sample.head_index)
    x, step = supernet.embed(batch.ids, sample, embedding=embedding)
    mixed = torch.zeros_like(x)
    blocks: Any = supernet.blocks
    for depth, (block, one) in enumerate(zip(blocks, sample.blocks, strict=True), 1):
        x = block(x, step, one._replace(gate=None))
        if depth in weights:
            mixed = mixed + weights[depth].to(x.dtype) * x
    target = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORE).flatten()
    _, states = supernet.norm(mixed, sample.masks, step.sizes)
    return linear_cross_entropy(states.flatten(0, 1), head.to(x.dtype), target)
