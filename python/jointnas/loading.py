"""Loading what is compressed: the embedded model, a folder, a GGUF file, or a hub name. Remote code is never run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedModel

from jointnas import assets, catalogue, data
from jointnas.config import DataConfig, ModelConfig
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.hf.families import family
from jointnas_kernels.hf.gguf import read as gguf

# Sizes of models whose tables can be measured without having their weights.
KNOWN: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    },
}  # fmt: skip


def check_device(device: str) -> torch.device:
    """The device of this name."""
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise JointNASError(f"unknown device {device!r}; allowed: cpu, cuda, cuda:N")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise JointNASError(f"device {device!r} was asked for, but torch sees no CUDA device; use cpu")
    return found


def located(config: ModelConfig) -> ModelConfig:
    """A model of the catalogue as its folder, fetched if it is not there yet; any other as it is."""
    if config.source not in catalogue.CATALOGUE or Path(config.source).exists():
        return config
    folder = catalogue.fetch_model(config.source, catalogue.default_folder(config.source))
    return config.model_copy(update={"source": str(folder)})


def caveat(config: ModelConfig) -> str:
    """What must be said wherever results of the model are shown; empty: nothing."""
    return catalogue.caveat(located(config).source)


def is_gguf(config: ModelConfig) -> bool:
    """Whether the model is a GGUF file."""
    return config.source.endswith(".gguf")


def device_type(config: ModelConfig) -> str:
    """cpu or cuda."""
    return config.device.partition(":")[0]


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The model in evaluation mode on its device."""
    config = located(config)
    device, dtype = check_device(config.device), getattr(torch, config.dtype)
    if config.source == "embedded":
        model: PreTrainedModel = assets.load_model(dtype)
    elif is_gguf(config):
        model = gguf.read(config.source, dtype)
    else:
        kind = family(model_config(config)).model
        with _readable(config, "model"):
            model = kind.from_pretrained(config.source, revision=config.revision or "main", dtype=dtype)
    model.eval().requires_grad_(False)
    torch.nn.Module.to(model, device)
    return model


def model_config(config: ModelConfig) -> Any:
    """The transformers config alone (for profiling, no weights are needed)."""
    if config.source in KNOWN:
        return LlamaConfig(**KNOWN[config.source])
    config = located(config)
    if is_gguf(config):
        return gguf.read_config(config.source)
    source = str(assets.model_dir()) if config.source == "embedded" else config.source
    with _readable(config, "model"):
        found = AutoConfig.from_pretrained(source, revision=config.revision, trust_remote_code=False)
    family(found, f"model {config.source!r}")
    return found


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer."""
    if config.source == "embedded":
        return assets.load_tokenizer()
    config = located(config)
    if is_gguf(config):
        return gguf.read_tokenizer(config.source)
    with _readable(config, "the tokenizer of"):
        return AutoTokenizer.from_pretrained(config.source, revision=config.revision, trust_remote_code=False)


def load_streams(config: DataConfig, model: ModelConfig, seed: int) -> data.Streams:
    """The data, in tokens of the model."""
    tokenizer = None if config.source == "embedded" else load_tokenizer(model)
    return data.load(config, tokenizer, seed)


def origin(config: ModelConfig) -> dict[str, Any]:
    """What an export keeps of the model it was made from; arguments of `exporting.export_model`."""
    config = located(config)
    folder, (name, notices) = Path(config.source), licence(config)
    alone = folder.is_dir() and not (folder / "tokenizer_config.json").is_file()  # a model without tokenizer
    tokenizer = None if alone else load_tokenizer(config)
    return {"base": config.source, "licence": name, "notices": notices, "tokenizer": tokenizer}


def licence(config: ModelConfig) -> tuple[str | None, list[Path]]:
    """(licence as the model card names it, files that must go along with the weights) of a local or embedded model."""
    if config.source == "embedded":
        return "apache-2.0", [assets.root() / "NOTICE.md"]
    folder = Path(config.source)
    files = sorted(f for pattern in ("LICEN[CS]E*", "NOTICE*") for f in folder.glob(pattern) if f.is_file())
    found = None
    if (folder / "README.md").is_file():
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
        head = re.match(r"---\n(.*?)\n---\n", card, re.S)
        line = re.search(r"^license:\s*(\S+)\s*$", head[1], re.M) if head else None
        found = line[1] if line else None
    return found, files


@contextlib.contextmanager
def _readable(config: ModelConfig, what: str) -> Iterator[None]:
    """Finds a model that looks like a folder, and makes the errors of transformers one line."""
    path = Path(config.source)
    is_path = path.is_absolute() or config.source.startswith((".", "~")) or config.source.count("/") > 1
    if is_path and not path.is_dir():
        raise JointNASError(f"model folder {config.source!r} does not exist; give a folder, a hub name or 'embedded'")
    if config.source != "embedded" and path.is_dir() and not (path / "config.json").is_file():
        raise JointNASError(f"model folder {config.source!r} has no config.json")
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise JointNASError(f"{what} {config.source!r} cannot be loaded: {reason}") from None
