"""What the last answers computed, for the next: a changed target, price or objective replays nothing again."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any, TypeVar

T = TypeVar("T")
N_VALUES = 256
"""Results that are kept of one model on one release: the last ten answers or so, most of it their replays (some 0.1 MB
each)."""
N_BASES = 4
"""Models (with cards, release, coefficients and seed) of which results are kept."""


class Kept:
    """Results of functions of deployment and traffic, the ones used last; `basis` is what else they depend on.

    Whoever gets one shares it: results must not be changed. Safe to use from several threads.
    """

    def __init__(self, basis: tuple[object, ...] = ()) -> None:
        self.basis = basis
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = Lock()

    def __contains__(self, key: Hashable) -> bool:
        """Return whether a result is kept under `key`."""
        with self._lock:
            return key in self._values

    def get(self, key: Hashable, make: Callable[[], T], is_small: Callable[[T], bool] | None = None) -> T:
        """Return the result that is kept under `key`, made if there is none.

        What `make` raises is not kept, nor what is too large: where `is_small` says no.
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                found: T = self._values[key]
                return found
        made = make()
        if is_small is not None and not is_small(made):
            return made
        with self._lock:
            self._values[key] = made
            while len(self._values) > N_VALUES:
                self._values.popitem(last=False)
        return made


_bases: deque[Kept] = deque(maxlen=N_BASES)
_lock = Lock()


def kept_for(*basis: object) -> Kept:
    """Return what is kept for equal arguments, nothing yet when they are new."""
    with _lock:
        kept = next((k for k in _bases if k.basis == basis), None)
        if kept is None:
            kept = Kept(basis)
        else:
            _bases.remove(kept)
        _bases.append(kept)
        return kept


def forget() -> None:
    """Forget everything: the next answer is computed as the first one of a process is."""
    with _lock:
        _bases.clear()
