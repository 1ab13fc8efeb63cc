"""The models of the catalogue: an index of names, one JSON file a model, and config.json files of the user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from advisor.catalog.files import read_json
from advisor.catalog.hf_config import ParsedModel, parse_config
from advisor.catalog.names import ModelEntry, resolve_model
from advisor.errors import BadData, printable
from advisor.schema import Model, Note, Source, first_error

INDEX = "index.json"
MAX_PATH = 4096


class ModelFiles:
    """Reads `data/models/` lazily: the index at first use, a model's file when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: dict[str, ModelEntry] | None = None
        self._models: dict[str, ParsedModel] = {}

    @property
    def entries(self) -> dict[str, ModelEntry]:
        """Return the index: catalogue name to hub id and aliases."""
        if self._entries is None:
            path = self._folder / INDEX
            index = read_json(path)
            try:
                self._entries = {n: ModelEntry(n, str(e["hf_id"]), tuple(e["aliases"])) for n, e in index.items()}
            except (KeyError, TypeError, AttributeError):
                raise BadData(str(path), "each entry must hold 'hf_id' and 'aliases'") from None
        return self._entries

    def get(self, name: str) -> tuple[Model, tuple[Note, ...]]:
        """Return the model that a name or a config.json path means, with notes on what was assumed.

        Errors: UnknownName for a name that is not there; BadData for a file that cannot be used.
        """
        if (path := _as_path(name)) is not None and name.lower() not in self._exact():
            parsed = model_from_path(path)
            return parsed.model, parsed.notes
        resolved = resolve_model(name, self.entries)
        if resolved.name not in self._models:
            self._models[resolved.name] = self._load(resolved.name)
        parsed = self._models[resolved.name]
        model = parsed.model
        if resolved.hf_id != model.hf_id:
            model = model.model_copy(update={"hf_id": resolved.hf_id})
        return model, (*resolved.notes, *parsed.notes)

    def _exact(self) -> set[str]:
        return {s.lower() for e in self.entries.values() for s in (e.name, e.hf_id, *e.aliases)}

    def _load(self, name: str) -> ParsedModel:
        path = self._folder / f"{name}.json"
        return _from_catalogue(read_json(path), str(path))


def _from_catalogue(document: dict[str, Any], where: str) -> ParsedModel:
    try:
        parsed = parse_config(document["config"], name=document["name"], hf_id=document["hf_id"], where=where)
        extra = parsed.model.n_extra_params + document.get("n_extra_params", 0)
        facts = {
            "published_n_params": document["published_n_params"],
            "n_extra_params": extra,
            "is_gated": document["is_gated"],
            "sources": [Source.model_validate(s) for s in document["source"]],
        }
        model = Model.model_validate(dict(parsed.model) | facts)
    except (KeyError, TypeError) as error:
        raise BadData(where, f"a field is missing or has the wrong type: {printable(error)}") from None
    except ValidationError as error:
        raise BadData(where, first_error(error)) from None
    # what the file states (the other modalities' weights, the context length) needs no warning
    notes = () if "n_extra_params" in document else tuple(n for n in parsed.notes if n.level != "info")
    return ParsedModel(model, notes)


def _as_path(name: str) -> Path | None:
    """Return the path that the user means, None when the text is a name."""
    looks_like_one = name.startswith(("./", "../", "/", "~", ".\\")) or name.lower().endswith(".json") or name == "."
    try:
        path = Path(name).expanduser()
        return path if looks_like_one or (path / "config.json").is_file() else None
    except (OSError, ValueError, RuntimeError):
        return Path(printable(name)) if looks_like_one else None


def model_from_path(path: Path) -> ParsedModel:
    """Return the model of a config.json, or of the folder that holds one; the model is named after the folder.

    Only that one file is read, up to 1 MiB. Engines load a folder with a config.json, so only such a one is kept for
    launch lines; a file of another name, or a path that no line can hold, leaves the name there. Errors: BadData.
    """
    file = path / "config.json" if path.is_dir() else path
    config = read_json(file)
    # the file itself may be a link elsewhere, as in the hub's cache: its folder counts
    folder = file.parent.resolve() if file.name == "config.json" else None
    name = printable(folder.name if folder else file.stem) or "model"
    parsed = parse_config(config, name=name, where=printable(file, 200))
    if folder is None or not str(folder).isprintable() or len(str(folder)) > MAX_PATH:
        return parsed
    return ParsedModel(parsed.model.model_copy(update={"folder": str(folder)}), parsed.notes)


def build_index(folder: Path) -> str:
    """Return the text of the index file for the model files in `folder`."""
    index = {}
    for path in sorted(folder.glob("*.json")):
        if path.name != INDEX:
            document = read_json(path)
            index[path.stem] = {"hf_id": document["hf_id"], "aliases": document["aliases"]}
    return json.dumps(index, indent=1) + "\n"
