"""A headless Chromium for tests, spoken to by the WebDriver protocol: no package is needed beside chromedriver."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

KEYS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015", "escape": "\ue00c", "space": " "}
NO_BROWSER = "needs chromium and chromedriver"
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
_ARGUMENTS += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--disable-dev-shm-usage"]


class Browser:
    """A session of a browser: pages, clicks, keys, scripts, what the console says."""

    def __init__(self, port: int, size: tuple[int, int]) -> None:
        self._base = f"http://127.0.0.1:{port}"
        options = {"args": [*_ARGUMENTS, f"--window-size={size[0]},{size[1]}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._post("/session", {"capabilities": {"alwaysMatch": wanted}})
        self._base += f"/session/{session['sessionId']}"

    def open(self, url: str) -> None:
        self._post("/url", {"url": url})

    def script(self, text: str, *arguments: Any) -> Any:
        """What a script returns; a promise is awaited."""
        return self._post("/execute/sync", {"script": text, "args": list(arguments)})

    def wait(self, text: str, *, seconds: float = 60.0) -> Any:
        """Evaluate an expression until it is true; returns its value."""
        return wait_for(lambda: self.script(f"return ({text})"), text, seconds=seconds)

    def click(self, selector: str) -> None:
        """Click with the mouse, as a person does: the element must be there, visible and not covered."""
        found = self._post("/element", {"using": "css selector", "value": selector})
        self._post(f"/element/{found[_ELEMENT]}/click", {})

    def type(self, selector: str, text: str) -> None:
        found = self._post("/element", {"using": "css selector", "value": selector})
        self._post(f"/element/{found[_ELEMENT]}/value", {"text": text})

    def press(self, *keys: str) -> None:
        """Press keys one after another, wherever the focus is."""
        values = [KEYS.get(key, key) for key in keys]
        actions = [{"type": kind, "value": value} for value in values for kind in ("keyDown", "keyUp")]
        self._post("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def screenshot(self, path: Path) -> None:
        with urllib.request.urlopen(f"{self._base}/screenshot", timeout=120) as answer:
            path.write_bytes(base64.b64decode(json.load(answer)["value"]))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console since the last call."""
        entries = self._post("/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def close(self) -> None:
        request = urllib.request.Request(self._base, method="DELETE")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(request, timeout=60).close()

    def _post(self, path: str, content: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._base + path, json.dumps(content).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {content}: {error.read().decode(errors='replace')[:2000]}") from error


def wait_for(found: Callable[[], Any], what: str, *, seconds: float = 60.0) -> Any:
    """Call until the result is true; returns it."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)
    return value


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def open_browser(size: tuple[int, int] = (1400, 1000)) -> Iterator[Browser]:
    """A browser for the time of a test, which is skipped where there is none."""
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip(NO_BROWSER)
    port = free_port()
    with subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        browser = None
        try:
            wait_for(lambda: _answers(port), "chromedriver", seconds=60)
            browser = Browser(port, size)
            yield browser
        finally:
            if browser is not None:
                browser.close()
            process.terminate()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5) as answer:
            return bool(json.load(answer)["value"]["ready"])
    except OSError:
        return False
