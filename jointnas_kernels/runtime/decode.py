"""Tokens through a packed model on a CPU, 1 to 16 sequences: calls of csrc/cpu/decode.cpp, one for each token that is
decoded, and one for each chunk of a prompt.

The kernel reads structs of int64 (decode.h), which are written here member by member; it allocates nothing. The caches
are static, [batch, key-value heads, length, head dim] in the model's dtype.
"""

from __future__ import annotations

import struct
import threading
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.layout import all_sizes, block_of, sliding_windows
from jointnas_kernels.nn.linear import FakeQuantLinear
from jointnas_kernels.nn.packed import PackedEmbedding, PackedLinear
from jointnas_kernels.ops.core import cpu

MOST = 16  # sequences
CHUNK = 256  # tokens of a call, those of all sequences together
# of the structs in decode.h: members of a linear and of a block, and where some of them are
LINEAR = 9
BLOCK, CACHES = 7 + 7 * LINEAR, 4
LENGTH, ANGLES = 8, 11
STAGES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
# Rotary embeddings whose frequencies depend on the length of the sequence have no table by position.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def misfit(model: Any) -> str | None:
    """Why the step cannot run a transformers model; None: it can."""
    weight = model.model.norm.weight
    if weight.device.type != "cpu" or weight.dtype not in cpu.DTYPES:
        return f"it runs float32 and bfloat16 models on a CPU, not {weight.dtype} on {weight.device}"
    if reason := config_misfit(model.config):
        return reason
    for b, layer in enumerate(model.model.layers):
        for names in STAGES:
            kinds = {_kind(module) for module in _modules(model, layer, names)}
            if None in kinds:
                return f"block {b} has linears that quantize activations of unquantized weights, or of another layout"
            if len(kinds) > 1:
                return f"block {b}: {', '.join(names)} are quantized unlike each other"
    kind, embedding = _kind(model.lm_head), model.get_input_embeddings()
    if isinstance(embedding, PackedEmbedding) and embedding.head is not model.lm_head:
        return "its embedding has the rows of another head"
    return None if kind and kind[1:2] in ((), (16,)) else "its head has quantized inputs, or another layout"


def config_misfit(config: Any) -> str | None:
    """The same as far as a config tells."""
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in STATIC_ROPE:
        return f"rotary embeddings of type {kind!r} depend on the length of the sequence"
    partial = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor")
    if partial not in (None, 1.0) or getattr(config, "partial_rotary_factor", None) not in (None, 1.0):
        return "only a part of each head is rotated"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"its activation is {config.hidden_act!r}, not 'silu'"
    return None


def _modules(model: Any, layer: Any, names: tuple[str, ...]) -> list[nn.Module]:
    layout = block_of(model.config)
    return [layer.get_submodule(m) for m in dict.fromkeys(op.module for op in layout.linears if op.name in names)]


def _kind(module: nn.Module) -> tuple[Any, ...] | None:
    """What linears of one stage must share; None: the step has no kernel for it."""
    if isinstance(module, PackedLinear):
        if module.layout != "cpu":
            return None
        data = module.weight.tensors[0]
        return module.weight_bits, module.act_bits, module.act_symmetric, tuple(data.shape[1:3])
    plain = isinstance(module, nn.Linear) and (not isinstance(module, FakeQuantLinear) or module.act_bits == 16)
    return (16,) if plain else None


class Caches:
    """Keys and values of every block: tensors [batch, key-value heads, length, head dim].

    Args:
        memory: [2, blocks, batch, key-value heads, length, head dim]
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.length = memory, memory.shape[4]
        self.keys, self.values = self.between(0, self.length)

    def between(self, begin: int, end: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Views of the keys and values of these positions: of all blocks at once, because slicing each takes as long as
        a block of a small model."""
        keys, values = self.memory[:, :, :, :, begin:end].unbind(0)
        return keys.unbind(0), values.unbind(0)


