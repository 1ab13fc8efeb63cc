"""In a real Chromium: every control of a page is turned, and the link opens the page as it then stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.app_browser import controls, open_all, settle, turn, values

pytestmark = pytest.mark.browser
BETWEEN_MS = 250
"""The page is still for so long before the next control is turned."""


@pytest.mark.parametrize(
    ("view", "fixed"),
    [
        ("/trust", {"engine"}),
        ("/audit", {"claims"}),
        ("/audit?claims=one+figure", {"claims"}),
        ("/compare?model=8b&gpus=2xH100", {"model", "gpus", "weights", "context", "watts", "budget", "grid", "co2"}),
    ],
)
def test_a_link_brings_back_every_control(visit: Callable[..., Any], view: str, fixed: set[str]) -> None:
    page = visit(view, width=1400)
    open_all(page)
    before = values(page)["controls"]
    for key, kind in controls(page).items():
        if key not in fixed and key in controls(page):
            turn(page, key, kind)
            settle(page, quiet_ms=BETWEEN_MS)
    settle(page)
    shown = values(page)
    changed = [key for key, value in shown["controls"].items() if before.get(key) != value]
    assert len(changed) >= 2, changed
    again = visit(page.url.split(page.url.split("/")[2], 1)[1], width=1400)
    open_all(again)
    settle(again)
    assert values(again) == shown
