"""Charts that were drawn before: a page that runs again draws only what changed."""

from __future__ import annotations

import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
MAX_CHARTS = 256
"""Charts kept for all sessions together; one is some hundred kB."""

_lock = Lock()
_kept: OrderedDict[str, object] = OrderedDict()


def remembered(draw: Callable[P, T]) -> Callable[P, T]:
    """Return `draw` with its last results kept by the content of its arguments; callers must not change a result."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> T:
        content = pickle.dumps((draw.__module__, draw.__qualname__, args, sorted(kwargs.items())))
        key = hashlib.sha256(content).hexdigest()
        with _lock:
            if key in _kept:
                _kept.move_to_end(key)
                return _kept[key]  # type: ignore[return-value]
        made = draw(*args, **kwargs)
        with _lock:
            _kept[key] = made
            while len(_kept) > MAX_CHARTS:
                _kept.popitem(last=False)
        return made

    return drawn
