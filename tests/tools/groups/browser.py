"""A headless Chromium that opens a page and evaluates expressions in it, over its debugging protocol."""

from __future__ import annotations

import asyncio
import base64
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def executable() -> str:
    """The path of an installed browser; without one the test is skipped."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser is installed ({', '.join(NAMES)})")
    return found


def visit(page: Path, *expressions: str, screenshot: Path | None = None, size: str = "1400,900") -> list[Any]:
    """Open ``page``, evaluate JavaScript expressions in order, and return their values.

    The last value is the list of addresses that the page asked for beside its own.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
        options += ["--remote-debugging-port=0", f"--user-data-dir={profile}", f"--window-size={size}", "about:blank"]
        process = subprocess.Popen([executable(), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return asyncio.run(_visit(_port(Path(profile), process), page, expressions, screenshot))
        finally:
            process.terminate()
            process.wait(timeout=20)


def _port(profile: Path, process: subprocess.Popen) -> int:
    path, until = profile / "DevToolsActivePort", time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if path.is_file() and len(lines := path.read_text().split("\n")) > 1:
            return int(lines[0])
        time.sleep(0.05)
    pytest.skip("the browser does not start here")


async def _visit(port: int, page: Path, expressions: tuple[str, ...], screenshot: Path | None) -> list[Any]:
    requested: list[str] = []
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        async with session.get(f"http://127.0.0.1:{port}/json") as answer:
            targets = await answer.json()
        address = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
        async with session.ws_connect(address, max_msg_size=0) as socket:
            number = 0

            async def call(method: str, **parameters: Any) -> Any:
                nonlocal number
                number += 1
                await socket.send_json({"id": number, "method": method, "params": parameters})
                while True:
                    message = await socket.receive_json()
                    if message.get("method") == "Network.requestWillBeSent":
                        requested.append(message["params"]["request"]["url"])
                    if message.get("id") == number:
                        return message["result"]

            async def evaluate(expression: str) -> Any:
                found = await call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
                assert "exceptionDetails" not in found, found["exceptionDetails"]
                return found["result"].get("value")

            await call("Network.enable")
            await call("Page.enable")
            await call("Page.navigate", url=page.as_uri())
            ready = "document.readyState === 'complete' && document.body?.dataset.ready !== undefined"
            until = time.monotonic() + 60
            while not await evaluate(ready):
                assert time.monotonic() < until, "the page does not get ready"
                await asyncio.sleep(0.05)
            values = [await evaluate(expression) for expression in expressions]
            if screenshot is not None:
                image = await call("Page.captureScreenshot", format="png")
                screenshot.write_bytes(base64.b64decode(image["data"]))
    return [*values, [url for url in requested if url != page.as_uri() and not url.startswith("data:")]]
