"""Open an HTML page in headless Chromium at a phone's and a desktop's width, in light and dark: screenshots, and what a person would object to.

    python scripts/look_at_page.py out/demo.eval/report.html out/shots [--chromium /usr/bin/chromium]

Prints one line per fault: words that overlap or leave their drawing, a page that scrolls sideways, cells that spill, console messages, requests to
the network. Exit 1 where there are any. Chromium is spoken to through its DevTools socket (aiohttp, which datasets brings); nothing is installed.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp

WIDTHS, SCHEMES, TALLEST = (390, 1280), ("light", "dark"), 2600
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars --remote-debugging-port=0".split()
FAULTS = r"""
(() => {
  const found = [], width = document.documentElement.clientWidth;
  document.querySelectorAll('details').forEach(part => part.open = true);
  if (document.documentElement.scrollWidth > width) found.push('the page scrolls sideways');
  for (const svg of document.querySelectorAll('svg')) {
    const box = svg.getBoundingClientRect(), words = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
    words.forEach(([a, r], index) => {
      if (r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 || r.bottom > box.bottom + 1) found.push('outside its drawing: ' + a);
      for (const [b, s] of words.slice(index + 1))
        if (Math.min(r.right, s.right) - Math.max(r.left, s.left) > 1.5 && Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top) > 3.5) found.push('overlap: ' + a + ' | ' + b);
    });
  }
  for (const part of document.querySelectorAll('p,h1,h2,h3,li,figcaption,summary')) if (part.getBoundingClientRect().right > width + 1) found.push('beyond the page: ' + part.textContent.slice(0, 60));
  for (const cell of document.querySelectorAll('th,td')) if (cell.clientWidth && cell.scrollWidth > cell.clientWidth + 1) found.push('spills: ' + cell.textContent.slice(0, 60));
  return JSON.stringify(found);
})()
"""


class Tab:
    """One page of a running Chromium."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.count, self.events = socket, 0, []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.count += 1
        await self.socket.send_json({"id": self.count, "method": method, "params": parameters})
        while True:
            answer = await self.socket.receive_json()
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    async def open(self, page: Path, width: int, scheme: str) -> None:
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        await self.call("Page.navigate", url=page.resolve().as_uri())
        await asyncio.sleep(1.0)

    async def shoot(self, stem: Path, width: int) -> None:
        height = int((await self.call("Page.getLayoutMetrics"))["cssContentSize"]["height"])
        for part, top in enumerate(range(0, height, TALLEST)):
            clip = {"x": 0, "y": top, "width": width, "height": min(TALLEST, height - top), "scale": 1}
            image = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
            stem.with_name(f"{stem.name}-{part}.png").write_bytes(base64.b64decode(image["data"]))

    def complaints(self) -> list[str]:
        """Console messages, exceptions and requests that left the machine's files."""
        said = []
        for event in self.events:
            method, detail = event.get("method", ""), event.get("params", {})
            if method in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                said.append(f"console: {json.dumps(detail)[:200]}")
            elif method == "Network.requestWillBeSent" and not detail["request"]["url"].startswith(("file:", "data:")):
                said.append(f"network: {detail['request']['url']}")
        return said


async def look(page: Path, out: Path | None, chromium: str) -> list[str]:
    """All faults of ``page``; screenshots go to ``out`` where it is given."""
    with tempfile.TemporaryDirectory() as profile:
        process = subprocess.Popen([chromium, *FLAGS, f"--user-data-dir={profile}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            address = next(line.split()[-1] for line in process.stderr or () if "DevTools listening" in line)
            async with aiohttp.ClientSession() as session:
                tabs = await (await session.get(f"http://{address.split('/')[2]}/json")).json()
                async with session.ws_connect(next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"), max_msg_size=0) as socket:
                    tab = Tab(socket)
                    found = await _all(tab, page, out)
                    await tab.call("Browser.close")
                    return found
        finally:
            process.terminate()
            process.wait(20)


async def _all(tab: Tab, page: Path, out: Path | None) -> list[str]:
    for part in ("Page", "Runtime", "Log", "Network"):
        await tab.call(f"{part}.enable")
    found: list[str] = []
    for width in WIDTHS:
        for scheme in SCHEMES:
            await tab.open(page, width, scheme)
            faults = json.loads((await tab.call("Runtime.evaluate", expression=FAULTS))["result"]["value"])
            found += [f"{width} px, {scheme}: {fault}" for fault in faults]
            if out is not None:
                await tab.shoot(out / f"{page.stem}-{width}-{scheme}", width)
    return found + tab.complaints()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    given = parser.parse_args()
    if not given.chromium:
        sys.exit("no chromium was found: name one with --chromium")
    given.out.mkdir(parents=True, exist_ok=True)
    faults = asyncio.run(look(given.page, given.out, given.chromium))
    print("\n".join(faults) or f"nothing overlaps, spills, complains or asks the network; screenshots in {given.out}")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
