"""The pages in a real browser: on a phone and on a desk, light and dark, on paper."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from eval.compare import main as compare
from eval.report import main as report
from tests.support.browser import BINARY, measure, print_pdf, screenshot
from tests.support.compare_files import write_everything

pytestmark = pytest.mark.skipif(BINARY is None, reason="no Chromium here (Debian: apt-get install chromium)")

LOOK = """
const lightness = c => { const v = c.match(/[0-9.]+/g).slice(0, 3).map(x => { x /= 255;
  return x <= 0.03928 ? x / 12.92 : Math.pow((x + 0.055) / 1.055, 2.4); });
  return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
const style = node => view.getComputedStyle(node);
const behind = node => { for (; node; node = node.parentElement) {
  const colour = style(node).backgroundColor; if (!/, 0\\)$/.test(colour) && colour !== "transparent") return colour; }
  return "rgb(255, 255, 255)"; };
let worst = [99, ""], smallest = [99, ""];
const walker = page.createTreeWalker(page.body, view.NodeFilter.SHOW_TEXT);
for (let text; text = walker.nextNode();) {
  const node = text.parentElement;
  if (!text.data.trim() || !node.getClientRects().length || node.closest(".hidden")) continue;
  const ink = lightness(node.closest("svg") ? style(node).fill : style(node).color), ground = lightness(behind(node));
  const contrast = (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
  if (contrast < worst[0]) worst = [contrast, text.data.trim().slice(0, 40)];
}
const wide = [...page.querySelectorAll("main *")].filter(node => !node.closest(".scroll, svg, pre, .hidden")
  && node.getBoundingClientRect().right > page.documentElement.clientWidth + 1).map(node => node.outerHTML);
return {
  width: page.documentElement.scrollWidth, height: page.documentElement.scrollHeight, wide, worst,
  ground: lightness(style(page.body).backgroundColor),
  pictures: [...page.querySelectorAll("img, figure")].map(
    node => node.getAttribute("alt") || node.getAttribute("aria-label") || ""),
  columns: style(page.querySelector(".grid")).gridTemplateColumns.split(" ").length,
  cut: [...page.querySelectorAll(".scroll")].filter(node => node.scrollWidth > node.clientWidth).map(
    node => node.getAttribute("aria-label")),
};
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run's report and a comparison with every kind of evaluation."""
    runs = tmp_path_factory.mktemp("runs")
    run, model = write_everything(runs)
    assert report(["--run", str(run)]) == 0
    assert compare(["--run", str(run), "--model", str(model), "--runs_dir", str(runs)]) == 0
    return {"report": run / "report.html", "compare": run / "compare.html", "curves": run / "curves.html"}


@pytest.mark.parametrize("name", ["report", "compare", "curves"])
def test_reads_on_a_phone_and_on_a_desk_light_and_dark(name: str, pages: dict[str, Path], tmp_path: Path) -> None:
    seen: dict[tuple[int, bool], Any] = {}
    for width, dark in ((390, False), (390, True), (1280, False)):
        found = seen[width, dark] = measure(pages[name], tmp_path, LOOK, width=width, dark=dark)
        assert found["width"] == width, f"the page is {found['width']} px wide on a screen of {width}"
        assert found["wide"] == []
        assert found["worst"][0] >= 4.5, f"contrast {found['worst']}"  # WCAG 2.2, 1.4.3
        assert len(found["pictures"]) >= 3
        assert all(found["pictures"])
    assert seen[390, False]["ground"] > 0.8
    assert seen[390, True]["ground"] < 0.05
    assert seen[390, False]["columns"] == 1 < seen[1280, False]["columns"]
    assert seen[390, False]["height"] > seen[1280, False]["height"]
    # A table that does not fit on a phone scrolls by itself; that of the held-out questions fits.
    assert "Held-out questions, table" not in seen[390, False]["cut"]
    assert seen[1280, False]["cut"] == []


def test_a_screenshot_shows_the_page(pages: dict[str, Path], tmp_path: Path) -> None:
    """Ink where a page has ink, light on dark in the dark; and a picture of the size that was asked for."""
    shares = {}
    for dark in (False, True):
        picture = tmp_path / f"{dark}.png"
        screenshot(pages["compare"], tmp_path, picture, width=390, height=900, dark=dark)
        assert struct.unpack(">II", picture.read_bytes()[16:24]) == (390, 900)
        light = imread(picture)[..., :3].mean(-1)
        ground = np.median(light)
        shares[dark] = (float(ground), float((np.abs(light - ground) > 0.3).mean()))
    assert shares[False][0] > 0.9 > 0.2 > shares[True][0]
    for _, ink in shares.values():
        assert 0.02 < ink < 0.4


@pytest.mark.skipif(shutil.which("pdftoppm") is None, reason="no pdftoppm here (Debian: apt-get install poppler-utils)")
def test_prints_on_paper(pages: dict[str, Path], tmp_path: Path) -> None:
    """A browser that prefers dark prints dark on white."""
    print_pdf(pages["compare"], tmp_path, tmp_path / "page.pdf")
    subprocess.run(["pdftoppm", "-r", "40", "-png", str(tmp_path / "page.pdf"), str(tmp_path / "paper")], check=True)
    papers = sorted(tmp_path.glob("paper*.png"))
    assert 2 <= len(papers) <= 12
    for paper in papers[:-1]:
        light = imread(paper)[..., :3].mean(-1)
        assert np.median(light) > 0.97
        assert 0.002 < (light < 0.6).mean() < 0.4
