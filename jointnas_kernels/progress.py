"""Progress for people: a bar on a terminal, elsewhere a plain line now and then; both with the time that is left."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 20.0  # between plain lines


class _Lines(tqdm):
    """Whole lines instead of one that is drawn again and again."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        return lambda text: print(text, file=file, flush=True)

    def close(self) -> None:
        self.disable = True  # nothing to clean up


class Progress:
    """A counter of work. What a piece of it costs may differ: the time that is left goes by the work, not by steps."""

    def __init__(self, what: str, total: float, start: float = 0, enabled: bool = True) -> None:
        if sys.stderr.isatty():
            layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
            self._bar = tqdm(total=total, initial=start, desc=what, disable=not enabled, bar_format=layout)
        else:
            self._bar = _Lines(
                total=total, initial=start, desc=what, disable=not enabled, mininterval=LINE_SECONDS, miniters=0,
                delay=LINE_SECONDS, bar_format="{desc}: {percentage:.0f}%, {remaining} left{postfix}",
            )  # fmt: skip

    def step(self, work: float = 1, /, **values: float | str) -> None:
        """A piece of work is done; the values are shown beside it from now on."""
        if values:
            shown = {k: v if isinstance(v, str) else f"{v:.4g}" for k, v in values.items()}
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(work)

    def close(self) -> None:
        """The work has ended."""
        self._bar.close()
