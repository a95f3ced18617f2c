"""Architecture parameters, and one sample of them per step turned into the mask vectors that every layer shares.

Widths: one draw a ~ Dirichlet(elu(alpha) + 1 + 1e-3) per dimension (DrNAS, arXiv 2006.10355), reparameterised, or a
hard one-hot by ReinMax, or Gumbel-softmax. Depth: one hard ReinMax draw D over the numbers of blocks; block b has the
gate sum over {l: choice l keeps b} of D_l. Bits: softmax probabilities per block, and once for the head (or a draw of
the same three kinds).

Masks, with the head, rotary-pair and value-dim memberships of the choices (channel order of the reordered model):

    hidden[n]       = sum_{i: n < N_i} a_i            OUT of embedding, o, down; IN of q, k, v, gate, up, lm_head
    q[h, d]         = heads[h] pairs[d] scale         scale = sum_j a_j / sqrt(d_j), so that attention runs at scale 1
    k[g, d]         = pairs[d]                        every key-value head is kept
    value[h, d]     = heads[h] prefix[d]^2            V's OUT mask, then o_proj's IN mask
    intermediate[n]                                   OUT of gate, up; IN of down

A model with norms on queries and keys takes q = heads pairs in front of its q_norm, whose normalisation would undo a
scale, and behind it the scale, folded into the weights of the mixture of norms:  q_norm = a scale,  k_norm = a.

The parameters, a few hundred numbers, stay on the host in fp32 whatever the model does: the depth draw decides on the
host which blocks run, so nothing waits for the device; one seed gives the same architectures on every device and rank;
and the masks of a step travel in a single copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jointnas_kernels.errors import JointNASError, unknown
from jointnas_kernels.layout import HEADS, HIDDEN, NEURONS, PAIRS, VALUES, WIDTHS, Factor, all_sizes, traits
from jointnas_kernels.ops.width.categorical import reinmax
from jointnas_kernels.space import BITS, STRUCTURE, Choice, SearchSpace, joint, keep_matrix

RELAXATIONS = ("dirichlet", "reinmax", "gumbel")
BIT_RELAXATIONS = ("softmax", *RELAXATIONS)
FLOOR = 1e-3  # of the Dirichlet concentration: elu + 1 reaches 0 in fp32 below -17


def seeded(*numbers: int) -> torch.Generator:
    """A host generator that is a function of these numbers."""
    state = 0x9E3779B97F4A7C15
    for n in numbers:  # splitmix64 steps: neighbouring steps and seeds must not give related streams
        state = (state + n + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state % 2**63)


class Masks(NamedTuple):
    """Device vectors shared by all layers of one step: hidden [N], q [H, D], k [Hkv, D], value [H * D],
    intermediate [I]; alpha [K] of the hidden size, for the norms; q_norm, k_norm [K] of the head dim, for those on
    queries and keys."""

    alpha: Tensor
    hidden: Tensor
    q: Tensor
    k: Tensor
    value: Tensor
    intermediate: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


READS = (2, 3, 1, 1, 1, 2, 1, 1)  # of each mask in a block, in their order
Probs = tuple[Tensor, Tensor, Tensor, Tensor]  # for the inputs of q/k/v, o, gate/up, down


class BlockSample(NamedTuple):
    """What one block needs to know. What it reads at several places is there once for each, all of one memory: each
    place then has a gradient of its own, and those of all blocks are summed at once (`_Shared`).

    Attributes:
        masks: of its beginning, its middle (behind attention) and its end.
        gate: scalar; None: the block runs as it is.
        weight_probs, act_probs: [P] and [Q] of its precisions.
        weight_index, act_index: the one precision to compute, known on the host.
    """

    masks: tuple[Masks, Masks, Masks]
    gate: Tensor | None = None
    weight_probs: Probs | None = None
    act_probs: Probs | None = None
    weight_index: int | None = None
    act_index: int | None = None

    @property
    def vectors(self) -> list[Tensor]:
        """What a block takes gradients for in "arch" and "full" mode, each once."""
        own = (*chain(*self.masks), self.gate, *(self.weight_probs or ()), *(self.act_probs or ()))
        return list({id(t): t for t in own if t is not None}.values())

    def leaves(self, grad: bool) -> BlockSample:
        """The same with leaves on the same memory."""
        found = {id(t): t.detach().requires_grad_(grad) for t in self.vectors}

        def each(vectors: Iterable[Tensor | None]) -> list[Any]:
            return [None if t is None else found[id(t)] for t in vectors]

        beginning, middle, end = (Masks(*each(masks)) for masks in self.masks)
        weight, act = (None if p is None else tuple(each(p)) for p in (self.weight_probs, self.act_probs))
        gate, masks = each([self.gate])[0], (beginning, middle, end)
        return self._replace(masks=masks, gate=gate, weight_probs=weight, act_probs=act)


@dataclass(frozen=True)
class ArchSample:
    """One architecture sample.

    Attributes:
        alphas: the drawn values on the host, [K] or [blocks, K], keyed like the search space's dimensions.
        gates: value of each block's gate.
        head_probs: [P] of the head's precisions, None where they are not searched.
        head_index: the one precision of the head to compute, known on the host.
    """

    alphas: Mapping[str, Tensor]
    gates: tuple[float, ...]
    masks: Masks
    blocks: tuple[BlockSample, ...]
    head_probs: Tensor | None = None
    head_index: int | None = None

    @property
    def requires_grad(self) -> bool:
        """Whether a backward pass reaches the architecture parameters."""
        return any(a.requires_grad for a in self.alphas.values())


class _Dirichlet(torch.autograd.Function):
    """torch.distributions.Dirichlet.rsample, with an explicit generator."""

    @staticmethod
    def forward(ctx: Any, concentration: Tensor, generator: torch.Generator | None) -> Tensor:
        x = torch._sample_dirichlet(concentration, generator)
        ctx.save_for_backward(x, concentration)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, concentration = ctx.saved_tensors
        (grad,) = grads
        total = concentration.sum(-1, True).expand_as(concentration)
        slope = torch._dirichlet_grad(x, concentration, total)
        return slope * (grad - (x * grad).sum(-1, True)), None


class _ToDevice(torch.autograd.Function):
    """Copy many small host tensors to the device at once (into `out` if given), and their gradients back at once."""

    ALIGN = 64  # elements: vectors start at multiples of 256 bytes, so kernels can use wide loads

    @staticmethod
    def forward(ctx: Any, device: torch.device, out: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.shapes = [t.shape for t in tensors]
        ctx.dtype = tensors[0].dtype
        flat = _ToDevice.pack(list(tensors), pin=device.type == "cuda")
        flat = flat.to(device, non_blocking=True) if out is None else out.copy_(flat, non_blocking=True)
        return _ToDevice.unpack(flat, ctx.shapes)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        flat = _ToDevice.pack([g.to(ctx.dtype) for g in grads]).cpu()
        return None, None, *_ToDevice.unpack(flat, ctx.shapes)

    @staticmethod
    def pack(tensors: list[Tensor], pin: bool = False) -> Tensor:
        flat = torch.cat([nn.functional.pad(t.reshape(-1), (0, -t.numel() % _ToDevice.ALIGN)) for t in tensors])
        return flat.pin_memory() if pin else flat

    @staticmethod
    def unpack(flat: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        parts = flat.split([shape.numel() + -shape.numel() % _ToDevice.ALIGN for shape in shapes])
        return tuple(part[: shape.numel()].view(shape) for part, shape in zip(parts, shapes, strict=True))


class _Shared(torch.autograd.Function):
    """Each row of a tensor, `reads` times. Autograd would add the gradients up one by one: 20 launches in a block; here
    a step stacks and sums them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, reads: int) -> tuple[Tensor, ...]:
        ctx.shape, ctx.reads = tensor.shape, reads
        ctx.set_materialize_grads(False)
        return tuple(row.detach() for row in tensor for _ in range(reads))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rows, *shape = ctx.shape
        found = [g for g in grads if g is not None]
        if not found:
            return None, None
        if rows > 1 and len(found) < len(grads):  # a block that did not run
            zero = torch.zeros(shape, dtype=found[0].dtype, device=found[0].device)
            found = [zero if g is None else g for g in grads]
        return torch.stack(found).view(rows, -1, *shape).sum(1), None


