"""The methods of a comparison by name. What follows a method's choice, from fine-tuning on, is the same for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jointnas.baselines import exhaustive, ilp, lonas, subnet_selection
from jointnas.baselines.context import Context, Picked
from jointnas.baselines.ours import joint, without_bits
from jointnas.baselines.pruned import pruned
from jointnas.baselines.random_choices import random
from jointnas.baselines.single_precision import uniform
from jointnas.baselines.tanglenas import tanglenas


@dataclass(frozen=True)
class Method:
    """One way to a model.

    Attributes:
        pick: the search.
        share: what all units of a seed share, done once and left in the context's shared folder; None: nothing.
        precise: whether there is a unit per precision, which its models get as a whole.
        targeted: whether there is a unit per target.
        bits: whether its supernet has bits, whose initialised quantizers all units of a seed share.
    """

    pick: Callable[[Context], Picked]
    share: Callable[[Context], None] | None = None
    precise: bool = False
    targeted: bool = True
    bits: bool = True


METHODS = {
    "joint": Method(joint),
    "no-bits": Method(without_bits, precise=True, bits=False),
    "subnet-selection": Method(subnet_selection.subnet_selection, subnet_selection.train, precise=True, bits=False),
    "lonas": Method(lonas.lonas, lonas.train, precise=True, bits=False),
    "tanglenas": Method(tanglenas, precise=True, bits=False),
    "pruned": Method(pruned, precise=True),
    "ilp": Method(ilp.ilp, ilp.measure),
    "uniform": Method(uniform, precise=True, targeted=False),
    "random": Method(random),
    "exhaustive": Method(exhaustive.exhaustive, targeted=False),
}
