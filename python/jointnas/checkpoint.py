"""Checkpoints that survive a kill at any moment and contain no pickle.

    checkpoints/step-N/  NAME.safetensors ...         tensors
                         NAME.R-of-N.safetensors ...  this rank's parts of those that N ranks share (`sharding`)
                         state.json                   everything else, and the dimensions along which parts are joined
                         manifest.json                sha256 of every file above
                         COMPLETE                     written last

A checkpoint is written into a temporary folder next to it, every file and the folder are fsynced, then it is renamed.
So a folder `step-N` is whole, unless the disk lied; COMPLETE and the manifest find that out.

In a session of several ranks (`parallel`) all of them save and load together. Each writes its parts, so that no rank
ever has all of a large model's state, and the main rank, which knows then that everyone has, all else. What is loaded
are whole tensors, one at a time where they have parts: the number of ranks may be another than it was.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from jointnas import parallel, sharding
from jointnas_kernels.errors import JointNASError, reading, writing

log = logging.getLogger(__name__)
Tensors = Mapping[str, Mapping[str, Tensor]]
DIVIDED = "divided"  # in a state: by group and tensor, the dimension along which its parts are joined


def save(folder: str | Path, step: int, tensors: Tensors, state: Mapping[str, Any], keep: int | None = None) -> Path:
    """Writes `folder/step-N` and removes all but the newest `keep` checkpoints."""
    folder = Path(folder)
    final = folder / f"step-{step}"
    divided = {
        name: {k: sharding.position(v).dim for k, v in group.items() if isinstance(v, DTensor)}
        for name, group in tensors.items()
    }
    everything = {"step": step, **state, **({DIVIDED: divided} if any(divided.values()) else {})}

    def begin() -> str:
        for left in folder.glob(".step-*.*"):  # of a killed run
            _clear(folder / left.name.split(".")[1])
        return str(_begin(final))

    def end() -> None:
        (temporary / "state.json").write_text(json.dumps(everything, indent=1))
        manifest = {"state.json": sha256(temporary / "state.json")}
        manifest = dict(sorted((manifest | {k: v for files in written for k, v in files.items()}).items()))
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        (temporary / "COMPLETE").write_text(sha256(temporary / "manifest.json"))
        _end(temporary, final)
        if keep is not None:
            for old in steps(folder)[:-keep]:
                shutil.rmtree(folder / f"step-{old}")

    with writing(final):
        temporary = Path(parallel.from_main(begin))
        try:
            written = parallel.on_each(lambda: _write(temporary, tensors))
            parallel.from_main(end)
        except BaseException:
            if parallel.is_main():
                shutil.rmtree(temporary, ignore_errors=True)
            raise
    return final


def _write(folder: Path, tensors: Tensors) -> dict[str, str]:
    """What this rank has to write: names and sha256 of its files."""
    files: dict[str, dict[str, Tensor]] = {}
    for name, group in tensors.items():
        if parallel.is_main():
            files[f"{name}.safetensors"] = {k: v for k, v in group.items() if not isinstance(v, DTensor)}
        for key, value in group.items():
            if isinstance(value, DTensor):
                at = sharding.position(value)
                if at.first:
                    files.setdefault(f"{name}.{at.number}-of-{at.parts}.safetensors", {})[key] = value.to_local()
    for name, group in files.items():
        save_file(plain(group), folder / name)
        fsync(folder / name)  # by who wrote it: the others may be other machines
    return {name: sha256(folder / name) for name in files}


def steps(folder: str | Path) -> list[int]:
    """Step numbers of the checkpoints in a folder, ascending, whole or not."""
    found = [p.name.removeprefix("step-") for p in Path(folder).glob("step-*")]
    return sorted(int(n) for n in found if n.isdigit())


def load(path: str | Path) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
    """(tensors, state) of one checkpoint."""
    path = Path(path)
    reason = parallel.from_main(lambda: damage(path))
    if reason:
        raise JointNASError(f"checkpoint {path}: {reason}")
    tensors: dict[str, Mapping[str, Tensor]] = {}
    with reading(f"checkpoint {path}"):
        state: dict[str, Any] = dict(json.loads((path / "state.json").read_text()))
        divided = dict(state.pop(DIVIDED, {}))
        for file in sorted(path.glob("*.safetensors")):
            name, _, part = file.stem.partition(".")
            if not part:
                here = load_file(file)
                tensors[name] = _Joined(path, name, here, divided[name]) if divided.get(name) else here
    return tensors, state


class _Joined(Mapping[str, Tensor]):
    """Tensors of a group, of which those with parts are read and joined when they are asked for."""

    def __init__(self, folder: Path, name: str, here: Mapping[str, Tensor], dims: Mapping[str, int]) -> None:
        found = folder.glob(f"{name}.*-of-*.safetensors")
        self._files = sorted(found, key=lambda f: int(f.name.split(".")[1].split("-")[0]))
        self._here, self._dims = here, dims

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._dims:
            return self._here[key]
        parts = []
        for file in self._files:
            with reading(f"checkpoint {file}"), safe_open(file, framework="pt") as opened:
                parts.append(opened.get_tensor(key))
        return torch.cat(parts, self._dims[key])

    def __iter__(self) -> Iterator[str]:
        return iter((*self._here, *self._dims))

    def __len__(self) -> int:
        return len(self._here) + len(self._dims)


def damage(path: Path) -> str:
    """What is wrong with a checkpoint folder; empty if nothing is."""
    if not path.is_dir():
        return "no such folder"
    if not (path / "COMPLETE").is_file():
        return "incomplete (no COMPLETE file)"
    try:
        if (path / "COMPLETE").read_text() != sha256(path / "manifest.json"):
            return "manifest.json does not match COMPLETE"
        manifest = json.loads((path / "manifest.json").read_text())
        for name, digest in manifest.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if sha256(path / name) != digest:
                return f"{name} does not match the manifest"
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        return f"manifest.json cannot be read ({error})"
    return ""


def latest(folder: str | Path) -> Path | None:
    """The newest whole checkpoint, the same for all ranks; damaged newer ones are named in a warning."""

    def newest() -> int | None:
        for step in reversed(steps(folder)):
            path = Path(folder) / f"step-{step}"
            reason = damage(path)
            if not reason:
                return step
            log.warning("skipping checkpoint %s: %s", path, reason)
        return None

    step = parallel.from_main(newest)
    return None if step is None else Path(folder) / f"step-{step}"


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """(tensors named "parameter.entry", plain hyperparameters per group)."""
    state = optimizer.state_dict()
    tensors = {f"{i}.{k}": torch.as_tensor(v) for i, entry in state["state"].items() for k, v in entry.items()}
    return tensors, json.loads(json.dumps(state["param_groups"]))


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Inverse of `pack_optimizer`; of sharded parameters this rank takes its parts."""
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        of = parameters[int(index)]
        state.setdefault(int(index), {})[key] = sharding.part(value, of) if value.dim() else value
    # JSON has no tuples: betas come back as a list
    entries = [{k: tuple(v) if k == "betas" else v for k, v in g.items()} for g in groups]
    optimizer.load_state_dict({"state": state, "param_groups": entries})


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clones: tensors that share memory (tied weights) cannot be saved, and non-contiguous ones neither."""
    return {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place, synced to disk, if nothing is raised.

    Raises:
        JointNASError: the disk is full, or cannot be written for another reason.
    """
    with writing(folder):
        temporary = _begin(folder)
        try:
            yield temporary
            _end(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _begin(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    return temporary


def _end(temporary: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    for file in (*temporary.iterdir(), temporary):
        fsync(file)
    try:
        if folder.exists():
            os.rename(folder, old)
        os.rename(temporary, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """A file that is there whole or not at all; folders are made. Of several ranks the main one writes.

    Raises:
        JointNASError: the disk is full, or cannot be written for another reason.
    """
    if not parallel.is_main():
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text)
            fsync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _clear(path: Path) -> None:
    """Removes what killed processes left beside a path that they were writing; where they had moved the old folder away
    and not the new one in, it comes back."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        pid, _, end = left.name.removeprefix(f".{path.name}.").partition(".")
        if not pid.isdigit() or end not in ("tmp", "old"):
            continue
        if end == "old" and not path.exists():
            os.rename(left, path)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
