"""What has to be timed: one `OpSpec` per distinct operation of a search space on one workload.

A model of a space point is the sum of the operations of its layout (T = rows of the workload, h hidden, H query heads,
n key/value heads, d head dim, I intermediate, V vocabulary):

    once       embedding [T,h] · final norm [T,h] · lm_head [B,h]x[V,h]  (only the last position needs logits)
    per block  2 norms, 2 residual adds [T,h] · q [H·d,h] · k, v [n·d,h] · rope, attention (H,d) · o [h,H·d]
               gate, up [I,h] · swiglu [T,I] · down [h,I]
               where queries and keys are normalised (Qwen3): norms [T·H,d] and [T·n,d]
               where a family fuses linears: one [(H+2n)·d,h], one [2·I,h]

Biases are not timed apart: a linear adds its own on the way out.
Only the linears of a block depend on its bits, and the head on its own. A part depends on at most three dimensions of
the space, so a table stays small although the space does not.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from jointnas_kernels import layout
from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.layout import HIDDEN, VOCAB, WIDTHS, Axis
from jointnas_kernels.space import SearchSpace

DENSE = 16  # "16 bit" = not quantized, whatever the model's dtype
LINEARS = ("linear", "lm_head")  # operations with a weight to multiply by


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

    def with_bits(self, wbits: int, abits: int, group: int) -> OpSpec:
        """The same at these bits. Without low-bit weights there is no group in the key: it is a property of theirs."""
        return self._replace(wbits=wbits, abits=abits, group=group if wbits < DENSE else 0)

    def __str__(self) -> str:
        bits = "" if (self.wbits, self.abits) == (DENSE, DENSE) else f" W{self.wbits}A{self.abits} g{self.group}"
        return f"{self.op} {self.m}x{self.n}x{self.k}{bits}"


@dataclass(frozen=True)
class Workload:
    """prefill: `batch` sequences of `seq` tokens at once. decode: one token per sequence after `seq` cached ones.

    Raises:
        JointNASError: an unknown mode or dtype, or sizes below 1.
    """

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
        """Tokens that go through the model in one call."""
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
    fused: bool = False

    @staticmethod
    def of(config: Any) -> ModelDims:
        """Of the model that a config describes."""
        layers, kv_heads, vocab = config.num_hidden_layers, config.num_key_value_heads, config.vocab_size
        own = layout.traits(config)
        return ModelDims(int(layers), int(kv_heads), int(vocab), own.qk_norm, own.fused)

    @property
    def block(self) -> layout.Block:
        """The block, but for biases."""
        return layout.block(layout.Traits(qk_norm=self.qk_norm, fused=self.fused))


@dataclass(frozen=True)
class Part:
    """One term of the sum: `count` times per block (or per model), of a size that depends on the widths in `dims`."""

    name: str = field(compare=False)
    op: str
    m: int
    n: tuple[Axis, ...]  # n is the sum of their sizes
    k: Axis | None
    model: ModelDims
    heads: Axis = ()  # m is multiplied by their number
    group: int = 0  # > 0: a linear that takes the bits of the block, or of the head, with this quantization group
    count: int = 1
    per_block: bool = True

    @functools.cached_property
    def dims(self) -> tuple[str, ...]:
        """The widths that it depends on."""
        used = {factor.dim for axis in (*self.n, self.k or (), self.heads) for factor in axis}
        return tuple(d for d in WIDTHS if d in used)

    def bits(self, space: SearchSpace) -> list[tuple[int, int]]:
        """(weight bits, activation bits) that the space has for it."""
        if not self.group:
            return [(DENSE, DENSE)]
        if not self.per_block:
            return [(bits, DENSE) for bits in space.sizes("head_bits")]
        return list(itertools.product(*bit_choices(space)))

    def specs(self, space: SearchSpace) -> Iterator[OpSpec]:
        """At all sizes that a structure of the space has, without bits."""
        return itertools.starmap(self.spec, space.combinations(self.dims))

    def spec(self, *widths: int) -> OpSpec:
        """At these sizes of `dims`."""
        searched = dict(zip(self.dims, widths, strict=True))
        sizes = {**searched, "kv_heads": self.model.kv_heads, "vocab": self.model.vocab}
        n, k = sum(layout.size(axis, sizes) for axis in self.n), 0 if self.k is None else layout.size(self.k, sizes)
        return OpSpec(self.op, self.m * layout.size(self.heads, sizes), n, k)


def parts(workload: Workload, model: ModelDims, space: SearchSpace) -> tuple[Part, ...]:
    """The parts of the model (module docstring) in execution order; equal ones of a block are one with a count."""
    t, modules, found = workload.rows, model.block.modules, Counter[Part]()
    for op in model.block.ops:
        if isinstance(op, layout.Norm):
            found[Part(op.name, "norm", t, (op.axis,), None, model, op.heads)] += 1
        elif isinstance(op, layout.Elementwise):
            found[Part(op.name, op.name, t, (op.n,), op.k, model)] += 1
        elif op == modules[op.module][0]:
            rows = tuple(layout.counted(member.rows) for member in modules[op.module])
            found[Part(op.name, "linear", t, rows, layout.counted(op.columns), model, group=space.group(op))] += 1
    head = space.group(layout.HEAD) if space.head_bits else 0
    return (
        Part("embedding", "embedding", t, (HIDDEN,), VOCAB, model, per_block=False),
        *(replace(part, count=count) for part, count in found.items()),
        Part("final_norm", "norm", t, (HIDDEN,), None, model, per_block=False),
        Part("lm_head", "lm_head", workload.batch, (VOCAB,), HIDDEN, model, group=head, per_block=False),
    )


def bit_choices(space: SearchSpace) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(weight bits, activation bits) a block can take; (16,) where the space does not search them."""
    return tuple(space.weight_bits or (DENSE,)), tuple(space.act_bits or (DENSE,))


def enumerate_ops(space: SearchSpace, config: Any, workload: Workload) -> list[OpSpec]:
    """Every distinct operation of the space, 16-bit twins of the quantized linears included, sorted by key.

    Raises:
        JointNASError: the workload is longer than a sliding window, whose attention is not among the operations.
    """
    window = min((w for w in layout.sliding_windows(config) if w is not None), default=workload.context)
    if window < workload.context:
        raise JointNASError(
            f"latency of attention through a sliding window is not measured: the model looks back {window} positions,"
            f" the workload {workload.context}. Choose a shorter sequence."
        )
    found: set[OpSpec] = set()
    for part in parts(workload, ModelDims.of(config), space):
        pairs = {(DENSE, DENSE), *part.bits(space)}
        for spec in part.specs(space):
            found.update(spec.with_bits(w, a, part.group) for w, a in pairs)
    return sorted(found)
