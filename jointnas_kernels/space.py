"""Search spaces, choices, and exact sizes of what a choice describes.

A space lists the allowed sizes of each dimension; one choice picks one of each:

    hidden, heads, head_dim, intermediate   widths shared by all blocks
    blocks                                  how many blocks are kept, most important first
    weight_bits, act_bits                   one per original block (None: not quantized, 16 = identity)

Every key-value head is kept; `heads` query heads keep the first heads / n_kv of each key-value group. Sizes are
counted from a config alone (any object with the attributes of transformers' LlamaConfig, or of the config of another
supported family) by walking its layout, so no weights are needed.
The number of parameters is multilinear in the independent dimensions, so its expectation is the same formula applied
to expected sizes: exact, and differentiable in the probabilities.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jointnas_kernels import layout
from jointnas_kernels.errors import JointNASError, unknown

WIDTHS = layout.WIDTHS
STRUCTURE = (*WIDTHS, "blocks")
BITS = ("weight_bits", "act_bits")
Probs = Mapping[str, Tensor]


class _Data:
    """Dataclasses from and to plain data."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON and YAML."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    @classmethod
    def _check(cls, data: Mapping[str, Any], what: str, where: str, *base: str) -> None:
        """Raise unless all keys are fields, or `base`, and without that one none of the structure's is missing."""
        names = [*(f.name for f in fields(cls)), *base]  # type: ignore[arg-type]
        for key in data:
            if key not in names:
                raise unknown(f"{what} key", key, names, where)
        missing = [n for n in STRUCTURE if n not in data]
        if missing and all(data.get(key) is None for key in base):
            raise JointNASError(f"{where}: missing {', '.join(missing)}.")


@dataclass(frozen=True)
class Choice(_Data):
    """One point of a space. `blocks` says how many blocks stay (by importance); bits are indexed by original block."""

    hidden: int
    heads: int
    head_dim: int
    intermediate: int
    blocks: int
    weight_bits: tuple[int, ...] | None = None
    act_bits: tuple[int, ...] | None = None

    @property
    def widths(self) -> dict[str, int]:
        """The sizes that all blocks share."""
        return {k: getattr(self, k) for k in WIDTHS}

    def bits(self, block: int) -> tuple[int | None, int]:
        """(weight bits, None: not quantized; activation bits) of an original block."""
        weight, act = self.weight_bits, self.act_bits
        return None if weight is None else weight[block], 16 if act is None else act[block]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "choice") -> Choice:
        """Inverse of `to_dict`.

        Raises:
            JointNASError: missing or unknown keys, or other values than integers.
        """
        cls._check(data, "choice", where)
        values: dict[str, Any] = {n: _integer(data[n], f"{where}: {n}") for n in STRUCTURE}
        for key in BITS:
            bits = data.get(key)
            if bits is not None:
                values[key] = tuple(_integer(b, f"{where}: {key}") for b in _sequence(bits, f"{where}: {key}"))
        return cls(**values)


