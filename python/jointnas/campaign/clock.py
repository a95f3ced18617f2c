"""Wall time of work that may be killed and continued."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType

from jointnas.run_folder import read_json, write_json

FILE = "clock.json"
EVERY = 5.0  # seconds: so much of the time before a kill is lost at most


class Clock:
    """Seconds spent inside, of all processes that worked in a folder, written to it as they pass."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._before = seconds(folder)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Clock:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._write()

    @property
    def seconds(self) -> float:
        """So far."""
        return self._before + time.monotonic() - self._began

    def _tick(self) -> None:
        while not self._ended.wait(EVERY):
            self._write()

    def _write(self) -> None:
        write_json(self._path, {"seconds": self.seconds})


def seconds(folder: Path) -> float:
    """What a folder's clock says."""
    return float((read_json(folder / FILE) or {"seconds": 0.0})["seconds"])
