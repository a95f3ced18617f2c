"""Search spaces, choices, and exact sizes of what a choice describes.

A space lists the allowed sizes of each dimension; one choice picks one of each:

    hidden, heads, head_dim, intermediate   widths shared by all blocks
    blocks                                  how many blocks are kept, most important first
    weight_bits, act_bits                   one per original block (None: not quantized, 16 = identity)

Every key-value head is kept; `heads` query heads keep the first heads / n_kv of each key-value group. Sizes are
counted from a config alone (any object with the attributes of transformers' LlamaConfig, or of the config of another
supported family), so no weights are needed.
The number of parameters is multilinear in the independent dimensions, so its expectation is the same formula applied
to expected sizes: exact, and differentiable in the probabilities.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jointnas_kernels.errors import JointNASError, unknown

WIDTHS = ("hidden", "heads", "head_dim", "intermediate")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Probs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Choice:
    """One point of a space. `blocks` says how many blocks stay (by importance); bits are indexed by original block."""

    hidden: int
    heads: int
    head_dim: int
    intermediate: int
    blocks: int
    weight_bits: tuple[int, ...] | None = None
    act_bits: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON and YAML."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "choice") -> Choice:
        """Inverse of `to_dict`; names missing and unknown keys."""
        names = [f.name for f in fields(cls)]
        for key in data:
            if key not in names:
                raise unknown("choice key", key, names, where)
        missing = [n for n in (*WIDTHS, "blocks") if n not in data]
        if missing:
            raise JointNASError(f"{where}: missing {', '.join(missing)}.")
        values: dict[str, Any] = {n: _integer(data[n], f"{where}: {n}") for n in (*WIDTHS, "blocks")}
        for key in ("weight_bits", "act_bits"):
            bits = data.get(key)
            if bits is not None:
                values[key] = tuple(_integer(b, f"{where}: {key}") for b in _sequence(bits, f"{where}: {key}"))
        return cls(**values)


@dataclass(frozen=True)
class SearchSpace:
    """The allowed sizes of every dimension, ascending. Bits of None leave that part unquantized."""

    hidden: tuple[int, ...]
    heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    intermediate: tuple[int, ...]
    blocks: tuple[int, ...]
    weight_bits: tuple[int, ...] | None = None
    act_bits: tuple[int, ...] | None = None
    group_size: int = 128

    def __post_init__(self) -> None:
        for key in (*WIDTHS, "blocks", "weight_bits", "act_bits"):
            values = getattr(self, key)
            if values is None and key.endswith("_bits"):
                continue
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
            raise JointNASError(f"search space: {key} {bad[0]} is no multiple of {of}, {what}.")

    # ---- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def named(cls, name: str) -> SearchSpace:
        """`llama3`, `qllama3`: Table 1 of arXiv 2606.04063 (Llama-3.1-8B). `tiny`: the embedded small model."""
        if name not in _NAMED:
            raise unknown("search space", name, _NAMED)
        return _NAMED[name]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "search space") -> SearchSpace:
        """From plain data; an optional key `base` names the space whose other dimensions are kept."""
        names = [f.name for f in fields(cls)]
        for key in data:
            if key not in (*names, "base"):
                raise unknown("search-space key", key, (*names, "base"), where)
        values = dict(data)
        base = values.pop("base", None)
        if base is not None:
            values = {**cls.named(str(base)).to_dict(), **values}
        missing = [n for n in (*WIDTHS, "blocks") if n not in values]
        if missing:
            raise JointNASError(f"{where}: missing {', '.join(missing)}.")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> SearchSpace:
        """One mapping with the fields of this class as keys, e.g. ``hidden: [128, 256]``."""
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

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON and YAML."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    # ---- what is in it ----------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Number of original blocks, the length of a choice's bits."""
        return self.blocks[-1]

    @property
    def o_proj_group(self) -> int:
        """o_proj's quantization group: head_dim cuts its input inside each head, and cuts must fall between groups."""
        return min(self.group_size, self.head_dim[0])

    def sizes(self, key: str) -> tuple[int, ...]:
        """The choices of a dimension; an empty tuple for bits that are not searched."""
        keys = (*WIDTHS, "blocks", "weight_bits", "act_bits")
        if key not in keys:
            raise unknown("search-space dimension", key, keys)
        return getattr(self, key) or ()

    def size(self) -> int:
        """How many choices there are."""
        structure = math.prod(len(self.sizes(k)) for k in (*WIDTHS, "blocks"))
        per_block = math.prod(len(self.sizes(k)) or 1 for k in ("weight_bits", "act_bits"))
        return structure * per_block**self.depth

    def full(self) -> Choice:
        """The largest size of every dimension, the highest precision everywhere."""
        structure = {k: self.sizes(k)[-1] for k in (*WIDTHS, "blocks")}
        bits = {k: (self.sizes(k)[-1],) * self.depth for k in ("weight_bits", "act_bits") if self.sizes(k)}
        return Choice(**structure, **bits)  # type: ignore[arg-type]

    def sample(self, generator: torch.Generator | None = None) -> Choice:
        """Uniform in every dimension, independently."""

        def pick(key: str, n: int) -> tuple[int, ...]:
            sizes = self.sizes(key)
            return tuple(sizes[i] for i in torch.randint(len(sizes), (n,), generator=generator).tolist())

        structure = {k: pick(k, 1)[0] for k in (*WIDTHS, "blocks")}
        bits = {k: pick(k, self.depth) for k in ("weight_bits", "act_bits") if self.sizes(k)}
        return Choice(**structure, **bits)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Choice]:
        """Every choice, lazily: `size()` of them."""
        for structure in itertools.product(*(self.sizes(k) for k in (*WIDTHS, "blocks"))):
            for w in itertools.product(self.weight_bits, repeat=self.depth) if self.weight_bits else (None,):
                for a in itertools.product(self.act_bits, repeat=self.depth) if self.act_bits else (None,):
                    h, heads, d, i, n = structure
                    yield Choice(h, heads, d, i, n, w, a)

    def check(self, choice: Choice) -> None:
        """Raise unless the choice is a point of this space."""
        for key in (*WIDTHS, "blocks"):
            if getattr(choice, key) not in self.sizes(key):
                raise unknown(f"{key} choice", getattr(choice, key), self.sizes(key))
        for key in ("weight_bits", "act_bits"):
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
        """Raise unless every choice is a sub-network of the model that `config` describes."""
        own = original_sizes(config)
        for key in (*WIDTHS, "blocks"):
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
        if self.weight_bits:
            for key in ("hidden", "intermediate"):
                if own[key] % self.group_size:
                    raise JointNASError(
                        f"the model's {key} size {own[key]} is no multiple of the quantization group size"
                        f" {self.group_size}."
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
        hidden=tuple(2**i for i in range(5, 13)),
        heads=(8, 16, 32),
        head_dim=(8, 16, 32, 64, 128),
        intermediate=(4096, 8192, 12288, 14336),
        blocks=tuple(range(1, 33)),
    ),
    "qllama3": SearchSpace(
        hidden=tuple(2**i for i in range(7, 13)),
        heads=(16, 32),
        head_dim=(32, 64, 128),
        intermediate=(4096, 8192, 12288, 14336),
        blocks=tuple(range(1, 33)),
        weight_bits=(2, 4, 8),
        act_bits=(2, 4, 8, 16),
    ),
    # no head_dim 16: o_proj's group would shrink to 16, and a 16-bit scale per 16 weights costs one more bit per weight
    "tiny": SearchSpace(
        hidden=(128, 256),
        heads=(2, 4),
        head_dim=(32, 64),
        intermediate=(256, 512, 768),
        blocks=(2, 3, 4, 5, 6),
        weight_bits=(2, 4, 8),
        act_bits=(4, 8, 16),
    ),
}


