"""A source of choices that hypothesis draws and shrinks; apart from source.py, so that a campaign does not need it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from hypothesis import strategies as st

from tests.fuzz.source import Source

T = TypeVar("T")


class Shrinking(Source):
    """Choices drawn by hypothesis."""

    def __init__(self, data: st.DataObject, *source: object) -> None:
        super().__init__(*source)  # type: ignore[arg-type]
        self.draw = data.draw

    def pick(self, options: Sequence[T]) -> T:
        return self.draw(st.sampled_from(options))

    def free(self, options: Sequence[T]) -> T:
        return self.draw(st.sampled_from(options))

    def seed(self) -> int:
        return self.draw(st.integers(0, 2**20))
