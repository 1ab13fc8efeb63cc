"""The scenario that Recommend, Compare, Explore and Capacity share: model, GPUs, traffic, targets, money."""

from __future__ import annotations

from typing import Any

import streamlit as st
from pydantic import ValidationError

from advisor.catalog import load_catalog
from advisor.catalog.grid import read_grid
from advisor.errors import DomainError
from advisor.schema import Request, Slo, Target, first_error
from advisor.ui import state
from advisor.ui.text import BACKENDS, HELP

MODELS_FIRST = ("70b", "8b")
GPUS_FIRST = ("8xA100", "8xH100", "2x8xH100", "8xH200", "4xL40S", "2xRTX4090", "8xA100,8xH100,8xL40S")
WEIGHTS = ("bf16", "fp16", "fp8", "awq-int4", "gptq-int4", "mxfp4", "int8", "int4")
PRESET, RATE, CLIENTS = "preset", "rate", "clients"
LENGTHS = {"prompt": "Prompt", "output": "Output"}
LENGTH_STOPS = tuple(2**n for n in range(4, 18))
"""Stops of the sliders of lengths: 16 to 131072 tokens."""
NO_GRID, ANY = "not counted", "any"
TARGETS = (("ttft", 0.05, 30.0), ("tpot", 0.01, 1.0), ("e2e", 0.5, 60.0))


EXAMPLES: dict[str, dict[str, object]] = {
    "Chat, 70B on 8 A100": {"model": "70b", "gpus": "8xA100", "workload": "chat", "load": PRESET},
    "RAG, 32B on 4 H100": {"model": "qwen3-32b", "gpus": "4xH100", "workload": "rag", "load": RATE, "rate": 2.0},
    "Code, 8B on L40S": {"model": "8b", "gpus": "4xL40S", "workload": "code", "load": PRESET},
    "Which card? 8B": {"model": "8b", "gpus": "1xL40S,1xA100,1xH100", "workload": "chat", "load": RATE, "rate": 4.0},
    "Overnight batch, MoE": {"model": "mixtral", "gpus": "4xH100", "workload": "batch", "load": PRESET},
}
"""Scenarios to start from: what each sets, by the keys of the widgets."""


def examples() -> None:
    """Show scenarios to start from; a click sets the side bar."""

    def take() -> None:
        if name := st.session_state.get("example"):
            state.set_all(EXAMPLES[name])

    st.pills("Start from", tuple(EXAMPLES), key="example", on_change=take, help="Sets model, GPUs and traffic.")


def model_name() -> str:
    """Return the model that the user chose or typed."""
    options = [*MODELS_FIRST, *(n for n in load_catalog().models() if n not in MODELS_FIRST)]
    return state.catalogue_name(
        state.choice("model", "Model", options, default="70b", help=HELP["model"], free=True), "model"
    )


def gpu_spec() -> str:
    """Return the GPUs that the user chose or typed."""
    return state.catalogue_name(
        state.choice("gpus", "GPUs", gpu_options(), default="8xA100", help=HELP["gpus"], free=True), "GPU"
    )


def gpu_options() -> tuple[str, ...]:
    """Return what the list of GPUs offers: usual machines, then eight of every card of the catalogue."""
    return (*GPUS_FIRST, *(f"{min(8, g.max_gpus_per_node)}x{g.name}" for g in load_catalog().gpus()))


def traffic(*, has_load: bool = True, has_sliders: bool = False) -> dict[str, Any]:
    """Return the fields of a Request that say what the users send.

    has_load    : also how much of it
    has_sliders : lengths come from sliders instead of number fields
    """
    fields: dict[str, Any] = {
        "workload": state.choice(
            "workload", "Traffic preset", load_catalog().workloads(), default="chat", help=HELP["preset"]
        )
    }
    kind = _load_kind() if has_load else PRESET
    if kind == RATE:
        fields["rate"] = state.number(
            "rate", "Requests per second", default=5.0, low=0.001, high=1e6, help="Independent (Poisson) arrivals."
        )
    elif kind == CLIENTS:
        fields["concurrency"] = state.whole(
            "clients", "Clients at once", default=32, help="Each sends its next request when its answer is there."
        )
    if has_sliders:
        for key, title in LENGTHS.items():
            text = f"{HELP['lengths']} 'preset' keeps the preset's distribution."
            fields[f"{key}_tokens"] = state.maybe_stop(key, f"{title} [tokens]", LENGTH_STOPS, hint="preset", help=text)
        return fields
    for column, (key, title) in zip(st.columns(2), LENGTHS.items(), strict=True):
        with column:
            fields[f"{key}_tokens"] = state.maybe_whole(
                key, f"{title} [tokens]", hint="preset", help=f"{HELP['lengths']} Empty = the preset's distribution."
            )
    return fields


