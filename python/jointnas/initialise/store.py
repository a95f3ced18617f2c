"""Finished blocks on disk, so that a killed initialisation goes on where it was."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from jointnas.checkpoint import fsync, plain, write_text
from jointnas_kernels.errors import JointNASError, reading, writing

Tensors = dict[str, Tensor]
Rows = list[dict[str, Any]]


class Store:
    """A folder of finished blocks: settings.json, block-NNN.safetensors (with the block's rows), blocks.jsonl."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        path = folder / "settings.json"
        if path.is_file():
            with reading(str(path), f"remove {folder} to initialise anew"):
                saved = dict(json.loads(path.read_text()))
            changed = sorted(k for k in {*saved, *settings} if saved.get(k) != settings.get(k))
            if changed:
                raise JointNASError(
                    f"{folder} holds blocks that were initialised with another {', '.join(changed)}; remove it or "
                    "choose another folder"
                )
        else:
            write_text(path, json.dumps(settings, indent=1))

    def within(self, name: str) -> Store:
        """A store of what is made of these blocks."""
        return Store(self.folder / name, self.settings)

    def _path(self, b: int) -> Path:
        return self.folder / f"block-{b:03}.safetensors"

    def finished(self) -> int:
        """How many blocks are there without a gap."""
        return next(b for b in itertools.count() if not self._path(b).is_file())

    def load(self, b: int) -> tuple[Tensors, Rows] | None:
        """A finished block; None: it is not."""
        path = self._path(b)
        if not path.is_file():
            return None
        with reading(str(path), "it is damaged: remove it to compute the block again"), safe_open(path, "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["rows"])  # noqa: SIM118

    def save(self, b: int, state: Tensors, rows: Rows) -> None:
        """Write a finished block, whole or not at all."""
        temporary, path = self.folder / f".block-{b:03}.tmp", self._path(b)
        with writing(path):
            try:
                save_file(plain(state), temporary, metadata={"rows": json.dumps(rows)})
                fsync(temporary)
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            fsync(path.parent)
            with open(self.folder / "blocks.jsonl", "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def report(self, rows: Rows) -> None:
        """All rows again: a kill may have come between a block and its rows."""
        write_text(self.folder / "blocks.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
