"""Where the random choices of a case come from, and how tensors are laid out in memory.

A case builder asks a ``Source``: ``pick`` for choices a kernel is compiled for (flags, dtypes, bit widths, power-of-two
buckets of sizes, layouts), ``free`` for everything else. ``Seeded`` answers from two generators, so that on a GPU all
cases of an op share a few dozen compiled kernels while sizes and data still differ in each; ``Shrinking``
(shrinking.py) answers from hypothesis, which then reduces a failing case to a small one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """Largest sizes drawn: rows (tokens), channels, and features of a GEMM."""

    rows: int
    width: int
    features: int


# The interpreter takes about a millisecond per program and operation; the GPU should see several blocks per dimension.
LIMITS = {"small": Limits(9, 160, 40), "medium": Limits(24, 300, 80), "large": Limits(300, 2100, 300)}


def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


class Source:
    """Random choices; subclasses say where they come from."""

    def __init__(self, dtype: torch.dtype, backend: str | None, limits: Limits) -> None:
        self.dtype, self.backend, self.limits = dtype, backend, limits

    def pick(self, options: Sequence[T]) -> T:
        """A choice that kernels are compiled for."""
        raise NotImplementedError

    def free(self, options: Sequence[T]) -> T:
        """A choice that no compilation depends on."""
        raise NotImplementedError

    def seed(self) -> int:
        """Seed of the case's data."""
        raise NotImplementedError

    def start(self) -> Source:
        """Begin the data of this case."""
        self.data = torch.Generator().manual_seed(self.seed())
        return self

    def flag(self) -> bool:
        return self.pick((False, True))

    def size(self, limit: int) -> int:
        """1..limit, even in the logarithm: ones, primes, multiples of 16, powers of two and their neighbours.

        Triton compiles anew for 1, for multiples of 16 and for each power-of-two block, so only the value inside such
        a class is free.
        """
        bucket = self.pick(range(limit.bit_length()))
        low, high = (1 << bucket) // 2 + 1, min(limit, 1 << bucket)
        if low > high:
            low = high
        aligned = self.pick((False, False, True))
        options = [n for n in range(low, high + 1) if (n % 16 == 0) == aligned]
        options = options or list(range(low, high + 1))
        primes = [n for n in options if is_prime(n)]
        return self.free(self.free((options, primes, options[:1], options[-1:])) or options)

    def leading(self, limit: int) -> tuple[int, ...]:
        """Leading dims with at most ``limit`` rows in all."""
        count = self.size(limit)
        part = self.free([d for d in range(1, count + 1) if count % d == 0])
        return self.free(((count,), (1, count), (part, count // part), (part, 1, count // part)))

    def subset(self, names: Sequence[str]) -> tuple[str, ...]:
        """A non-empty subset of ``names``: the inputs that get a gradient."""
        kept = tuple(name for name in names if self.flag())
        return kept or (self.pick(names),)

    def layout(self, dims: int = 2) -> str:
        """How a tensor lies in memory (``place``); dense half of the time."""
        ways = ("dense", "dense", "dense", "offset", "padded", "step")
        return self.pick(ways if dims < 2 else (*ways, "columns"))

    # -- data --------------------------------------------------------------------------------------------------------

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values of a random magnitude, at times with outliers, zeros or a row of zeros."""
        half = self.dtype == torch.float16  # products of three factors are to stay below its 65,504
        values = torch.randn(shape, generator=self.data, dtype=torch.float64)
        values *= self.free((1.0, 1.0, 0.05, 1.5 if half else 6.0))
        style = self.free(("plain", "plain", "plain", "outliers", "zeros", "zero row"))
        if style == "outliers":
            values[torch.rand(shape, generator=self.data) < 0.02] *= 6 if half else 25
        elif style == "zeros":
            values[torch.rand(shape, generator=self.data) < 0.3] = 0
        elif style == "zero row" and values.dim() > 1:
            values[..., 0, :] = 0
        return values.to(dtype or self.dtype)

    def mask(self, *shape: int) -> Tensor:
        """A width mask: probabilities, or the hard prefix of a one-hot choice."""
        soft = torch.rand(shape, generator=self.data, dtype=torch.float64)
        if self.free((False, False, True)):
            soft = (torch.arange(shape[-1]) < self.free(range(1, shape[-1] + 1))).double().expand(shape).clone()
        return soft.to(self.vector_dtype)

    def probs(self, count: int) -> Tensor:
        """Probabilities of ``count`` choices, at times one-hot."""
        values = torch.rand(count, generator=self.data, dtype=torch.float64) + 0.05
        if self.free((False, False, True)):
            values = torch.nn.functional.one_hot(torch.tensor(self.free(range(count))), count).double()
        return (values / values.sum()).to(self.vector_dtype)

    @property
    def vector_dtype(self) -> torch.dtype:
        """Masks and probabilities are fp32, beside fp64 tensors fp64."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


class Seeded(Source):
    """Choices from a seed; ``variants`` > 0 leaves that many different answers to the ``pick``s."""

    def __init__(self, op: str, seed: int, variants: int, *source: object) -> None:
        super().__init__(*source)  # type: ignore[arg-type]
        self.structure = random.Random(f"{op}/{self.dtype}/{seed % variants if variants else seed}")
        self.rest = random.Random(f"{op}/{seed}/free")

    def pick(self, options: Sequence[T]) -> T:
        return self.structure.choice(options)

    def free(self, options: Sequence[T]) -> T:
        return self.rest.choice(options)

    def seed(self) -> int:
        return self.rest.getrandbits(40)


# ---- what several builders draw, and how they say it ----


def keep(sizes: Sequence[int], n: int) -> Tensor:
    """[K, n]: 1 where choice i keeps the channel."""
    return torch.tensor([[float(k < size) for k in range(n)] for size in sizes], dtype=torch.float64)


def sizes_of(source: Source, n: int) -> list[int]:
    """One to four sizes up to n: any order, repeats allowed, often multiples of eight."""
    unit = source.pick((1, 8)) if n >= 8 else 1
    return [unit * source.pick(range(1, n // unit + 1)) for _ in range(source.pick((1, 2, 3, 4)))]


def structural_size(source: Source, limit: int) -> int:
    """A size that becomes part of a compiled kernel."""
    low = source.pick([1 << e for e in range(limit.bit_length())])
    return source.pick(range(low, min(2 * low, limit + 1)))


def layouts(source: Source, vectors: Sequence[str] = (), **tensors: int) -> dict[str, str]:
    """Memory layouts: of tensors with so many dims, of the incoming gradient, of (mostly dense) vectors."""
    found = {name: source.layout(dims) for name, dims in tensors.items()}
    found["grad"] = source.pick(("dense", "dense", "offset", "step", "expanded"))
    for name in vectors:
        found[name] = source.pick(("dense", "dense", "dense", "offset", "step"))
    return found


def describe(**values: object) -> str:
    return " ".join(f"{name}={list(v) if isinstance(v, tuple) else v}" for name, v in values.items())


def place(values: Tensor, how: str, device: str) -> Tensor:
    """``values`` on ``device``, as a view of a larger buffer whose other elements are NaN (or the largest int).

    dense · offset (rows cut out, unaligned) · padded (rows cut out, aligned) · step (every second element) · columns
    (transposed memory) · expanded (stride 0 everywhere; all values are equal).
    """
    if values.dim() == 0 or how == "dense":
        return values.clone(memory_format=torch.contiguous_format).to(device)
    if how == "columns":
        turned = values.transpose(-1, -2).contiguous() if values.dim() > 1 else values.clone()
        return turned.to(device).transpose(-1, -2) if values.dim() > 1 else turned.to(device)
    if how == "expanded":
        return values.flatten()[0].to(device).expand(values.shape)
    n = values.shape[-1]
    start, length, step = {
        "offset": (3, -(-(n + 3) // 16) * 16 + 5, 1),
        "padded": (16, -(-n // 16) * 16 + 32, 1),
        "step": (0, 2 * n, 2),
    }[how]
    poison = float("nan") if values.is_floating_point() else torch.iinfo(values.dtype).max
    buffer = torch.full((*values.shape[:-1], length), poison, dtype=values.dtype)
    buffer[..., start : start + step * n : step] = values
    return buffer.to(device)[..., start : start + step * n : step]  # one transfer: no kernels but the op's own
