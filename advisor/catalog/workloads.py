"""Traffic presets as workloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from advisor.catalog.files import read_toml
from advisor.errors import BadData, UnknownName
from advisor.schema import (
    ClosedLoad,
    FixedLengths,
    Lengths,
    Load,
    LognormalLengths,
    PoissonLoad,
    PrefixSharing,
    Workload,
    first_error,
)

_FIELDS = {"source", "prompt_tokens_mean", "output_tokens_mean", "sigma", "prompt_clip", "output_clip"} | {
    *("arrivals_per_s", "concurrency", "shared_prefix_tokens", "conversation_hit_frac")
}


def read_presets(path: Path) -> dict[str, Any]:
    """Return the tables of a preset file, by name."""
    return {name: table for name, table in read_toml(path).items() if isinstance(table, dict)}


def workload_preset(name: str, presets: dict[str, Any], where: str = "presets.toml") -> Workload:
    """Return the workload of a preset; UnknownName for one that is not there, BadData for a table that is wrong."""
    key = {"summarize": "summarise", "summary": "summarise", "coding": "code", "offline": "batch"}.get(
        name.strip().lower(), name.strip().lower()
    )
    if key not in presets:
        raise UnknownName("workload", name, presets, f"Presets: {', '.join(presets)}.")
    table = presets[key]
    if unknown := set(table) - _FIELDS:
        raise BadData(where, f"[{key}] has unknown fields: {', '.join(sorted(unknown))}")
    try:
        return Workload(name=key, lengths=_lengths(table), load=_load(table), prefix=_prefix(table))
    except KeyError as error:
        raise BadData(where, f"[{key}] lacks {error}") from None
    except ValidationError as error:
        raise BadData(where, f"[{key}] {first_error(error)}") from None


def _lengths(table: dict[str, Any]) -> Lengths:
    if table["sigma"] == 0:
        return FixedLengths(prompt_tokens=table["prompt_tokens_mean"], output_tokens=table["output_tokens_mean"])
    clips = {k: tuple(table[k]) for k in ("prompt_clip", "output_clip") if k in table}
    lengths = {k: table[k] for k in ("prompt_tokens_mean", "output_tokens_mean", "sigma")}
    return LognormalLengths.model_validate(lengths | clips)


def _load(table: dict[str, Any]) -> Load:
    if "concurrency" in table:
        return ClosedLoad(concurrency=table["concurrency"])
    return PoissonLoad(arrivals_per_s=table["arrivals_per_s"])


def _prefix(table: dict[str, Any]) -> PrefixSharing:
    return PrefixSharing(
        shared_prefix_tokens=table.get("shared_prefix_tokens", 0),
        conversation_hit_frac=table.get("conversation_hit_frac", 0.0),
    )