class DecodeStep:
    """Logits of further tokens of some sequences: the next one of each, or a prompt.

    Args:
        model: a transformers model on a CPU for which `misfit` is None; its weights are used where they are.
        threads: None: torch's number at every call.
        isa: of the kernels (`cpu.ISAS`).

    Raises:
        JointNASError: a model that does not fit.
    """

    def __init__(self, model: Any, threads: int | None = None, isa: int = 0) -> None:
        if reason := misfit(model):
            raise JointNASError(f"decode step: the model does not fit: {reason}")
        self.model, self.threads, self.isa = model, threads, isa
        self.sizes, self.dtype = all_sizes(model.config), model.model.norm.weight.dtype
        self._weights: list[Tensor] = []  # what the structs point to
        self._blocks = array("q")
        for b, layer in enumerate(model.model.layers):
            self._blocks.extend(self._block(b, layer))
        self._model = array("q", [
            cpu.DTYPES[self.dtype], *(self.sizes[k] for k in ("hidden", "heads", "kv_heads", "head_dim", "intermediate",
            "vocab")), len(model.model.layers), 0, self._keep(getattr(model.get_input_embeddings(), "weight", None)),
            self._keep(model.model.norm.weight), 0, 0, float_bits(model.config.rms_norm_eps),
            float_bits(model.model.layers[0].self_attn.scaling), *linear_fields(model.lm_head, self._keep),
            self._blocks.buffer_info()[0],
        ])  # fmt: skip
        self._memory, self._for = torch.empty(0, dtype=torch.uint8), (0,) * 5  # what it is for
        self._bound: Caches | None = None
        self._angles: tuple[Tensor, ...] = ()
        self._busy = threading.Lock()

    def caches(self, batch: int, length: int) -> Caches:
        """Room for that many sequences and positions."""
        blocks = len(self.model.model.layers)
        shape = (2, blocks, batch, self.sizes["kv_heads"], length, self.sizes["head_dim"])
        return Caches(torch.zeros(shape, dtype=self.dtype))

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
            JointNASError: more than 16 sequences; ids, positions or slots outside of the model's or the caches'; or a
                step that another thread is in.
        """
        return self._run(ids, positions, (len(ids), ids.shape[-1]), caches, slot, starts, keep)

    def _run(
        self, ids: Tensor, positions: Tensor, shape: tuple[int, ...], caches: Caches, slot: int, starts: Tensor | None,
        keep: int,
    ) -> Tensor:  # fmt: skip
        batch, threads = shape[0], self.threads or torch.get_num_threads()
        if not 1 <= batch <= MOST:
            raise JointNASError(f"decode step: a batch of {batch}; allowed: 1 to {MOST} sequences")
        if caches.keys[0].shape[0] != batch:
            raise JointNASError(f"decode step: {batch} tokens for caches of {caches.keys[0].shape[0]} sequences")
        given = {"ids": (ids, shape), "positions": (positions, shape)}
        for name, (tensor, wanted) in (given | ({} if starts is None else {"starts": (starts, shape[:1])})).items():
            if tensor.shape != wanted or tensor.dtype != torch.int64 or tensor.device.type != "cpu":
                raise JointNASError(f"decode step: {name} must be int64 {list(wanted)} on the CPU, got {tensor.dtype} "
                                    f"{list(tensor.shape)} on {tensor.device}")  # fmt: skip
        ids, positions = ids.reshape(batch, -1), positions.reshape(batch, -1)
        count = ids.shape[1]
        if not 1 <= keep <= count:
            raise JointNASError(f"decode step: logits of {keep} tokens; allowed: 1 to {count}")
        begins = torch.zeros(batch, dtype=torch.int64) if starts is None else starts.contiguous()
        if not self._busy.acquire(blocking=False):
            raise JointNASError("decode step: another thread is in it; give each thread a model of its own")
        try:
            if caches is not self._bound:
                self._bind(caches)
            found: list[Tensor] = []
            size = max(1, CHUNK // batch)
            for begin in range(0, count, size):
                part = slice(begin, min(begin + size, count))
                kept = max(0, part.stop - max(begin, count - keep))
                # of a sequence that begins behind this chunk, all tokens in it see themselves alone
                seen = begins if part.stop == count else begins.clamp_max(slot + part.stop - 1)
                found.append(self._call(ids[:, part], positions[:, part], seen, slot + begin, kept, threads))
        finally:
            self._busy.release()
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def _call(self, ids: Tensor, positions: Tensor, starts: Tensor, slot: int, keep: int, threads: int) -> Tensor:
        """One call: logits [batch, keep, vocab]."""
        batch, count = ids.shape
        if self._for != (needs := (batch, count, keep, threads, self._model[LENGTH])):
            size = array("q", [0])
            cpu.call("decode_size", self._model, batch, count, keep, size, threads=threads, isa=self.isa)
            self._memory, self._for = torch.empty(size[0] + 64, dtype=torch.uint8), needs
        logits = torch.empty(batch, keep, self.sizes["vocab"], dtype=self.dtype)
        memory = self._memory.data_ptr()
        cpu.call("decode_step", self._model, batch, count, keep, ids.contiguous(), positions.contiguous(), starts, slot,
                 logits, memory + -memory % 64, threads=threads, isa=self.isa)  # fmt: skip
        return logits

    def _bind(self, caches: Caches) -> None:
        """Points the structs to these caches, and to the rotary angles of their positions."""
        layers = len(self.model.model.layers)
        batch, _, length, _ = caches.keys[0].shape
        shape = (batch, self.sizes["kv_heads"], length, self.sizes["head_dim"])
        memory = caches.memory
        if memory.shape != (2, layers, *shape) or memory.dtype != self.dtype or not memory.is_contiguous():
            raise JointNASError(f"decode step: caches of another model; made by `caches`, they are dense "
                                f"{self.dtype} {[2, layers, *shape]}")  # fmt: skip
        if caches.length != self._model[LENGTH]:
            like, positions = torch.empty(1, dtype=self.dtype), torch.arange(caches.length)[None]
            self._angles = tuple(t[0].contiguous() for t in self.model.model.rotary_emb(like, positions))
            self._model[LENGTH] = caches.length
            self._model[ANGLES], self._model[ANGLES + 1] = (t.data_ptr() for t in self._angles)
        for b, (keys, values) in enumerate(zip(caches.keys, caches.values, strict=True)):
            self._blocks[b * BLOCK + CACHES], self._blocks[b * BLOCK + CACHES + 1] = keys.data_ptr(), values.data_ptr()
        self._bound = caches

    def _keep(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        tensor = tensor.detach().contiguous()
        self._weights.append(tensor)
        return tensor.data_ptr()

    def _block(self, b: int, layer: Any) -> Iterator[int]:
        yield self._keep(layer.input_layernorm.weight)
        yield self._keep(layer.post_attention_layernorm.weight)
        for name in ("q_norm", "k_norm"):
            norm = getattr(layer.self_attn, name, None)
            yield self._keep(None if norm is None else norm.weight)
        yield from (0, 0)  # caches
        yield sliding_windows(self.model.config)[b] or 0
        for names in STAGES:
            modules = _modules(self.model, layer, names)
            for i in range(len(names)):
                yield from linear_fields(modules[i], self._keep) if i < len(modules) else (0,) * LINEAR


def linear_fields(module: Any, address: Callable[[Tensor | None], int]) -> tuple[int, ...]:
    """DecodeLinear of an nn.Linear, or of a PackedLinear in the CPU's layout; `address` is a tensor's, and keeps it."""
    if not isinstance(module, PackedLinear):
        outputs, inputs = module.weight.shape
        return address(module.weight), address(module.bias), outputs, inputs, 16, 0, 0, 16, 0
    data = module.weight.tensors[0]
    stored = module.in_features // data.shape[1]
    bf16 = data.shape[2] == 1 + stored * module.weight_bits // 32
    return (
        address(data), address(module.bias), module.out_features, module.in_features, module.weight_bits,
        stored, int(bf16), module.act_bits, int(module.act_symmetric),
    )  # fmt: skip


def float_bits(value: float) -> int:
    """The bits of an fp32 number."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
