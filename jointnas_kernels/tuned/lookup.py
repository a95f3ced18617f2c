"""Looking plans up: the files of a device, read once per process, the user's before those of the package."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from jointnas_kernels import _ext
from jointnas_kernels.errors import JointNASError
from jointnas_kernels.tuned.files import FOLDER_VARIABLE, Device, Row, Shape, Tuned, file_name, read, user_folder

log = logging.getLogger(__name__)
SHIPPED = Path(__file__).parent


def describe(device: torch.device) -> Device:
    """A CUDA device, as a file names it."""
    found = torch.cuda.get_device_properties(device)
    return Device(found.name, f"{found.major}.{found.minor}", found.multi_processor_count)


def kernels_here() -> str:
    """The hash of the kernels that products run on.

    Raises:
        JointNASError: the extension was built without CUDA, or not at all.
    """
    return _ext.lowbit_kernels()


class Plans:
    """What files say, the first one that says something."""

    def __init__(self, files: Sequence[Tuned]) -> None:
        self._rows: dict[Shape, list[Row]] = {}
        for row in (row for file in files for row in file.rows):
            self._rows.setdefault(row.shape, []).append(row)
        # one call of a C function per product: shapes are few, and so are counts of tokens
        self.find = functools.lru_cache(maxsize=4096)(self._find)

    def _find(self, tokens: int, shape: Shape) -> Row | None:
        """Its row; None where nothing is known, or the kernels' own choice is the fastest."""
        rows = self._rows.get(shape, ())
        row = next((row for row in rows if row.least <= tokens <= row.tokens), None)
        return None if row is None or row.kernel is None else row


def load(device: Device, kernels: str, folders: Sequence[Path]) -> Plans | None:
    """The plans of a device for these kernels, of the first folder first; None where there are none."""
    found = []
    for path in (folder / file_name(device.name) for folder in folders):
        try:
            file = read(path)
        except JointNASError as error:
            log.warning("%s; it is left out", error)
            continue
        if file is not None:
            reason = misfit(file, device, kernels)
            if reason:
                log.warning("tuned plans %s are left out: they are of %s", path, reason)
            else:
                found.append(file)
    return Plans(found) if any(file.rows for file in found) else None


def misfit(file: Tuned, device: Device, kernels: str) -> str:
    """Why plans do not hold on a device for these kernels; empty if they do."""
    if file.device != device:
        return f"another device ({file.device}, not {device})"
    return "" if file.kernels == kernels else "other kernels than this package has; measure again with `jointnas tune`"


@functools.cache
def plans(device: torch.device) -> Plans | None:
    """The plans of a device; None where there are none. Its files are read at the first call."""
    if device.type != "cuda" or os.environ.get(FOLDER_VARIABLE) == "":
        return None
    return load(describe(device), kernels_here(), (user_folder(), SHIPPED))


def forget() -> None:
    """Files are read again at the next product. What a CUDA graph has captured stays as it is."""
    plans.cache_clear()
