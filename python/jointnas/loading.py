"""Loading what is compressed: the embedded model, a folder, a GGUF file, or a hub name. Remote code is never run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedModel

from jointnas import assets, catalogue, data, weights
from jointnas.config import DataConfig, ModelConfig, RunConfig, SpaceConfig
from jointnas_kernels.errors import JointNASError, panics
from jointnas_kernels.hf import feasible_space
from jointnas_kernels.hf.families import family
from jointnas_kernels.hf.gguf import read as gguf
from jointnas_kernels.latency.timing import native_bf16
from jointnas_kernels.space import SearchSpace

# Sizes of models whose tables can be measured without having their weights.
KNOWN: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    "llama-3.1-70b": {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
}  # fmt: skip

R = TypeVar("R", bound=RunConfig)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json")


def check_device(device: str) -> torch.device:
    """The device of this name."""
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise JointNASError(f"unknown device {device!r}; allowed: auto, cpu, cuda, cuda:N")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise JointNASError(f"device {device!r} was asked for, but torch sees no CUDA device; use cpu")
    if found.index is not None and found.type == "cuda" and found.index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise JointNASError(f"device {device!r} was asked for, but there are {count}: cuda:0 to cuda:{count - 1}")
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
    return catalogue.is_gguf(config.source)


def device_type(config: ModelConfig) -> str:
    """cpu or cuda, of a resolved configuration."""
    return config.device.partition(":")[0]


def sized(space: SpaceConfig, model: ModelConfig) -> ModelConfig:
    """The model whose sizes a space is about: the embedded one stands for Llama-3.1-8B where the space is of that."""
    eight_billion = space.base in ("llama3", "qllama3") and model.source == "embedded"
    return model.model_copy(update={"source": "llama-3.1-8b"} if eight_billion else {})


def resolve(config: R) -> R:
    """The configuration with what every `auto` device and dtype means on this machine; it is this that a run keeps."""
    model = resolve_model(config.model)
    latency = config.latency
    if latency.dtype == "auto":
        latency = latency.model_copy(update={"dtype": model.dtype})
    return config.model_copy(update={"model": model, "latency": latency})


def resolve_model(config: ModelConfig) -> ModelConfig:
    """The same of the model alone.

    float32 stands for every checkpoint that is not bfloat16: float16 would need scaled losses. The embedded model is
    float32 everywhere: at its size bfloat16 gains nothing, and its numbers agree between machines."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    kind, dtype = check_device(device).type, config.dtype
    if dtype == "auto":
        stored = None if config.source == "embedded" else getattr(model_config(config), "dtype", None)
        native = stored == torch.bfloat16 and (kind == "cuda" or native_bf16())
        dtype = "bfloat16" if native else "float32"
    return config.model_copy(update={"device": device, "dtype": dtype})


def space_of(config: RunConfig, model_config: Any) -> tuple[SearchSpace, list[str]]:
    """The configured space without what the model's class refuses, and what that is, a line each.

    Raises:
        JointNASError: a space that is not possible, or nothing of it is for this model.
    """
    try:
        return feasible_space(model_config, config.space.build())
    except JointNASError as error:
        if config.space != SpaceConfig() or config.model.source == ModelConfig().source:
            raise
        hint = f"The space is {config.space.base}, that of the embedded model; give --space llama3, qllama3 or a file."
        raise JointNASError(f"{error} {hint}") from None


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The model in evaluation mode on its device."""
    config = resolve_model(located(config))
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    if config.source == "embedded":
        model: PreTrainedModel = assets.load_model(dtype)
    elif is_gguf(config):
        model = gguf.read(config.source, dtype)
    else:
        found = model_config(config)
        check_unquantized(found, config)
        with _readable(config, "model"):
            model = weights.read(family(found).model, config.source, config.revision, dtype)
    model.eval().requires_grad_(False)
    torch.nn.Module.to(model, device)
    return model


def check_unquantized(found: Any, config: ModelConfig) -> None:
    """Raise if a model's config says that its weights are quantized: what is compressed must not be compressed yet."""
    quantization = getattr(found, "quantization_config", None)
    if not quantization:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    raise JointNASError(
        f"model {config.source!r} is quantized already ({getattr(method, 'value', method)}), and no longer has the"
        " weights that a search or another quantization starts from; give the model that it was made from, or save it"
        " dequantized first (transformers: model.dequantize()). jointnas_kernels.hf.load runs exports as they are."
    )


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
    if not has_tokenizer(config):  # of some families transformers would make an empty one
        raise JointNASError(
            f"model {config.source!r} has no tokenizer; put its files there (tokenizer.json, tokenizer_config.json)"
        )
    with _readable(config, "the tokenizer of"):
        tokenizer = AutoTokenizer.from_pretrained(config.source, revision=config.revision, trust_remote_code=False)
        tokenizer("x")  # one that is damaged may load, and fail at its first text
        return tokenizer


def load_streams(config: DataConfig, model: ModelConfig, seed: int) -> data.Streams:
    """The data, in tokens of the model."""
    model = located(model)
    tokenizer = load_tokenizer(model) if has_tokenizer(model) else None
    return data.load(config, tokenizer, seed, model=model.source, vocabulary=model_config(model).vocab_size)


def has_tokenizer(config: ModelConfig) -> bool:
    """False for a folder without a tokenizer's files."""
    folder = Path(config.source)
    return not folder.is_dir() or any((folder / name).is_file() for name in TOKENIZER_FILES)


def check_lengths(config: Any, **lengths: int | None) -> None:
    """Raises if a setting (`data_seq_len=` is data.seq_len) asks for more tokens than a model of this config sees."""
    most = config.max_position_embeddings
    for name, length in lengths.items():
        if length is not None and length > most:
            raise JointNASError(
                f"{name.replace('_', '.', 1)} is {length}, but the model sees at most {most} tokens "
                f"(max_position_embeddings); set it to {most} or less"
            )


def origin(config: ModelConfig) -> dict[str, Any]:
    """What an export keeps of the model it was made from; arguments of `exporting.export_model`."""
    config = located(config)
    name, notices = licence(config)
    tokenizer = load_tokenizer(config) if has_tokenizer(config) else None
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
    if path.is_file():
        raise JointNASError(f"model {config.source!r} is a file; give a folder, a .gguf file, a hub name or 'embedded'")
    if config.source != "embedded" and path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        hint = f"; it has {files[0].name}: give that file" if files else ""
        raise JointNASError(f"model folder {config.source!r} has no config.json{hint}")
    try:
        with panics():
            yield
    except JointNASError:
        raise
    except Exception as error:  # those of transformers, tokenizers and safetensors have no common base
        cause = error.__cause__ if isinstance(error, StrictDataclassError) else error  # its first line is a heading
        reason = (str(cause or error).strip() or type(error).__name__).splitlines()[0]
        raise JointNASError(f"{what} {config.source!r} cannot be loaded: {reason}") from None
