"""Quantization, after its search, of what was searched without bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from jointnas.preparation import initialise_quantizers
from jointnas.run_folder import Run
from jointnas_kernels.hf import Supernet, convert, extract
from jointnas_kernels.space import Choice, SearchSpace, kept_blocks


def quantized(run: Run, choice: Choice, folder: Path) -> tuple[Supernet, Choice]:
    """A supernet of the choice's own size on what the run trained, LoRA merged, with no precision but the one that the
    run is followed by, its quantizers initialised as configured; and its only choice. Finished blocks are kept in
    `folder`."""
    assert run.after is not None
    small = extract(run.supernet, replace(choice, weight_bits=None, act_bits=None, head_bits=None))
    options = run.config.search
    space = SearchSpace.single(small.config, group_size=run.space.group_size)
    torch.manual_seed(run.config.seed)  # LoRA's A
    supernet = convert(small, run.after.of(space), lora_rank=options.lora_rank, lora_alpha=options.lora_alpha)
    supernet.gradient_checkpointing = options.gradient_checkpointing
    blocks: Any = supernet.blocks
    for block, b in zip(blocks, kept_blocks(run.supernet.block_rank, choice.blocks), strict=True):
        original: Any = run.supernet.blocks[b]
        for name, linear in block.linears.items():
            linear.group_size = original.linears[name].group_size  # the table's: o_proj's depends on the whole space
    initialise_quantizers(run.config, supernet, run.streams, folder)
    return supernet, supernet.space.full()
