"""Works the app's pages as a person does, in a real Chromium: every control once, with what the page does meanwhile.

A control is found by its key, which streamlit writes into the page as a class; how it is turned follows from its kind.
The page is watched from inside: when a spinner shows, when the script runs, what moved that nobody touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking")
"""Of Chromium: for a container without a graphics card, and nothing sent from it."""
WATCH = """(() => {
  const seen = window.__seen = { spans: { spinner: [], running: [] }, shifts: [], titled: 0 };
  const is_on = {
    spinner: () => !!document.querySelector('[data-testid=stSpinner], [data-testid=stStatusWidget]'),
    running: () => { const app = document.querySelector('[data-testid=stApp]');
      return !app || !document.querySelector('h1') || app.getAttribute('data-test-script-state') !== 'notRunning'; },
  };
  const look = () => {
    const now = performance.now();
    // what moves in the frame that first shows the page was not there before
    if (seen.titled < 2 && document.querySelector('h1')) { seen.titled++; seen.from = now; }
    for (const name in is_on) {
      const spans = seen.spans[name], last = spans[spans.length - 1];
      if (!is_on[name]()) continue;
      // a gap that no eye sees is none
      if (last && now - last[1] < 100) last[1] = now; else spans.push([now, now]);
    }
    // a page at rest draws no frames: watching it must not make it draw sixty a second
    if (seen.titled < 2) requestAnimationFrame(look); else setTimeout(look, 40);
  };
  look();
  const box = r => [r.x, r.y, r.width, r.height].map(Math.round);
  const name = n => { const e = n && (n.nodeType === 1 ? n : n.parentElement), k = e && e.closest('[class*=st-key-]');
    return !e ? 'gone' : (k ? k.className.match(/st-key-([\\w-]+)/)[1] + ' ' : '')
      + (e.closest('[data-testid]')?.dataset.testid ?? e.tagName) + ' ' + e.textContent.trim().slice(0, 30); };
  const moved = e => e.sources.map(s => [name(s.node), box(s.previousRect), box(s.currentRect)]);
  const note = e => seen.shifts.push({ at: e.startTime, value: e.value, sources: moved(e) });
  new PerformanceObserver(list => list.getEntries().forEach(note)).observe({ type: 'layout-shift', buffered: true });
})()"""
"""Put into each page before anything of it runs."""
STILL = """quiet => { const all = Object.values(window.__seen.spans).flat().map(s => s[1]), now = performance.now();
  return all.every(end => now - end > quiet) && !document.querySelector('[data-testid=stSkeleton], .st-key-later')
    && [...document.querySelectorAll('[data-testid=stPlotlyChart]')].every(e => e.querySelector('.main-svg')); }"""
TAKE = """since => { const s = window.__seen;
  const longest = spans => Math.max(0, ...spans.filter(p => p[1] >= since).map(p => p[1] - Math.max(p[0], since)));
  const last = Math.max(since, ...s.spans.running.map(p => p[1]));
  const shifts = s.shifts.filter(e => e.at >= Math.max(since, s.from));
  return { spinner: longest(s.spans.spinner), still: last - since, shifts }; }"""
KEYS = """() => [...document.querySelectorAll('.stElementContainer[class*=st-key-]')].map(e => ({
  key: e.className.match(/st-key-([\\w-]+)/)[1], shown: e.getClientRects().length > 0,
  kind: (e.querySelector('[data-testid=stSelectbox], [data-testid=stNumberInput], [data-testid=stButtonGroup], '
    + '[data-testid=stSlider], [data-testid=stMultiSelect], [data-testid=stCheckbox], [data-testid=stTextInput], '
    + '[data-testid=stTextArea]') || { dataset: {} }).dataset.testid })).filter(e => e.kind)"""
VALUES = r"""() => { const found = {};
  for (const e of document.querySelectorAll('.stElementContainer[class*=st-key-]')) {
  const key = e.className.match(/st-key-([\w-]+)/)[1];
  const on = [...e.querySelectorAll('[role=radio][aria-checked=true]')].map(x => x.textContent.trim());
  const tags = [...e.querySelectorAll('[data-tag]')].map(x => x.textContent.trim());
  const thumbs = [...e.querySelectorAll('[role=slider], input[type=range]')].map(x => x.getAttribute('aria-valuetext'));
  const inputs = [...e.querySelectorAll('input:not([type=range]):not([type=file]), textarea')]
    .map(x => x.type === 'checkbox' ? String(x.checked) : x.value);
  const all = [...on, ...tags, ...thumbs, ...inputs];
  if (e.querySelector('[data-testid=stWidgetLabel]')) found[key] = all.join(' | '); }
  const texts = id => [...document.querySelectorAll(`[data-testid=${id}]`)].map(x => x.innerText);
  return { controls: found, metrics: texts('stMetric'), codes: texts('stCode'), alerts: texts('stAlert') }; }"""
NUMBERS = {"prompt": 900, "output": 150, "context": 16384, "usd": 2.5, "watts": 6000, "budget": 60, "kwh": 0.12}
NUMBERS |= {"pue": 1.3, "co2": 0.3, "capex": 30000, "hosted_in": 0.5, "hosted_out": 1.5, "rack": 40, "tokens": 10**9}
NUMBERS |= {"rate": 3, "clients": 24, "peak": 3, "night": 0.3, "use": 0.5, "years": 3, "headroom": 0.3, "lora": 16}
"""What is typed into number fields; fields not named here go one step up."""
WAIT_MS = 60_000


@dataclass(frozen=True)
class Seen:
    """What one step did: the longest time a spinner showed, the time until the page was still [s], what moved."""

    spinner_s: float
    still_s: float
    shifts: tuple[dict[str, Any], ...]

    @property
    def shift(self) -> float:
        """Return the sum of the layout shifts: share of the view that moved times how far (Chromium's definition)."""
        return sum(float(s["value"]) for s in self.shifts)


def watched(browser: Any, *, width: int = 1400, height: int = 900, scheme: str = "light") -> Any:
    """Return a new page of a new visitor that notes what it does."""
    page = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
    page.add_init_script(WATCH)
    return page


def now_ms(page: Any) -> float:
    """Return the page's clock."""
    return float(page.evaluate("performance.now()"))


def settle(page: Any, since_ms: float = 0.0, *, quiet_ms: float = 400) -> Seen:
    """Wait until nothing has run for `quiet_ms`; return what was seen since a time of the page's clock."""
    page.wait_for_timeout(300)
    page.wait_for_function(STILL, arg=quiet_ms, timeout=WAIT_MS)
    found = page.evaluate(TAKE, since_ms)
    return Seen(found["spinner"] / 1e3, found["still"] / 1e3, tuple(found["shifts"]))


def open_all(page: Any) -> None:
    """Open everything that is folded in the side bar, so that its controls can be reached."""
    for _ in range(page.locator("[data-testid=stExpander] details:not([open])").count()):
        page.locator("[data-testid=stExpander] details:not([open]) summary").first.click()
    page.wait_for_timeout(400)


def to_end(page: Any) -> None:
    """Scroll the page to its end and let what is drawn there stand."""
    page.evaluate("(e => { e.scrollTop = e.scrollHeight; })(document.querySelector('[data-testid=stMain]'))")
    page.wait_for_timeout(300)


def told(shifts: Sequence[Mapping[str, Any]], n: int = 3) -> list[Any]:
    """Return layout shifts with what moved furthest in each, short enough to read."""

    def moved(source: Sequence[Any]) -> float:
        _, before, after = source
        return (
            0.0 if not (before[2] and after[2]) else max(abs(a - b) for a, b in zip(before[:2], after[:2], strict=True))
        )

    return [(round(s["value"], 3), sorted(s["sources"], key=moved, reverse=True)[:n]) for s in shifts]


def controls(page: Any) -> dict[str, str]:
    """Return the controls of a page that are shown: key to kind."""
    return {c["key"]: c["kind"] for c in page.evaluate(KEYS) if c["shown"]}


def values(page: Any) -> dict[str, Any]:
    """Return what a page shows: the value of each control, the big numbers, commands and alerts."""
    found: dict[str, Any] = page.evaluate(VALUES)
    return found


def turn(page: Any, key: str, kind: str) -> None:
    """Give a control another value, as a person would."""
    box = page.locator(f".st-key-{key}").first
    fold = page.locator(f"details:not([open]):has(.st-key-{key}) summary")
    if fold.count():
        fold.first.click()
        page.wait_for_timeout(400)
    box.scroll_into_view_if_needed()
    if kind == "stSelectbox":
        field = box.locator("input")
        field.click()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        options = page.locator("[role=option]")
        wanted = "true" if options.count() > 1 else None
        last = options.nth(min(2, options.count() - 1))
        if wanted and last.get_attribute("aria-selected") == wanted:
            last = options.first
        last.click()
    elif kind == "stButtonGroup":
        box.locator("[role=radio][aria-checked=false]").first.click()
    elif kind == "stNumberInput":
        if key in NUMBERS:
            box.locator("input").fill(f"{NUMBERS[key]}")
            page.keyboard.press("Enter")
        else:
            box.locator("[data-testid=stNumberInputStepUp]").click()
    elif kind == "stSlider":
        thumb = box.get_by_role("slider").first
        thumb.focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
    elif kind == "stMultiSelect":
        options = page.locator("[role=option]")
        for _ in range(5):  # a page that is drawn anew closes the list again
            box.locator("input").click()
            page.wait_for_timeout(300)
            if options.count():
                break
        options.first.click()
        page.keyboard.press("Escape")
    elif kind == "stCheckbox":
        box.locator("label").first.click()
    else:
        box.locator("input, textarea").first.fill("4")
        page.keyboard.press("Tab")
