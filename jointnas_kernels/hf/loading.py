"""Run an exported model on low-bit kernels.

The model is built without weights (meta device), and each tensor goes from the file straight into its module: packed
integers stay packed, so memory is what the files hold (a kernel's own layout adds a few bytes per group of weights), or
less: an embedding with the values of a packed head is not held, its rows are the head's.
Everything but the quantized linears is stock transformers, which runs what runtime/generation.py does not.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from jointnas_kernels.errors import JointNASError, reading, unknown
from jointnas_kernels.hf.compressed import Scheme, read_schemes
from jointnas_kernels.hf.families import build, family, rotary
from jointnas_kernels.nn.linear import FakeQuantLinear
from jointnas_kernels.nn.packed import BACKENDS, PackedEmbedding, PackedLinear
from jointnas_kernels.runtime import attach

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@torch.no_grad()
def load(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, backend: str = "auto"
) -> PreTrainedModel:
    """The model of an exported folder, its quantized linears on `lowbit_linear`; for inference, `generate` included.
    `model.runtime` says what ran the latest call, and why.

    Also loads other compressed-tensors folders, if each linear is `pack-quantized` W{2,4,8} in symmetric groups with
    A{2,4,8} (dynamic per token) or A16, or not quantized; and folders without any quantization.

    Args:
        folder: of `jointnas.export` or `save_pretrained`.
        device: where to run.
        dtype: of activations, scales and unquantized weights; None: the folder's.
        backend: of the low-bit kernels.

    Raises:
        JointNASError: the folder, or something in it, is not supported; the message names it.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise JointNASError(f"{str(folder)!r} is no model folder: it has no config.json")
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS, where="load")
    with reading(f"model folder {str(folder)!r}"):
        return _load(folder, device, dtype, backend)


def _load(folder: Path, device: str | torch.device, dtype: torch.dtype | None, backend: str) -> PreTrainedModel:
    raw = read_object(folder / "config.json")
    quantization = raw.pop("quantization_config", None)
    family(SimpleNamespace(**raw), f"{str(folder)!r}: a model")
    config = AutoConfig.for_model(**raw)
    dtype = dtype or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
    config.dtype = dtype
    with torch.device("meta"):
        model = build(config)
    schemes = read_schemes(quantization, model) if quantization else {}
    if "lm_head" in schemes and config.tie_word_embeddings:
        raise JointNASError("lm_head: cannot be quantized while it is tied to the embedding, which is not")
    with Tensors(folder, torch.device(device), dtype) as tensors:
        for name, scheme in schemes.items():
            parent, _, child = name.rpartition(".")
            new = _linear(tensors, name, scheme, model.get_submodule(name), backend)
            setattr(model.get_submodule(parent), child, new)
        for name, module in model.named_modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                full = f"{name}.{key}" if name else key
                if parameter.is_meta and not (full == "lm_head.weight" and config.tie_word_embeddings):
                    value = tensors.take(full, tuple(parameter.shape))
                    module.register_parameter(key, nn.Parameter(value, requires_grad=False))
        tensors.finish(ignore="lm_head.weight" if config.tie_word_embeddings else "")
    model.tie_weights()
    if (rows := rows_of_head(model)) is not None:
        model.set_input_embeddings(rows)
    model.get_submodule("model").rotary_emb = rotary(config).to(device)  # computed from the config, not stored
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval()
    attach(model)
    return model


def rows_of_head(model: Any) -> PackedEmbedding | None:
    """In place of the model's embedding, if that has the values of a packed head of which single rows can be read."""
    head, values = model.lm_head, model.get_input_embeddings().weight
    if not isinstance(head, PackedLinear) or head.layout == "cuda":
        return None
    embedding = PackedEmbedding(head, values.dtype)
    parts = torch.arange(len(values), device=values.device).split(4096)
    return embedding if all(torch.equal(embedding(rows), values[rows]) for rows in parts) else None


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, of thousands of brackets
        raise JointNASError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise JointNASError(f"{path} is damaged: it holds no object")
    return found


def _linear(tensors: Tensors, name: str, scheme: Scheme, plain: nn.Module, backend: str) -> nn.Module:
    """One quantized linear from its stored tensors, in place of the `plain` one without weights."""
    assert isinstance(plain, nn.Linear)
    outputs, inputs = plain.weight.shape
    bias = None if plain.bias is None else tensors.take(f"{name}.bias", (outputs,))
    if scheme.weight_bits is None:
        weight = tensors.take(f"{name}.weight", (outputs, inputs))
        return FakeQuantLinear(weight, bias, None, scheme.act_bits, scheme.act_symmetric).requires_grad_(False)
    bits, group = scheme.weight_bits, scheme.group_size
    shape = tensors.take(f"{name}.weight_shape", (2,)).tolist()
    if shape != [outputs, inputs]:
        raise JointNASError(f"{name}.weight_shape is {shape}; the config wants {[outputs, inputs]}")
    if inputs % group or inputs * bits % 32:
        raise JointNASError(f"{name}: {inputs} inputs are no multiple of the group size {group} and of whole words")
    packed = tensors.take(f"{name}.weight_packed", (outputs, inputs * bits // 32))
    if packed.dtype != torch.int32:
        raise JointNASError(f"{name}.weight_packed is {packed.dtype}; supported: int32")
    scale = tensors.take(f"{name}.weight_scale", (outputs, inputs // group))
    try:
        return PackedLinear(packed, scale, bias, bits, scheme.act_bits, scheme.act_symmetric, backend)
    except JointNASError as error:
        raise JointNASError(f"{name} (W{bits}A{scheme.act_bits}, group {group}): {error}") from None


class Tensors:
    """The safetensors files of a folder; every tensor is read once, by name, onto one device."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.folder, self.device, self.dtype = folder, device, dtype
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Tensors:
        index = self.folder / INDEX
        names = set(read_object(index).get("weight_map", {}).values()) if index.is_file() else {SINGLE}
        for name in sorted(names):
            if not (self.folder / name).is_file():
                raise JointNASError(f"{str(self.folder)!r} has no {name}")
            try:
                file = self._stack.enter_context(safe_open(self.folder / name, framework="pt", device=str(self.device)))
            except SafetensorError as error:
                raise JointNASError(f"{self.folder / name} is damaged: {error}") from None
            self._files |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        """What is left to take."""
        return list(self._files)

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor, floating-point ones in the given dtype if there is one; in memory of its own (files are mapped)."""
        if name not in self._files:
            raise JointNASError(f"{str(self.folder)!r} has no tensor {name!r}")
        tensor = self._files.pop(name).get_tensor(name)
        if shape is not None and tuple(tensor.shape) != shape:
            raise JointNASError(f"{name} has shape {tuple(tensor.shape)}; the config wants {shape}")
        own: Tensor = tensor.to(self.dtype, copy=True) if tensor.is_floating_point() else tensor.clone()
        return own

    def finish(self, ignore: str) -> None:
        """Raise if a tensor was not used."""
        left = [n for n in self._files if n != ignore and not n.endswith("rotary_emb.inv_freq")]
        if left:
            names, more = ", ".join(left[:3]), f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise JointNASError(f"{str(self.folder)!r} has tensors that its config has no use for: {names}{more}")