@dataclass(frozen=True)
class SearchSpace(_Data):
    """The allowed sizes of every dimension, ascending. Bits of None leave that part unquantized.

    Raises:
        JointNASError: sizes that are no distinct positive integers, bits that no kernel has, or quantization groups
            that a width would cut.
    """

    hidden: tuple[int, ...]
    heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    intermediate: tuple[int, ...]
    blocks: tuple[int, ...]
    weight_bits: tuple[int, ...] | None = None
    act_bits: tuple[int, ...] | None = None
    group_size: int = 128

    def __post_init__(self) -> None:
        for key in (*STRUCTURE, *BITS):
            values = getattr(self, key)
            if values is not None or key in STRUCTURE:
                object.__setattr__(self, key, _sizes(values, f"search space: {key}"))
        _integer(self.group_size, "search space: group_size")
        if self.group_size < 1:
            raise JointNASError(f"search space: group_size is {self.group_size}; it must be positive.")
        for key, low, high in (("weight_bits", 2, 8), ("act_bits", 2, 16)):
            for b in getattr(self, key) or ():
                if not low <= b <= high or 8 < b < 16:
                    allowed = "2 to 8" if key == "weight_bits" else "2 to 8, and 16 for unquantized activations"
                    raise JointNASError(f"search space: {key} contains {b}; allowed: {allowed}.")
        for d in self.head_dim:
            if d % 2:
                raise JointNASError(f"search space: head_dim contains {d}; rotary embedding needs an even head_dim.")
        if self.weight_bits is not None:
            for key in ("hidden", "intermediate"):
                self._multiple(key, self.group_size, "the quantization group size")
            self._multiple("head_dim", self.o_proj_group, "o_proj's group: min(group size, smallest head_dim)")

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
        group_size: int = 128,
    ) -> SearchSpace:  # fmt: skip
        """The space whose only structure is the model that a config describes."""
        sizes: dict[str, Any] = {k: (v,) for k, v in layout.original_sizes(config).items()}
        return cls(**sizes, weight_bits=weight_bits, act_bits=act_bits, group_size=group_size)  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "search space") -> SearchSpace:
        """From plain data; an optional key `base` names the space whose other dimensions are kept.

        Raises:
            JointNASError: unknown or missing keys, or bad values.
        """
        cls._check(data, "search-space", where, "base")
        values = dict(data)
        base = values.pop("base", None)
        return cls(**values) if base is None else cls(**{**cls.named(str(base)).to_dict(), **values})

    @classmethod
    def from_yaml(cls, path: str | Path) -> SearchSpace:
        """One mapping with the fields of this class as keys, e.g. ``hidden: [128, 256]``.

        Raises:
            JointNASError: no file, no YAML, no mapping, or what `from_dict` refuses.
        """
        import yaml  # here: only users of files need it

        path = Path(path)
        if not path.is_file():
            raise JointNASError(f"search space file {str(path)!r} does not exist.")
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise JointNASError(f"{path}: not valid YAML ({' '.join(str(e).split())}).") from None
        if not isinstance(data, Mapping):
            raise JointNASError(f"{path}: expected a mapping of search-space keys, found {type(data).__name__}.")
        return cls.from_dict({str(k): v for k, v in data.items()}, where=str(path))

    # ---- what is in it ----------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Number of original blocks, the length of a choice's bits."""
        return self.blocks[-1]

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
        if key not in (*STRUCTURE, *BITS):
            raise unknown("search-space dimension", key, (*STRUCTURE, *BITS))
        sizes: tuple[int, ...] | None = getattr(self, key)
        return sizes or ()

    def size(self) -> int:
        """How many choices there are."""
        per_block = math.prod(len(self.sizes(k)) or 1 for k in BITS)
        return int(math.prod(len(self.sizes(k)) for k in STRUCTURE) * per_block**self.depth)

    def full(self) -> Choice:
        """The largest size of every dimension, the highest precision everywhere."""
        return self._choice(lambda key, n: (self.sizes(key)[-1],) * n)

    def sample(self, generator: torch.Generator | None = None) -> Choice:
        """Uniform in every dimension, independently."""

        def pick(key: str, n: int) -> tuple[int, ...]:
            sizes = self.sizes(key)
            return tuple(sizes[i] for i in torch.randint(len(sizes), (n,), generator=generator).tolist())

        return self._choice(pick)

    def _choice(self, pick: Callable[[str, int], tuple[int, ...]]) -> Choice:
        """From `pick(dimension, how many)`."""
        structure = {k: pick(k, 1)[0] for k in STRUCTURE}
        bits = {k: pick(k, self.depth) for k in BITS if self.sizes(k)}
        return Choice(**structure, **bits)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Choice]:
        """Every choice, lazily: `size()` of them."""

        def rows(key: str) -> Iterable[tuple[int, ...] | None]:
            return itertools.product(self.sizes(key), repeat=self.depth) if self.sizes(key) else (None,)

        for structure in itertools.product(*(self.sizes(k) for k in STRUCTURE)):
            sizes: Any = dict(zip(STRUCTURE, structure, strict=True))
            for w in rows("weight_bits"):
                for a in rows("act_bits"):
                    yield Choice(**sizes, weight_bits=w, act_bits=a)

    def check(self, choice: Choice) -> None:
        """Raise unless the choice is a point of this space.

        Raises:
            JointNASError: it is not.
        """
        for key in STRUCTURE:
            if getattr(choice, key) not in self.sizes(key):
                raise unknown(f"{key} choice", getattr(choice, key), self.sizes(key))
        for key in BITS:
            bits, sizes = getattr(choice, key), self.sizes(key)
            if (bits is None) != (not sizes):
                state = "searches" if sizes else "does not search"
                raise JointNASError(f"choice: {key} is {bits}, but the space {state} {key}.")
            if bits is not None and len(bits) != self.depth:
                raise JointNASError(f"choice: {len(bits)} {key} for {self.depth} blocks; give one per original block.")
            for b in bits or ():
                if b not in sizes:
                    raise unknown(f"{key} choice", b, sizes)

    def validate(self, config: Any) -> None:
        """Raise unless every choice is a sub-network of the model that `config` describes.

        Raises:
            JointNASError: the first size that is not, and what is allowed.
        """
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
        cut = [key for key in ("hidden", "intermediate") if self.weight_bits and own[key] % self.group_size]
        if cut:
            size = f"{cut[0]} size {own[cut[0]]}"
            fitting = self._fitting(own["hidden"], own["intermediate"])
            raise JointNASError(
                f"the model's {size} is no multiple of the quantization group size {self.group_size}. {fitting}"
            )


