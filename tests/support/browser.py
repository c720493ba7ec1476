"""A page in a real browser: what it measures there, and what it looks like. Chromium without a window, no network."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

BINARY = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
FRAME = """<!DOCTYPE html><meta charset="utf-8"><style>html, body {{ margin: 0 }}</style>
<iframe style="border: 0; width: {width}px; height: {height}px" srcdoc="{page}"></iframe>"""
MEASURE = """<script>
addEventListener("load", () => {{
  const view = document.querySelector("iframe").contentWindow, page = view.document;
  const found = (() => {{ {body} }})();
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = JSON.stringify(found);
}});
</script>"""


def measure(page: Path, scratch: Path, body: str, *, width: int, dark: bool = False) -> Any:
    """What the JavaScript function `body` returns for the page in a frame `width` pixels wide; `view` is its window and
    `page` its document there."""
    frame = _frame(page, width, 800) + MEASURE.format(body=body)
    (scratch / "measure.html").write_text(frame, encoding="utf-8")
    done = _chromium(scratch, dark, "--dump-dom", str(scratch / "measure.html"))
    found = re.search(r'<pre id="found">(.*?)</pre>', done, re.DOTALL)
    assert found is not None, done[-2000:]
    return json.loads(html.unescape(found.group(1)))


def screenshot(page: Path, scratch: Path, picture: Path, *, width: int, height: int, dark: bool = False) -> None:
    """The first `height` pixels of the page, as PNG. In a frame, because Chromium's windows have a least width."""
    framed = scratch / "picture.html"
    framed.write_text(_frame(page, width, height), encoding="utf-8")
    _chromium(scratch, dark, f"--screenshot={picture}", f"--window-size={width},{height}", str(framed))


def print_pdf(page: Path, scratch: Path, pdf: Path) -> None:
    """The page as it is printed."""
    _chromium(scratch, True, f"--print-to-pdf={pdf}", "--no-pdf-header-footer", str(page))


def _frame(page: Path, width: int, height: int) -> str:
    content = page.read_text(encoding="utf-8")
    return FRAME.format(width=width, height=height, page=html.escape(content))


def _chromium(scratch: Path, dark: bool, *arguments: str) -> str:
    assert BINARY is not None
    profile = scratch / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    done = subprocess.run(
        [BINARY, *FLAGS, scheme, f"--user-data-dir={profile}", *arguments],
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
