"""The grid of a study: its cells in a fixed order, each with an id made of its content."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from advisor.errors import BadData, DomainError, printable
from advisor.schema.request import Objective
from advisor.schema.study import Study, StudyWorkload
from advisor.study.trace import digest

ID_BYTES = 8
"""64 bits: two of 10**6 cells share an id with probability 3e-8."""

_SHARD = re.compile(r"(\d{1,9})/(\d{1,9})")
_NODES = re.compile(r"^\s*(\d+\s*x\s*){1,2}", re.IGNORECASE)
_OWN_FIELDS = ("mode", "deployment", "backends", "n_finalists", "engine_version")


@dataclass(frozen=True, slots=True)
class Cell:
    """One question of a study."""

    id: str
    model: str
    gpus: str
    workload: StudyWorkload
    slo: str
    objective: Objective
    seed: int


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `index` of `n` of a grid: the cells whose id leaves that remainder."""

    index: int = 0
    n: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.n}"

    def holds(self, cell_id: str) -> bool:
        """Return whether a cell belongs to this part; each cell belongs to exactly one of the n."""
        return int(cell_id, 16) % self.n == self.index


def parse_shard(text: str) -> Shard:
    """Return the shard of text such as '0/1000'; parts count from 0. Raises DomainError.

    >>> parse_shard("3/8")
    Shard(index=3, n=8)
    """
    match = _SHARD.fullmatch(text.strip())
    if match is None or not int(match[1]) < int(match[2]):
        raise DomainError(
            f"cannot read shard '{printable(text)}'; write i/n with i from 0 to n-1, such as 0/8 for the first of 8"
        )
    return Shard(int(match[1]), int(match[2]))


def _loads(workload: StudyWorkload) -> Iterator[StudyWorkload]:
    """Yield a workload once for each of its rates or client counts."""
    for field in ("rate", "concurrency"):
        for value in getattr(workload, field):
            yield workload.model_copy(update={field: (value,)})
    if not workload.rate and not workload.concurrency:
        yield workload


def _plain(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _with_file(text: str) -> dict[str, str]:
    """Return a name, and the digest of the file where it is the path of one: the content decides, not the path."""
    parts = [_NODES.sub("", part) for part in text.split(",")]
    files = [p for p in parts if p.lower().endswith((".json", ".toml")) and Path(p).is_file()]
    if not files:
        return {"name": text}
    return {"name": _NODES.findall(text)[0] if _NODES.findall(text) else "", "sha256": "+".join(map(_digest, files))}


def _digest(path: str) -> str:
    return digest(Path(path).resolve())


def _traffic(workload: StudyWorkload) -> dict[str, Any]:
    # defaults are left out, so that a field that a later release adds does not change the ids of old studies
    return workload.model_dump(mode="json", exclude_defaults=True, exclude={"name", "trace"})


class Grid:
    """The cells of a study, seeds varying fastest; cells are made when they are asked for."""

    def __init__(self, study: Study) -> None:
        workloads = [one for w in study.workloads for one in _loads(w)]
        self._axes: list[list[tuple[Any, str]]] = [
            [(m, _plain(_with_file(m))) for m in study.models],
            [(g, _plain(_with_file(g))) for g in study.gpus],
            [(w, _plain(_traffic(w))) for w in workloads],
            [(s, _plain(s)) for s in study.slos],
            [(o, _plain(o)) for o in study.objectives],
            [(s, _plain(s)) for s in study.seeds],
        ]
        for name, axis in zip(("models", "gpus", "workloads"), self._axes, strict=False):
            if len({text for _, text in axis}) < len(axis):
                raise BadData("study", f"'{name}' names the same thing twice; give each once")
        given = study.model_dump(mode="json", exclude_defaults=True, include=set(_OWN_FIELDS))
        self._common = _plain(given)

    def __iter__(self) -> Iterator[Cell]:
        *outer, seeds = self._axes
        for (model, m), (gpus, g), (workload, w), (slo, s), (objective, o) in product(*outer):
            head = hashlib.blake2b(f"{self._common}\n{m}\n{g}\n{w}\n{s}\n{o}\n".encode(), digest_size=ID_BYTES)
            for seed, text in seeds:
                whole = head.copy()
                whole.update(text.encode())
                yield Cell(whole.hexdigest(), model, gpus, workload, slo, objective, seed)
