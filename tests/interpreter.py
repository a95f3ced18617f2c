"""Triton's interpreter, made quick enough: by a function that it does not know it reduces element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from triton.runtime.interpreter import ReduceOps

from jointnas_kernels.ops.quant.kernels import larger, smaller


def quick_reductions() -> None:
    """The extremes that keep NaN by numpy's, which do the same."""
    known = {id(larger): np.maximum, id(smaller): np.minimum}
    slow = ReduceOps.generic_reduce

    def reduce(self: Any, inputs: Sequence[Any]) -> Any:
        function = known.get(id(self.combine_fn))
        if function is None or self.axis is None:
            return slow(self, inputs)
        values = function.reduce(inputs[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(values, inputs[0].dtype)

    ReduceOps.generic_reduce = reduce
