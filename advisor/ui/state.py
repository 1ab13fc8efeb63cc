"""Widgets whose values live in the URL: the address of a page is the whole view, to bookmark or to send."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import streamlit as st

from advisor.errors import DomainError, printable
from advisor.units import MS

OFF = "off"
_LATENCY_S = (
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    0.75,
    1,
    1.5,
    2,
    3,
    5,
    10,
    20,
    30,
    60,
)


def latency_steps(low_s: float, high_s: float) -> list[str]:
    """Return the stops of a target's slider between two latencies, 'off' first."""
    steps = [s for s in _LATENCY_S if low_s <= s <= high_s]
    return [OFF, *(f"{s / MS:g} ms" if s < 1 else f"{s:g} s" for s in steps)]


def seconds(stop: str) -> float | None:
    """Return the latency [s] of a slider's stop, None for 'off'."""
    if stop == OFF:
        return None
    number, unit = stop.split()
    return float(number) * (MS if unit == "ms" else 1.0)


_KEPT, _PAGE, _FRESH, _REFUSED = "kept", "kept page", "kept fresh", "kept refused"
"""Keys of the session: the last value of every widget, the page that is shown, whether it was switched to just now, and
what the address asked for in vain."""


def enter(page: str) -> None:
    """Note which page is shown; after a switch, widgets take the values that they had on the page before."""
    before = st.session_state.get(_PAGE)
    st.session_state[_FRESH] = before is not None and before != page
    if st.session_state[_FRESH]:
        st.session_state.pop(_REFUSED, None)
    st.session_state[_PAGE] = page


def _check(key: str, is_good: Callable[[str], bool], wanted: str) -> None:
    """Take a value out of the address that a widget cannot have, to be told on the page (`refused`).

    Streamlit would drop most such values in silence; an endless whole number it does not survive.
    """
    if key not in st.query_params:
        return
    wrong = [text for text in st.query_params.get_all(key) if not is_good(text)]
    if wrong:
        del st.query_params[key]
        st.session_state.setdefault(_REFUSED, {})[key] = f"{key}={printable(wrong[0])} ({wanted})"
        st.rerun()
    elif key in st.session_state.get(_REFUSED, {}):
        del st.session_state[_REFUSED][key]


def refused() -> list[str]:
    """Return what the address asked for and cannot be, with what would be accepted."""
    return list(st.session_state.get(_REFUSED, {}).values())


def _is_number(
    low: float, high: float, *, is_whole: bool = False, is_empty_good: bool = False
) -> Callable[[str], bool]:
    def is_good(text: str) -> bool:
        if not text.strip():
            return is_empty_good
        try:
            found = float(text)
        except ValueError:
            return False
        return low <= found <= high and (not is_whole or found == int(found))

    return is_good


def _between(low: float, high: float, *, is_whole: bool = False) -> str:
    return f"{'a whole number' if is_whole else 'a number'} from {low:,g} to {high:,.10g}"


def _bring(key: str, default: object, read: Callable[[object], object] = lambda value: value) -> None:
    """Give a widget the value that it had on the page before, in its state and in the URL; a link's own value wins.

    read : turns the other page's value into this widget's, None where it has no such value
    """
    kept = st.session_state.get(_KEPT, {})
    if not st.session_state.get(_FRESH) or key not in kept or key in st.query_params:
        return
    value = read(kept[key])
    st.session_state[key] = value
    if value != default and value is not None:
        st.query_params[key] = [str(v) for v in value] if isinstance(value, list) else _written(value)


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _keep(key: str, value: object) -> None:
    st.session_state.setdefault(_KEPT, {})[key] = value


def set_all(values: Mapping[str, object]) -> None:
    """Set widgets by their keys, from a callback: the next run shows them so and the URL follows."""
    for key, value in values.items():
        st.session_state[key] = value
        _keep(key, value)


def peek(key: str, options: Sequence[str], default: str) -> str:
    """Return what `choice` will return further down the page, so that what stands above it can show it."""
    kept = st.session_state.get(_KEPT, {}).get(key) if st.session_state.get(_FRESH) else None
    for found in (st.session_state.get(key), st.query_params.get(key), kept):
        if found is not None:
            return str(found) if found in options else default
    return default


def choice(key: str, title: str, options: Sequence[str], *, default: str, help: str = "", free: bool = False) -> str:
    """Return one of `options` from a list kept in the URL; with `free`, any text that the user types."""
    _bring(key, default, lambda value: value if free or value in options else default)
    if free:
        # a typed value is not among the options when its link is opened, so it joins them
        asked = st.query_params.get(key, st.session_state.get(key))
        if isinstance(asked, str) and asked and asked not in options:
            options = [asked[:200], *options]
    else:
        _check(key, lambda text: text in options, f"one of {len(options)} in its list")
    if not free and st.session_state.get(key, default) not in options:
        # the options follow other widgets: a plan's rank of the answer before may be no rank of this one
        st.session_state[key] = default
    found = st.selectbox(
        title,
        options,
        index=list(options).index(default),
        key=key,
        help=help or None,
        accept_new_options=free,
        bind="query-params",
    )
    _keep(key, found)
    return str(found or default)