def _cut(found: tuple[Tensor, ...], size: int) -> list[tuple[Tensor, ...]]:
    """In parts of a size."""
    return [found[i : i + size] for i in range(0, len(found), size)]


def _shared(tensor: Tensor, reads: int) -> list[tuple[Tensor, ...]]:
    """For each row of a tensor so many references, which share its memory."""
    if not tensor.requires_grad:
        return [(row,) * reads for row in tensor]
    return _cut(_Shared.apply(tensor, reads), reads)  # type: ignore[no-untyped-call]


class ArchParameters(nn.Module):
    """The logits of every searched dimension: `logits[key]` of shape [K], or [blocks, K] for bits of blocks.

    Args:
        space: what is searched.
        config: the model's.
        block_rank: original block indices, most important first.
        relaxation: of the widths: "dirichlet", "reinmax" or "gumbel".
        bit_relaxation: of the bits: "softmax" (no draw), or one of the three.
        tau: temperature of "gumbel", and of ReinMax's backward.
        alpha_init: added to the logit of the full size of every dimension but the bits. At 0 the Dirichlet starts
            uniform and, as producer and consumer masks compound, the network faint; 3 gives the full size 4x the mass.

    Raises:
        JointNASError: an unknown relaxation, or a temperature that is not positive.
    """

    def __init__(
        self, space: SearchSpace, config: Any, block_rank: Sequence[int] | None = None, *,
        relaxation: str = "dirichlet", bit_relaxation: str = "softmax", tau: float = 1.0, alpha_init: float = 0.0,
    ) -> None:
        super().__init__()
        if relaxation not in RELAXATIONS:
            raise unknown("relaxation", relaxation, RELAXATIONS)
        if bit_relaxation not in BIT_RELAXATIONS:
            raise unknown("bit relaxation", bit_relaxation, BIT_RELAXATIONS)
        if not tau > 0:
            raise JointNASError(f"tau is {tau}; a temperature must be positive.")
        self.space, self.relaxation, self.bit_relaxation, self.tau = space, relaxation, bit_relaxation, tau
        full = all_sizes(config)
        self.block_rank = tuple(block_rank if block_rank is not None else range(full["blocks"]))

        def members(factor: Factor) -> Tensor:
            """[full size, K]: 1 where a choice of the factor's dimension keeps the channel."""
            kept = [factor.mask(full, full | {factor.dim: size}) for size in space.sizes(factor.dim)]
            return torch.stack(kept, dim=1).float()

        with torch.device("cpu"):
            logits = {}
            for key in STRUCTURE:
                logits[key] = torch.zeros(len(space.sizes(key)))
                logits[key][-1] = alpha_init
            for key in BITS:
                if space.sizes(key):
                    logits[key] = torch.zeros(full["blocks"], len(space.sizes(key)))
            if space.head_bits:
                logits["head_bits"] = torch.zeros(len(space.head_bits))
            self.logits = nn.ParameterDict({k: nn.Parameter(v) for k, v in logits.items()})
            self._member = {
                "hidden": members(*HIDDEN), "heads": members(HEADS[1]).repeat(full["kv_heads"], 1),
                "pairs": members(*PAIRS), "prefix": members(*VALUES),
                "scale": torch.tensor([1 / math.sqrt(d) for d in space.head_dim], dtype=torch.float64),
                "intermediate": members(*NEURONS), "blocks": keep_matrix(space, self.block_rank).float(),
            }
        self._kv, self._qk_norm = full["kv_heads"], traits(config).qk_norm

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ArchParameters:
        return self  # stays on the host in fp32: see the top of this file

    # ---- probabilities ----------------------------------------------------------------------------------------------

    def concentration(self, key: str) -> Tensor:
        """Of the Dirichlet of a width."""
        return nn.functional.elu(self.logits[key]) + 1 + FLOOR

    def probs(self) -> dict[str, Tensor]:
        """Expected probabilities of every dimension, differentiable."""
        result = {}
        for key, logits in self.logits.items():
            kind = self._kind(key)
            c = self.concentration(key) if kind == "dirichlet" else logits.softmax(-1)
            result[key] = c / c.sum(-1, keepdim=True)
        return result

    def argmax(self) -> Choice:
        """The most probable structure that the space does not exclude, and the most probable bits."""
        probs = self.probs()
        structures = joint(self.space, probs).probs
        index = dict(zip(STRUCTURE, torch.unravel_index(structures.argmax(), structures.shape), strict=True))
        index |= {k: p.argmax(-1) for k, p in probs.items() if k not in STRUCTURE}
        return Choice.from_dict({k: torch.tensor(self.space.sizes(k))[i].tolist() for k, i in index.items()})

    def one_hot(self, choice: Choice) -> dict[str, Tensor]:
        """Certain probabilities of a choice, keyed like `probs`."""
        self.space.check(choice)
        sizes = {k: torch.tensor(self.space.sizes(k)) for k in self.logits}
        return {k: (torch.tensor(getattr(choice, k))[..., None] == s).float() for k, s in sizes.items()}

    # ---- sampling ---------------------------------------------------------------------------------------------------

    def _kind(self, key: str) -> str:
        return "reinmax" if key == "blocks" else self.bit_relaxation if key.endswith("_bits") else self.relaxation

    def draw(self, generator: torch.Generator | None = None, relaxation: str | None = None) -> dict[str, Tensor]:
        """One draw of every dimension, keyed like `probs`, differentiable in the logits; a host generator.

        Raises:
            JointNASError: an unknown relaxation.
        """
        if relaxation is not None and relaxation not in RELAXATIONS:
            raise unknown("relaxation", relaxation, RELAXATIONS)
        result = {}
        for key, logits in self.logits.items():
            kind = self._kind(key) if relaxation is None or key not in WIDTHS else relaxation
            if kind == "softmax":
                value = logits.softmax(-1)
            elif kind == "dirichlet":  # in fp64: a fp32 draw at the floor underflows to exact zeros
                value = _Dirichlet.apply(self.concentration(key).double(), generator).to(logits.dtype)  # type: ignore[no-untyped-call]
            elif kind == "reinmax":
                value = reinmax(logits, self.tau, generator)
            else:
                noise = torch.empty_like(logits).exponential_(generator=generator).log()
                value = ((logits - noise) / self.tau).softmax(-1)
            result[key] = value
        return result

    def _vectors(self, alphas: Mapping[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Masks, gates and bit probabilities of given values, on the host."""
        a = {k: v.to(dtype) for k, v in alphas.items()}
        m = {k: v.to(dtype) for k, v in self._member.items()}
        heads, pairs, prefix = m["heads"] @ a["heads"], m["pairs"] @ a["head_dim"], m["prefix"] @ a["head_dim"]
        scale = m["scale"] @ a["head_dim"]
        return [
            a["hidden"],
            m["hidden"] @ a["hidden"],
            heads[:, None] * (pairs if self._qk_norm else pairs * scale),
            pairs.expand(self._kv, -1),
            (heads[:, None] * prefix.square()).flatten(),
            m["intermediate"] @ a["intermediate"],
            *((a["head_dim"] * scale, a["head_dim"]) if self._qk_norm else ()),
            m["blocks"] @ a["blocks"],
            *(a[k] for k in (*BITS, "head_bits") if k in a),
        ]

    @torch.no_grad()
    def buffer(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Device memory for one sample, as `assemble` takes it."""
        return _ToDevice.pack(self._vectors(self.probs(), dtype)).to(device)

    def assemble(
        self, alphas: Mapping[str, Tensor], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
    ) -> ArchSample:
        """Masks, gates and bit probabilities of given host values, on the device; differentiable in them.

        With `out`, from `buffer`, they are views of it, always at the same addresses, and it is overwritten.
        """
        host = self._vectors(alphas, dtype)
        device, at = torch.device(device), 8 if self._qk_norm else 6  # masks, then gates, then bits
        same = device.type == "cpu" and out is None
        moved = host if same else _ToDevice.apply(device, out, *host)  # type: ignore[no-untyped-call]
        values: tuple[float, ...] = tuple(host[at].detach().tolist())
        gates: Sequence[Tensor | None] = moved[at].unbind()
        shared = Masks(*moved[:at])
        if not host[at].requires_grad:  # a certain gate of 1 is no gate at all
            gates = [None if v == 1 else gate for v, gate in zip(values, gates, strict=True)]
        searched, none = [k for k in BITS if k in alphas], (None,) * len(gates)
        probs = {k: _shared(bits, 4) for k, bits in zip(searched, moved[at + 1 :], strict=False)}
        index = {k: self._certain(alphas[k]) for k in searched}
        columns = (self._of_blocks(shared), gates, *(of.get(k, none) for of in (probs, index) for k in BITS))
        blocks = tuple(BlockSample(*row) for row in zip(*columns, strict=True))
        sample = ArchSample(dict(alphas), values, shared, blocks)
        if "head_bits" not in alphas:
            return sample
        return replace(sample, head_probs=moved[-1], head_index=self._certain(alphas["head_bits"][None])[0])

    def _of_blocks(self, masks: Masks) -> list[tuple[Masks, Masks, Masks]]:
        """The masks for the three places of every block; a place that does not read a mask has that of the first."""
        blocks = len(self.block_rank)
        if not masks.hidden.requires_grad:
            return [(masks, masks, masks)] * blocks
        columns: list[list[tuple[Any, ...]]] = []
        for mask, reads in zip(masks, READS, strict=True):
            one = [(None,)] * blocks if mask is None else _cut(_shared(mask[None], reads * blocks)[0], reads)
            columns.append([(own + own[:1] * 2)[:3] for own in one])
        return [tuple(Masks(*place) for place in zip(*own, strict=True)) for own in zip(*columns, strict=True)]  # type: ignore[misc]

    @staticmethod
    def _certain(probs: Tensor) -> tuple[int | None, ...]:
        """Per row the index of a precision that has probability 1 and wants no gradient, else None."""
        if probs.requires_grad:
            return (None,) * probs.shape[0]
        top = probs.max(-1)
        return tuple(i if v == 1 else None for i, v in zip(top.indices.tolist(), top.values.tolist(), strict=True))
