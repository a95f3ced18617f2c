"""LoNAS (Munoz et al., "LoNAS: elastic low-rank adapters for efficient large language models", 2024), as
arXiv 2606.04063 compares with it: in order of importance, with sandwich training, and searched by strata.

Each step trains two random sub-networks, each of a random stratum of parameters, with LoRA of a random rank. A target
takes, of random candidates of every stratum that are fast enough at the precision they get afterwards, the one of least
loss.
"""

from __future__ import annotations

import torch

from jointnas.baselines.context import Context, Picked
from jointnas.baselines.sandwich import GRID, sandwich, trained
from jointnas.baselines.strata import groups_of, strata, structures
from jointnas.losses import Losses
from jointnas.run_folder import write_json
from jointnas_kernels.space import Choice

RANKS = (1.0, 0.75, 0.5)  # of the largest


def train(context: Context) -> None:
    """Trains the supernet, once for all targets and precisions."""
    run = context.run(after=context.precision)
    sizes = structures(run)
    groups = strata(sizes, context.options.strata)
    ranks = [max(1, int(share * run.config.search.lora_rank)) for share in RANKS]

    def draw(generator: torch.Generator) -> tuple[Choice, int]:
        def one(count: int) -> int:
            return int(torch.randint(count, (1,), generator=generator))

        group = groups[one(len(groups))]
        return group[one(len(group))], ranks[one(len(ranks))]

    tokens = sandwich(run, min(sizes, key=sizes.__getitem__), draw)
    write_json(run.folder / GRID, {"tokens": tokens})


def lonas(context: Context) -> Picked:
    """The best candidate within the target."""
    run, facts = trained(context)
    groups = groups_of(run, context.options)
    losses = Losses(run, run.folder / "losses.json", context.options.batches)
    found = [choice for group in groups for choice in group]
    choice = run.as_deployed(losses.best(found))
    return Picked(run, choice, facts["tokens"], losses.tokens, {"compared": len(found)})
