"""What the steps of all devices share: which models they run, caches, and prompts by the chunk."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.layout import all_sizes, block_of

STAGES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
# Rotary embeddings whose frequencies depend on the length of the sequence have no table by position.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def config_misfit(config: Any) -> str | None:
    """Why no step runs models of a config; None: they do."""
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in STATIC_ROPE:
        return f"rotary embeddings of type {kind!r} depend on the length of the sequence"
    partial = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor")
    if partial not in (None, 1.0) or getattr(config, "partial_rotary_factor", None) not in (None, 1.0):
        return "only a part of each head is rotated"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"its activation is {config.hidden_act!r}, not 'silu'"
    return None


def stage_modules(config: Any, layer: Any, names: tuple[str, ...]) -> list[nn.Module]:
    """The modules of one of STAGES in a layer: one for each name, or one for all."""
    layout = block_of(config)
    return [layer.get_submodule(m) for m in dict.fromkeys(op.module for op in layout.linears if op.name in names)]


class Caches:
    """Keys and values of every block: tensors [batch, key-value heads, length, head dim].

    Args:
        memory: [2, blocks, batch, key-value heads, length, head dim].
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.batch, self.length = memory, memory.shape[2], memory.shape[4]
        self.keys, self.values = self.between(0, self.length)

    def between(self, begin: int, end: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Views of the keys and values of these positions: of all blocks at once, because slicing each takes as long as
        a block of a small model."""
        keys, values = self.memory[:, :, :, :, begin:end].unbind(0)
        return keys.unbind(0), values.unbind(0)


class Step(ABC):
    """Logits of further tokens of some sequences: the next one of each, or a prompt.

    Args:
        model: a transformers model for which `misfit` is None; its weights are used where they are.

    Raises:
        JointNASError: a model that does not fit.
    """

    kind: ClassVar[str]  # of device
    dtypes: ClassVar[tuple[torch.dtype, ...]]
    most: ClassVar[int]  # sequences
    chunk: ClassVar[int]  # tokens at once, those of all sequences together

    def __init__(self, model: Any) -> None:
        if reason := self.misfit(model):
            raise JointNASError(f"decode step: the model does not fit: {reason}")
        weight = model.model.norm.weight
        self.model, self.sizes, self.dtype, self.device = model, all_sizes(model.config), weight.dtype, weight.device
        self._bound: Caches | None = None
        self._angles: tuple[Tensor, ...] = ()  # cosines and sines [length, head dim]
        self._busy = threading.Lock()

    @classmethod
    def misfit(cls, model: Any) -> str | None:
        """Why it cannot run a transformers model; None: it can."""
        weight = model.model.norm.weight
        if weight.device.type != cls.kind or weight.dtype not in cls.dtypes:
            names = ", ".join(str(dtype)[6:] for dtype in cls.dtypes)
            return f"it runs models in {names} on {cls.kind}, not {weight.dtype} on {weight.device}"
        return config_misfit(model.config) or cls._weights_misfit(model)

    @classmethod
    def _weights_misfit(cls, model: Any) -> str | None:
        return None

    @torch.inference_mode(False)
    def caches(self, batch: int, length: int) -> Caches:
        """Room for that many sequences and positions."""
        shape = (2, len(self.model.model.layers), batch, self.sizes["kv_heads"], length, self.sizes["head_dim"])
        return Caches(torch.zeros(shape, dtype=self.dtype, device=self.device))

    def __call__(
        self, ids: Tensor, positions: Tensor, caches: Caches, slot: int, starts: Tensor | None = None
    ) -> Tensor:
        """Logits [batch, vocab] for one token of each sequence, ids [batch]; otherwise as `prefill`.

        Raises:
            JointNASError: as `prefill`.
        """
        return self._run(ids, positions, (len(ids),), caches, slot, starts, 1)[:, 0]

    def prefill(
        self, ids: Tensor, positions: Tensor, caches: Caches, slot: int, starts: Tensor | None = None, keep: int = 1
    ) -> Tensor:
        """Logits [batch, keep, vocab] for the last of tokens ids [batch, count] at rotary positions [batch, count],
        int64; their keys and values go to the caches from `slot` on. A token sees the slots up to its own, in sequence
        m from starts[m] (0) on; what stands before its sequence sees itself. Memory does not grow with `count`.

        Raises:
            JointNASError: more sequences than `most`; slots outside of the caches'; ids or positions outside of the
                model's, on a CPU (a GPU asserts ids, and makes NaN of tokens at other positions than the caches');
                or a step that another thread is in.
        """
        return self._run(ids, positions, (len(ids), ids.shape[-1]), caches, slot, starts, keep)

    def _run(
        self, ids: Tensor, positions: Tensor, shape: tuple[int, ...], caches: Caches, slot: int, starts: Tensor | None,
        keep: int,
    ) -> Tensor:  # fmt: skip
        batch = shape[0]
        if not 1 <= batch <= self.most:
            raise JointNASError(f"decode step: a batch of {batch}; allowed: 1 to {self.most} sequences")
        if caches.batch != batch:
            raise JointNASError(f"decode step: {batch} tokens for caches of {caches.batch} sequences")
        given = {"ids": (ids, shape), "positions": (positions, shape)}
        for name, (tensor, wanted) in (given | ({} if starts is None else {"starts": (starts, shape[:1])})).items():
            if tensor.shape != wanted or tensor.dtype != torch.int64 or tensor.device != self.device:
                raise JointNASError(f"decode step: {name} must be int64 {list(wanted)} on {self.device}, got "
                                    f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}")  # fmt: skip
        ids, positions = ids.reshape(batch, -1), positions.reshape(batch, -1)
        count = ids.shape[1]
        if not 1 <= keep <= count:
            raise JointNASError(f"decode step: logits of {keep} tokens; allowed: 1 to {count}")
        if not 0 <= slot <= caches.length - count:
            raise JointNASError(f"decode step: {count} tokens from slot {slot} on, in caches of {caches.length}")
        if not self._busy.acquire(blocking=False):
            raise JointNASError("decode step: another thread is in it; give each thread a model of its own")
        try:
            if caches is not self._bound:
                self._check(caches)
                self._bind(caches)
                self._bound = caches
            found: list[Tensor] = []
            size = max(1, self.chunk // batch)
            for begin in range(0, count, size):
                part = slice(begin, min(begin + size, count))
                kept = max(0, part.stop - max(begin, count - keep))
                # of a sequence that begins behind this chunk, all tokens in it see themselves alone
                last = starts is None or part.stop == count
                seen = starts if last or starts is None else starts.clamp_max(slot + part.stop - 1)
                found.append(self._chunk(ids[:, part], positions[:, part], seen, slot + begin, kept))
        finally:
            self._busy.release()
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def _check(self, caches: Caches) -> None:
        blocks, memory = len(self.model.model.layers), caches.memory
        shape = (2, blocks, caches.batch, self.sizes["kv_heads"], caches.length, self.sizes["head_dim"])
        same = (memory.shape, memory.dtype, memory.device) == (shape, self.dtype, self.device)
        if not same or not memory.is_contiguous():
            raise JointNASError("decode step: caches of another model; made by `caches`, they are dense "
                                f"{self.dtype} {list(shape)} on {self.device}")  # fmt: skip

    def _rotate_to(self, length: int) -> None:
        """Makes `_angles` those of so many positions."""
        like, positions = torch.empty(1, dtype=self.dtype, device=self.device), torch.arange(length, device=self.device)
        self._angles = tuple(t[0].contiguous() for t in self.model.model.rotary_emb(like, positions[None]))

    @abstractmethod
    def _bind(self, caches: Caches) -> None:
        """Lets what follows use these caches, and angles for their positions."""

    @abstractmethod
    def _chunk(self, ids: Tensor, positions: Tensor, starts: Tensor | None, slot: int, keep: int) -> Tensor:
        """Logits [batch, keep, vocab] of the last of some tokens, ids and positions [batch, count]; keep may be 0."""
