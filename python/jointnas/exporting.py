"""The result as a folder that stock transformers loads: config, safetensors, tokenizer, model card, choice.

An unquantized choice is a plain Hugging Face folder. A quantized one is stored in the format of compressed-tensors
(jointnas_kernels/hf/compressed.py): packed integers and scales, from which `AutoModelForCausalLM.from_pretrained`, with
compressed-tensors installed, computes exactly what the fine-tuned model computed, its activation quantizers included.
`jointnas_kernels.hf.load` runs the same folder on low-bit kernels.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from jointnas.checkpoint import replacing
from jointnas_kernels.errors import JointNASError, reading
from jointnas_kernels.hf.compressed import PACKED, Scheme, quantization_config, stored
from jointnas_kernels.nn.linear import FakeQuantLinear
from jointnas_kernels.space import STRUCTURE, Choice, kept_blocks

CHOICE_FILE = "choice.json"
SEARCHED = "Found by a joint search over architecture and precision, then distilled from the original."


def export_model(
    model: PreTrainedModel, folder: str | Path, choice: Choice, block_rank: Sequence[int], *, tokenizer: Any = None,
    facts: Mapping[str, Any] | None = None, base: str = "", licence: str | None = None, story: str = SEARCHED,
    notices: Sequence[Path] = (), max_shard_size: str | int = "50GB",
) -> Path:  # fmt: skip
    """Writes an extracted or baked model atomically: the folder is there whole, or not at all.

    `facts` are numbers for the model card, `story` its sentence on how the model came about, `notices` files that the
    base model's terms want beside the weights."""
    schemes, tensors = quantized_state(model)
    with replacing(Path(folder)) as temporary:
        model.save_pretrained(temporary, state_dict=tensors, max_shard_size=max_shard_size)
        if schemes:
            config = temporary / "config.json"
            plain = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
            ignore = sorted(plain - {n for n, s in schemes.items() if not s.plain})
            entries = {**json.loads(config.read_text()), "quantization_config": quantization_config(schemes, ignore)}
            config.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        for notice in notices:
            shutil.copy(notice, temporary / notice.name)
        blocks = [
            {
                "original_block": b,
                "weight_bits": choice.weight_bits[b] if choice.weight_bits else 16,
                "act_bits": choice.act_bits[b] if choice.act_bits else 16,
            }
            for b in kept_blocks(block_rank, choice.blocks)
        ]
        record = {"choice": choice.to_dict(), "layers": blocks, "base": base, "facts": dict(facts or {})}
        (temporary / CHOICE_FILE).write_text(json.dumps(record, indent=1))
        size = sum(f.stat().st_size for f in temporary.glob("*.safetensors"))
        (temporary / "README.md").write_text(card(choice, blocks, schemes, size, facts or {}, base, licence, story))
    return Path(folder)


def quantized_state(model: nn.Module) -> tuple[dict[str, Scheme], dict[str, Tensor]]:
    """(scheme of each quantized linear, tensors to be stored of the whole model)."""
    tensors: dict[str, Tensor] = dict(model.state_dict())
    schemes = {}
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantLinear):
            schemes[name] = Scheme.of(module)
            del tensors[f"{name}.weight"]
            try:
                tensors |= {f"{name}.{key}": value for key, value in stored(module).items()}
            except JointNASError as error:
                raise JointNASError(f"{name}: {error}") from None
    return schemes, tensors


def card(
    choice: Choice, blocks: Sequence[Mapping[str, Any]], schemes: Mapping[str, Scheme], size: int,
    facts: Mapping[str, Any], base: str, licence: str | None, story: str = SEARCHED,
) -> str:  # fmt: skip
    """A model card in Markdown."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [compressed, jointnas]"]
    lines += [f"license: {licence}"] if licence else []
    lines += ["---", "", f"# Compressed {base or 'model'}", "", story, ""]
    lines += ["```python", "from transformers import AutoModelForCausalLM"]
    if schemes:
        lines += ["model = AutoModelForCausalLM.from_pretrained(folder)  # pip install compressed-tensors", ""]
        if all(s.weight_bits is None or s.weight_symmetric for s in schemes.values()):
            lines += ["from jointnas_kernels import hf", "model = hf.load(folder)  # the same, on low-bit kernels"]
    else:
        lines += ["model = AutoModelForCausalLM.from_pretrained(folder)"]
    lines += ["```", "", "| | |", "|---|---|"]
    lines += [f"| {k} | {getattr(choice, k)} |" for k in STRUCTURE]
    lines += [f"| head_bits | {choice.head_bits} |"] if choice.head_bits is not None else []
    lines += [f"| {k} | {v} |" for k, v in facts.items()]
    lines += [f"| weights on disk | {size / 1e6:,.1f} MB |"]
    lines += [f"| base model | {base} |"] if base else []
    lines += [f"| licence | {licence} |"] if licence else []
    if choice.weight_bits or choice.act_bits:
        lines += ["", "| block | of the original | weight bits | activation bits |", "|---|---|---|---|"]
        lines += [f"| {i} | " + " | ".join(str(v) for v in b.values()) + " |" for i, b in enumerate(blocks)]
    if schemes:
        what = "The head's weights" if list(schemes) == ["lm_head"] else "Linear weights"
        acts = sorted({("symmetric" if s.act_symmetric else "asymmetric") for s in schemes.values() if s.act_bits < 16})
        lines += [
            "",
            f"{what} are stored as integers ({PACKED}) with one scale per group of inputs; embeddings and norms"
            f"{'' if 'lm_head' in schemes else ' and `lm_head`'} are not quantized."
            + (f" Activations are quantized per token, dynamically, {' or '.join(acts)}." if acts else ""),
            "Load it as above: `dequantize=True` would apply the first group's scheme to every layer.",
        ]
    return "\n".join(lines) + "\n"


def reload(folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The exported model through stock `AutoModelForCausalLM`."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise JointNASError(f"{str(folder)!r} is no exported model: it has no config.json")
    with reading(f"model folder {str(folder)!r}"):
        quantized = "quantization_config" in json.loads((folder / "config.json").read_text())
    if quantized and importlib.util.find_spec("compressed_tensors") is None:
        raise JointNASError(
            f"{str(folder)!r} is quantized: transformers loads it with compressed-tensors, which is not installed "
            "(pip install compressed-tensors); jointnas_kernels.hf.load needs nothing else"
        )
    whole, bars = reading(f"model folder {str(folder)!r}"), contextlib.redirect_stderr(io.StringIO())
    with whole, bars, torch.no_grad():  # compressed-tensors' bars cannot be turned off
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        model.eval()(torch.zeros(1, 1, dtype=torch.long))  # the first call unpacks the weights
    if quantized:
        _undispatched(model)
    nn.Module.to(model, device)
    return model


def _undispatched(model: PreTrainedModel) -> None:
    """Takes back what compressed-tensors leaves of unpacking in every module: moves between devices around its forward.
    The decode step runs models whose modules are what their classes say, but for replaced linears."""
    from compressed_tensors.offload import remove_dispatch

    remove_dispatch(model)
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.forward
