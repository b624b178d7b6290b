"""Chromium without a window, driven by the DevTools protocol over a pipe: https://chromedevtools.github.io/devtools-protocol."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
# Chromium reads commands from descriptor 3 and answers on 4.
PIPES = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'


class Browser:
    """One page at a time; `with Browser(folder) as browser`."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        command = [CHROMIUM, *OPTIONS, "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(["sh", "-c", PIPES, "sh", *command], stdin=pipe, stdout=pipe)
        self._number = 0
        self._rest = b""  # of what was read, behind the newest message
        self._events: list[str] = []
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Page.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What a command answers; RuntimeError with its error."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        while (found := self._read()).get("id") != self._number:
            self._events.append(found.get("method", ""))
        if "error" in found:
            raise RuntimeError(f"{method}: {found['error']}")
        result: dict[str, Any] = found["result"]
        return result

    def _read(self) -> dict[str, Any]:
        """The next answer or event."""
        assert self._process.stdout is not None
        pieces = [self._rest]
        while b"\0" not in pieces[-1]:
            pieces.append(os.read(self._process.stdout.fileno(), 1 << 16))
            if not pieces[-1]:
                raise RuntimeError("Chromium ended")
        content, _, self._rest = b"".join(pieces).partition(b"\0")
        found: dict[str, Any] = json.loads(content)
        return found

    def look(self, *, width: int, dark: bool = False, height: int = 900) -> None:
        """The size of the window in CSS pixels, and whether its user prefers dark pages."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[feature])

    def open(self, page: Path) -> None:
        """Load a file, and wait until it is whole."""
        self._events.clear()
        self._call("Page.navigate", url=page.as_uri())
        while "Page.loadEventFired" not in self._events:
            self._events.append(self._read().get("method", ""))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON has it."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        size = self.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        found = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(found["data"])

    def point_at(self, selector: str) -> None:
        """Move the pointer to the middle of the first element that the selector finds, which comes into view."""
        x, y = self._middle(selector)
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        x, y = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def _middle(self, selector: str) -> tuple[float, float]:
        element = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{element}.scrollIntoView({{block: 'center'}})")
        x, y, width, height = self.evaluate(
            f"(({{x, y, width, height}}) => [x, y, width, height])({element}.getBoundingClientRect())"
        )
        return x + width / 2, y + height / 2