def _load_kind() -> str:
    return state.segments(
        "load",
        "Load",
        (PRESET, RATE, CLIENTS),
        default=PRESET,
        help="The preset's own rate; or requests per second that arrive whatever happens (open loop); or clients that"
        " each wait for their answer (closed loop).",
    )


def targets() -> Slo:
    """Return the latency targets of the sliders."""
    found = []
    for metric, low, high in TARGETS:
        stop = state.stop(
            f"{metric}_p99",
            f"{metric.upper()} P99 at most",
            state.latency_steps(low, high),
            default=state.OFF,
            help=f"{HELP[metric]} {HELP['slo']}",
        )
        if (bound := state.seconds(stop)) is not None:
            found.append(Target.model_validate({"metric": metric, "statistic": "p99", "max_s": bound}))
    return Slo(targets=tuple(found))


def money_and_limits() -> dict[str, Any]:
    """Return the fields of a Request that most users leave as they are."""
    back = {name: key for key, name in BACKENDS.items()}
    fields: dict[str, Any] = {
        "backends": tuple(
            back[n] for n in state.several("backends", "Engines", tuple(back), help="None chosen = all are compared.")
        ),
        "weight_dtypes": state.several(
            "weights",
            "Weight formats",
            WEIGHTS,
            hint="as published",
            help=f"Others can change the answers' quality. {HELP['int4']}",
        ),
        "max_model_len": state.maybe_whole(
            "context", "Longest request [tokens]", hint="from the lengths", help="vLLM's max-model-len."
        ),
        "price_kind": state.choice(
            "price", "Price", ("on-demand", "spot", "reserved", "own"), default="on-demand", help=HELP["price_kind"]
        ),
        "provider": _provider(),
        "price_usd_per_gpu_h": state.maybe_number(
            "usd", "Own price [$/GPU/h]", high=1e4, hint="price table", help="Instead of the published prices."
        ),
        "power_cap_w": state.maybe_number(
            "watts", "Power cap, all GPUs [W]", high=1e9, hint="none", help="Plans whose boards draw more are left out."
        ),
        "budget_usd_per_h": state.maybe_number(
            "budget", "Budget [$/h]", high=1e7, hint="none", help="Plans whose rent is higher are left out."
        ),
        "electricity_usd_per_kwh": state.maybe_number(
            "kwh", "Electricity [$/kWh]", high=10.0, hint="in the rent", help="Where you pay it beside the GPUs."
        )
        or 0.0,
        "pue": state.maybe_number("pue", "PUE", low=1.0, high=5.0, hint="1", help=HELP["pue"]) or 1.0,
        "grid_kgco2e_per_kwh": _carbon(),
    }
    return {key: value for key, value in fields.items() if value not in (None, ())}


def _provider() -> str | None:
    names = sorted({p.provider for p in load_catalog().prices()})
    text = "Any = the median of the providers that publish a price for the card."
    found = state.choice("provider", "Provider", (ANY, *names), default=ANY, help=text)
    return None if found == ANY else found


def _carbon() -> float | None:
    grids = read_grid()
    place = state.choice("grid", "Grid", (NO_GRID, *grids), default=NO_GRID, help=HELP["grid"])
    hint = "of the grid" if place != NO_GRID else "not counted"
    own = state.maybe_number("co2", "Own grid [kg CO2e/kWh]", high=5.0, hint=hint, help="Instead of a country's mean.")
    return own if own is not None else grids.get(place)


def scenario(
    *, max_plans: int = 40, has_load: bool = True, has_sliders: bool = False, is_money_open: bool = False
) -> Request:
    """Return the request of the side bar; raises AdvisorError with a sentence for what is not allowed."""
    with st.sidebar:
        model, gpus = model_name(), gpu_spec()
        fields = traffic(has_load=has_load, has_sliders=has_sliders)
        objectives = ("cost", "latency", "throughput", "energy")
        objective = state.choice("objective", "Best means", objectives, default="cost", help=HELP["objective"])
        st.markdown("**Latency targets**")
        slo = targets()
        with st.expander("Engines, formats, money", expanded=is_money_open):
            fields |= money_and_limits()
    asked = {k: v for k, v in fields.items() if v is not None}
    try:
        return Request.model_validate(
            asked | {"model": model, "gpus": gpus, "slo": slo, "objective": objective, "max_plans": max_plans}
        )
    except ValidationError as error:
        raise DomainError(first_error(error)) from None
