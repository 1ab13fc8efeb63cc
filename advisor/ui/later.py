"""What a page does not wait for: it is shown without, says what is being worked out, and fills itself in.

Results are found again by their keys, for all sessions together, as long as the app runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock
from typing import Any, TypeVar

import streamlit as st

from advisor.ui import pool

T = TypeVar("T")
PATIENCE_S = 0.8
"""A page waits for so long before it is shown without: then most pages are shown once."""
POLL_S = 1.0
MAX_KEPT = 256

_lock = Lock()
_found: OrderedDict[str, Future[Any]] = OrderedDict()


def get(key: str, near: str, call: Callable[..., T], *args: object, patience_s: float | None = PATIENCE_S) -> T | None:
    """Return `call(*args)` from a worker, None where it takes longer than `patience_s`; raises its AdvisorError."""
    with _lock:
        future = _found.get(key)
        if future is not None:
            _found.move_to_end(key)
    if future is None or future.cancelled():
        future = pool.submit(near, call, *args)  # without workers this takes its time: not under the lock
        with _lock:
            _found[key] = future
            while len(_found) > MAX_KEPT:
                _found.popitem(last=False)[1].cancel()
    try:
        found: T = pool.result(future, call, *args, timeout_s=patience_s)
    except TimeoutError:
        return None
    except Exception:
        with _lock:
            _found.pop(key, None)
        raise
    return found


def forget() -> None:
    """Forget all results: the next question is a new one."""
    with _lock:
        _found.clear()


@st.fragment(run_every=POLL_S)
def fill_in(key: str, text: str) -> None:
    """Say what is being worked out; run the page again when it is there."""
    future = _found.get(key)
    if future is None or future.done():
        st.rerun()
    with st.container(key="later"):  # its name tells who watches the page that it is not complete
        st.caption(text)
