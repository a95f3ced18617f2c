"""Search spaces; which sizes fit a model, and which of them its class takes together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jointnas_kernels import layout
from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.space.choice import Choice
from jointnas_kernels.space.plain import (
    ATTENTION,
    BITS,
    DIMENSIONS,
    HEAD_BITS,
    STRUCTURE,
    Data,
    ascending,
    integer,
    named,
    read_yaml,
    sequence,
)
from jointnas_kernels.space.stock import made, refused


@dataclass(frozen=True)
class SearchSpace(Data):
    """The allowed sizes of every dimension, ascending. Bits of None leave that part unquantized.

    `excluded` lists combinations (hidden, heads, head_dim) of allowed sizes that are not in the space. `feasible`
    fills it; without it every combination counts, and no model is needed.

    Raises:
        JointNASError: sizes that are no distinct positive integers, bits that no kernel has, quantization groups
            that a width would cut, or nothing but excluded combinations.
    """

    hidden: tuple[int, ...]
    heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    intermediate: tuple[int, ...]
    blocks: tuple[int, ...]
    weight_bits: tuple[int, ...] | None = None
    act_bits: tuple[int, ...] | None = None
    group_size: int = 128
    excluded: tuple[tuple[int, ...], ...] = ()
    head_bits: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for key in DIMENSIONS:
            values = getattr(self, key)
            if values is not None or key in STRUCTURE:
                object.__setattr__(self, key, ascending(values, f"search space: {key}"))
        integer(self.group_size, "search space: group_size")
        if self.group_size < 1:
            raise JointNASError(f"search space: group_size is {self.group_size}; it must be positive.")
        for key, low, high in (("weight_bits", 2, 8), ("act_bits", 2, 16)):
            for b in getattr(self, key) or ():
                if not low <= b <= high or 8 < b < 16:
                    allowed = "2 to 8" if key == "weight_bits" else "2 to 8, and 16 for unquantized activations"
                    raise JointNASError(f"search space: {key} contains {b}; allowed: {allowed}.")
        for b in self.head_bits or ():
            if b not in HEAD_BITS:
                allowed = f"{', '.join(map(str, HEAD_BITS[:-1]))}, and 16 for an unquantized head"
                raise JointNASError(f"search space: head_bits contains {b}; allowed: {allowed}.")
        for d in self.head_dim:
            if d % 2:
                raise JointNASError(f"search space: head_dim contains {d}; rotary embedding needs an even head_dim.")
        for key in self._grouped:
            self._multiple(key, self.group_size, "the quantization group size")
        for b in self.head_bits or ():
            cut = [size for size in self.hidden if b < 16 and size % (32 // b)]
            if cut:
                raise JointNASError(
                    f"search space: hidden {cut[0]} is no multiple of {32 // b}, the inputs of a {b}-bit head in one"
                    " word of a checkpoint."
                )
        if self.weight_bits is not None:
            self._multiple("head_dim", self.o_proj_group, "o_proj's group: min(group size, smallest head_dim)")
        self._exclude()

    @property
    def _grouped(self) -> tuple[str, ...]:
        """Widths that the quantization group must divide."""
        return ("hidden", "intermediate") if self.weight_bits is not None else ("hidden",) * self.quantizes_head

    def _multiple(self, key: str, of: int, what: str) -> None:
        bad = [v for v in getattr(self, key) if v % of]
        if bad:
            raise JointNASError(f"search space: {key} {bad[0]} is no multiple of {of}, {what}. {self._fitting()}")

    def _fitting(self, *inputs: int) -> str:
        """Says which group sizes fit all widths, and `inputs` more: multiples of as many inputs as a 32-bit word holds
        at 2 bits (every kernel takes those), where there are none at 4 or at 8."""
        common = math.gcd(*self.hidden, *self.intermediate, *inputs)
        fit = [g for g in range(4, common + 1, 4) if common % g == 0]
        fit = [g for g in fit if not any(d % min(g, self.head_dim[0]) for d in self.head_dim)]
        best = next((found for word in (16, 8, 4) if (found := [g for g in fit if g % word == 0])), [])
        return f"Group sizes that fit: {', '.join(map(str, best)) or 'none; choose other widths'}."

    def _exclude(self) -> None:
        """Keeps of `excluded` what else were in the space."""
        where, known = "search space: excluded", set[tuple[int, ...]]()
        for entry in sequence(self.excluded, where):
            sizes = tuple(integer(v, where) for v in sequence(entry, where))
            if len(sizes) != len(ATTENTION):
                raise JointNASError(f"{where}: expected {', '.join(ATTENTION)}, found {list(sizes)}.")
            if all(size in self.sizes(key) for key, size in zip(ATTENTION, sizes, strict=True)):
                known.add(sizes)
        object.__setattr__(self, "excluded", tuple(sorted(known)))
        if not self.combinations(ATTENTION):
            raise JointNASError(f"{where}: every combination is; at least one must be left.")

    # ---- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def named(cls, name: str) -> SearchSpace:
        """`llama3`, `qllama3`: Table 1 of arXiv 2606.04063 (Llama-3.1-8B). `tiny`: the embedded small model.

        Raises:
            JointNASError: another name.
        """
        if name not in _NAMED:
            raise unknown("search space", name, _NAMED)
        return _NAMED[name]

    @classmethod
    def single(
        cls, config: Any, weight_bits: Sequence[int] | None = None, act_bits: Sequence[int] | None = None,
        group_size: int = 128, head_bits: Sequence[int] | None = None,
    ) -> SearchSpace:  # fmt: skip
        """The space whose only structure is the model that a config describes."""
        sizes: dict[str, Any] = {k: (v,) for k, v in layout.original_sizes(config).items()}
        bits: dict[str, Any] = {"weight_bits": weight_bits, "act_bits": act_bits, "head_bits": head_bits}
        return cls(**sizes, **bits, group_size=group_size)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "search space") -> SearchSpace:
        """From plain data; an optional key `base` names the space whose other dimensions are kept.

        Raises:
            JointNASError: unknown or missing keys, or bad values.
        """
        cls.check_keys(data, "search-space", where, "base")
        values = dict(data)
        base = values.pop("base", None)
        return cls(**values) if base is None else cls(**{**cls.named(str(base)).to_dict(), **values})

    @classmethod
    def from_yaml(cls, path: str | Path) -> SearchSpace:
        """One mapping with the fields of this class as keys, e.g. ``hidden: [128, 256]``.

        Raises:
            JointNASError: no file, no YAML, no mapping, or what `from_dict` refuses.
        """
        return cls.from_dict(read_yaml(path, "search space file"), where=str(path))

    # ---- what is in it ----------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Number of original blocks, the length of a choice's bits."""
        return self.blocks[-1]

    @property
    def quantizes_head(self) -> bool:
        """Whether there is a choice with a quantized head."""
        return self.head_bits is not None and self.head_bits[0] < 16

    @property
    def o_proj_group(self) -> int:
        """o_proj's quantization group: head_dim cuts its input inside each head, and cuts must fall between groups."""
        return min(self.group_size, self.head_dim[0])

    def group(self, linear: layout.Linear) -> int:
        """A linear's quantization group."""
        return self.o_proj_group if linear.cut_in_heads else self.group_size

    def sizes(self, key: str) -> tuple[int, ...]:
        """The choices of a dimension; an empty tuple for bits that are not searched.

        Raises:
            JointNASError: no dimension has that name.
        """
        if key not in DIMENSIONS:
            raise unknown("search-space dimension", key, DIMENSIONS)
        sizes: tuple[int, ...] | None = getattr(self, key)
        return sizes or ()

    def combinations(self, dims: Sequence[str]) -> list[tuple[int, ...]]:
        """Ascending sizes of these dimensions that occur together in a structure of the space.

        Raises:
            JointNASError: no dimension has one of the names.
        """
        coupled = [d for d in dims if d in ATTENTION]
        places = [ATTENTION.index(d) for d in coupled]
        grid = itertools.product(*(self.sizes(d) for d in ATTENTION))
        occurring = {tuple(sizes[i] for i in places) for sizes in set(grid).difference(self.excluded)}

        def occurs(sizes: tuple[int, ...]) -> bool:
            return tuple(size for d, size in zip(dims, sizes, strict=True) if d in ATTENTION) in occurring

        return list(filter(occurs, itertools.product(*(self.sizes(d) for d in dims))))

    @cached_property
    def allowed(self) -> Tensor:
        """[hidden, heads, head_dim] bool: which of their combinations are not excluded."""
        grid = itertools.product(*(self.sizes(d) for d in ATTENTION))
        mask = torch.tensor([sizes not in self.excluded for sizes in grid], device="cpu")
        return mask.view([len(self.sizes(d)) for d in ATTENTION])

    def allows(self, choice: Choice) -> bool:
        """Whether the structure of a choice of this space is not excluded."""
        return tuple(getattr(choice, d) for d in ATTENTION) not in self.excluded

    def nearest(self, choice: Choice) -> Choice:
        """The choice with the allowed combination that changes its sizes least, by their ratios."""

        def distance(sizes: tuple[int, ...]) -> float:
            return sum(abs(math.log(size / getattr(choice, d))) for d, size in zip(ATTENTION, sizes, strict=True))

        nearest = min(self.combinations(ATTENTION), key=distance)
        sizes: Any = dict(zip(ATTENTION, nearest, strict=True))
        return replace(choice, **sizes)

    def size(self) -> int:
        """How many choices there are."""
        per_block = math.prod(len(self.sizes(k)) or 1 for k in BITS)
        others = math.prod(len(self.sizes(k)) for k in STRUCTURE if k not in ATTENTION)
        return int(self.allowed.sum()) * others * per_block**self.depth * (len(self.sizes("head_bits")) or 1)

    def full(self) -> Choice:
        """The largest size of every dimension, the highest precision everywhere. Where that structure is excluded, the
        one with the largest hidden · heads · head_dim."""
        full = self._choice(lambda key, n: (self.sizes(key)[-1],) * n)
        largest = max(self.combinations(ATTENTION), key=lambda sizes: (math.prod(sizes), sizes))
        sizes: Any = dict(zip(ATTENTION, largest, strict=True))
        return replace(full, **sizes)

    def sample(self, generator: torch.Generator | None = None) -> Choice:
        """Uniform in every dimension, independently; with excluded combinations, uniform over what is left."""

        def pick(key: str, n: int) -> tuple[int, ...]:
            sizes = self.sizes(key)
            return tuple(sizes[i] for i in torch.randint(len(sizes), (n,), generator=generator).tolist())

        while True:
            choice = self._choice(pick)
            if self.allows(choice):
                return choice

    def _choice(self, pick: Callable[[str, int], tuple[int, ...]]) -> Choice:
        """From `pick(dimension, how many)`."""
        structure = {k: pick(k, 1)[0] for k in STRUCTURE}
        bits = {k: pick(k, self.depth) for k in BITS if self.sizes(k)}
        head = pick("head_bits", 1)[0] if self.head_bits else None
        return Choice(**structure, **bits, head_bits=head)  # type: ignore[arg-type]

    def structures(self) -> list[Choice]:
        """Every combination of sizes but bits, in their order."""
        found: list[Any] = self.combinations(STRUCTURE)
        return [Choice(*sizes) for sizes in found]

    def __iter__(self) -> Iterator[Choice]:
        """Every choice, lazily: `size()` of them."""

        def rows(key: str) -> Iterable[tuple[int, ...] | None]:
            return itertools.product(self.sizes(key), repeat=self.depth) if self.sizes(key) else (None,)

        for structure in self.structures():
            for w in rows("weight_bits"):
                for a in rows("act_bits"):
                    for head in self.head_bits or (None,):
                        yield replace(structure, weight_bits=w, act_bits=a, head_bits=head)

    def check(self, choice: Choice) -> None:
        """Raise unless the choice has sizes and bits of this space. A supernet computes excluded combinations, too.

        Raises:
            JointNASError: it has not.
        """
        for key in STRUCTURE:
            if getattr(choice, key) not in self.sizes(key):
                raise unknown(f"{key} choice", getattr(choice, key), self.sizes(key))
        for key in BITS:
            bits, sizes = getattr(choice, key), self.sizes(key)
            self._both(key, bits)
            if bits is not None and len(bits) != self.depth:
                raise JointNASError(f"choice: {len(bits)} {key} for {self.depth} blocks; give one per original block.")
            for b in bits or ():
                if b not in sizes:
                    raise unknown(f"{key} choice", b, sizes)
        self._both("head_bits", choice.head_bits)
        if choice.head_bits is not None and choice.head_bits not in self.sizes("head_bits"):
            raise unknown("head_bits choice", choice.head_bits, self.sizes("head_bits"))

    def _both(self, key: str, bits: Any) -> None:
        """Raise unless a choice has these bits where the space searches them, and only there."""
        if (bits is None) != (not self.sizes(key)):
            state = "searches" if self.sizes(key) else "does not search"
            raise JointNASError(f"choice: {key} is {bits}, but the space {state} {key}.")

    # ---- of one model -----------------------------------------------------------------------------------------------

    def feasible(self, config: Any) -> tuple[SearchSpace, list[str]]:
        """What of the space the class of a model's config takes: combinations that it refuses are `excluded`, sizes
        that are left in none are removed. Also one line per removal, and one for all excluded combinations.

        Raises:
            JointNASError: a size that is no sub-network of this model, and what is allowed; or nothing is left.
        """
        self._fit(config)
        values, lines, together = self.to_dict(), list[str](), dict[tuple[int, ...], str]()
        for dims in (ATTENTION, ("intermediate",), ("blocks",)):
            grid = self.combinations(dims)
            reasons = refused(config, dims, grid)
            left = [sizes for sizes in grid if sizes not in reasons]
            if not left:
                raise JointNASError(self._nothing(config, dims, reasons))
            for place, key in enumerate(dims):
                values[key] = sorted({sizes[place] for sizes in left})
                first = {sizes[place]: reason for sizes, reason in reversed(reasons.items())}
                lines += [f"{key} {size}: {first[size]}" for size in sorted(first) if size not in values[key]]
            together |= reasons if dims == ATTENTION else {}
        space = SearchSpace.from_dict({**values, "excluded": [*self.excluded, *together]})
        new = [sizes for sizes in together if sizes in space.excluded]
        if new:
            total = len(space.combinations(ATTENTION)) + len(space.excluded)
            text = f"{len(new)} of {total} combinations of {', '.join(ATTENTION)}, first {named(ATTENTION, new[0])}"
            lines.append(f"{text}: {together[new[0]]}")
        return space, lines

    def _nothing(self, config: Any, dims: Sequence[str], reasons: Mapping[tuple[int, ...], str]) -> str:
        """That no sizes of these dimensions are feasible, and which numbers of heads are with the first."""
        first, why = next(iter(reasons.items()))
        text = f"search space: no {', '.join(dims)} is feasible. {named(dims, first)}: {why}"
        if dims != ATTENTION:
            return text
        hidden, _, head_dim = first
        groups = config.num_key_value_heads
        grid = [(hidden, heads, head_dim) for heads in range(groups, config.num_attention_heads + 1, groups)]
        fits = [str(sizes[1]) for sizes in grid if sizes not in refused(config, dims, grid)]
        return f"{text} Heads that fit hidden {hidden}: {', '.join(fits) or 'none'}."

    def validate(self, config: Any) -> None:
        """Raise unless choices of this space are sub-networks of the model that `config` describes.

        Raises:
            JointNASError: as `feasible`.
        """
        self.feasible(config)

    def _fit(self, config: Any) -> None:
        """Raise unless every size is one of a sub-network."""
        own = layout.original_sizes(config)
        for key in STRUCTURE:
            if self.sizes(key)[-1] > own[key]:
                raise JointNASError(f"search space: {key} {self.sizes(key)[-1]} exceeds the model's {own[key]}.")
        n_kv = config.num_key_value_heads
        for h in self.heads:
            if h % n_kv:
                raise JointNASError(
                    f"search space: heads {h} is no multiple of the model's {n_kv} key-value heads; every group must"
                    f" keep equally many query heads. Nearest: {max(n_kv, round(h / n_kv) * n_kv)}."
                )
        for d in self.head_dim:
            if own["head_dim"] % d:
                allowed = [k for k in range(2, own["head_dim"] + 1, 2) if own["head_dim"] % k == 0]
                raise JointNASError(
                    f"search space: head_dim {d} does not divide the model's {own['head_dim']}; rotary pairs are kept"
                    f" at a stride, so it must. Allowed: {', '.join(map(str, allowed))}."
                )
        if (self.weight_bits or self.act_bits) and self.depth != own["blocks"]:
            raise JointNASError(
                f"search space: the largest number of blocks is {self.depth} but the model has {own['blocks']}; a"
                " space with bits must contain the full depth, because bits are chosen per original block."
            )
        cut = [key for key in self._grouped if own[key] % self.group_size]
        if cut:
            size = f"{cut[0]} size {own[cut[0]]}"
            fitting = self._fitting(own["hidden"], own["intermediate"])
            raise JointNASError(
                f"the model's {size} is no multiple of the quantization group size {self.group_size}. {fitting}"
            )


