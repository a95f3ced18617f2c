"""Headless Chromium, driven by chromedriver's W3C WebDriver protocol: JSON over HTTP, without another package."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "needs Chromium and its driver: apt-get install chromium chromium-driver"
SECONDS = 60.0
FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "disable-dev-shm-usage", "no-first-run",
    "disable-background-networking", "disable-component-update", "disable-sync",
)  # fmt: skip


class Browser:
    """A session with one window."""

    def __init__(self, address: str, profile: Path, width: int) -> None:
        self._address = address
        metrics = {"width": width, "height": 800, "pixelRatio": 1.0}  # as a telephone, which heeds the viewport's tag
        options = {
            "binary": CHROMIUM, "args": [f"--{flag}" for flag in (*FLAGS, f"user-data-dir={profile}")],
            "mobileEmulation": {"deviceMetrics": metrics},
        }  # fmt: skip
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._session = self._post("/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def open(self, url: str) -> None:
        """Waits until it is loaded."""
        self._post(f"/session/{self._session}/url", {"url": url})

    def evaluate(self, script: str) -> Any:
        """What a script returns."""
        return self._post(f"/session/{self._session}/execute/sync", {"script": script, "args": []})

    def console(self) -> list[str]:
        """Messages since it was last asked."""
        found = self._post(f"/session/{self._session}/se/log", {"type": "browser"})
        return [f"{entry['level']}: {entry['message']}" for entry in found]

    def close(self) -> None:
        """Ends the session and its browser."""
        request = urllib.request.Request(f"{self._address}/session/{self._session}", method="DELETE")
        self._send(request)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        return self._send(urllib.request.Request(self._address + path, data, headers))

    def _send(self, request: urllib.request.Request) -> Any:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=SECONDS) as answer:
            return json.load(answer)["value"]


@contextlib.contextmanager
def browser(width: int = 400) -> Iterator[Browser]:
    """A browser that keeps its files in a folder of its own, whose path is short enough for its sockets."""
    assert DRIVER is not None
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as folder:
        log, environment = Path(folder, "driver.log"), {**os.environ, "HOME": folder, "TMPDIR": folder}
        with log.open("w") as out:
            driver = subprocess.Popen([DRIVER, "--port=0"], stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            page = Browser(f"http://127.0.0.1:{_port(log)}", Path(folder, "profile"), width)
            try:
                yield page
            finally:
                page.close()
        finally:
            driver.terminate()
            driver.wait(SECONDS)


def _port(log: Path) -> int:
    """The free port that a driver chose, as it says."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        _, said, after = log.read_text().partition("started successfully on port ")
        if said and "." in after:
            return int(after.partition(".")[0])
        time.sleep(0.05)
    raise AssertionError(f"chromedriver did not start: {log.read_text()}")
