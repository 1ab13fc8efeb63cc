"""Errors that a user can act on: each names the thing, the rule that it broke and what would be accepted."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], n: int = 2, cutoff: float = 0.6) -> list[str]:
    """Return up to `n` known words that a wrong one may have meant, the most alike first."""
    from difflib import get_close_matches  # where all words are right, nobody waits for it

    return get_close_matches(word, list(known), n, cutoff)


class AdvisorError(Exception):
    """Base of every error that bad input can cause; its text is one sentence for the user."""


class DomainError(AdvisorError):
    """A number lies outside the range in which a law or an option means anything."""


class BadData(AdvisorError):
    """A file or document cannot be used; `path` says where, `why` says which rule it breaks."""

    def __init__(self, path: str, why: str) -> None:
        self.path = path
        self.why = why
        super().__init__(f"{path}: {why}")


class UnknownName(AdvisorError):
    """A name is not in the catalogue; `nearest` holds the closest names that are."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.name = name
        shown = printable(name)
        lowered = {k.lower(): k for k in known}
        self.nearest = [lowered[k] for k in nearest(name.lower()[:80], lowered, 3, 0.4)]
        text = f"unknown {kind} '{shown}'"
        text += f"; did you mean {' or '.join(self.nearest)}?" if self.nearest else "."
        super().__init__(f"{text} {hint}".strip())


def printable(text: object, limit: int = 60) -> str:
    """Return text with control characters replaced and cut to `limit`, fit for a message."""
    shown = "".join(c if c.isprintable() else "?" for c in str(text))
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
