"""The container: metadata and where tensors lie, of GGUF versions 2 and 3.

Read here, because the `gguf` package takes a quarter of a minute for the vocabulary of one model.

    header     magic "GGUF", version u32, tensors u64, metadata u64
    metadata   key, type u32, value;   strings are length u64 and UTF-8, arrays are type u32, count u64 and values
    tensors    name, dimensions u32, sizes u64 (fastest first), type u32, offset u64
    data       from the next multiple of general.alignment on
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jointnas_kernels.errors import JointNASError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class Entry(NamedTuple):
    """One tensor of a file."""

    shape: tuple[int, ...]  # slowest first
    kind: int  # llama.cpp's number of its type
    offset: int  # in the data


class Container:
    """A mapped file.

    Raises:
        JointNASError: there is no such file, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.where = f"GGUF file {str(path)!r}"
        if not path.is_file():
            raise JointNASError(f"{self.where} {'is a folder' if path.is_dir() else 'does not exist'}")
        with path.open("rb") as file:
            empty = path.stat().st_size == 0  # which cannot be mapped
            self._data: Any = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._data[:4] != b"GGUF":
            raise JointNASError(f"{self.where} is no GGUF file: it does not begin with GGUF")
        self._at = 4
        try:
            version, tensors, values = self._next("<IQQ")
            if version not in (2, 3):
                raise JointNASError(f"{self.where} has version {version}; supported: 2 and 3")
            self.values = dict(self._item() for _ in range(values))
            self.entries = dict(self._tensor() for _ in range(tensors))
        except (struct.error, UnicodeDecodeError, OverflowError):
            raise JointNASError(f"{self.where} is damaged: it ends, or makes no sense, at byte {self._at:,}") from None
        alignment = int(self.values.get("general.alignment", 32))
        self._start = math.ceil(self._at / alignment) * alignment

    def bytes_of(self, name: str, count: int) -> npt.NDArray[np.uint8]:
        """The first bytes of a tensor.

        Raises:
            JointNASError: the file ends before.
        """
        begin = self._start + self.entries[name].offset
        if begin + count > len(self._data):
            raise JointNASError(
                f"{self.where} is cut off: tensor {name} ends at byte {begin + count:,} of {len(self._data):,}"
            )
        return np.frombuffer(self._data, np.uint8, count, begin)

    def _next(self, layout: str) -> tuple[Any, ...]:
        found = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return found

    def _string(self) -> str:
        (length,) = self._next("<Q")
        if self._at + length > len(self._data):
            raise struct.error
        self._at += length
        return bytes(self._data[self._at - length : self._at]).decode("utf-8")

    def _item(self) -> tuple[str, Any]:
        key, (kind,) = self._string(), self._next("<I")
        return key, self._value(kind)

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._next("<" + _NUMBERS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise struct.error
        inner, count = self._next("<IQ")
        if inner in _NUMBERS:
            return list(self._next(f"<{count}{_NUMBERS[inner]}"))
        read: Callable[[], Any] = self._string if inner == _STRING else lambda: self._value(inner)
        return [read() for _ in range(count)]

    def _tensor(self) -> tuple[str, Entry]:
        name, (dimensions,) = self._string(), self._next("<I")
        sizes = self._next(f"<{dimensions}Q")
        kind, offset = self._next("<IQ")
        return name, Entry(tuple(reversed(sizes)), kind, offset)
