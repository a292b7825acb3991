"""A headless Chromium, driven through a pipe by its DevTools protocol: no port, and no package beside Debian's."""

import base64
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = ("file:", "data:", "blob:", "http://127.0.0.1")  # what a page may load
SECONDS = 300.0  # for one answer: this machine may be busy with everything else
# Software does what a GPU would; a container has no user namespaces and little shared memory.
FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--enable-unsafe-swiftshader",
         "--hide-scrollbars", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-extensions", "--mute-audio")  # fmt: skip


class Tab:
    """One page. Errors of its console, exceptions and loads that failed are in `errors`."""

    def __init__(self, browser: "Browser", session: str) -> None:
        self._browser, self._session = browser, session
        self.errors: list[str] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to a command of the protocol."""
        return self._browser.call(method, self._session, **params)

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str, ready: str) -> None:
        """Load it, and wait until the expression `ready` is true."""
        self.call("Page.navigate", url=url)
        self.wait(ready)

    def eval(self, expression: str) -> Any:
        """The value of an expression, as JSON has it; that of a promise once it is there."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise AssertionError(f"{expression}: {told['exceptionDetails']}")
        return told["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until it is true. An error of the expression counts as not yet: a page that is loading has nothing."""
        deadline = time.monotonic() + SECONDS
        last: AssertionError | None = None
        while time.monotonic() < deadline:
            try:
                if self.eval(f"Boolean({expression})"):
                    return
            except AssertionError as error:
                last = error
            time.sleep(0.05)
        raise AssertionError(f"never true: {expression}; errors: {self.errors}") from last

    def move(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path) -> None:
        """A PNG of what is on the screen."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


class Browser:
    """Commands go into one end of a pipe, answers and events come out of the other, each ended by a zero byte."""

    def __init__(self, process: subprocess.Popen[bytes], into: int, out: int) -> None:
        self._process, self._into, self._out = process, into, out
        self._number, self._rest = 0, b""
        self._tabs: dict[str, Tab] = {}

    def tab(self) -> Tab:
        """A new page, whose errors are kept from the beginning."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[session] = Tab(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        return tab

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            self._note(answer)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._out], [], [], SECONDS)
            assert ready, "the browser does not answer"
            more = os.read(self._out, 1 << 20)
            assert more, f"the browser has gone, code {self._process.poll()}"
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(text))

    def _note(self, event: dict[str, Any]) -> None:
        tab, params = self._tabs.get(event.get("sessionId", "")), event.get("params", {})
        if tab is None:
            return
        if event["method"] == "Runtime.exceptionThrown":
            tab.errors.append(str(params["exceptionDetails"].get("exception", {}).get("description")))
        elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert", "warning"):
            tab.errors.append(" ".join(str(each.get("value", each.get("description"))) for each in params["args"]))
        elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
            tab.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif event["method"] == "Network.requestWillBeSent" and not params["request"]["url"].startswith(HERE):
            tab.errors.append(f"asked for {params['request']['url'][:200]}")


@contextmanager
def running(program: str, folder: Path) -> Iterator[Browser]:
    """Runs it with a profile in `folder`, and ends it."""
    (their_in, our_in), (our_out, their_out) = os.pipe(), os.pipe()
    command = [program, *FLAGS, f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank"]
    # The browser reads descriptor 3 and writes descriptor 4.
    shell = ["bash", "-c", f'exec "$@" 3<&{their_in} 4>&{their_out}', "bash", *command]
    with (folder / "browser.log").open("wb") as log:
        process = subprocess.Popen(shell, pass_fds=(their_in, their_out), stdout=log, stderr=log)
    os.close(their_in)
    os.close(their_out)
    try:
        yield Browser(process, our_in, our_out)
    finally:
        os.close(our_in)  # it ends when nobody holds the other end
        os.close(our_out)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
