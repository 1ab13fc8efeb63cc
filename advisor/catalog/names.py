"""From what people call a model to its catalogue name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from advisor.errors import UnknownName, printable
from advisor.schema import Note

PREFERENCE = (
    *("llama-3.3", "llama-3.1", "llama-3.2", "qwen3-coder", "qwen3", "qwen2.5", "mistral-small", "mistral-7b-v0.3"),
    *("mistral-nemo", "mistral", "mixtral", "gemma-3", "gpt-oss", "deepseek-v3", "deepseek-r1", "deepseek", "phi-4"),
    *("llama-4", "kimi", "llama-3", "gemma-2", "phi", "llama-2", "bloom", "falcon", "gpt-3", "gpt", "opt"),
)
"""Which family a short name such as '70b' means: current, widely served families first."""

_SUFFIXES = re.compile(r"-(instruct|chat|it|hf|base|pt|text)(?=-|$)")
_MAX_NAME = 200


@dataclass(frozen=True)
class ModelEntry:
    """One line of the index: a catalogue name, its hub id and its other names."""

    name: str
    hf_id: str
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class Resolved:
    """The catalogue name that was taken, the hub id that the text names, and what else it could have been."""

    name: str
    hf_id: str
    notes: tuple[Note, ...] = ()


def resolve_model(text: str, entries: Mapping[str, ModelEntry]) -> Resolved:
    """Return the catalogue name that `text` means.

    Tried in this order: catalogue name, hub id or alias, the same without punctuation and words such as 'instruct';
    then all models whose name holds each part of the text ('70b', 'qwen 32b'), of which `PREFERENCE` picks one and a
    note names the others. Errors: UnknownName with the nearest names.
    """
    wanted = text.strip().lower()[:_MAX_NAME]
    exact = {key: e.name for e in entries.values() for key in _spellings(e)}
    loose = {_loose(key): name for key, name in exact.items()}
    known = exact.get(wanted) or loose.get(_loose(wanted) or "?")
    if known:
        return _named(wanted, entries[known])
    matches = _matches(wanted, entries)
    if not matches:
        hint = "Run 'advisor models' for the list, or give the path of a config.json."
        sizes = {part for name in entries for part in name.split("-") if re.fullmatch(r"\d+(\.\d+)?b", part)}
        raise UnknownName("model", text, [*entries, *sorted(sizes)], hint)
    best, *others = matches
    if not others:
        return Resolved(best, entries[best].hf_id)
    shown = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
    return Resolved(best, entries[best].hf_id, (Note(text=f"'{printable(text)}': took {best}; also {shown}."),))


def _named(wanted: str, entry: ModelEntry) -> Resolved:
    """Return the entry with the very checkpoint that was asked for: a launch command must not load a relative."""
    if wanted == entry.name:
        return Resolved(entry.name, entry.hf_id)
    ids = [i for i in (entry.hf_id, *entry.aliases) if "/" in i]
    same = [i for i in ids if wanted in (i.lower(), _tail(i)) or _tail(wanted) == _tail(i)]
    alike = [i for i in ids if _loose(i) == _loose(wanted)]
    hf_id = next(iter(same or alike), entry.hf_id)
    if _loose(hf_id).startswith(_loose(entry.hf_id)) or _loose(hf_id) == _loose(entry.name):
        return Resolved(entry.name, hf_id)
    return Resolved(
        entry.name,
        hf_id,
        (
            Note(
                text=f"{hf_id} has the architecture of {entry.name}; its sizes are used, the context length may differ."
            ),
        ),
    )


def _tail(text: str) -> str:
    return re.sub(r"[\s_]+", "-", text.lower().rsplit("/", 1)[-1]).removesuffix("-hf")


def _spellings(entry: ModelEntry) -> list[str]:
    return [s.lower() for s in (entry.name, entry.hf_id, *entry.aliases) if s]


def _slug(text: str) -> str:
    """Return a name without organisation, blanks and words that do not change the sizes."""
    slug = re.sub(r"[\s_]+", "-", text.strip().lower().rsplit("/", 1)[-1])
    return _SUFFIXES.sub("", slug).removeprefix("meta-")


def _loose(text: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", _slug(text))


def _tokens(text: str) -> list[str]:
    # "llama-3.3" and "llama3.3" give the same tokens: letters and the version apart
    return re.findall(r"\d[\d.]*x\d[\d.]*b|(?<![a-z])a\d[\d.]*b|\d[\d.]*[bmt](?![a-z])|[a-z]+|\d[\d.]*", _slug(text))


def _matches(wanted: str, entries: Mapping[str, ModelEntry]) -> list[str]:
    tokens = _tokens(wanted)
    if not tokens or re.sub(r"[^a-z0-9.]", "", _slug(wanted)) != "".join(tokens):
        return []
    found = [e.name for e in entries.values() if _holds(_tokens(e.name), tokens)]
    # an alias such as 'deepseek-r1-distill-llama-70b' must not make 'deepseek' mean a Llama
    found = found or [e.name for e in entries.values() if any(_holds(_tokens(s), tokens) for s in _spellings(e))]
    return sorted(found, key=_rank)


def _holds(have: Sequence[str], tokens: Sequence[str]) -> bool:
    """Return whether every token stands in `have`, in the same order."""
    rest = iter(have)
    return all(any(token == other for other in rest) for token in tokens)


def _rank(name: str) -> tuple[int, str]:
    for place, prefix in enumerate(PREFERENCE):
        if name.startswith(prefix):
            return place, name
    return len(PREFERENCE), name
