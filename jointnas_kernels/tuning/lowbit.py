"""The CUDA low-bit products of a device, as what is tuned: checked against the reference, timed as captured graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jointnas_kernels.latency.timing import copies, graph_sample
from jointnas_kernels.ops.core import cuda as calls
from jointnas_kernels.ops.lowbit import check, cuda
from jointnas_kernels.ops.lowbit.choice import Candidate, candidates, runs, usual
from jointnas_kernels.ops.lowbit.reference import product
from jointnas_kernels.ops.lowbit.tiles import INPUTS
from jointnas_kernels.ops.lowbit.weight import LowbitWeight
from jointnas_kernels.ops.quant.spec import level_range
from jointnas_kernels.testing import poisoned
from jointnas_kernels.tuned import Shape

ROWS = 4096  # of the reference at a time: its weights are fp64
# Dense weights are rounded to their dtype, 2^-9 of each: sums are off by some 1e-3 of a usual output
NOISE = {"dense": 2**-8}
MOST_COPIES = 64


class Products:
    """`Products(device)(shape, tokens)` is the contest of that product."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device, self.seed = device, seed

    def __call__(self, shape: Shape, tokens: int) -> Product:
        """Makes its weights and input."""
        return Product(shape, tokens, self.device, torch.Generator(self.device).manual_seed(self.seed))


class Product:
    """A product with a random weight and input; the weight in more copies than the L2 cache holds."""

    def __init__(self, shape: Shape, tokens: int, device: torch.device, generator: torch.Generator) -> None:
        self.shape, self.device, self.dtype = shape, device, getattr(torch, shape.dtype)
        low, high = level_range(shape.w_bits)
        draw: dict[str, Any] = {"device": device, "generator": generator}
        q = torch.randint(low, high + 1, (shape.outputs, shape.inputs), dtype=torch.int8, **draw)
        scale = (torch.rand(shape.outputs, shape.inputs // INPUTS, **draw) * 0.01 + 0.005).to(self.dtype)
        stored = LowbitWeight.pack(q, scale, shape.w_bits, INPUTS, layout="storage")
        self.x = (torch.randn(tokens, shape.inputs, **draw) + 0.5).to(self.dtype)
        self.expected = self._reference(stored)
        weight = stored.laid_out("cuda", shape.planes)
        count = copies(q.numel() * shape.w_bits // 8, 2**62, device, MOST_COPIES)
        self.weights = [weight, *(weight.clone() for _ in range(count - 1))]
        self.usual = usual(tokens, weight, shape.a_bits)
        possible = candidates(tokens, shape, calls.multiprocessors(self.x))
        self.candidates: Sequence[Candidate] = [c for c in possible if runs(c.kernel, weight)]
        self._samples: dict[Candidate, Callable[[], float]] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def _reference(self, stored: LowbitWeight) -> Tensor:
        """[tokens, O] fp32, computed in fp64."""
        packed, scale = stored.unpack()
        parts = zip(packed.split(ROWS), scale.split(ROWS), strict=True)
        bits = self.shape.w_bits, self.shape.a_bits
        return torch.cat([product(self.x, p, s, *bits, INPUTS, False, torch.float64).float() for p, s in parts], 1)

    def _call(self, candidate: Candidate, weight: LowbitWeight) -> Tensor:
        return cuda.product(candidate.kernel, self.x, weight, self.shape.a_bits, False, candidate.plan)

    def wrong(self, candidate: Candidate) -> str:
        """What a candidate computes otherwise than the reference; empty if nothing."""
        try:
            with poisoned():  # memory may hold the result of the candidate before
                y = self._call(candidate, self.weights[0])
        except (ValueError, RuntimeError) as error:  # refused, or not launched
            return str(error)
        wrong = check.mismatches(y, self.expected, NOISE.get(candidate.kernel, 1e-4))
        return f"{wrong} of {y.numel()} outputs are wrong" if wrong else ""

    def sample(self, candidate: Candidate) -> float:
        """Milliseconds of a call, of one replay; infinite where there is no memory for it."""
        if candidate not in self._samples:
            calls = [partial(self._call, candidate, weight) for weight in self.weights]
            try:
                self._samples[candidate] = graph_sample(calls, self.device, self._pool)
            except torch.cuda.OutOfMemoryError:
                self._samples[candidate] = lambda: math.inf
        return self._samples[candidate]()