def segments(key: str, title: str, options: Sequence[str], *, default: str, help: str = "") -> str:
    """Return one of a few options shown side by side, kept in the URL."""
    _bring(key, default, lambda value: value if value in options else default)
    _check(key, lambda text: text in options, f"one of {', '.join(options)}")
    found = st.segmented_control(
        title, options, default=default, required=True, key=key, help=help or None, bind="query-params"
    )
    _keep(key, found)
    return str(found or default)


def whole(key: str, title: str, *, default: int, low: int = 1, high: int = 10**6, help: str = "") -> int:
    """Return a whole number kept in the URL."""
    _bring(key, default)
    _check(key, _is_number(low, high, is_whole=True), _between(low, high, is_whole=True))
    found = st.number_input(
        title, min_value=low, max_value=high, value=default, step=1, key=key, help=help or None, bind="query-params"
    )
    _keep(key, found)
    return int(found)


def maybe_whole(key: str, title: str, *, low: int = 1, high: int = 10**8, hint: str, help: str = "") -> int | None:
    """Return a whole number kept in the URL, or None where the field is empty."""
    _bring(key, None, lambda value: int(value) if str(value).isdigit() else None)  # type: ignore[call-overload]
    _check(key, _is_number(low, high, is_whole=True, is_empty_good=True), _between(low, high, is_whole=True))
    found = st.number_input(
        title,
        min_value=low,
        max_value=high,
        value=None,
        step=1,
        key=key,
        placeholder=hint,
        help=help or None,
        bind="query-params",
    )
    _keep(key, found)
    return None if found is None else int(found)


def number(key: str, title: str, *, default: float, low: float, high: float, help: str = "") -> float:
    """Return a number kept in the URL."""
    _bring(key, default)
    _check(key, _is_number(low, high), _between(low, high))
    found = st.number_input(title, low, high, default, key=key, format="%g", help=help or None, bind="query-params")
    _keep(key, found)
    return float(found)


def maybe_number(key: str, title: str, *, high: float, low: float = 0.0, hint: str, help: str = "") -> float | None:
    """Return a positive number kept in the URL, or None where the field is empty or 0."""
    _bring(key, None)
    _check(key, _is_number(low, high, is_empty_good=True), _between(low, high))
    found = st.number_input(
        title,
        min_value=low,
        max_value=high,
        value=None,
        key=key,
        format="%g",
        placeholder=hint,
        help=help or None,
        bind="query-params",
    )
    _keep(key, found)
    return float(found) if found else None


def stop(key: str, title: str, options: Sequence[str], *, default: str, help: str = "") -> str:
    """Return one stop of a slider kept in the URL."""
    _bring(key, default, lambda value: value if value in options else default)
    _check(key, lambda text: text in options, f"one of {', '.join(options)}")
    found = st.select_slider(title, options, value=default, key=key, help=help or None, bind="query-params")
    _keep(key, found)
    return str(found)


def maybe_stop(key: str, title: str, numbers: Sequence[int], *, hint: str, help: str = "") -> int | None:
    """Return a number from a slider kept in the URL, None at its stop `hint`; a link's own number joins the stops."""
    _bring(key, hint, lambda value: hint if value is None else str(value))
    asked = str(st.query_params.get(key, st.session_state.get(key, "")))
    every = sorted({*numbers, *([int(asked)] if asked.isdigit() and 0 < int(asked) <= 10**8 else [])})
    found = stop(key, title, [hint, *(str(n) for n in every)], default=hint, help=help)
    return None if found == hint else int(found)


def several(key: str, title: str, options: Sequence[str], *, help: str = "", hint: str = "any") -> tuple[str, ...]:
    """Return the chosen ones of some options, kept in the URL; none chosen means all."""
    _bring(key, [])
    _check(key, lambda text: text in options, f"of {', '.join(options)}")
    found = st.multiselect(title, options, key=key, help=help or None, placeholder=hint, bind="query-params")
    _keep(key, list(found))
    return tuple(found)


def tick(key: str, title: str, *, default: bool = False, help: str = "") -> bool:
    """Return a yes or no kept in the URL."""
    _bring(key, default)
    _check(key, lambda text: text.lower() in ("true", "false"), "true or false")
    found = st.toggle(title, value=default, key=key, help=help or None, bind="query-params")
    _keep(key, found)
    return bool(found)


def catalogue_name(text: str, kind: str) -> str:
    """Return text that names something in the catalogue; raises DomainError for a path.

    The page must not be a way to read files of the machine that serves it: that is the command line's right.
    """
    name = text.strip()
    if not name:
        raise DomainError(f"no {kind} is given; choose one from the list or type its name")
    looks_like_a_path = name.startswith((".", "/", "~", "\\")) or name.lower().endswith((".json", ".toml"))
    if looks_like_a_path or "\0" in name or any(_is_here(pool.strip()) for pool in name.split(",")):
        raise DomainError(
            f"'{printable(name)}' looks like a path; this page takes a {kind}'s name, the command line also takes files"
        )
    return name


def _is_here(name: str) -> bool:
    try:
        return bool(name) and os.path.lexists(Path(name))
    except (OSError, ValueError):
        return True


def named(key: str, title: str, names: Sequence[str], show: Callable[[str], str], *, help: str = "") -> str:
    """Return one of some quantities by its name, shown as a label; the URL holds the label."""
    back = {show(name): name for name in names}
    return back[choice(key, title, tuple(back), default=next(iter(back)), help=help)]
