"""What a method of a comparison works with, and what it returns."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from jointnas.compare_config import CompareOptions
from jointnas.config import RunConfig
from jointnas.data import Streams
from jointnas.objective import Infeasible
from jointnas.precision import Precision
from jointnas.preparation import prepare
from jointnas.run_folder import Run
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.latency import LatencyTable
from jointnas_kernels.space import Choice


@dataclass
class Context:
    """One method at one target, precision and seed.

    `config` has its target, its seed and its folder (`out`); `model` is the original, which is copied; `shared` is the
    folder of what all of the method's units with this seed share, `quantizers` that of the initialised quantizers.
    `number` tells units of the same method, target and seed apart."""

    config: RunConfig
    options: CompareOptions
    model: torch.nn.Module
    streams: Streams
    table: LatencyTable
    shared: Path
    quantizers: Path
    precision: Precision | None = None
    number: int = 0

    def run(self, after: Precision | None = None, **search: Any) -> Run:
        """A supernet on the original weights, quantizers initialised; with `after` one without bits, to be quantized to
        that. `search`: options of the search to change."""
        config = self.config.model_copy(update={"search": self.config.search.model_copy(update=search)})
        return prepare(
            config, copy.deepcopy(self.model), self.streams, self.table, after=after, quantizers=self.quantizers
        )


@dataclass
class Picked:
    """What a method ends with, before its fine-tuning.

    `run`: whose supernet has the weights to start from. `choice`: one of `run.deployed`. `tokens`: that something was
    trained on. `evaluated`: tokens that went forward only. `about`: what else there is to say of the search."""

    run: Run
    choice: Choice
    tokens: int = 0
    evaluated: int = 0
    about: dict[str, Any] = field(default_factory=dict)


def given(run: Run, choice: Choice) -> Picked:
    """A choice that nothing searched for.

    Raises:
        Infeasible: the device cannot run it.
    """
    try:
        run.bound.predict(choice)
    except JointNASError as error:
        raise Infeasible(str(error)) from None
    return Picked(run, choice)
