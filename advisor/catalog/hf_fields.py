"""Typed, bounded look-up in a config.json that nobody has checked yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advisor.errors import BadData, printable

_MISSING = object()


class Fields:
    """One JSON object with typed, bounded reads; each failed read raises a BadData that names the field."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self.where = where

    def updated(self, values: Mapping[str, Any]) -> Fields:
        """Return the same object with some values replaced or added."""
        return Fields({**self._values, **values}, self.where)

    def has(self, *names: str) -> bool:
        """Return whether one of the names is there and not null."""
        return any(self._values.get(name) is not None for name in names)

    def raw(self, *names: str) -> Any:
        """Return the first of the names that is there and not null, else None."""
        for name in names:
            value = self._values.get(name)
            if value is not None:
                return value
        return None

    def is_absent(self, name: str) -> bool:
        """Return whether the key itself is missing: null means 'none', a missing key means the family's default."""
        return name not in self._values

    def integer(self, *names: str, low: int, high: int, default: int | None = None) -> int:
        """Return the first of the names as a whole number in [low, high]; BadData when it is none or missing."""
        value: Any = _MISSING
        name = names[0]
        for candidate in names:
            if self._values.get(candidate) is not None:
                name, value = candidate, self._values[candidate]
                break
        if value is _MISSING:
            if default is not None:
                return default
            also = f" (or {', '.join(repr(n) for n in names[1:])})" if names[1:] else ""
            raise BadData(self.where, f"'{name}'{also} is missing; give a whole number from {low} to {high}")
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            shown = printable(_short(value))
            raise BadData(self.where, f"'{name}' must be a whole number from {low} to {high}, got {shown}")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        """Return the name as true or false, `default` when it is missing or null."""
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise BadData(self.where, f"'{name}' must be true or false, got {printable(_short(value))}")
        return value

    def text(self, *names: str, default: str = "") -> str:
        """Return the first of the names as text of at most 200 characters, `default` when missing or null."""
        value = self.raw(*names)
        if value is None:
            return default
        if not isinstance(value, str) or len(value) > 200:
            raise BadData(
                self.where, f"'{names[0]}' must be text of at most 200 characters, got {printable(_short(value))}"
            )
        return value

    def number(self, name: str, *, low: float, high: float, default: float) -> float:
        """Return the name as a number in [low, high], `default` when it is missing or null."""
        value = self._values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise BadData(
                self.where, f"'{name}' must be a number from {low:g} to {high:g}, got {printable(_short(value))}"
            )
        return float(value)

    def section(self, name: str) -> Fields | None:
        """Return a nested object, None when it is missing or null."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise BadData(self.where, f"'{name}' must be an object, got {printable(_short(value))}")
        return Fields(value, self.where)

    def texts(self, name: str, limit: int = 2000) -> list[str]:
        """Return a list of short texts, empty when it is missing or null."""
        value = self._values.get(name)
        if value is None:
            return []
        if (
            not isinstance(value, list)
            or len(value) > limit
            or not all(isinstance(v, str) and len(v) <= 200 for v in value)
        ):
            raise BadData(
                self.where, f"'{name}' must be a list of at most {limit} names, got {printable(_short(value))}"
            )
        return list(value)

    def integers(self, name: str, limit: int = 2000) -> list[int]:
        """Return a list of whole numbers, empty when it is missing or null."""
        value = self._values.get(name)
        if value is None:
            return []
        is_good = isinstance(value, list) and len(value) <= limit
        if not is_good or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            raise BadData(
                self.where, f"'{name}' must be a list of at most {limit} whole numbers, got {printable(_short(value))}"
            )
        return list(value)


def _short(value: Any) -> str:
    """Return a value as text without walking into large or deep ones."""
    if isinstance(value, (Mapping, list, tuple)):
        return f"a {'list' if isinstance(value, (list, tuple)) else 'object'} of {len(value)} entries"
    if isinstance(value, str):
        return repr(value[:80])
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**18:
        return "a number above 1e18" if value > 0 else "a number below -1e18"
    return repr(value)