# ---- sizes ----------------------------------------------------------------------------------------------------------


def original_sizes(config: Any) -> dict[str, int]:
    """The sizes of the model that a config describes, under the names of the search dimensions."""
    return {
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "intermediate": config.intermediate_size,
        "blocks": config.num_hidden_layers,
    }


class Extras(NamedTuple):
    """What the blocks of a model hold beside seven weights and two norms."""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over the dims of each head, on queries and on keys


def extras(config: Any) -> Extras:
    """Of the model that a config describes; a config without a model type counts as a Llama's."""
    kind = getattr(config, "model_type", "llama")
    if kind == "mistral":
        return Extras()
    if kind == "qwen2":
        return Extras(qkv_bias=True)
    attention = bool(getattr(config, "attention_bias", False))
    if kind == "qwen3":
        return Extras(attention, attention, qk_norm=True)
    return Extras(attention, attention, bool(getattr(config, "mlp_bias", False)))


def sliding_windows(config: Any) -> tuple[int | None, ...]:
    """Of every block: how many positions a token looks back at, itself included; None: all of them."""
    window, count = getattr(config, "sliding_window", None), config.num_hidden_layers
    kind = getattr(config, "model_type", "llama")
    if not window or kind not in ("mistral", "qwen2", "qwen3"):
        return (None,) * count
    types = ["sliding_attention"] * count if kind == "mistral" else config.layer_types
    return tuple(window if t == "sliding_attention" else None for t in types)


def linear_shapes(config: Any, choice: Choice) -> dict[str, tuple[int, int]]:
    """(out, in) of the seven linears of a kept block."""
    h, i, n_kv = choice.hidden, choice.intermediate, config.num_key_value_heads
    q, kv = choice.heads * choice.head_dim, n_kv * choice.head_dim
    return dict(zip(LINEARS, ((q, h), (kv, h), (kv, h), (h, q), (i, h), (i, h), (h, i)), strict=True))


def kept_blocks(block_rank: Sequence[int], blocks: int) -> tuple[int, ...]:
    """Original indices of the `blocks` most important blocks, in the order they run."""
    return tuple(sorted(block_rank[:blocks]))


