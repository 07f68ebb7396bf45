"""Headless Chromium, driven over the DevTools protocol: messages of JSON, each ended by a zero byte, over two pipes."""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# a name and its code; what each key types, besides
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40}
TYPES = {"Enter": "\r", " ": " "}
ALT, CONTROL, SHIFT = 1, 2, 8
WAIT_S = 60


def chromium() -> str:
    """Return Chromium's path; skip the test where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("needs Chromium: apt-get install chromium")


class Page:
    """A tab of Chromium, what it has requested, and what it has complained about."""

    def __init__(self, to_browser: int, from_browser: int):
        self._to, self._from, self._unread, self._n = to_browser, from_browser, b"", 0
        self._session: str | None = None
        self.requests: list[tuple[str, str]] = []
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        """Send a command and return its result."""
        self._n += 1
        message = {"id": self._n, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._n:
            self._note(answer.get("method"), answer.get("params", {}))
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self._unread:
            assert select.select([self._from], [], [], WAIT_S)[0], "Chromium does not answer"
            more = os.read(self._from, 2**20)
            assert more, "Chromium has ended"
            self._unread += more
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def _note(self, event: str | None, params: dict) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append((params["request"]["url"], params["request"].get("postData", "")))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled":
            self.complaints.append(json.dumps(params["args"]))

    def run(self, script: str) -> object:
        """Return the value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script: str) -> object:
        """Wait until an expression is true in the page; return its value."""
        end = time.monotonic() + WAIT_S
        while not (value := self.run(script)):
            assert time.monotonic() < end, (script, self.run("document.body.innerText"), self.complaints)
            time.sleep(0.01)
        return value

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && about !== null")

    def text(self, selector: str) -> str:
        return str(self.run(f"document.querySelector({selector!r}).textContent"))

    def type(self, text: str) -> None:
        """Type text into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, held: int = 0) -> None:
        code = {"windowsVirtualKeyCode": KEYS[key], "key": key, "code": "Space" if key == " " else key}
        typed = {} if held & (ALT | CONTROL) else {"text": TYPES[key]} if key in TYPES else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", modifiers=held, **code, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", modifiers=held, **code)

    def point(self, selector: str, click: bool = False) -> None:
        """Move the mouse to the middle of an element, and click there."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'nearest'}}); "
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mouseMoved", *(("mousePressed", "mouseReleased") if click else ())):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left" if click else "none", clickCount=1)

    def size(self, width: int, height: int = 900) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, scheme: str) -> None:
        """Be a browser on a light or a dark desktop."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        """Save what the whole page looks like."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(shot))


@contextmanager
def browser() -> Iterator[Page]:
    """Start Chromium with one tab, and end it."""
    program, profile = chromium(), tempfile.mkdtemp(prefix="kindling-chromium-")
    ends = [*os.pipe(), *os.pipe()]
    for i, end in enumerate(ends):  # out of the way of 3 and 4
        ends[i] = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10)
        os.close(end)
    flags = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-gpu"]
    flags += ["--no-first-run", "--disable-dev-shm-usage", "--hide-scrollbars", "--force-color-profile=srgb"]
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none as root
    quiet = os.open(os.devnull, os.O_WRONLY)
    # it reads commands from 3 and writes answers to 4; these come last, since `quiet` may be one of them
    given = ((quiet, 1), (quiet, 2), (ends[0], 3), (ends[3], 4))
    actions = [(os.POSIX_SPAWN_DUP2, end, number) for end, number in given]
    process = os.posix_spawn(program, [program, *flags], os.environ, file_actions=actions, setsid=True)
    for end in (ends[0], ends[3], quiet):
        os.close(end)
    try:
        yield Page(ends[1], ends[2])
    finally:
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(ends[1])
        os.close(ends[2])
        shutil.rmtree(profile, ignore_errors=True)
