"""What the theme's options cannot say: text that is legible on white and on black, and a spinner that moves nothing.

Streamlit's own greys and code colours reach 2.2 to 3.7 : 1 on white; WCAG 2.2 asks for 4.5 : 1 (criterion 1.4.3).
"""

from __future__ import annotations

QUIET, STRONG = ("#4A515C", "#C9CED6"), ("#14181D", "#E6E9ED")
"""Colours on (white, black): words beside numbers, and the numbers."""
CODE = {
    ".comment, .token.prolog, .token.punctuation, .token.unchanged.line": QUIET,
    ".attr-name, .token.property, .token.variable, .token.parameter": ("#00558A", "#7CC4F0"),
    ".boolean, .token.constant, .token.symbol, .token.number, .token.regex": ("#00614A", "#4FD1AC"),
    ".string, .token.char, .token.attr-value, .token.inserted.line, .token.inserted.prefix": ("#1B6B2A", "#6FD583"),
    ".keyword, .token.tag, .token.function, .token.class-name, .token.selector, .token.builtin": ("#1D4ED8", "#8CB4FF"),
    ".operator, .token.entity, .token.decorator, .token.atrule": ("#8A3A00", "#FFB27A"),
    ".important, .token.deleted.line, .token.deleted.prefix": ("#A8201A", "#FF9B95"),
}
"""Kinds of words in code to their colours on (white, black)."""

UNLOADED = ".stElementContainer[width=fit-content]:not([class*=st-key-]):has(> [data-testid=stSkeleton])"
"""What stands in a spinner's place until a browser has loaded the first one of a visit: 56 pixels for a moment."""
SPINNER = (
    f".stElementContainer:has(> .stSpinner), {UNLOADED} {{ position: fixed; right: 1.5rem; bottom: 1.5rem; z-index:"
    " 1000; width: auto; padding: 0.5rem 1rem; border-radius: 0.5rem; background: light-dark(#FFFFFF, #1C222A);"
    " border: 1px solid light-dark(#C9CED6, #4A515C); }"
)
"""What is being worked out is said in the corner: in sight wherever one has scrolled to, and it moves nothing."""
LATE = ".stElementContainer[class*=st-key-]:has([data-testid=stSkeleton])"
ROOM = (
    f"{LATE} {{ min-height: 68px; }} [class*=st-key-files-] {LATE} {{ min-height: 0; }} .st-key-records {{ min-height:"
    " 128px !important; } [class*=st-key-command] { min-height: 77px; } .st-key-equal-command { min-height: 122px; }"
    " [class*=st-key-state-] { min-height: 3.2rem; } .st-key-best-jobs-place { min-height: 1200px; }"
    " .st-key-two-plans { min-height: 800px; }"
)
"""Room for what a browser loads late, which streamlit draws 40 pixels high until then: a control with its title, the
field for a file; and for what is longer or shorter: a command of two lines, or two of them of two lines, what a plan is
and whether it keeps the targets. Charts, big numbers and boxes say their heights themselves."""

NARROW = ".st-key-hint { display: none; } @media (max-width: 768px) { .st-key-hint { display: flex; } }"
"""Where streamlit folds the side bar away, one is told where it is."""


def css() -> str:
    """Return the style sheet that the app puts into each page."""
    rules = [f".stApp pre .token{kinds} {{ color: {_either(pair)} !important; }}" for kinds, pair in CODE.items()]
    ticks = (".xtick", ".ytick", ".x2tick", ".y2tick", ".infolayer .colorbar")
    plots = ", ".join(f".stApp .js-plotly-plot {part} text" for part in ticks)
    plots += ", .stApp .js-plotly-plot .textpoint text, .stApp .js-plotly-plot .bartext-outside"
    plots += ", .stApp .js-plotly-plot .annotation-text"
    titles = ", ".join(f".stApp .js-plotly-plot .{name}" for name in ("xtitle", "ytitle", "x2title", "y2title"))
    rules.append(f"{plots}, {titles} {{ fill: {_either(QUIET)} !important; }}")
    rules.append(f".stApp .js-plotly-plot .legendtext {{ fill: {_either(STRONG)} !important; }}")
    rules += [SPINNER, ROOM, NARROW]
    return "<style>" + " ".join(rules) + "</style>"


def _either(pair: tuple[str, str]) -> str:
    return f"light-dark({pair[0]}, {pair[1]})"
