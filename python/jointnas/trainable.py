"""Linears that train through their quantizers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jointnas_kernels.nn.linear import FakeQuantLinear
from jointnas_kernels.ops.quant import grid
from jointnas_kernels.ops.quant.activations import act_quant_mix
from jointnas_kernels.ops.quant.weights import fake_quant_weight


class TrainableQuantLinear(nn.Linear):
    """y = Q_a(x) Q_w(W)^T with straight-through gradients; `baked` is what it becomes after training."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, weight_bits: int | None, act_bits: int | None, group_size: int,
        clip: Tensor | None, act_symmetric: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        self.weight = nn.Parameter(weight)
        if bias is not None:
            self.bias = nn.Parameter(bias)
        self.weight_bits, self.act_bits, self.group_size = weight_bits, act_bits or 16, group_size
        self.act_symmetric = act_symmetric
        self.register_buffer("clip", clip)
        self.register_buffer("one", torch.ones(1, device=weight.device), persistent=False)

    def quantized(self) -> Tensor:
        """The weight [O, I] that is used, differentiable in the one that is trained."""
        if self.weight_bits is None:
            return self.weight
        clip = self.get_buffer("clip") if self.clip is not None else None
        return fake_quant_weight(self.weight, self.weight_bits, self.group_size, clip=clip)

    def forward(self, input: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        if self.act_bits < 16:
            one = self.get_buffer("one")
            input = act_quant_mix(input, (self.act_bits,), one, symmetric=self.act_symmetric)
        return F.linear(input, self.quantized(), self.bias)

    @torch.no_grad()
    def baked(self) -> FakeQuantLinear:
        """A plain linear on the quantized weight, which quantizes its input if that is searched."""
        bias = None if self.bias is None else self.bias.detach().clone()
        weight, of = self.weight.detach().clone(), None
        if self.weight_bits is not None:
            clip = self.get_buffer("clip") if self.clip is not None else None
            weight, of = grid.quantize(weight, self.weight_bits, self.group_size, clip=clip)
        return FakeQuantLinear(weight, bias, of, self.act_bits, self.act_symmetric)
