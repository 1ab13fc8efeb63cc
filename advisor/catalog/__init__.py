"""The catalogue: models, GPUs, prices, traffic presets, engines and fitted coefficients, read lazily from `data/`."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from advisor.catalog.files import data_root, read_json, read_toml
from advisor.catalog.gpu_spec import ParsedGpus, parse_gpu_spec, parse_gpus
from advisor.catalog.hardware import GpuFiles, gpu_from_toml
from advisor.catalog.hf_config import ParsedModel, model_from_config, parse_config
from advisor.catalog.models import ModelFiles, model_from_path
from advisor.catalog.names import ModelEntry
from advisor.catalog.prices import PriceChoice, PriceFiles
from advisor.catalog.workloads import read_presets, workload_preset
from advisor.errors import BadData, UnknownName
from advisor.schema import CoefficientSet, Gpu, Model, Note, Price, Workload, first_error
from advisor.units import MIB

T = TypeVar("T")
__all__ = [
    "Catalog",
    "ParsedGpus",
    "ParsedModel",
    "PriceChoice",
    "gpu_from_toml",
    "load_catalog",
    "model_from_config",
    "model_from_path",
    "parse_config",
    "parse_gpus",
]


REPORTS = ("accuracy.json", "accuracy_cells.json")
"""Files beside the coefficient sets: what the last fit was off by."""


class Catalog:
    """Everything under one data folder; each file is read when it is first needed, then kept."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._models = ModelFiles(root / "models")
        self._gpus = GpuFiles(root / "hardware")
        self._prices = PriceFiles(root / "prices")
        self._presets: dict[str, Any] | None = None
        self._read: dict[Path, tuple[tuple[int, int], Any]] = {}
        self._held_out: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] | None = None

    def models(self) -> dict[str, ModelEntry]:
        """Return the index of models: name to hub id and aliases, without reading their files."""
        return self._models.entries

    def model(self, name: str) -> tuple[Model, tuple[Note, ...]]:
        """Return the model that a name, hub id, short name or config.json path means, with notes."""
        return self._models.get(name)

    def gpus(self) -> tuple[Gpu, ...]:
        """Return every GPU, sorted by name."""
        return self._gpus.all()

    def gpu(self, name: str) -> Gpu:
        """Return the GPU that a name or alias means; UnknownName with the nearest names."""
        return self._gpus.get(name)

    def clusters(self, spec: str) -> ParsedGpus:
        """Return the clusters of a spec such as '8xA100', with notes and the prices of custom cards."""
        return parse_gpu_spec(spec, self._gpus)

    def prices(self) -> tuple[Price, ...]:
        """Return every published price."""
        return self._prices.all()

    def price(self, gpu_name: str, provider: str | None = None, kind: str = "on-demand") -> Price | None:
        """Return the price to use for a GPU, the median provider's when none is named; None when none is published."""
        return self._prices.for_gpu(gpu_name, provider, kind)

    def price_choice(self, gpu_name: str, provider: str | None = None, kind: str = "on-demand") -> PriceChoice | None:
        """Return the price to use with the alternatives of other providers."""
        return self._prices.choose(gpu_name, provider, kind)

    def workloads(self) -> tuple[str, ...]:
        """Return the names of the traffic presets."""
        return tuple(self._preset_tables())

    def workload(self, name: str) -> Workload:
        """Return a traffic preset; UnknownName for one that is not there."""
        return workload_preset(name, self._preset_tables(), str(self._preset_path))

    def workload_source(self, name: str) -> str:
        """Return where the numbers of a preset come from."""
        return str(self._preset_tables()[self.workload(name).name].get("source", ""))

    def coefficient_sets(self) -> tuple[str, ...]:
        """Return the names of the fitted coefficient sets."""
        return tuple(sorted(p.stem for p in (self.root / "fitted").glob("*.json") if p.name not in REPORTS))

    def coefficients(self, name: str) -> CoefficientSet:
        """Return the fitted coefficients of an engine from `fitted/NAME.json`."""
        return self._kept(self._file("coefficient set", "fitted", name, ".json"), _coefficients_from)

    def accuracy(self) -> dict[str, Any]:
        """Return the errors on left-out engine starts that the last fit wrote, empty where there was none.

        By regime and in sum; what single starts and cells were off by is in `held_out`.
        """
        return self._report(REPORTS[0])

    def held_out(self) -> dict[str, Any]:
        """Return `accuracy` with the errors of each start and cell: ten times as much to read."""
        whole, single = self.accuracy(), self._report(REPORTS[1])
        if self._held_out is None or self._held_out[0] is not whole or self._held_out[1] is not single:
            self._held_out = whole, single, whole | single
        return self._held_out[2]

    def _report(self, name: str) -> dict[str, Any]:
        path = self.root / "fitted" / name
        return self._kept(path, partial(read_json, max_bytes=16 * MIB)) if path.is_file() else {}

    def engine(self, name: str) -> dict[str, Any]:
        """Return the facts of an engine (defaults by version, flags) from `engines/NAME.toml`."""
        return self._kept(self._file("engine", "engines", name, ".toml"), read_toml)

    def _kept(self, path: Path, read: Callable[[Path], T]) -> T:
        """Return a file as `read` gives it, read again only when it has changed: a fit rewrites its coefficients."""
        status = path.stat()
        state = (status.st_mtime_ns, status.st_size)
        found = self._read.get(path)
        if found is None or found[0] != state:
            found = self._read[path] = (state, read(path))
        value: T = found[1]
        return value

    @property
    def _preset_path(self) -> Path:
        return self.root / "workloads" / "presets.toml"

    def _preset_tables(self) -> dict[str, Any]:
        if self._presets is None:
            self._presets = read_presets(self._preset_path)
        return self._presets

    def _file(self, kind: str, folder: str, name: str, suffix: str) -> Path:
        # a name is never a path: it must be the stem of a file that is there
        known = sorted(p.stem for p in (self.root / folder).glob(f"*{suffix}"))
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,200}", name) or name not in known:
            raise UnknownName(kind, name, known)
        return self.root / folder / f"{name}{suffix}"


def _coefficients_from(path: Path) -> CoefficientSet:
    try:
        return CoefficientSet.model_validate(read_json(path, max_bytes=16 * MIB))
    except ValidationError as error:
        raise BadData(str(path), first_error(error)) from None


@lru_cache(maxsize=8)
def load_catalog(root: Path | None = None) -> Catalog:
    """Return the catalogue of a data folder, by default the one that comes with the package; cheap and kept."""
    return Catalog(root if root is not None else data_root())
