"""Checkpoints that survive a kill at any moment and contain no pickle.

    checkpoints/step-N/  NAME.safetensors ...   tensors
                         state.json             everything else
                         manifest.json          sha256 of every file above
                         COMPLETE               written last

A checkpoint is written into a temporary folder next to it, every file and the folder are fsynced, then it is renamed.
So a folder `step-N` is whole, unless the disk lied; COMPLETE and the manifest find that out.
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
from safetensors.torch import load_file, save_file
from torch import Tensor

from jointnas_kernels.errors import JointNASError, reading, writing

log = logging.getLogger(__name__)
Tensors = Mapping[str, Mapping[str, Tensor]]


def save(folder: str | Path, step: int, tensors: Tensors, state: Mapping[str, Any], keep: int | None = None) -> Path:
    """Writes `folder/step-N` and removes all but the newest `keep` checkpoints."""
    folder = Path(folder)
    for left in folder.glob(".step-*"):  # of a killed run
        shutil.rmtree(left, ignore_errors=True)
    final = folder / f"step-{step}"
    with replacing(final) as temporary:
        for name, group in tensors.items():
            save_file(plain(group), temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        manifest = {f.name: sha256(f) for f in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        (temporary / "COMPLETE").write_text(sha256(temporary / "manifest.json"))
    if keep is not None:
        for old in steps(folder)[:-keep]:
            shutil.rmtree(folder / f"step-{old}")
    return final


def steps(folder: str | Path) -> list[int]:
    """Step numbers of the checkpoints in a folder, ascending, whole or not."""
    found = [p.name.removeprefix("step-") for p in Path(folder).glob("step-*")]
    return sorted(int(n) for n in found if n.isdigit())


def load(path: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors, state) of one checkpoint."""
    path = Path(path)
    reason = damage(path)
    if reason:
        raise JointNASError(f"checkpoint {path}: {reason}")
    with reading(f"checkpoint {path}"):
        tensors = {f.stem: load_file(f) for f in sorted(path.glob("*.safetensors"))}
        state: dict[str, Any] = dict(json.loads((path / "state.json").read_text()))
    return tensors, state


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
    """The newest whole checkpoint; damaged newer ones are named in a warning."""
    for step in reversed(steps(folder)):
        path = Path(folder) / f"step-{step}"
        reason = damage(path)
        if not reason:
            return path
        log.warning("skipping checkpoint %s: %s", path, reason)
    return None


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """(tensors named "parameter.entry", plain hyperparameters per group)."""
    state = optimizer.state_dict()
    tensors = {f"{i}.{k}": torch.as_tensor(v) for i, entry in state["state"].items() for k, v in entry.items()}
    return tensors, json.loads(json.dumps(state["param_groups"]))


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Inverse of `pack_optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
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
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.iterdir():
                fsync(file)
            fsync(temporary)
            if folder.exists():
                os.rename(folder, old)
            os.rename(temporary, folder)
        except BaseException:
            if old.exists() and not folder.exists():
                os.rename(old, folder)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """A file that is there whole or not at all; folders are made.

    Raises:
        JointNASError: the disk is full, or cannot be written for another reason.
    """
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
