"""What training costs, in tokens: each counts once per pass forward and backward through a model that learns from it.

A bilevel step is a weight step and (after the warm-up) an architecture step on a batch each. Whatever a method's search
does not spend of `total` is added to its fine-tuning, so that all methods learn from equally many tokens.
"""

from __future__ import annotations

from jointnas.config import RunConfig


def batch(config: RunConfig) -> int:
    """Of a batch of the search."""
    return config.data.batch_size * config.data.seq_len


def bilevel(config: RunConfig, steps: int) -> int:
    """Of so many steps of the joint search."""
    return batch(config) * (2 * steps - min(steps, config.search.weight_warmup))


def finetune_step(config: RunConfig) -> int:
    """Of a step of the distillation."""
    return (config.finetune.batch_size or config.data.batch_size) * config.data.seq_len


def total(config: RunConfig) -> int:
    """Of a search of all configured steps and the distillation after it."""
    return bilevel(config, config.search.steps) + config.finetune.steps * finetune_step(config)


def finetune_steps(config: RunConfig, left: int) -> int:
    """Steps of the distillation for what a search has left of the tokens of all training."""
    return max(0, left) // finetune_step(config)
