"""How long the app lets one wait, and what jumps: every page in a real Chromium, opened once, each control turned once.

One visitor on a fresh server, so every question is new. A row a page: seconds from the request to the page's last
change, the longest time that a spinner showed, the sum of the layout shifts (Chromium's score; of what moved though
nobody touched it). Below it the controls that took longest. Prints; no asserts.

    python -m benchmarks.app_spinners [--page capacity] [--all] [--end]

`--end` turns each control with the page scrolled to its end, where whatever changed its height above shows.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from typing import Any

from benchmarks.app_browser import FLAGS, Seen, controls, now_ms, open_all, settle, to_end, told, turn, watched
from benchmarks.app_sessions import served

PAGES = {
    "recommend": "/",
    "compare": "/compare",
    "explore": "/explore",
    "train": "/train",
    "capacity": "/capacity",
    "capacity, money": "/capacity?view=Money&model=qwen3-32b",
    "capacity, power": "/capacity?view=Power+and+energy&model=8b&gpus=4xH100",
    "trust": "/trust",
    "audit": "/audit",
    "audit, one figure": "/audit?claims=one+figure",
    "calibrate": "/calibrate",
}
WARM_S = 20.0
"""A server prepares its slow first views for so long."""
N_SLOWEST = 3
MOST_SHIFT = 0.1
"""Layout shift above which a control's row says what moved (good, says web.dev/articles/cls, is less)."""
LAST = ("engine", "claims", "view")
"""Controls that take others away: turned after them."""


def row(name: str, seen: Seen) -> None:
    """Print one line."""
    print(f"{name:44} {seen.still_s:6.2f} {seen.spinner_s:9.2f} {seen.shift:9.3f}", flush=True)


def work(browser: Any, url: str, name: str, path: str, *, is_all: bool, is_end: bool) -> list[Seen]:
    """Open a page, turn each of its controls once, print what one waits for; return the controls' rows."""
    page = watched(browser)
    page.goto(url + path)
    row(f"{name}: opened", settle(page))
    open_all(page)
    found: dict[str, Seen] = {}
    for key, kind in sorted(controls(page).items(), key=lambda c: c[0] in LAST):
        if key not in controls(page):  # another control took it away
            continue
        if is_end:
            to_end(page)
        since = now_ms(page)
        turn(page, key, kind)
        found[key] = settle(page, since)
        if page.locator(
            "[data-testid=stAlertContentError]"
        ).count():  # such a question has no answer: back to the first
            page.goto(url + path)
            settle(page)
            open_all(page)
    page.context.close()
    if found:
        spinners, stills = [s.spinner_s for s in found.values()], [s.still_s for s in found.values()]
        print(
            f"{'':4}{len(found)} controls: still after {statistics.median(stills):.2f} s (median), {max(stills):.2f} s"
            f" (most); spinner {max(spinners):.2f} s at most"
        )
    slowest = sorted(found, key=lambda k: -found[k].still_s)[: None if is_all else N_SLOWEST]
    for key in slowest:
        row(f"{'':4}{key}", found[key])
    for key, seen in found.items():
        if seen.shift > MOST_SHIFT:
            print(f"{'':4}{key} moves by {seen.shift:.3f}: {told(seen.shifts)}")
    return list(found.values())


def main() -> None:
    """Start the app and a browser, work each page."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", help="one page only, such as capacity")
    parser.add_argument("--end", action="store_true", help="turn each control with the page scrolled to its end")
    parser.add_argument("--all", action="store_true", help="print every control")
    options = parser.parse_args()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the start")
    seen: list[Seen] = []
    with served({}) as url, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, headless=True, args=list(FLAGS))
        first = watched(browser)
        first.goto(url)
        print(f"{'':44} {'still':>6} {'spinner':>9} {'shift':>9}")
        row("first visitor of a fresh server", settle(first))
        first.context.close()
        time.sleep(WARM_S)
        for name, path in PAGES.items():
            if options.page is None or name.startswith(options.page):
                seen += work(browser, url, name, path, is_all=options.all, is_end=options.end)
        browser.close()
    print(f"{len(seen)} controls turned: spinner {max(s.spinner_s for s in seen):.2f} s at most, ", end="")
    print(f"{sum(s.spinner_s > 2 for s in seen)} above 2 s; load average {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
