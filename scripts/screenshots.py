"""Take the screenshots of docs/images from the running app: `make app`, then `python scripts/screenshots.py [URL]`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
RUNS = FOLDER.parents[1] / "data" / "runs"
READY = """() => !document.querySelector('[data-testid=stStatusWidget]')
  && !document.querySelector('[data-testid=stSpinner], [data-testid=stSkeleton], .st-key-later')
  && !!document.querySelector('h1')
  && [...document.querySelectorAll('[data-testid=stPlotlyChart]')].every(e => e.querySelector('.main-svg'))"""
SHOTS = {
    "recommend": ("/?tpot_p99=200+ms", 1280, 1480, "light"),
    "compare": ("/compare", 1280, 1500, "dark"),
    "explore": ("/explore", 1280, 2050, "light"),
    "train": ("/train?stage=1%3A+optimizer+states&train_pp=4", 1280, 1450, "dark"),
    "capacity": ("/capacity?model=8b&gpus=4xH100&peak=20", 1280, 1300, "light"),
    "power": ("/capacity?view=Power+and+energy&gpus=8xH100&grid=germany&rack=40", 1280, 1650, "dark"),
    "trust": ("/trust", 1280, 1650, "light"),
    "audit": ("/audit", 1280, 1100, "light"),
    "calibrate": ("/calibrate", 1280, 2800, "light"),
    "phone": ("/?tpot_p99=200+ms", 390, 1800, "dark"),
}
"""Name of each image: path, width, height, colour scheme."""


def shoot(browser: Any, url: str, name: str) -> None:
    """Write one image."""
    path, width, height, scheme = SHOTS[name]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.goto(url + path)
    page.wait_for_timeout(1000)
    page.wait_for_function(READY, timeout=120_000)
    page.wait_for_timeout(1500)
    if name == "calibrate":
        lines = (RUNS / "vllm-0.26.0_h100-2.jsonl").read_bytes().splitlines(keepends=True)[:24]
        file = {"name": "records.jsonl", "mimeType": "text/plain", "buffer": b"".join(lines)}
        page.locator("input[type=file]").set_input_files(file)
        page.get_by_role("button", name="Refit").click(timeout=120_000)
        page.get_by_text("What changed").first.wait_for(timeout=300_000)
        page.wait_for_timeout(3000)
    page.screenshot(path=FOLDER / f"{name}.png")
    page.close()


def main() -> None:
    """Take all of them."""
    from playwright.sync_api import sync_playwright

    url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8501"
    FOLDER.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for name in SHOTS:
            shoot(browser, url, name)
        browser.close()


if __name__ == "__main__":
    main()