def _integer(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise JointNASError(f"{where}: expected an integer, found {value!r}.")
    return value


def _sequence(value: Any, where: str) -> Sequence[Any]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise JointNASError(f"{where}: expected a list of integers, found {value!r}.")
    return value


def _sizes(value: Any, where: str) -> tuple[int, ...]:
    sizes = tuple(_integer(v, where) for v in _sequence(value, where))
    if not sizes:
        raise JointNASError(f"{where}: at least one choice is needed.")
    if min(sizes) < 1:
        raise JointNASError(f"{where}: {min(sizes)} is not positive.")
    if len(set(sizes)) < len(sizes):
        raise JointNASError(f"{where}: {list(sizes)} names a choice twice.")
    return tuple(sorted(sizes))


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


# ---- sizes ----------------------------------------------------------------------------------------------------------


def kept_blocks(block_rank: Sequence[int], blocks: int) -> tuple[int, ...]:
    """Original indices of the `blocks` most important blocks, in the order they run."""
    return tuple(sorted(block_rank[:blocks]))


def count_params(config: Any, choice: Choice) -> int:
    """Parameters of the extracted model, as transformers counts them (tied embeddings once)."""
    return int(_total(config, choice.widths, choice.blocks, lambda _: choice.blocks))


def expected_params(config: Any, space: SearchSpace, probs: Probs) -> Tensor:
    """Exact E[count_params] for independent dimensions; fp64, differentiable in `probs` (keyed by dimension)."""
    means = _means(space, probs)
    total: Tensor = _total(config, means, means["blocks"], lambda _: means["blocks"])
    return total


def model_bytes(
    config: Any, space: SearchSpace, choice: Choice, block_rank: Sequence[int] | None = None, dtype_bytes: int = 2
) -> float:
    """Bytes of the weights on disk: packed integers plus one scale of `dtype_bytes` per group; everything else dense.

    `block_rank` lists blocks most important first and says whose bits count; None means the original order.
    """
    kept = kept_blocks(block_rank or range(space.depth), choice.blocks)

    def of_all(linear: layout.Linear) -> float:
        return sum(_bytes_per_weight(space, linear, choice.bits(b)[0], dtype_bytes) for b in kept)

    return float(_total(config, choice.widths, choice.blocks, of_all, dtype_bytes))


def expected_bytes(
    config: Any, space: SearchSpace, probs: Probs, block_rank: Sequence[int] | None = None, dtype_bytes: int = 2
) -> Tensor:
    """Exact E[model_bytes]; fp64, differentiable in `probs`."""
    keep = keep_probability(space, probs["blocks"], block_rank)

    def of_all(linear: layout.Linear) -> Tensor:
        if space.weight_bits is None:
            return keep.sum() * dtype_bytes
        cost = [_bytes_per_weight(space, linear, bits, dtype_bytes) for bits in space.weight_bits]
        per_block = probs["weight_bits"].double() @ torch.tensor(cost, dtype=torch.float64, device=keep.device)
        return (keep * per_block).sum()

    total: Tensor = _total(config, _means(space, probs), keep.sum(), of_all, dtype_bytes)
    return total


def _total(
    config: Any, widths: layout.Sizes, blocks: Any, of_all: Callable[[layout.Linear], Any], unit: int = 1
) -> Any:
    """Σ of all parameters, in numbers or expectations: `unit` of each; of a linear's weights `of_all` in all blocks."""
    sizes, block = layout.all_sizes(config, widths), layout.block_of(config)
    tables = (layout.EMBEDDING,) if config.tie_word_embeddings else (layout.EMBEDDING, layout.HEAD)
    outside = sum(table.weights(sizes) for table in tables) + layout.size(layout.FINAL_NORM.axis, sizes)
    total = (outside + blocks * block.others(sizes)) * unit
    return total + sum(linear.weights(sizes) * of_all(linear) for linear in block.linears)


def keep_probability(space: SearchSpace, blocks: Tensor, block_rank: Sequence[int] | None = None) -> Tensor:
    """P(block b is kept) = P(number of blocks > rank of b), [depth] fp64, from probabilities blocks [K] of depths."""
    return keep_matrix(space, block_rank).to(blocks.device) @ blocks.double()


def keep_matrix(space: SearchSpace, block_rank: Sequence[int] | None = None) -> Tensor:
    """[number of original blocks, len(space.blocks)] in fp64: 1 where that number of blocks keeps that block."""
    rank = torch.tensor(range(space.depth) if block_rank is None else block_rank).argsort()
    return (torch.tensor(space.blocks) > rank[:, None]).double()


def _means(space: SearchSpace, probs: Probs) -> dict[str, Tensor]:
    """Expected sizes, fp64."""
    p = {k: probs[k].double() for k in STRUCTURE}
    return {k: v @ torch.tensor(space.sizes(k), dtype=torch.float64, device=v.device) for k, v in p.items()}


def _bytes_per_weight(space: SearchSpace, linear: layout.Linear, bits: int | None, dtype_bytes: int) -> float:
    return float(dtype_bytes) if bits is None else bits / 8 + dtype_bytes / space.group(linear)
