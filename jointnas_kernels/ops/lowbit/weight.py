"""LowbitWeight: a quantized matrix, laid out once for the kernels that will multiply it again and again.

    layout     tensors                                                    multiplied by
    storage    packed int32 [O, I w_bits/32] (pack.py), scale [O, I/g]    Triton, the reference; others lay it out anew
    cpu        data int32 (blocks.py)                                     the CPU kernels
    cuda       tiles int32, scale, row_sum fp32 [O], locks (tiles.py)     the CUDA kernels

The last two also hold bit-planes (``planes``), for kernels of W <= 4 times A <= 4 (CUDA: A <= 8). A CUDA weight must
not be used on two streams at once (locks).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.ops.core import cuda
from jointnas_kernels.ops.core.backends import why_not
from jointnas_kernels.ops.lowbit import blocks, tiles
from jointnas_kernels.ops.lowbit.pack import check_bits, pack_weight
from jointnas_kernels.ops.lowbit.reference import dequantize
from jointnas_kernels.ops.quant.spec import PACKED_WEIGHT_BITS

LAYOUTS = {"cpu": blocks, "cuda": tiles}


class LowbitWeight(NamedTuple):
    """Integers q of 2, 4 or 8 bits with a scale per row and group of inputs: the weight [O, I] is q * scale.

    Plain tensors and plain values, so that a module can register the tensors and `torch.compile` trace their use. Made
    by `pack`.

    Attributes:
        tensors: of the layout: storage int32 [O, I w_bits/32] and [O, I/g]; others see the module's docstring.
        layout: "storage", "cpu" or "cuda".
        planes: whether words hold bit-planes.
        outputs, inputs: O and I.
        w_bits: 2, 4 or 8.
        group_size: g, inputs that share a scale.
    """

    tensors: Sequence[Tensor]
    layout: str
    planes: bool
    outputs: int
    inputs: int
    w_bits: int
    group_size: int

    @classmethod
    def stored(cls, packed: Tensor, scale: Tensor, w_bits: int, group_size: int) -> LowbitWeight:
        """The storage layout of packed int32 [O, I w_bits/32] and scale [O, I/group_size], as they are.

        Raises:
            JointNASError: bits, dtypes, shapes or devices that do not fit.
        """
        check_bits(w_bits, PACKED_WEIGHT_BITS, "w_bits")
        if packed.dtype != torch.int32 or packed.dim() != 2:
            raise JointNASError(f"packed must be int32 [O, I*w_bits/32], got {packed.dtype} {tuple(packed.shape)}; "
                                "integers of another dtype are packed by `LowbitWeight.pack`")
        outputs, words = packed.shape
        inputs = words * 32 // w_bits
        if group_size < 1 or inputs % group_size:
            raise JointNASError(f"group_size must divide the input size {inputs}, got {group_size}")
        if scale.shape != (outputs, inputs // group_size):
            raise JointNASError(f"scale must be {(outputs, inputs // group_size)}, got {tuple(scale.shape)}")
        if packed.device != scale.device:
            raise JointNASError(f"packed and scale must be on one device, got {packed.device} and {scale.device}")
        return cls((packed, scale), "storage", False, outputs, inputs, w_bits, group_size)

    @classmethod
    def pack(
        cls, q: Tensor, scale: Tensor, w_bits: int, group_size: int, device: torch.device | str | None = None,
        layout: str | None = None, planes: bool = False,
    ) -> LowbitWeight:  # fmt: skip
        """Lay out a weight for the kernels of a device.

        Args:
            q: int32 [O, I*w_bits/32], packed already (`pack_weight`); or, in any other integer dtype, [O, I] in
                [-2^(w_bits-1), 2^(w_bits-1)-1].
            scale: [O, I/group_size], any floating dtype.
            w_bits: 2, 4 or 8.
            group_size: inputs that share a scale; divides I.
            device: where it will be used; that of ``q`` if not given.
            layout: "storage", "cpu" or "cuda"; that of the device's own kernels if not given, "storage" if they cannot
                take this weight.
            planes: bit-planes.

        Raises:
            JointNASError: bits, dtypes or shapes that do not fit, or a layout that cannot hold this weight.
        """
        check_bits(w_bits, (2, 4) if planes else PACKED_WEIGHT_BITS, "LowbitWeight.pack: w_bits")
        packed = q if q.dtype == torch.int32 or q.dtype.is_floating_point else pack_weight(q, w_bits)
        weight = cls.stored(packed.to(device or q.device), scale.to(device or q.device), w_bits, group_size)
        if layout is None:
            layout = next((name for name in LAYOUTS if weight.misfit(name) is None), "storage")
        return weight.laid_out(layout, planes)

    @classmethod
    def stack(cls, weights: Sequence[LowbitWeight]) -> LowbitWeight | None:
        """One weight with the rows of all, in their layout; None where that is no row behind row ("cpu", bit-planes, or
        "cuda" with rows that are no whole tiles) or they differ in more than `outputs`."""
        first = weights[0]
        kinds = {(w[1:3], w[4:], tuple(t.dtype for t in w.tensors)) for w in weights}  # all but `outputs`
        whole = first.layout == "storage" or all(w.outputs % tiles.ROWS == 0 for w in weights)
        if len(kinds) > 1 or not whole or first.planes or first.layout == "cpu":
            return None
        packed, scale, *rest = zip(*(w.tensors for w in weights), strict=True)
        tensors = [torch.cat(packed), torch.cat(scale, 0 if first.layout == "storage" else 1)]
        if rest:
            tensors += [torch.cat(rest[0]), torch.zeros_like(rest[1][0])]
        return first._replace(tensors=tensors, outputs=sum(w.outputs for w in weights))

    def misfit(self, layout: str) -> str | None:
        """Why the kernels of "cpu" or "cuda" cannot multiply this weight, in the storage layout; None if they can."""
        scale = self.tensors[1]
        if layout == "cuda" and (self.group_size != tiles.INPUTS or scale.dtype not in cuda.DTYPES):
            return f"they take groups of {tiles.INPUTS} in float16 or bfloat16, not {self.group_size} in {scale.dtype}"
        if layout == "cpu" and self.group_size % (32 // self.w_bits):
            return (f"{self.w_bits}-bit groups must be multiples of {32 // self.w_bits} inputs and these have "
                    f"{self.group_size}")
        return why_not(layout, scale)

    def laid_out(self, layout: str, planes: bool = False) -> LowbitWeight:
        """The same weight in another layout; itself where nothing changes.

        Raises:
            JointNASError: an unknown layout, or one that cannot hold this weight.
        """
        if (layout, planes) == (self.layout, self.planes):
            return self
        packed, scale = self.unpack()
        if layout == "storage":
            return self._replace(layout=layout, planes=False, tensors=(packed, scale))
        if layout not in LAYOUTS:
            raise unknown("layout", layout, ("storage", *LAYOUTS))
        tensors = LAYOUTS[layout].lay_out(packed, scale, self.w_bits, self.group_size, planes)
        return self._replace(layout=layout, planes=planes, tensors=tensors)

    def unpack(self) -> tuple[Tensor, Tensor]:
        """(packed int32 [O, I*w_bits/32], scale [O, I/group_size]) from any layout."""
        if self.layout == "storage":
            return self.tensors[0], self.tensors[1]
        read_back = LAYOUTS[self.layout].read_back
        return read_back(self.tensors, self.outputs, self.inputs, self.w_bits, self.group_size, self.planes)

    def dequantized(self, rows: Tensor | slice = slice(None), dtype: torch.dtype = torch.float64) -> Tensor:
        """q * scale of some rows, [rows, I] in ``dtype``."""
        if self.layout == "cpu" and isinstance(rows, Tensor):  # without reading the others
            packed, scale = blocks.read_back(
                self.tensors, self.outputs, self.inputs, self.w_bits, self.group_size, self.planes, rows
            )
        else:
            packed, scale = (t[rows] for t in self.unpack())
        return dequantize(packed, scale, self.w_bits, self.group_size, dtype)

    def clone(self) -> LowbitWeight:
        """A copy at other addresses."""
        return self._replace(tensors=tuple(t.clone() for t in self.tensors))
