"""The head's weight at a mixture of precisions, one draw for the model: sum_p pi_p Q_p(W), and W itself at 16 bits.

W is frozen and has no LoRA. An embedding that is tied to the head takes the same values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jointnas_kernels.ops.quant.mixture.op import quant_lora_mix

RANK = 8  # of a LoRA pair of zeros: the smallest that every kernel takes


class HeadQuantizer(nn.Module):
    """The weight quantizers of a head [V, N] in groups of inputs, by precision.

    Args:
        weight: of the head, or of the embedding it is tied to; only its shape and device matter.
        bits: ascending, of `space.HEAD_BITS`.
        group_size: a divisor of N.
        backend: forces one backend of the operator; None: by device.

    Attributes:
        clip: ratios [P, V, N / group] in (0, 1] of each group's absmax, of the P precisions below 16; at first 1.
    """

    clip: Tensor

    def __init__(self, weight: Tensor, bits: Sequence[int], group_size: int, backend: str | None = None) -> None:
        super().__init__()
        self.bits, self.group_size, self.backend = tuple(bits), group_size, backend
        self.low = tuple(b for b in self.bits if b < 16)
        outputs, inputs = weight.shape
        shape = (len(self.low), outputs, inputs // group_size)
        self.register_buffer("clip", torch.ones(shape, dtype=torch.float32, device=weight.device))

    def forward(self, weight: Tensor, probs: Tensor | None = None, index: int | None = None) -> Tensor:
        """[V, N] in the weight's dtype, differentiable in `probs` [P']: of all precisions, 16 included, or (`index`)
        of one of them alone."""
        if index is not None:
            if self.bits[index] == 16:
                return weight
            return self._mixed(weight, slice(index, index + 1), torch.ones(1, device=weight.device))
        assert probs is not None  # a space with head_bits always samples them
        count = len(self.low)
        if not count:
            return probs[-1] * weight
        mixed = self._mixed(weight, slice(count), probs[:count])
        return mixed if count == len(self.bits) else torch.addcmul(mixed, probs[-1], weight)

    def _mixed(self, weight: Tensor, some: slice, probs: Tensor) -> Tensor:
        bits, (outputs, inputs) = self.low[some], weight.shape
        a, b = weight.new_zeros(len(bits), RANK, inputs), weight.new_zeros(len(bits), outputs, RANK)
        return quant_lora_mix(
            weight, a, b, 1.0, bits, probs, self.group_size, self.clip[some], mode="arch", backend=self.backend
        )

    @torch.no_grad()
    def sliced(self, weight: Tensor, columns: Tensor) -> HeadQuantizer:
        """Those of the weight [V, n] of a subset of the inputs; `columns` keep whole groups."""
        small = HeadQuantizer(weight, self.bits, self.group_size, self.backend)
        small.clip.copy_(self.clip[..., columns[:: self.group_size] // self.group_size])
        return small
