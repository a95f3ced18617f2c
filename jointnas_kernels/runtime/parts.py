"""What the decode step and prompts are made of, each part alone: for latency tables, which add parts up.

A part runs many times in one call by one team, as it does inside of a step: without Python, with the step's barriers.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.ops.core import cpu
from jointnas_kernels.runtime.decode import CHUNK, MOST, float_bits, linear_fields

PARTS = ("embedding", "norm", "product", "head norm", "rotation", "attention", "swiglu", "residual")  # DecodePart
NO_LINEAR = (0, 0, 0, 0, 16, 0, 0, 16, 0)


class Part:
    """One part of a step for `chunk` tokens of each of `batch` sequences, `repeats` times in a call.

    Args:
        name: of PARTS.
        batch: sequences, 1 to 16.
        dtype: float32 or bfloat16.
        linears: of a product, one after the other; all map `hidden` inputs to equally many outputs.
        repeats: calls of any other part.
        hidden: width of norms, residuals and products' inputs.
        heads, kv_heads, head_dim: of attention, rotation and head norms.
        intermediate: width of swiglu.
        length: positions that attention looks back at, the new ones included; every repetition has a cache of its own.
        chunk: tokens of each sequence, one after the other.

    Raises:
        JointNASError: an unknown part, or sizes that the step does not run.
    """

    def __init__(
        self, name: str, batch: int, dtype: torch.dtype, linears: Sequence[nn.Module] = (), repeats: int = 1,
        hidden: int = 1, heads: int = 1, kv_heads: int = 1, head_dim: int = 2, intermediate: int = 1, length: int = 1,
        chunk: int = 1,
    ) -> None:  # fmt: skip
        if name not in PARTS:
            raise unknown("part", name, PARTS, where="decode step")
        if not 1 <= batch <= MOST or not 1 <= chunk <= max(1, CHUNK // batch) or dtype not in cpu.DTYPES:
            raise JointNASError(f"decode step: no parts for {batch} sequences, {chunk} tokens of each, in {dtype}")
        self.name, self.batch, self.chunk, self.dtype, self.linears = name, batch, chunk, dtype, list(linears)
        tokens, length = batch * chunk, max(length, chunk)
        self.repeats, self.hidden = len(self.linears) or repeats, hidden
        self._kept: list[Tensor] = []
        first = linear_fields(self.linears[0], self._address) if self.linears else NO_LINEAR
        self.outputs = first[2]
        cache = (batch, kv_heads, length, head_dim)
        blocks = array("q")
        for i in range(self.repeats):
            keys, values = (self._zeros(*cache) if name == "attention" else 0 for _ in range(2))
            product = linear_fields(self.linears[i], self._address) if self.linears else NO_LINEAR
            head_norm = self._ones(head_dim) if name == "head norm" else 0
            blocks.extend((self._ones(hidden), 0, head_norm, 0, keys, values, 0))
            blocks.extend((*product, *NO_LINEAR * 6))
            if name not in ("attention", "product"):
                blocks *= self.repeats
                break
        self._blocks = blocks
        self._input = torch.zeros(tokens, hidden, dtype=dtype)
        # attention alone is that of rotated queries and keys
        angles = [0 if name == "attention" else self._zeros(length, head_dim) for _ in range(2)]
        self._model = array("q", [
            cpu.DTYPES[dtype], hidden, heads, kv_heads, head_dim, intermediate, tokens, self.repeats, length,
            self._input.data_ptr(), 0, *angles, float_bits(1e-5), float_bits(head_dim**-0.5), *first,
            self._blocks.buffer_info()[0],
        ])  # fmt: skip
        self._ids, self._slot = torch.arange(tokens), length - chunk
        self._positions = (self._slot + torch.arange(chunk)).repeat(batch)
        self._starts = torch.zeros(batch, dtype=torch.int64)
        self._memory, self._for = torch.empty(0, dtype=torch.uint8), 0

    def __call__(self, x: Tensor | None = None) -> Tensor:
        """[batch * chunk, outputs] of a product's last linear, for x [batch * chunk, hidden]; empty for other parts."""
        threads = torch.get_num_threads()
        if self._for != threads:
            size = array("q", [0])
            cpu.call("decode_size", self._model, self.batch, self.chunk, 1, size, threads=threads)
            self._memory, self._for = torch.zeros(size[0] + 64, dtype=torch.uint8), threads
        if x is not None and self.linears:
            self._input.copy_(x)
        y = torch.empty(2, self.batch * self.chunk, self.outputs, dtype=self.dtype)  # of products, in turns
        memory = self._memory.data_ptr()
        cpu.call("decode_part", self._model, PARTS.index(self.name), self.batch, self.chunk, self._ids, self._positions,
                 self._starts, self._slot, y, memory + -memory % 64, threads=threads)  # fmt: skip
        return y[(self.repeats - 1) % 2]

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self._kept.append(tensor.detach().contiguous())
        return self._kept[-1].data_ptr()

    def _zeros(self, *shape: int) -> int:
        return self._address(torch.zeros(shape, dtype=self.dtype))

    def _ones(self, *shape: int) -> int:
        return self._address(torch.ones(shape, dtype=self.dtype))
