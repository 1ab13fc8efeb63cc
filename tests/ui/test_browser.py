"""The real app in a real headless Chromium: every page opens, nothing fails in the console, links and files work."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from advisor.schema import CoefficientSet
from benchmarks.app_browser import WAIT_MS, settle

pytestmark = pytest.mark.browser
VIEWS = [
    "/?model=8b&gpus=2xH100&load=clients&clients=16",
    "/compare?model=8b&gpus=2xH100",
    "/explore?model=8b&gpus=2xH100",
    "/train?gpus=8xH100&train_pp=4&stage=1%3A+optimizer+states",
    "/capacity?model=8b&gpus=4xH100",
    "/capacity?model=8b&gpus=4xH100&view=Money",
    "/capacity?model=8b&gpus=4xH100&view=Power+and+energy",
    "/trust",
    "/audit",
]
FAINT = """() => {
  const channel = x => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const luminance = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const read = text => { const n = text.match(/[\\d.]+/g).map(Number), k = text.startsWith('color(srgb') ? 255 : 1;
    return [n[0] * k, n[1] * k, n[2] * k, n[3] ?? 1]; };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3]));
  const behind = e => { const found = [];
    for (let x = e; x; x = x.parentElement) found.push(read(getComputedStyle(x).backgroundColor));
    return found.reverse().reduce((below, c) => over(c, below), [255, 255, 255]); };
  const faint = new Set(), walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, said = walk.currentNode.textContent.trim();
    // in the grid of errors the cell behind a number is a picture: its colours have a test of their own
    const is_in_grid = e.closest('.heatmaplayer .heatmap-label');
    if (!said || !e.getClientRects().length || is_in_grid) continue;
    const style = getComputedStyle(e), size = parseFloat(style.fontSize), ground = behind(e);
    const colour = read(e.namespaceURI.endsWith('svg') ? style.fill : style.color);
    for (let x = e; x; x = x.parentElement) colour[3] *= Number(getComputedStyle(x).opacity);
    if (style.visibility === 'hidden' || !colour[3]) continue;
    const [a, b] = [luminance(over(colour, ground)), luminance(ground)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05), wanted = size >= 24 ? 3 : 4.5;
    // stops of a slider are drawn in the colour of its track until somebody touches it
    if (ratio < wanted && !(ratio < 1.01 && e.closest('[data-testid=stSlider]')))
      faint.add(`${ratio.toFixed(2)} : 1 for '${said.slice(0, 40)}'`);
  }
  return [...faint];
}"""
"""Texts that are harder to read than WCAG 2.2 asks for (success criterion 1.4.3)."""


def metric(page: Any, name: str) -> str:
    box = page.locator("[data-testid=stMetric]", has_text=name).first
    return str(box.locator("[data-testid=stMetricValue]").inner_text())


def test_a_moved_slider_is_in_the_url_and_the_link_opens_the_same_view(visit: Callable[..., Any]) -> None:
    page = visit("/?model=8b&gpus=2xH100&load=clients&clients=16")
    lines = page.locator("[data-testid=stPlotlyChart]").first.locator("g.shape-group path")
    assert lines.count() == 0
    slider = page.locator("[data-testid=stSlider]", has_text="TPOT P99").get_by_role("slider")
    slider.focus()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    page.wait_for_url(re.compile("tpot_p99="))
    lines.first.wait_for(state="attached", timeout=WAIT_MS)  # the target is drawn as a line
    settle(page)
    assert lines.count() == 1
    again = visit(page.url.split(page.url.split("/")[2], 1)[1])
    for name in ("Cost of 1M output tokens", "TPOT P99"):
        assert metric(again, name) == metric(page, name)


def test_downloads_hold_what_the_page_shows(visit: Callable[..., Any]) -> None:
    from advisor.ui.text import show

    page = visit("/?model=8b&gpus=2xH100&load=clients&clients=16")
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Answer (JSON)").click()
    answer = json.loads(Path(waiting.value.path()).read_text())
    best = answer["best"]
    assert metric(page, "TPOT P99") == show("tpot_p99_s", best["prediction"]["tpot_p99_s"]["value"])
    assert best["command"] == page.locator("[data-testid=stCode]").first.inner_text().strip()
    assert shlex.split(best["command"])[:2] == ["vllm", "serve"]
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download serve.sh").click()
    assert "vllm serve" in Path(waiting.value.path()).read_text()


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_is_legible_and_its_files_and_charts_can_be_saved(visit: Callable[..., Any], view: str) -> None:
    page = visit(view, width=1400)
    page.locator("[data-testid=stCode]", has_text="advisor ").last.wait_for(state="attached", timeout=WAIT_MS)
    settle(page)
    grounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        settle(page)
        # colours that are on their way from one scheme to the other are nobody's to read
        page.wait_for_function("() => !document.getAnimations().some(a => a instanceof CSSTransition)", timeout=WAIT_MS)
        grounds.append(page.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor"))
        assert page.evaluate(FAINT) == [], scheme
    assert len(set(grounds)) == 2
    names = []
    for button in page.locator("[data-testid=stDownloadButton] button").all():
        with page.expect_download() as waiting:
            button.click()
        name, text = waiting.value.suggested_filename, Path(waiting.value.path()).read_text()
        names.append(name)
        if name.endswith(".json"):
            assert json.loads(text), name
        elif name.endswith(".csv"):
            head, first = list(csv.reader(text.splitlines()))[:2]
            assert len(head) == len(first) > 1, name
        else:
            assert text.strip(), name
    for kind in (".json", ".csv"):
        assert [n for n in names if n.endswith(kind)], names
    charts = page.locator("[data-testid=stPlotlyChart]")
    if charts.count():
        charts.first.hover()
        with page.expect_download() as waiting:
            charts.first.locator("[data-title^='Download plot']").click()
        assert waiting.value.suggested_filename.startswith("advisor-")
        assert Path(waiting.value.path()).read_bytes()[:4] == b"\x89PNG"
    assert charts.count() or view == "/audit"


def test_the_keyboard_reaches_inputs_files_and_the_end_of_the_page(visit: Callable[..., Any]) -> None:
    page = visit("/?model=8b&gpus=2xH100", width=1400)
    page.locator("[data-testid=stCode]", has_text="advisor ").last.wait_for(state="attached", timeout=WAIT_MS)
    settle(page)
    named = (
        "() => { const e = document.activeElement; return e.getAttribute('aria-label') || e.innerText || e.tagName }"
    )
    stops = []
    for _ in range(400):
        page.keyboard.press("Tab")
        stops.append(page.evaluate(named)[:80])  # the page itself can have the focus, to be scrolled
        if "What the words mean" in stops[-1]:
            break
    for wanted in ("Model", "TTFT P99 at most", "Explore", "Download serve.sh", "Answer (JSON)", "What the words mean"):
        assert any(wanted in stop for stop in stops), wanted
    page.keyboard.press("Enter")
    page.get_by_text("Time to first token: from sending").first.wait_for(timeout=WAIT_MS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(visit: Callable[..., Any], scheme: str) -> None:
    page = visit("/?model=8b&gpus=2xH100", width=390, scheme=scheme)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
    assert page.evaluate("document.querySelector('[data-testid=stMain]').scrollWidth") <= 390
    assert page.get_by_text("behind the arrows").is_visible()
    background = page.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")
    red, green, blue = map(int, re.findall(r"\d+", background)[:3])
    assert (red + green + blue < 150) == (scheme == "dark")


def test_the_scenario_follows_to_the_next_page_and_the_address_with_it(visit: Callable[..., Any]) -> None:
    page = visit("/?model=8b&gpus=2xH100&prompt=900&tpot_p99=100+ms", width=1600)
    page.get_by_role("link", name="Explore", exact=True).first.click()
    page.wait_for_url(re.compile("/explore"))
    settle(page)
    for part in ("model=8b", "gpus=2xH100", "prompt=900", "tpot_p99=100"):
        assert part in page.url, page.url
    command = page.locator("[data-testid=stCode]").last.inner_text()
    assert "--model 8b --gpus 2xH100" in command
    assert "--prompt-tokens 900" in command
    assert (
        page.locator("[data-testid=stPlotlyChart]", has_text="decode").count() >= 1
    )  # the roofline's points are named
    slider = page.locator("[data-testid=stSlider]", has_text="Prompt").get_by_role("slider")
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_url(re.compile("prompt=1024"))
    settle(page)
    page.get_by_role("link", name="Recommend", exact=True).first.click()
    page.wait_for_function("() => location.search.includes('prompt=1024')", timeout=WAIT_MS)
    page.locator("[data-testid=stCode]", has_text="--prompt-tokens 1024").last.wait_for(timeout=WAIT_MS)


def test_a_click_on_the_error_grid_chooses_its_cell(visit: Callable[..., Any]) -> None:
    page = visit("/trust", width=1400)
    grid = page.locator("[data-testid=stPlotlyChart]").first
    # the grid may be higher than the window: its head into view, below the row of pages
    grid.evaluate("e => e.scrollIntoView({block: 'start'})")
    page.evaluate("document.querySelector('[data-testid=stMain]').scrollBy(0, -120)")
    settle(page)
    # the drag layer covers the plot; cells lie on a regular grid: second row, third column of six
    box = grid.locator(".nsewdrag").first.bounding_box()
    n_rows = grid.locator(".ytick text").count()
    page.mouse.click(box["x"] + box["width"] * 2.5 / 6, box["y"] + box["height"] * 1.5 / n_rows)
    page.wait_for_url(re.compile("held_metric=TPOT"), timeout=WAIT_MS)
    settle(page)
    assert page.locator("[data-testid=stAlertContentError]").count() == 0


def test_hostile_text_in_a_link_stays_text(visit: Callable[..., Any]) -> None:
    page = visit("/?model=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E&gpus=8xA100")
    assert page.locator("[data-testid=stAlert]").first.inner_text().startswith("unknown model '<img src=x")
    assert page.locator("[data-testid=stMain] img").count() == 0


def test_run_records_can_be_uploaded_and_refitted_and_a_broken_file_is_a_sentence(
    visit: Callable[..., Any], root: Path
) -> None:
    page = visit("/calibrate")
    lines = (root / "data" / "runs" / "vllm-0.26.0_h100.jsonl").read_bytes().splitlines(keepends=True)
    upload = page.locator("input[type=file]")
    upload.set_input_files({"name": "mine.jsonl", "mimeType": "text/plain", "buffer": b"".join(lines[:3])})
    page.get_by_text("TTFT P50, median error").first.wait_for(timeout=WAIT_MS)
    settle(page)
    page.get_by_role("button", name="Refit").click()
    page.get_by_text("What changed").first.wait_for(timeout=WAIT_MS)
    settle(page)
    with page.expect_download() as waiting:
        page.get_by_role("button", name="The fit (vllm.json)").click()
    fitted = CoefficientSet.model_validate_json(Path(waiting.value.path()).read_text())
    assert fitted.report is not None
    assert "quick refit on 3 cells" in fitted.report.notes[0]
    upload = visit("/calibrate").locator("input[type=file]")
    upload.set_input_files({"name": "broken.jsonl", "mimeType": "text/plain", "buffer": lines[0][:200]})
    alert = upload.page.locator("[data-testid=stAlert]").first
    alert.wait_for(timeout=WAIT_MS)
    assert alert.inner_text().startswith("broken.jsonl")
