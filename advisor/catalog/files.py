"""Where the catalogue's files lie, and bounded reading of them."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from advisor.errors import BadData, printable
from advisor.units import KIB, MIB

MAX_FILE_BYTES = MIB
"""Larger than any config.json or catalogue file; a user's path may name anything."""

_PACKAGE = Path(__file__).resolve().parents[1]


def data_root() -> Path:
    """Return the data folder: the checkout's `data/`, else the copy inside the installed package."""
    checkout = _PACKAGE.parent / "data"
    if (checkout / "models").is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file():
        return checkout
    return _PACKAGE / "_data"


def read_text(path: Path, max_bytes: int = MAX_FILE_BYTES) -> str:
    """Return a regular file of bounded size as text; BadData says what is wrong with it."""
    shown = printable(path, 200)
    try:
        if not path.is_file():
            raise BadData(shown, "no such file" if not path.exists() else "must be a regular file")
        with path.open("rb") as handle:
            content = handle.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        raise BadData(shown, f"cannot be read ({type(error).__name__})") from None
    if len(content) > max_bytes:
        raise BadData(shown, f"is larger than {max_bytes // KIB} KiB, the most that is read")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadData(shown, "must be UTF-8 text") from None


def read_json(path: Path, max_bytes: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """Return a JSON file that holds one object; BadData when it holds anything else."""
    shown = printable(path, 200)
    try:
        value = json.loads(read_text(path, max_bytes), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise BadData(shown, f"is no JSON: {error.msg} at line {error.lineno}") from None
    except RecursionError:
        raise BadData(shown, "is nested too deeply") from None
    except ValueError as error:
        raise BadData(shown, f"is no JSON: {printable(error)}") from None
    if not isinstance(value, dict):
        raise BadData(shown, "must hold one JSON object")
    return value


def read_toml(path: Path, max_bytes: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """Return a TOML file as a table; BadData when it cannot be parsed."""
    shown = printable(path, 200)
    text = read_text(path, max_bytes)
    try:
        return _compiled(text) if path.is_relative_to(data_root()) else _parsed(text)
    except (RecursionError, ValueError) as error:
        import tomllib

        if isinstance(error, tomllib.TOMLDecodeError):
            raise BadData(shown, f"is no TOML: {printable(error)}") from None
        raise BadData(shown, "is nested too deeply or holds a number out of range") from None


def _parsed(text: str) -> dict[str, Any]:
    import tomllib  # most processes find all tables compiled

    return tomllib.loads(text)


def _compiled(text: str) -> dict[str, Any]:
    """Return a TOML text as a table, from JSON that an earlier process wrote where Python keeps its bytecode.

    The name of that file is the digest of the text, so that an edited text is read anew; as for bytecode, a folder that
    cannot be written, `PYTHONDONTWRITEBYTECODE`, or a file that cannot be read only cost time.
    """
    folder = Path(__file__).parent / "__pycache__"
    kept = folder / f"toml-{blake2b(text.encode(), digest_size=16).hexdigest()}.json"
    try:
        table = json.loads(kept.read_bytes())
        if isinstance(table, dict):
            return table
    except (OSError, ValueError):
        pass
    table = _parsed(text)
    if sys.dont_write_bytecode:
        return table
    try:
        content = json.dumps(table)
    except TypeError:  # a date, which JSON does not know
        return table
    if json.loads(content) == table:
        part = kept.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
            part.write_text(content, encoding="utf-8")
            part.replace(kept)
    return table


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")
