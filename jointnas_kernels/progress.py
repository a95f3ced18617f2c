"""Progress for people: a bar on a terminal, elsewhere a plain line now and then; both with the time that is left."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 20.0  # between plain lines


class _Lines:
    """A stream for tqdm: whole lines instead of one that is drawn again and again."""

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            print(text, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


class Progress:
    """A counter of work. What a piece of it costs may differ: the time that is left goes by the work, not by steps."""

    def __init__(self, what: str, total: float, start: float = 0, enabled: bool = True) -> None:
        layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        options: dict[str, Any] = {}
        if not sys.stderr.isatty():
            layout = "{desc}: {percentage:.0f}%, {remaining} left{postfix}"
            options = {"file": _Lines(), "mininterval": LINE_SECONDS, "delay": LINE_SECONDS, "miniters": 0}
        self._bar = tqdm(total=total, initial=start, desc=what, disable=not enabled, bar_format=layout, **options)

    def step(self, work: float = 1, /, **values: float | str) -> None:
        """A piece of work is done; the values are shown beside it from now on."""
        if values:
            shown = {k: v if isinstance(v, str) else f"{v:.4g}" for k, v in values.items()}
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(work)

    def close(self) -> None:
        """The work has ended."""
        self._bar.close()
