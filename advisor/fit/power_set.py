"""The coefficient set of board power: fits to our runs and to public tables, with intervals, bounds and sources."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from advisor.catalog import load_catalog
from advisor.catalog.files import read_json
from advisor.fit.objective import run_cell
from advisor.fit.power import (
    BOUNDS,
    FIXED,
    MEANING,
    PowerCell,
    PowerFit,
    Replay,
    base_name,
    clock_exponent,
    fit_family,
    fit_power,
    mean_work,
    power_cell,
    published_cell,
    relative_errors,
)
from advisor.fit.records import Cell
from advisor.fit.run import load_data
from advisor.predict.shapes import shapes_of
from advisor.predict.step import step_cost
from advisor.predict.transfer import transferred
from advisor.schema import Coefficient, CoefficientSet, EngineFacts, FitReport, Source

Z90 = 1.645
ENGINE_VERSION = "0.26.0"


def coefficient_set(
    fit: PowerFit,
    families: Mapping[str, PowerFit],
    clock: tuple[float, float],
    *,
    run_ids: Sequence[str],
    transfer_error: float,
    sources: Sequence[Source],
) -> CoefficientSet:
    """Return the coefficient set of data/fitted/power.json from the fits to our records and to public tables."""
    origin = "own runs: see report.run_ids"
    table: dict[str, Coefficient] = {}
    for name, value in fit.values.items():
        if name not in FIXED:
            table[name] = _coefficient(name, value, fit.deviations[name], origin)
    for family, found in families.items():
        for name, value in found.values.items():
            table[name] = _coefficient(name, value, found.deviations[name], f"public tables, {family}: see sources")
        table[f"error_frac__{family}"] = _error(found.error_frac(), f"halves of the public rows of {family} left out")
    table["error_frac__hopper"] = _error(fit.error_frac(), "cells of engine starts left out of the fit")
    table["error_frac"] = _error(
        transfer_error, "public rows of A100 and B200 under Hopper's energies, nothing refitted"
    )
    exponent, deviation = clock
    low, high = max(1.0, exponent - Z90 * deviation), min(3.0, exponent + Z90 * deviation)
    table["clock_exponent"] = Coefficient(
        value=exponent,
        low=low,
        high=high,
        unit="1",
        bounds=(1.0, 3.0),
        meaning="n of compute power ~ clock^n",
        source=origin + "; clocks between 0.72 and 1 of the nominal one",
    )
    table["link_j_per_byte"] = Coefficient(
        value=FIXED["link_j_per_byte"],
        low=2 * 8 * 1.3e-12,
        high=4 * 8 * 5.5e-12,
        unit="J/byte",
        bounds=(0.0, 1e-9),
        meaning="energy of one byte sent to another GPU, both ends",
        source="5.5 pJ/bit of a 112 Gb/s SerDes, 1.3 pJ/bit of NVLink-C2C (NVIDIA 2023); not determined by our runs",
    )
    table["node_other_w_per_gpu"] = Coefficient(
        value=360.0,
        low=200.0,
        high=575.0,
        unit="W",
        bounds=(0.0, 2000.0),
        meaning="CPUs, memory, switches, network cards, fans and conversion losses of a node, per GPU",
        source="at most 8.48 kW measured on an 8 x H100 node rated 10.2 kW (arXiv:2412.08602), less 8 x 700 W",
    )
    errors = {"board_power_w": fit.median_error(), "board_power_w p90": fit.error_frac()}
    errors |= {f"board_power_w {run}": float(np.median(np.abs(e))) for run, e in fit.left_out.items()}
    return CoefficientSet(
        name="power",
        version=1,
        engine="vllm",
        engine_versions=(ENGINE_VERSION,),
        gpu="h100-sxm-80gb",
        coefficients=table,
        report=FitReport(
            run_ids=tuple(run_ids),
            n_cells=fit.n_cells,
            n_coefficients=len(fit.deviations),
            condition_number=fit.condition_number,
            median_abs_error=errors,
            notes=(
                "errors are of engine starts left out of the fit, one at a time",
                "weights were random numbers; the int4 ones were not drawn at all, so int4_j_per_flop is a lower end",
            ),
        ),
        sources=tuple(sources),
    )


def _coefficient(name: str, value: float, deviation: float, source: str) -> Coefficient:
    bounds = BOUNDS[base_name(name)]
    spread = math.exp(min(Z90 * deviation, 2.0))
    is_at_bound = min(abs(math.log(value / b)) for b in bounds) < 1e-3
    return Coefficient(
        value=value,
        low=max(bounds[0], value / spread) if not is_at_bound else min(value, max(bounds[0], value / spread)),
        high=max(value, min(bounds[1], value * spread)),
        unit={"flop": "J/FLOP", "byte": "J/byte"}.get(base_name(name).split("_")[-1], "1"),
        bounds=bounds,
        meaning=MEANING[base_name(name)],
        source=source,
        is_at_bound=is_at_bound,
    )


def _error(value: float, source: str) -> Coefficient:
    return Coefficient(
        value=value,
        low=value,
        high=value,
        unit="1",
        bounds=(0.0, 1.0),
        meaning="half-width of the 90 % interval of board power, share of the power",
        source=source,
    )


def replay_of(cell: Cell, values: Mapping[str, float], facts: EngineFacts | None = None) -> Replay:
    """Return what the GPUs did in a cell: the mean over its drawn replays."""
    simulations = run_cell(cell, values, facts)
    n = len(simulations)
    work = mean_work([s.total_work for s in simulations])
    shapes = shapes_of(cell.model)
    stages = [step_cost(shapes, cell.gpu, cell.deployment, values, k) for k in range(cell.deployment.pp)]
    n_tokens = sum(float(s.prompt_tokens.sum() + s.output_tokens.sum()) for s in simulations) / n
    return Replay(stages, work, sum(s.duration_s for s in simulations) / n, n_tokens)


def power_cells(cells: Sequence[Cell], serving: CoefficientSet, facts: EngineFacts | None = None) -> list[PowerCell]:
    """Return the cells whose power reading can be used, replayed with the coefficients of the serving law."""
    found = (power_cell(c.record, c.gpu, replay_of(c, transferred(serving, c.gpu), facts)) for c in cells)
    return [cell for cell in found if cell is not None]


FAMILIES = {
    "ampere": (
        "bf16_j_per_flop",
        "memory_j_per_byte",
        "memory_j_per_byte__a100-sxm-40gb",
        "cache_j_per_byte",
        "awake_frac",
    ),
    "blackwell": ("bf16_j_per_flop", "memory_j_per_byte", "cache_j_per_byte", "awake_frac"),
}
"""Architectures that public rows determine, and which of their coefficients."""


def fit_power_set(cells: Sequence[PowerCell], published: Sequence[PowerCell], cited: Sequence[str]) -> CoefficientSet:
    """Return the coefficient set from our cells and published ones of Hopper and other architectures."""
    fit = fit_power(cells, [c for c in published if c.gpu.family == "hopper"])
    groups = {name: [c for c in published if c.gpu.family == name] for name in FAMILIES}
    families = {k: fit_family(rows, fit.values, k, FAMILIES[k]) for k, rows in groups.items() if len(rows) >= MIN_ROWS}
    strange = [abs(e) for rows in groups.values() for e in relative_errors(rows, fit.values)]
    return coefficient_set(
        fit,
        families,
        clock_exponent(cells, fit.values),
        run_ids=sorted({c.run_id for c in cells}),
        transfer_error=float(np.quantile(strange, 0.9)) if strange else UNKNOWN_ERROR,
        sources=(
            Source(field="*", title="own runs: report.run_ids"),
            Source(field="cache_j_per_byte, *__ampere, *__blackwell", title="; ".join(cited)),
        ),
    )


MIN_ROWS = 12
UNKNOWN_ERROR = 0.3


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit and write: ``python -m advisor.fit.power_set data/runs --out data/fitted/power.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="run records with their manifest")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    catalog = load_catalog()
    facts = EngineFacts.from_table(catalog.engine("vllm"), ENGINE_VERSION)
    cells = load_data(options.folder, catalog).cells
    rows = read_json(catalog.root / "golden" / "power_public.json")["rows"]
    published = [published_cell(row, catalog.gpu(row["gpu"])) for row in rows]
    own = power_cells(cells, catalog.coefficients("vllm"), facts)
    found = fit_power_set(own, published, sorted({row["source"] for row in rows}))
    options.out.write_text(found.model_dump_json(indent=1) + "\n")


if __name__ == "__main__":
    main()
