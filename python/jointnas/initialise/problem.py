"""One block and the weight quantizers sought for it: what all methods work on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from jointnas.initialise.blocks import Blocks
from jointnas.initialise.clip import mse_clip
from jointnas_kernels.ops.core.tensors import compute_dtype
from jointnas_kernels.ops.quant.spec import divisor
from jointnas_kernels.ops.quant.weights import fake_quant_weight

Parameters = dict[str, Tensor]  # of one block, by name
State = dict[str, Tensor]  # what a block is changed to: parameters by name, and PATH.clip or PATH.scale of its linears
Row = dict[str, Any]  # errors of a block
Clips = dict[str, Tensor]  # clip ratio [O, I / group] of each module's weight, by path


@dataclass
class Problem:
    """Block b shall map x to y [windows, tokens, N] with weights of some bits; without x there are no errors."""

    blocks: Blocks
    b: int
    x: Tensor | None
    y: Tensor | None
    bits: int
    groups: Mapping[str, int]  # of each module
    parameters: Parameters = field(init=False)  # of the whole block, before anything

    def __post_init__(self) -> None:
        self.parameters = {k: v.detach() for k, v in self.blocks.layers[self.b].named_parameters()}

    def on(self, windows: slice) -> Problem:
        """The same on some of the windows."""
        assert self.x is not None
        assert self.y is not None
        return replace(self, x=self.x[windows], y=self.y[windows])

    @property
    def weights(self) -> Parameters:
        """Those that are quantized, by parameter name."""
        return {f"{path}.weight": self.parameters[f"{path}.weight"] for path in self.groups}

    def unclipped(self) -> Clips:
        """Ratios of 1."""
        weights = {path: (self.parameters[f"{path}.weight"], group) for path, group in self.groups.items()}
        return {p: torch.ones(w.shape[0], w.shape[1] // group, device=w.device) for p, (w, group) in weights.items()}

    def steps(self, clips: Clips) -> dict[str, float]:
        """Mean distance of neighbouring levels of each module's weight."""
        return {p: step(self.parameters[f"{p}.weight"], self.bits, g, clips[p]) for p, g in self.groups.items()}

    def searched(self, parameters: Parameters, importance: Mapping[str, Tensor] | None = None) -> Clips:
        """Ratios with the least squared error of each group, its inputs weighed by `importance` [I] of each module."""
        weighed = {} if importance is None else importance
        return {
            path: mse_clip(parameters[f"{path}.weight"], self.bits, group, weighed.get(path))
            for path, group in self.groups.items()
        }

    def energies(self, parameters: Parameters) -> dict[str, Tensor]:
        """Sum over tokens of x^2 for every input [I] of each module, in the block with these parameters."""
        assert self.x is not None
        found: dict[str, Tensor] = {}
        for stage in self.blocks.stages:
            inputs = self.blocks.inputs(self.b, stage[0], self.x, parameters)
            sums = [v.to(compute_dtype(v.dtype)).flatten(0, -2).square().sum(0) for v in inputs]
            found |= dict.fromkeys(stage, torch.stack(sums).sum(0))
        return found

    def quantized(self, parameters: Parameters, clips: Clips) -> Parameters:
        """The parameters with quantized weights, differentiable in parameters and ratios."""
        found = dict(parameters)
        for path, group in self.groups.items():
            found[f"{path}.weight"] = rounded(parameters[f"{path}.weight"], self.bits, group, clips[path])
        return found

    @torch.no_grad()
    def error(self, parameters: Parameters, relative: bool = False) -> float:
        """Error of the block's output with these parameters: mean square, or `relative` (`blocks.relative_error`)."""
        assert self.x is not None
        assert self.y is not None
        return self.blocks.mse(self.b, self.x, self.y, parameters, relative)


def rounded(weight: Tensor, bits: int, group_size: int, clip: Tensor) -> Tensor:
    """`fake_quant_weight`, differentiable in the weight [O, I] and the ratios [O, I / group] by the `clip` rule.

    The op's scales count a group's largest weight as a constant. Where weights move it is none: its gradient comes in
    through the ratio."""
    if torch.is_grad_enabled() and weight.requires_grad:
        largest = weight.to(clip.dtype).unflatten(-1, (-1, group_size)).abs().amax(-1)
        clip = clip * (largest / largest.detach().clamp_min(torch.finfo(clip.dtype).tiny))
    return fake_quant_weight(weight, bits, group_size, clip=clip, ste="clip")


def step(weight: Tensor, bits: int, group_size: int, clip: Tensor) -> float:
    """Mean distance of a quantized weight's neighbouring levels."""
    largest = weight.unflatten(-1, (-1, group_size)).abs().amax(-1)
    return float((clip * largest).mean()) / divisor(bits, True)
