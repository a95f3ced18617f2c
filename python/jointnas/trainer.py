"""A search by transformers' Trainer: a supernet is its model, a callback makes the two kinds of steps.

    search = SearchCallback(objective=objective)
    trainer = Trainer(
        supernet, args, train_dataset=data, callbacks=[search],
        optimizer_cls_and_kwargs=search.optimizer_cls_and_kwargs(supernet, args),
    )

An optimizer step trains LoRA or the architecture, each with its own gradients only; parameters without a gradient are
not touched, not even by weight decay. What a step draws is a function of (args.seed, step), as in `jointnas search`,
and the same for all of its micro-batches: a resumed run goes on as the killed one would have, bit for bit. Trainer's
evaluation sees the most probable choice. The two kinds of steps take turns in one data set; `jointnas search` keeps a
part of it for architecture steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from jointnas.objective import Objective, entropies
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf import Supernet


class SearchCallback(TrainerCallback):
    """Alternates weight steps and architecture steps of a `transformers.Trainer`.

    Args:
        arch_every: every so many optimizer steps one trains the architecture, the others LoRA.
        weight_warmup: optimizer steps before the first that may train the architecture.
        lr_arch: learning rate of the architecture parameters; that of LoRA is Trainer's.
        objective: latency and budget terms of the architecture steps' loss, made by
            `Objective(config, supernet.config, table.bind(supernet.space, supernet.block_rank))`; the config's
            `search.steps`, over which the penalty ramps up, are Trainer's optimizer steps. None: cross-entropy alone.

    Raises:
        JointNASError: numbers out of range.
    """

    def __init__(
        self, arch_every: int = 2, weight_warmup: int = 0, lr_arch: float = 3e-3, objective: Objective | None = None
    ) -> None:
        for name, value, least in (("arch_every", arch_every, 2), ("weight_warmup", weight_warmup, 0)):
            if value < least:
                raise JointNASError(f"SearchCallback: {name} is {value}; it must be at least {least}.")
        if not lr_arch > 0:
            raise JointNASError(f"SearchCallback: lr_arch is {lr_arch}; a learning rate must be positive.")
        self.arch_every, self.weight_warmup = arch_every, weight_warmup
        self.lr_arch, self.objective = lr_arch, objective
        self._parts: dict[str, float] = {}  # of the last architecture step's objective
        self._use_cache: Any = None

    def mode(self, step: int) -> str:
        """What an optimizer step trains, "weight" or "arch"; counted from 0."""
        arch = step >= self.weight_warmup and step % self.arch_every == self.arch_every - 1
        return "arch" if arch else "weight"

    def optimizer_cls_and_kwargs(self, supernet: Supernet, args: TrainingArguments) -> tuple[Any, dict[str, Any]]:
        """Trainer's argument of that name: the optimizer that `args.optim` names, with one group of parameters for LoRA
        (learning rate, betas and weight decay of `args`) and one for the architecture (`lr_arch`, no weight decay, and
        DrNAS's betas 0.5 and 0.999 where the optimizer has betas). Learning rate schedules scale both.

        Raises:
            JointNASError: `args.optim` makes its groups itself.
        """
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(args)
        if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
            raise JointNASError(f"SearchCallback: optim {args.optim!r} makes its own parameter groups; use adamw_torch")
        weight = {"params": supernet.lora_parameters(), "weight_decay": args.weight_decay}
        arch: dict[str, Any] = {"params": supernet.arch_parameters(), "lr": self.lr_arch, "weight_decay": 0.0}
        if "betas" in options:
            arch["betas"] = (0.5, 0.999)
        return optimizer, {**options, "params": [weight, arch]}

    # ---- events -----------------------------------------------------------------------------------------------------

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        """Refuses what would compute something else than a search.

        Raises:
            JointNASError: the model is no supernet, or an option of Trainer does not go with one.
        """
        supernet = kwargs["model"]
        if not isinstance(supernet, Supernet):
            raise JointNASError(f"SearchCallback: the model is a {type(supernet).__name__}; give Trainer a supernet.")
        refused = {
            "label_smoothing_factor": args.label_smoothing_factor, "neftune_noise_alpha": args.neftune_noise_alpha,
            "use_liger_kernel": args.use_liger_kernel, "torch_compile": args.torch_compile,
        }  # fmt: skip
        for name, value in refused.items():
            if value:
                raise JointNASError(f"Trainer: {name}={value} does not work with a supernet; leave it out.")
        if args.n_gpu > 1:
            raise JointNASError(
                f"Trainer: {args.n_gpu} GPUs in one process (DataParallel) cannot hold a supernet, whose architecture"
                " parameters stay on the host; start one process per GPU, or set CUDA_VISIBLE_DEVICES to one."
            )
        if self.objective is not None:
            bound = self.objective.bound
            if bound.space != supernet.space or tuple(bound.rank) != supernet.block_rank:
                raise JointNASError(
                    "SearchCallback: the objective is of another space or order of blocks than the supernet; make it"
                    " with table.bind(supernet.space, supernet.block_rank)."
                )
        self._use_cache = supernet.config.use_cache  # Trainer turns it off, and what is extracted would inherit that

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        """Sets seed and objective.

        Raises:
            JointNASError: the supernet is fixed to one choice.
        """
        supernet: Supernet = kwargs["model"]
        if supernet.choice is not None:
            raise JointNASError("SearchCallback: the supernet is fixed to one choice; call relax() to search.")
        supernet.relax()
        supernet.seed = args.seed
        if self.objective is not None:
            objective = self.objective

            def regularizer(probs: dict[str, Tensor]) -> Tensor:
                total, self._parts = objective.regularizer(probs, state.global_step)
                return total

            supernet.regularizer = regularizer

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        """Decides what the step trains, and which architecture it draws."""
        supernet: Supernet = kwargs["model"]
        supernet.mode(self.mode(state.global_step)).step = state.global_step

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        """The next micro-batch draws the same architecture."""
        kwargs["model"].step = state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        """Adds the largest entropy of a dimension, and the parts of the objective."""
        logs, supernet = kwargs["logs"], kwargs["model"]
        if "loss" in logs:
            entropy = entropies(supernet.arch.probs(), supernet.space, supernet.block_rank)
            own = {"entropy_max": max(entropy.values(), default=0.0), **self._parts}
            logs.update(own)
            state.log_history[-1].update(own)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        """Makes the checkpoint a folder that `Supernet.from_pretrained` loads, too."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            kwargs["model"].save_description(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        """Leaves the supernet as it was given."""
        supernet: Supernet = kwargs["model"]
        supernet.regularizer = None
        supernet.config.use_cache = self._use_cache
