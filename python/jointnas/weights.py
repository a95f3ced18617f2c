"""Reading a checkpoint that must be whole, finite, and of the model that its config describes.

transformers initialises weights that a checkpoint lacks at random, drops those that it has no use for, and takes NaN as
it comes, all with a warning at most. Here each is an error that names file and tensor. Weights are read once: headers
first, which costs nothing, then by transformers; values are looked at where they lie in memory, without a copy.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from jointnas_kernels.errors import JointNASError

Files = dict[str, Path]  # the file of each tensor
BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.")
LFS = b"version https://git-lfs"


def read(kind: type[PreTrainedModel], source: str, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this class from a local folder or a hub name, on the CPU, in this floating-point dtype.

    Raises:
        JointNASError: the checkpoint is damaged, not of this model, or has values that are not finite.
    """
    files = tensor_files(Path(source)) if Path(source).is_dir() else {}

    def place(name: str) -> str:
        file = files.get(name, files.get(name.removeprefix("model.")))
        return f"model {source!r}" if file is None else str(file)

    if files:
        _check_sizes(kind, source, files, place)
    with _quiet():
        loaded: Any = kind.from_pretrained(
            source, revision=revision or "main", dtype=dtype, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    model, info = loaded
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        raise JointNASError(f"{place(name)}: {name} has shape {tuple(stored)}; the config wants {tuple(wanted)}")
    unknown = [name for name in info["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq")]
    for names, fault in ((info["missing_keys"], "lacks"), (unknown, "has, but its config has no use for,")):
        if names:
            first, more = min(names), f" and {len(names) - 1} more" if len(names) > 1 else ""
            where = place(first) if fault != "lacks" else f"model {source!r}"
            raise JointNASError(f"{where} {fault} tensor {first}{more}; is it the checkpoint of this config?")
    for name, parameter in model.named_parameters():
        low, high = torch.aminmax(parameter.detach())  # of NaN both are NaN; nothing of the tensor's size is made
        if not (low.isfinite() and high.isfinite()):
            value = "NaN" if low.isnan() or high.isnan() else "infinite"
            stored_as = "" if dtype == torch.float32 else f" in {str(dtype).removeprefix('torch.')}"
            raise JointNASError(f"{place(name)}: {name} has {value} values{stored_as}; the checkpoint cannot be used")
    found: PreTrainedModel = model
    return found


def _check_sizes(kind: type[PreTrainedModel], source: str, files: Files, place: Callable[[str], str]) -> None:
    """Raises where a config wants other sizes than its checkpoint has: loading would first fill what it wants with
    random numbers, however much that is."""
    of: Any = kind
    config = of.config_class.from_pretrained(source)
    blocks = max((int(found[1]) + 1 for found in map(BLOCK.search, files) if found), default=0)
    if config.num_hidden_layers > blocks > 0:
        raise JointNASError(
            f"model {source!r} lacks tensor model.layers.{blocks}.*: it has {blocks} blocks, and its config wants "
            f"{config.num_hidden_layers}; is it the checkpoint of this config?"
        )
    with torch.device("meta"):
        wanted = dict(of._from_config(config).named_parameters())
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as opened:
            for stored in opened.keys():  # noqa: SIM118
                name = stored if stored in wanted else f"model.{stored}"
                shape = tuple(opened.get_slice(stored).get_shape())
                if name in wanted and shape != tuple(wanted[name].shape):
                    raise JointNASError(
                        f"{place(name)}: {name} has shape {shape}; the config wants {tuple(wanted[name].shape)}"
                    )


def tensor_files(folder: Path) -> Files:
    """The safetensors file of every tensor in a model folder; only headers are read.

    Raises:
        JointNASError: no such weights, a file that is missing or damaged, an index that is wrong.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return dict.fromkeys(_names(folder / SAFE_WEIGHTS_NAME), folder / SAFE_WEIGHTS_NAME)
    if not index.is_file():
        pickles = sorted(f.name for f in folder.glob("*.bin")) + sorted(f.name for f in folder.glob("*.pt*"))
        if pickles:
            raise JointNASError(
                f"model folder {str(folder)!r} has pickled weights ({pickles[0]}), which can run code and are never"
                " read; save them as safetensors: model.save_pretrained(FOLDER) of transformers does"
            )
        raise JointNASError(f"model folder {str(folder)!r} has no weights: no {SAFE_WEIGHTS_NAME} or its index")
    try:
        listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {name: folder / listed[name] for name in listed}
    except (ValueError, KeyError, TypeError) as error:
        raise JointNASError(f"{index} is damaged: {type(error).__name__} {error}") from None
    held = {}
    for shard in sorted(set(shards.values())):
        if not shard.is_file():
            first = next(name for name in shards if shards[name] == shard)
            raise JointNASError(f"{shard} is missing; {index.name} says that it holds {first}, among others")
        held[shard] = set(_names(shard))
    for name, shard in shards.items():
        if name not in held[shard]:
            raise JointNASError(f"{shard} has no tensor {name}, which {index.name} says that it holds")
    return shards


def _names(path: Path) -> list[str]:
    """Tensors of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise JointNASError(f"{path} {_damage(path) or f'is damaged: {error}'}; copy or download it again") from None


def _damage(path: Path) -> str:
    """What is wrong with a file that cannot be opened, as far as that can be told."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(len(LFS))
        if start == LFS:
            return "is a Git LFS pointer in place of the weights (git lfs pull)"
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > size - 8:
            return f"is truncated or damaged: its {size} bytes end inside its header"
        file.seek(8)
        try:
            entries = json.loads(file.read(length))
            ends = {name: 8 + length + e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return "has a damaged header"
    cut = min((name for name in ends if ends[name] > size), key=lambda name: ends[name], default=None)
    return "" if cut is None else f"is truncated: its {size} bytes end inside tensor {cut}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report on what did not fit: it is an error here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
