"""An exported folder as one GGUF file: the same integers and scales, where a block type of llama.cpp can hold them.

Scales are fp16 there. One that is not an fp16 number is rounded, by at most 2^-11 of itself (2^-25 below 2^-14);
`Written` says by how much at most, and `read` gives the model that the file stands for. Nothing else is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig

from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf.compressed import Scheme, read_schemes
from jointnas_kernels.hf.families import build, family
from jointnas_kernels.hf.gguf import blocks, names
from jointnas_kernels.hf.gguf.tokenizer import tokenizer_metadata
from jointnas_kernels.hf.loading import Tensors, read_object
from jointnas_kernels.layout import all_sizes, block_of
from jointnas_kernels.ops.lowbit.pack import unpack_weight

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass
class Written:
    """What became of a model."""

    types: dict[str, str] = field(default_factory=dict)  # of each tensor in the file
    rounded: float = 0.0  # largest relative change of a scale
    remarks: list[str] = field(default_factory=list)  # what the user should know


class _Stored(NamedTuple):
    """A parameter of a folder: values, or levels int8 [O, I] of so many bits and their scales [O, groups]."""

    data: Tensor
    scale: Tensor | None = None
    bits: int = 0


@torch.no_grad()
def write(folder: str | Path, path: str | Path, tokenizer: Any, name: str = "", licence: str | None = None) -> Written:
    """Writes the model of a folder (of `jointnas.export` or `save_pretrained`) for llama.cpp.

    Quantized linears become Q8_0, Q4_0 or TQ2_0 blocks, or keep their values where no type fits their groups; norms and
    biases are fp32, everything else has the folder's dtype. A quantized head whose values the embedding has, too, is
    stored once, for both.

    Args:
        folder: as `hf.load` reads it.
        path: the new file.
        tokenizer: a fast tokenizer of transformers.
        name: of the model, for people.
        licence: its SPDX name.

    Raises:
        JointNASError: the folder, its tokenizer, or something in its config has no form in llama.cpp.
    """
    gguf, folder = names.library(), Path(folder)
    raw = read_object(folder / "config.json")
    quantization = raw.pop("quantization_config", None)
    family(SimpleNamespace(**raw), f"{str(folder)!r}: a model")
    config = AutoConfig.for_model(**raw)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    if dtype not in PLAIN:
        raise JointNASError(f"GGUF: models in {dtype} cannot be written; supported: {', '.join(map(str, PLAIN))}")
    values, remarks = names.metadata_of(config)
    words = tokenizer_metadata(tokenizer, config.vocab_size)
    with torch.device("meta"):
        model = build(config)
    schemes = read_schemes(quantization, model) if quantization else {}
    done, arch = Written(remarks=remarks), names.architecture(config)
    if acts := sorted({s.act_bits for s in schemes.values() if s.act_bits < 16}):
        done.remarks.append(f"activations of {', '.join(map(str, acts))} bits: llama.cpp quantizes activations its own "
                            "way, to 8 bits in blocks of 32")  # fmt: skip
    writer = gguf.GGUFWriter(path, arch, use_temp_file=True)
    metadata = {f"{arch}.{key}": value for key, value in values.items()}
    metadata |= {f"tokenizer.{key}": value for key, value in words.items()}
    metadata |= {"general.type": "model", "general.name": name or folder.name}
    for key, value in (metadata | ({"general.license": licence} if licence else {})).items():
        _add(writer, key, value)
    with Tensors(folder, torch.device("cpu"), dtype) as tensors:
        for parameter, stored in _parameters(model, tensors, schemes):
            kind, data = _encoded(stored, parameter, done)
            done.types[names.tensor_name(parameter)] = kind
            writer.add_tensor(names.tensor_name(parameter), data, raw_dtype=gguf.GGMLQuantizationType[kind])
        tensors.finish(ignore="lm_head.weight" if config.tie_word_embeddings else "")
    if (factors := names.rope_factors(config)) is not None:
        done.types[names.ROPE_FACTORS] = "F32"
        writer.add_tensor(names.ROPE_FACTORS, factors.numpy())
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(gguf, done.types))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if done.rounded:
        done.remarks.append(f"scales were rounded to fp16, by at most {done.rounded:.2e} of themselves")
    return done


def _parameters(model: Any, tensors: Tensors, schemes: dict[str, Scheme]) -> Iterator[tuple[str, _Stored]]:
    """(name, what is stored) of every parameter as llama.cpp has it: fused ones apart where it must be, rows in its
    order."""
    config = model.config
    layout, sizes, arch = block_of(config), all_sizes(config), names.architecture(config)
    of_head = schemes.get("lm_head")
    head = None if of_head is None else _take(tensors, HEAD, tuple(model.lm_head.weight.shape), of_head)
    for parameter, value in model.named_parameters():
        if parameter == HEAD and (config.tie_word_embeddings or head is not None):
            continue
        if parameter == EMBEDDING and head is not None:
            embedding = tensors.take(EMBEDDING, tuple(value.shape))
            shared = torch.equal(_values(head), embedding)
            yield EMBEDDING, head if shared else _Stored(embedding)
            if not shared:
                yield HEAD, head
            continue
        module, _, kind = parameter.rpartition(".")
        scheme = schemes.get(module) if kind == "weight" else None
        stored = _take(tensors, parameter, tuple(value.shape), scheme)
        members = layout.modules.get(module.split(".", 3)[-1], ())
        if arch == "llama" and len(members) > 1:
            parts = {f"{module.rpartition('.')[0]}.{m.name}": layout.rows(m, sizes) for m in members}
        else:
            parts = {module: slice(None)}
        for name, rows in parts.items():
            heads = names.heads_of(name.rpartition(".")[2], arch, config)
            scale = None if stored.scale is None else names.interleaved(stored.scale[rows], heads)
            yield f"{name}.{kind}", _Stored(names.interleaved(stored.data[rows], heads), scale, stored.bits)


def _take(tensors: Tensors, parameter: str, shape: tuple[int, ...], scheme: Scheme | None) -> _Stored:
    if scheme is None or scheme.weight_bits is None:
        return _Stored(tensors.take(parameter, shape))
    name, bits, (outputs, inputs) = parameter.rpartition(".")[0], scheme.weight_bits, shape
    packed = tensors.take(f"{name}.weight_packed", (outputs, inputs * bits // 32))
    scale = tensors.take(f"{name}.weight_scale", (outputs, inputs // scheme.group_size))
    tensors.take(f"{name}.weight_shape", (2,))
    return _Stored(unpack_weight(packed, bits, (outputs, inputs)), scale, bits)


def _encoded(stored: _Stored, parameter: str, done: Written) -> tuple[str, Any]:
    """(type, data) of one tensor in the file."""
    data, scale, bits = stored
    if scale is None:
        return _plain(data)
    group = data.shape[1] // scale.shape[1]
    kind = blocks.type_for(bits, group)
    if kind is None:
        kind, plain = _plain(_values(stored))
        done.remarks.append(f"{parameter} is stored as {kind}: its groups of {group} inputs cut blocks of 32")
        return kind, plain
    half = scale.to(torch.float16)
    if not half.isfinite().all():
        raise JointNASError(f"{parameter} has a scale of {float(scale.abs().max()):.3g}, beyond fp16")
    change = (half.double() / scale.double() - 1).abs()[scale != 0]
    done.rounded = max(done.rounded, float(change.max()) if change.numel() else 0.0)
    return kind, blocks.encode(data, half, kind)


def _values(stored: _Stored) -> Tensor:
    """What levels and scales stand for, in the scales' dtype."""
    data, scale, _ = stored
    if scale is None:
        return data
    return (data.unflatten(1, (scale.shape[1], -1)).float() * scale.float().unsqueeze(-1)).flatten(1).to(scale.dtype)


def _plain(values: Tensor) -> tuple[str, Any]:
    """Matrices in their dtype, vectors in fp32."""
    values = values.float() if values.dim() == 1 else values.contiguous()
    kind = PLAIN[values.dtype]
    return kind, (values.view(torch.uint8) if kind == "BF16" else values).numpy()


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = ((list, "array"), (bool, "bool"), (str, "string"), (int, "uint32"), (float, "float32"))
    kind = next(name for of, name in kinds if isinstance(value, of))
    getattr(writer, f"add_{kind}")(key, value)


def _file_type(gguf: Any, types: dict[str, str]) -> int:
    """What most weights are; llama.cpp shows it."""
    found = [kind for name, kind in types.items() if name.startswith("blk.") and "norm" not in name]
    kind = max(sorted(set(found)), key=found.count)
    return int(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