def subnet_config(config: Any, choice: Choice, kept: Sequence[int] | None = None) -> Any:
    """The config, of the same class, of the model that a choice describes.

    `kept`: the original indices of its blocks, None: the first ones; widths in numbers of channels.

    Raises:
        JointNASError: the class refuses these sizes; its own reason.
    """
    found, why = made(config, {**choice.widths, "blocks": choice.blocks}, kept)
    if found is None:
        raise JointNASError(f"{choice.named()}: {why}")
    return found


_NAMED = {
    "llama3": SearchSpace(
        hidden=tuple(2**i for i in range(5, 13)), heads=(8, 16, 32), head_dim=(8, 16, 32, 64, 128),
        intermediate=(4096, 8192, 12288, 14336), blocks=tuple(range(1, 33)),
    ),
    "qllama3": SearchSpace(
        hidden=tuple(2**i for i in range(7, 13)), heads=(16, 32), head_dim=(32, 64, 128),
        intermediate=(4096, 8192, 12288, 14336), blocks=tuple(range(1, 33)), weight_bits=(2, 4, 8),
        act_bits=(2, 4, 8, 16),
    ),
    # no head_dim 16: o_proj's group would shrink to 16, and a 16-bit scale per 16 weights costs one more bit per weight
    "tiny": SearchSpace(
        hidden=(128, 256), heads=(2, 4), head_dim=(32, 64), intermediate=(256, 512, 768), blocks=(2, 3, 4, 5, 6),
        weight_bits=(2, 4, 8), act_bits=(4, 8, 16),
    ),
}
