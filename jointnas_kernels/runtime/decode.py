"""Tokens through a packed model on a CPU, 1 to 16 sequences: calls of csrc/cpu/decode.cpp, one for each token that is
decoded, and one for each chunk of a prompt.

The kernel reads structs of int64 (decode.h), which are written here member by member; it allocates nothing. The caches
are static, [batch, key-value heads, length, head dim] in the model's dtype.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from jointnas_kernels.layout import sliding_windows
from jointnas_kernels.nn.linear import FakeQuantLinear
from jointnas_kernels.nn.packed import PackedEmbedding, PackedLinear
from jointnas_kernels.ops.core import cpu
from jointnas_kernels.runtime.step import STAGES, Caches, Step, stage_modules

MOST = 16  # sequences
CHUNK = 256  # tokens of a call, those of all sequences together
# of the structs in decode.h: members of a linear and of a block, and where some of them are
LINEAR = 9
BLOCK, CACHES = 7 + 7 * LINEAR, 4
LENGTH, ANGLES = 8, 11


def _kind(module: nn.Module) -> tuple[Any, ...] | None:
    """What linears of one stage must share; None: the step has no kernel for it."""
    if isinstance(module, PackedLinear):
        if module.layout != "cpu":
            return None
        data = module.weight.tensors[0]
        return module.weight_bits, module.act_bits, module.act_symmetric, tuple(data.shape[1:3])
    plain = isinstance(module, nn.Linear) and (not isinstance(module, FakeQuantLinear) or module.act_bits == 16)
    return (16,) if plain else None


class DecodeStep(Step):
    """`Step` on a CPU.

    Args:
        model: as of `Step`.
        threads: None: torch's number at every call.
        isa: of the kernels (`cpu.ISAS`).

    Raises:
        JointNASError: a model that does not fit.
    """

    kind, dtypes, most, chunk = "cpu", tuple(cpu.DTYPES), MOST, CHUNK

    def __init__(self, model: Any, threads: int | None = None, isa: int = 0) -> None:
        super().__init__(model)
        self.threads, self.isa = threads, isa
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

    @classmethod
    def _weights_misfit(cls, model: Any) -> str | None:
        for b, layer in enumerate(model.model.layers):
            for names in STAGES:
                kinds = {_kind(module) for module in stage_modules(model.config, layer, names)}
                if None in kinds:
                    return (f"block {b} has linears that quantize activations of unquantized weights, or of another "
                            "layout")  # fmt: skip
                if len(kinds) > 1:
                    return f"block {b}: {', '.join(names)} are quantized unlike each other"
        kind, embedding = _kind(model.lm_head), model.get_input_embeddings()
        if isinstance(embedding, PackedEmbedding) and embedding.head is not model.lm_head:
            return "its embedding has the rows of another head"
        return None if kind and kind[1:2] in ((), (16,)) else "its head has quantized inputs, or another layout"

    def _chunk(self, ids: Tensor, positions: Tensor, starts: Tensor | None, slot: int, keep: int) -> Tensor:
        (batch, count), threads = ids.shape, self.threads or torch.get_num_threads()
        begins = torch.zeros(batch, dtype=torch.int64) if starts is None else starts.contiguous()
        if self._for != (needs := (batch, count, keep, threads, self._model[LENGTH])):
            size = array("q", [0])
            cpu.call("decode_size", self._model, batch, count, keep, size, threads=threads, isa=self.isa)
            self._memory, self._for = torch.empty(size[0] + 64, dtype=torch.uint8), needs
        logits = torch.empty(batch, keep, self.sizes["vocab"], dtype=self.dtype)
        memory = self._memory.data_ptr()
        cpu.call("decode_step", self._model, batch, count, keep, ids.contiguous(), positions.contiguous(), begins, slot,
                 logits, memory + -memory % 64, threads=threads, isa=self.isa)  # fmt: skip
        return logits

    def _bind(self, caches: Caches) -> None:
        if caches.length != self._model[LENGTH]:
            self._rotate_to(caches.length)
            self._model[LENGTH] = caches.length
            self._model[ANGLES], self._model[ANGLES + 1] = (t.data_ptr() for t in self._angles)
        for b, (keys, values) in enumerate(zip(caches.keys, caches.values, strict=True)):
            self._blocks[b * BLOCK + CACHES], self._blocks[b * BLOCK + CACHES + 1] = keys.data_ptr(), values.data_ptr()

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
            modules = stage_modules(self.model.config, layer, names)
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
