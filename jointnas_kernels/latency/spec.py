"""What has to be timed: one `OpSpec` per distinct operation of a search space on one workload.

A model of a space point is the sum of these parts (T = rows of the workload, h hidden, H query heads, n key/value
heads, d head dim, I intermediate, V vocabulary):

    once       embedding [T,h] · final norm [T,h] · lm_head [B,h]x[V,h]  (only the last position needs logits)
    per block  2 norms, 2 residual adds [T,h] · q [H·d,h] · k, v [n·d,h] · rope, attention (H,d) · o [h,H·d]
               gate, up [I,h] · swiglu [T,I] · down [h,I]
               where queries and keys are normalised (Qwen3): norms [T·H,d] and [T·n,d]

Biases are not timed apart: a linear adds its own on the way out.
Only the seven linears of a block depend on its bits. A part depends on at most three dimensions of the space,
so a table stays small although the space does not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.space import extras, sliding_windows

WIDTHS = ("hidden", "heads", "head_dim", "intermediate")
OPS = ("linear", "lm_head", "embedding", "norm", "add", "rope", "attention", "swiglu")
DENSE = 16  # "16 bit" = not quantized, whatever the model's dtype


class OpSpec(NamedTuple):
    """Key of one measurement. `m` rows; `n`, `k`: out and in features (attention, rope: heads and head dim).

    group is the quantization group along k, 0 where nothing is quantized."""

    op: str
    m: int
    n: int
    k: int
    wbits: int = DENSE
    abits: int = DENSE
    group: int = 0

    def __str__(self) -> str:
        bits = "" if (self.wbits, self.abits) == (DENSE, DENSE) else f" W{self.wbits}A{self.abits} g{self.group}"
        return f"{self.op} {self.m}x{self.n}x{self.k}{bits}"


@dataclass(frozen=True)
class Workload:
    """prefill: `batch` sequences of `seq` tokens at once. decode: one token per sequence after `seq` cached ones."""

    mode: Literal["prefill", "decode"] = "prefill"
    batch: int = 1
    seq: int = 128
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.mode not in ("prefill", "decode"):
            raise unknown("workload", self.mode, ("prefill", "decode"))
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise unknown("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        for name in ("batch", "seq"):
            if getattr(self, name) < 1:
                raise JointNASError(f"workload {name} must be at least 1, got {getattr(self, name)}")

    @property
    def queries(self) -> int:
        """Tokens of one sequence that go through the model in one call."""
        return self.seq if self.mode == "prefill" else 1

    @property
    def rows(self) -> int:
        return self.batch * self.queries

    @property
    def context(self) -> int:
        """Keys an attention call looks at."""
        return self.seq if self.mode == "prefill" else self.seq + 1


@dataclass(frozen=True)
class ModelDims:
    """What a table must know of the model beyond the space: it makes `predict(choice)` self-contained."""

    layers: int
    kv_heads: int
    vocab: int
    qk_norm: bool = False

    @staticmethod
    def of(config: Any) -> ModelDims:
        layers, kv_heads, vocab = config.num_hidden_layers, config.num_key_value_heads, config.vocab_size
        return ModelDims(int(layers), int(kv_heads), int(vocab), extras(config).qk_norm)


@dataclass(frozen=True)
class Part:
    """One term of the sum: `count` times per block (or per model), depending on the widths in `dims`."""

    name: str
    dims: tuple[str, ...]
    spec: Callable[..., OpSpec]
    count: int = 1
    per_block: bool = True
    group: int = 0  # > 0: a linear that takes the block's bits, with this quantization group


def parts(workload: Workload, dims: ModelDims, group: int, o_group: int) -> tuple[Part, ...]:
    """The parts of the model (module docstring), in execution order."""
    t, n = workload.rows, dims.kv_heads

    def linear(out: int, inp: int) -> OpSpec:
        return OpSpec("linear", t, out, inp)

    head_norms = (
        Part("q_norm", ("heads", "head_dim"), lambda H, d: OpSpec("norm", t * H, d, 0)),
        Part("k_norm", ("head_dim",), lambda d: OpSpec("norm", t * n, d, 0)),
    )
    return (
        Part("embedding", ("hidden",), lambda h: OpSpec("embedding", t, h, dims.vocab), per_block=False),
        Part("norm", ("hidden",), lambda h: OpSpec("norm", t, h, 0), count=2),
        Part("q", ("hidden", "heads", "head_dim"), lambda h, H, d: linear(H * d, h), group=group),
        Part("kv", ("hidden", "head_dim"), lambda h, d: linear(n * d, h), count=2, group=group),
        *(head_norms if dims.qk_norm else ()),
        Part("rope", ("heads", "head_dim"), lambda H, d: OpSpec("rope", t, H, d)),
        Part("attention", ("heads", "head_dim"), lambda H, d: OpSpec("attention", t, H, d)),
        Part("o", ("hidden", "heads", "head_dim"), lambda h, H, d: linear(h, H * d), group=o_group),
        Part("add", ("hidden",), lambda h: OpSpec("add", t, h, 0), count=2),
        Part("gate_up", ("hidden", "intermediate"), lambda h, i: linear(i, h), count=2, group=group),
        Part("swiglu", ("intermediate",), lambda i: OpSpec("swiglu", t, i, 0)),
        Part("down", ("hidden", "intermediate"), lambda h, i: linear(h, i), group=group),
        Part("final_norm", ("hidden",), lambda h: OpSpec("norm", t, h, 0), per_block=False),
        Part("lm_head", ("hidden",), lambda h: OpSpec("lm_head", workload.batch, dims.vocab, h), per_block=False),
    )


def groups(space: Any) -> tuple[int, int]:
    """(group of all linears, group of o_proj). o_proj's is capped by the smallest head dim, so that a width
    mask is constant inside a group."""
    return int(space.group_size), min(int(space.group_size), min(space.head_dim))


def bit_choices(space: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(weight bits, activation bits) a block can take; (16,) where the space does not search them."""
    return tuple(space.weight_bits or (DENSE,)), tuple(space.act_bits or (DENSE,))


def with_bits(spec: OpSpec, wbits: int, abits: int, group: int) -> OpSpec:
    """`spec` at these bits. Dense weights with quantized activations keep the group out of the key: it is a
    property of the weights."""
    return spec._replace(wbits=wbits, abits=abits, group=group if wbits < DENSE else 0)


def combinations(space: Any, dims: Sequence[str]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(getattr(space, d) for d in dims))


def enumerate_ops(space: Any, config: Any, workload: Workload) -> list[OpSpec]:
    """Every distinct operation of the space, 16-bit twins of the quantized linears included, sorted by key.

    Raises:
        JointNASError: the workload is longer than a sliding window, whose attention is not among the operations.
    """
    window = min((w for w in sliding_windows(config) if w is not None), default=workload.context)
    if window < workload.context:
        raise JointNASError(
            f"latency of attention through a sliding window is not measured: the model looks back {window} positions,"
            f" the workload {workload.context}. Choose a shorter sequence."
        )
    wbits, abits = bit_choices(space)
    pairs = {(DENSE, DENSE), *itertools.product(wbits, abits)}
    found: set[OpSpec] = set()
    for part in parts(workload, ModelDims.of(config), *groups(space)):
        for values in combinations(space, part.dims):
            spec = part.spec(*values)
            found.update(with_bits(spec, w, a, part.group) for w, a in pairs) if part.group else found.add(spec)
    return sorted(found)
