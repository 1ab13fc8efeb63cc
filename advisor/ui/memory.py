"""What was drawn before, for all sessions together: a page that runs again draws only what changed.

Charts, and tables that take long, are kept by the content of what they show. `replayed` keeps what streamlit made of
one too, so that a page that shows it again neither builds nor serializes it.
"""

from __future__ import annotations

import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import Any, ParamSpec, TypeVar

import streamlit as st

P = ParamSpec("P")
T = TypeVar("T")
MAX_CHARTS = 256
"""Charts kept for all sessions together; one is some hundred kB."""

_lock = Lock()
_kept: OrderedDict[str, object] = OrderedDict()
_keys: dict[int, str] = {}
"""Identity of each kept result to its key."""


def content_key(*content: object) -> str:
    """Return a name of some content: equal for what pickles alike."""
    return hashlib.sha256(pickle.dumps(content)).hexdigest()


def key_of(result: object) -> str | None:
    """Return the key under which a result of a `remembered` function is kept, None for anything else."""
    with _lock:
        key = _keys.get(id(result))
        return key if key is not None and _kept.get(key) is result else None


def remembered(draw: Callable[P, T]) -> Callable[P, T]:
    """Return `draw` with its last results kept by the content of its arguments; callers must not change a result."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> T:
        key = content_key(draw.__module__, draw.__qualname__, args, sorted(kwargs.items()))
        with _lock:
            if key in _kept:
                _kept.move_to_end(key)
                return _kept[key]  # type: ignore[return-value]
        made = draw(*args, **kwargs)
        with _lock:
            _forget(key)  # of two sessions that drew the same at once, the later one's stays
            _kept[key], _keys[id(made)] = made, key
            while len(_kept) > MAX_CHARTS:
                _forget(next(iter(_kept)))
        return made

    return drawn


def _forget(key: str) -> None:
    if key in _kept:
        _keys.pop(id(_kept.pop(key)), None)


@st.cache_data(max_entries=2 * MAX_CHARTS, show_spinner=False)
def replayed(content: str, _show: Callable[..., Any], _args: tuple[Any, ...]) -> None:
    """Call `_show(*_args)`, which shows elements that are no widgets; the next time streamlit repeats them.

    content : names all that is shown; the same content must look the same
    """
    _show(*_args)
