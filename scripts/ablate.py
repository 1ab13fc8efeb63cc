"""Prints what each part of the serving law is worth: errors on our runs with one part changed, nothing refitted.

The coefficients are those of the full fit, so these are not errors on unseen starts; only the differences matter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from advisor.catalog import load_catalog
from advisor.fit import objective
from advisor.fit.records import Cell
from advisor.fit.run import load_data, read_transfer
from advisor.fit.validate import predict_cell, rows_of, table
from advisor.predict import simulate as simulation
from advisor.predict.engine_state import EngineLimits

SHOWN = ("ttft_s.p50", "ttft_s.p99", "tpot_s.p50", "requests_per_s")
NOTHING = 1e-9
THROTTLED_MHZ = 1800.0
Limits = Callable[[EngineLimits], Mapping[str, Any]]

HOST = ("host_step_s", "host_graph_layer_s", "host_large_layer_s", "host_eager_layer_s", "host_seq_s")
PARTS: dict[str, Mapping[str, float | str]] = {
    "launching takes no time": dict.fromkeys(HOST, NOTHING),
    "one host time a layer instead of two": {"host_large_layer_s": "host_graph_layer_s", "host_tp_factor": 1.0},
    "the client takes no time": dict.fromkeys(("submit_s", "return_s", "serial_s", "wake_s"), NOTHING),
    "arithmetic and streaming add": {"sharpness": 1.0, "sharpness_int4": 1.0},
    "the larger of the two": {"sharpness": 50.0, "sharpness_int4": 50.0},
    "taking a request in delays no launch": {"intake_s": NOTHING},
    "no last wave of fp8 tiles": {"wave_frac": NOTHING},
    "no power limit": {"joules_per_flop": 1e-20, "joules_per_byte": 1e-20},
    "a limit that acts at once": {"throttle_s": 1e-6},
    "all-reduces of one kind": {"all_reduce_switch_bytes": 1e16},
    "an API server takes no time": dict.fromkeys(("http_s", "http_token_s", "http_out_s"), NOTHING),
}
SCHEDULES: dict[str, Limits] = {
    "one batch in flight instead of two": lambda at: {"n_in_flight": 1 if at.pp == 1 else at.pp},
    "launches never block the core": lambda at: {"blocks_on_launch": False},
    "launches always block the core": lambda at: {"blocks_on_launch": True},
}
TURNS = {"an API server gives a request one turn": 1}
GROUPS: dict[str, tuple[Callable[[Cell], bool], tuple[str, ...]]] = {
    "all": (lambda cell: True, ("one batch in flight instead of two", *tuple(PARTS)[:6])),
    "the 1B starts": (lambda c: c.record.model == "llama-3.2-1b", ("launching takes no time",)),
    "the fp8 starts": (
        lambda c: c.deployment.weight_dtype == "fp8",
        ("launching takes no time", "no last wave of fp8 tiles"),
    ),
    "clock below 1800 MHz": (
        lambda c: (_clock(c) or THROTTLED_MHZ) < THROTTLED_MHZ,
        ("no power limit", "a limit that acts at once"),
    ),
    "closed loops, one GPU": (lambda c: _is_loop(c) and c.deployment.n_gpus == 1, ("launches never block the core",)),
    "closed loops, several GPUs": (
        lambda c: _is_loop(c) and c.deployment.n_gpus > 1,
        ("launches always block the core", "all-reduces of one kind"),
    ),
    "servers": (
        objective.is_http,
        ("an API server gives a request one turn", "an API server takes no time"),
    ),
}
"""Which cells, and what is changed for them."""


def _is_loop(cell: Cell) -> bool:
    load = cell.workload.load
    return load.kind == "closed" and load.concurrency > 1


def _clock(cell: Cell) -> float | None:
    power = cell.record.measured.board_power_w
    return power.sm_clock_mhz if power is not None else None


def main() -> int:
    catalog = load_catalog()
    data = load_data(catalog.root / "runs", catalog)
    transfer = read_transfer(catalog.root / "fitted" / "transfer.toml")
    fitted = {name: c.value for name, c in catalog.coefficients("vllm").coefficients.items()}
    simulate = objective.simulate

    front = simulation.Front

    def show(group: str, name: str, values: Mapping[str, float], limits: Limits | None = None) -> None:
        def changed(stages: Any, at: EngineLimits, *rest: Any, **named: Any) -> Any:
            return simulate(stages, replace(at, **limits(at)) if limits else at, *rest, **named)

        cells = [cell for cell in data.cells if GROUPS[group][0](cell)]
        objective.simulate = changed
        simulation.Front = partial(front, n_turns=TURNS[name]) if name in TURNS else front
        rows = rows_of(cells, lambda cell: predict_cell(cell, objective.values_for(cell, values, transfer), None))
        objective.simulate, simulation.Front = simulate, front
        found = table(rows)
        errors = " | ".join(f"{100 * found[m]['median']:.1f} / {100 * found[m]['p90']:.0f}" for m in SHOWN)
        sys.stdout.write(f"| {group} ({len(cells)}) | {name} | {errors} |\n")
        sys.stdout.flush()

    for group, (_, changes) in GROUPS.items():
        show(group, "none", fitted)
        for name in changes:
            if not (name in PARTS or name in SCHEDULES or name in TURNS):
                raise LookupError(f"nothing is changed by '{name}'")
            change = PARTS.get(name, {})
            values = {k: fitted[v] if isinstance(v, str) else v for k, v in change.items()}
            show(group, name, fitted | values, SCHEDULES.get(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
