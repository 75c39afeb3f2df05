"""A headless Chromium and one page in it, spoken to by its DevTools protocol over two pipes: no package is needed.

with Browser(find()) as browser:
    page = browser.open(path, width=390)
    page.run("document.title")
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from select import select
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 60
"""Seconds that an answer may take: far more than it does, on a machine that others use too."""


def find() -> str | None:
    """The Chromium of this machine; None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """A running Chromium. Use as a context manager."""

    def __init__(self, program: str) -> None:
        self._stack = contextlib.ExitStack()
        profile = self._stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # the protocol's descriptors are 3 and 4; a shell puts them there
        script = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "chromium", program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._n, self.events = b"", 0, []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self.call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._stack.close()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The result of a command; events that come meanwhile are kept."""
        self._n += 1
        message = {"id": self._n, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        for answer in self._messages():
            if answer.get("id") == self._n:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)
        raise AssertionError("the browser has gone")

    def wait_for(self, method: str, session: str) -> None:
        """Return when an event has come."""
        if any(event["method"] == method and event.get("sessionId") == session for event in self.events):
            return
        for message in self._messages():
            self.events.append(message)
            if message.get("method") == method and message.get("sessionId") == session:
                return

    def open(self, path: Path, *, width: int = 1280, script: bool = True, dark: bool = False) -> Page:
        """A page of this file, loaded, in a window of this size."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", session)
        self.call("Performance.enable", session, timeDomain="threadTicks")
        self.call(
            "Emulation.setDeviceMetricsOverride", session, width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        self.call("Emulation.setScriptExecutionDisabled", session, value=not script)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", session, features=[scheme])
        self.events = [event for event in self.events if event.get("sessionId") != session]
        self.call("Page.navigate", session, url=path.absolute().as_uri())
        self.wait_for("Page.loadEventFired", session)
        return Page(self, session)

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            while b"\0" not in self._buffer:
                if not select([self._in], [], [], PATIENCE)[0]:
                    raise AssertionError(f"no answer of the browser in {PATIENCE} s")
                data = os.read(self._in, 1 << 20)
                if not data:
                    return
                self._buffer += data
            message, self._buffer = self._buffer.split(b"\0", 1)
            yield json.loads(message)


class Page:
    """A page that is open."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def run(self, expression: str) -> Any:
        """The value of a piece of JavaScript."""
        found = self._browser.call("Runtime.evaluate", self._session, expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise AssertionError(found["exceptionDetails"])
        return found["result"].get("value")

    def click(self, selector: str) -> None:
        """Click the middle of an element, as a mouse does."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{block: 'center'}})")
        x, y = self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({element}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            mouse = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
            self._browser.call("Input.dispatchMouseEvent", self._session, **mouse)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self._browser.call("Input.insertText", self._session, text=text)

    def press(self, key: str, code: int) -> None:
        """Press a key, such as Enter (13) or Tab (9)."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self._browser.call(
                "Input.dispatchKeyEvent", self._session, type=kind, key=key, code=key,
                windowsVirtualKeyCode=code, **(text if kind == "keyDown" else {}),
            )  # fmt: skip

    def complaints(self) -> list[str]:
        """Errors and warnings on the page's console, exceptions, and requests to anybody but the file itself."""
        found = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            method, told = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                found.append(str(told["exceptionDetails"]))
            elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
                found.append(told["entry"]["text"])
            elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
                found.append(str(told["args"]))
            elif method == "Network.requestWillBeSent" and not told["request"]["url"].startswith("file:"):
                found.append(f"a request to {told['request']['url']}")
        return found

    def busy(self) -> float:
        """Seconds of a processor's time that the page has taken, whatever else the machine was doing."""
        found = self._browser.call("Performance.getMetrics", self._session)["metrics"]
        return next(metric["value"] for metric in found if metric["name"] == "TaskDuration")

    def printed_pages(self) -> int:
        """How many pages of A4 it takes on paper."""
        import base64
        import re

        data = base64.b64decode(self._browser.call("Page.printToPDF", self._session, preferCSSPageSize=False)["data"])
        return len(re.findall(rb"/Type\s*/Page\b(?!s)", data))