def _block_params(config: Any, h: Any, heads: Any, d: Any, i: Any) -> tuple[dict[str, Any], Any]:
    """Weights of each linear, and the rest of a block (norms, biases). Sizes may be numbers or expectations."""
    n_kv = config.num_key_value_heads
    q, kv, mlp = heads * d * h, n_kv * d * h, i * h
    linears = dict(zip(LINEARS, (q, kv, kv, q, mlp, mlp, mlp), strict=True))
    rest, extra = 2 * h, extras(config)
    if extra.qkv_bias:
        rest = rest + heads * d + 2 * n_kv * d
    if extra.o_bias:
        rest = rest + h
    if extra.mlp_bias:
        rest = rest + 2 * i + h
    if extra.qk_norm:
        rest = rest + 2 * d
    return linears, rest


def _outer_params(config: Any, h: Any) -> Any:
    """Embedding, final norm, and lm_head unless tied."""
    return config.vocab_size * h * (1 if config.tie_word_embeddings else 2) + h


def count_params(config: Any, choice: Choice) -> int:
    """Parameters of the extracted model, as transformers counts them (tied embeddings once)."""
    linears, rest = _block_params(config, choice.hidden, choice.heads, choice.head_dim, choice.intermediate)
    return int(_outer_params(config, choice.hidden) + choice.blocks * (sum(linears.values()) + rest))


def expected_params(config: Any, space: SearchSpace, probs: Probs) -> Tensor:
    """Exact E[count_params] for independent dimensions; fp64, differentiable in `probs` (keyed by dimension)."""
    h, heads, d, i, blocks = (_mean(probs, space, k) for k in (*WIDTHS, "blocks"))
    linears, rest = _block_params(config, h, heads, d, i)
    return _outer_params(config, h) + blocks * (sum(linears.values()) + rest)


def model_bytes(
    config: Any, space: SearchSpace, choice: Choice, block_rank: Sequence[int] | None = None, dtype_bytes: int = 2
) -> float:
    """Bytes of the weights on disk: packed integers plus one scale of `dtype_bytes` per group; everything else dense.

    `block_rank` lists blocks most important first and says whose bits count; None means the original order.
    """
    linears, rest = _block_params(config, choice.hidden, choice.heads, choice.head_dim, choice.intermediate)
    total = float(_outer_params(config, choice.hidden) * dtype_bytes)
    for b in kept_blocks(block_rank or range(space.depth), choice.blocks):
        bits = choice.weight_bits[b] if choice.weight_bits is not None else None
        total += rest * dtype_bytes
        total += sum(n * _bytes_per_weight(space, name, bits, dtype_bytes) for name, n in linears.items())
    return total


def expected_bytes(
    config: Any, space: SearchSpace, probs: Probs, block_rank: Sequence[int] | None = None, dtype_bytes: int = 2
) -> Tensor:
    """Exact E[model_bytes]; fp64, differentiable in `probs`."""
    h, heads, d, i = (_mean(probs, space, k) for k in WIDTHS)
    linears, rest = _block_params(config, h, heads, d, i)
    keep = keep_probability(space, probs["blocks"], block_rank)
    total = _outer_params(config, h) * dtype_bytes + keep.sum() * rest * dtype_bytes
    for name, n in linears.items():
        if space.weight_bits is None:
            total = total + keep.sum() * n * _bytes_per_weight(space, name, None, dtype_bytes)
        else:
            cost = [_bytes_per_weight(space, name, b, dtype_bytes) for b in space.weight_bits]
            per_block = probs["weight_bits"].double() @ torch.tensor(cost, dtype=torch.float64, device=keep.device)
            total = total + n * (keep * per_block).sum()
    return total


def keep_probability(space: SearchSpace, blocks: Tensor, block_rank: Sequence[int] | None = None) -> Tensor:
    """P(block b is kept) = P(number of blocks > rank of b), for every original block b; [depth], fp64."""
    return keep_matrix(space, block_rank).to(blocks.device) @ blocks.double()


def keep_matrix(space: SearchSpace, block_rank: Sequence[int] | None = None) -> Tensor:
    """[number of original blocks, len(space.blocks)] in fp64: 1 where that number of blocks keeps that block."""
    order = list(block_rank) if block_rank is not None else list(range(space.depth))
    rank = torch.empty(len(order), dtype=torch.long)
    rank[torch.tensor(order)] = torch.arange(len(order))
    return (torch.tensor(space.blocks) > rank[:, None]).double()


def _mean(probs: Probs, space: SearchSpace, key: str) -> Tensor:
    p = probs[key].double()
    return p @ torch.tensor(space.sizes(key), dtype=torch.float64, device=p.device)


def _bytes_per_weight(space: SearchSpace, linear: str, bits: int | None, dtype_bytes: int) -> float:
    if bits is None:
        return float(dtype_bytes)
    return bits / 8 + dtype_bytes / (space.o_proj_group if linear == "o_proj" else space.group_size)
