"""The GPUs of the catalogue: one TOML file a card, found by name or alias."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import ValidationError

from advisor.catalog.files import read_text, read_toml
from advisor.errors import BadData, UnknownName
from advisor.schema import Gpu, Price, first_error

_VENDOR = re.compile(r"^(nvidia|amd|geforce|tesla|instinct)-")


class GpuFiles:
    """Reads `data/hardware/` lazily: one file for an exact name, all of them for an alias."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._gpus: dict[str, Gpu] = {}
        self._is_complete = False

    @property
    def names(self) -> tuple[str, ...]:
        """Return all catalogue names, sorted."""
        return tuple(sorted(path.stem for path in self._folder.glob("*.toml")))

    def all(self) -> tuple[Gpu, ...]:
        """Return every GPU, sorted by name."""
        if not self._is_complete:
            for name in self.names:
                self._by_name(name)
            self._is_complete = True
        return tuple(self._gpus[name] for name in sorted(self._gpus))

    def get(self, name: str) -> Gpu:
        """Return the GPU that a catalogue name or an alias means; UnknownName with the nearest names."""
        wanted = gpu_slug(name)
        if wanted in self._gpus or wanted in self.names:
            return self._by_name(wanted)
        for gpu in (self._by_name(name) for name in self.names if self._may_be(name, wanted)):
            if wanted in {gpu_slug(a) for a in (gpu.name, gpu.label, *gpu.aliases)}:
                return gpu
        known = [*self.names, *(a for gpu in self.all() for a in gpu.aliases)]
        raise UnknownName("GPU", name, known, "Run 'advisor gpus' for the list, or give a TOML file of your own card.")

    def others(self, name: str, taken: Gpu) -> tuple[str, ...]:
        """Return the other cards that a short name such as 'a100' could mean."""
        wanted = gpu_slug(name)
        if wanted in {taken.name, gpu_slug(taken.label)}:
            return ()
        parts = wanted.split("-")
        return tuple(n for n in self.names if n != taken.name and all(p in n.split("-") for p in parts))

    def _may_be(self, name: str, wanted: str) -> bool:
        """Return whether a card's file holds the wanted alias somewhere, so that it is worth parsing."""
        return name in self._gpus or wanted in joined(read_text(self._folder / f"{name}.toml").lower())

    def _by_name(self, name: str) -> Gpu:
        if name not in self._gpus:
            self._gpus[name], _ = gpu_from_toml(self._folder / f"{name}.toml")
        return self._gpus[name]


def joined(text: str) -> str:
    """Return a text in lower case with single hyphens for what parts its words, and none before GB."""
    return re.sub(r"(?<=\d)-(?=gb\b)", "", re.sub(r"[\s_-]+", "-", text))


def gpu_slug(text: str) -> str:
    """Return a GPU name in lower case with single hyphens and without the vendor."""
    slug = joined(text.strip().lower()[:200]).strip("-")
    while (shorter := _VENDOR.sub("", slug)) != slug:
        slug = shorter
    return slug


def gpu_from_toml(path: Path) -> tuple[Gpu, Price | None]:
    """Return the card of a TOML file and, when the file has a [price] table, what it costs.

    The fields are those of `Gpu`; `[price]` needs only `usd_per_gpu_h`. Errors: BadData.
    """
    where = str(path)
    table = read_toml(path)
    price_table = table.pop("price", None)
    try:
        gpu = Gpu.model_validate(table)
        price = None
        if price_table is not None:
            defaults = {"gpu": gpu.name, "provider": "own", "kind": "own", "date": "not given", "source": where}
            price = Price.model_validate(defaults | dict(price_table))
    except ValidationError as error:
        raise BadData(where, first_error(error)) from None
    except (TypeError, ValueError):
        raise BadData(where, "[price] must be a table with usd_per_gpu_h") from None
    return gpu, price
