"""Command power: what it prints agrees with itself, with hand arithmetic and with `predict`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import advisor
from advisor.catalog import load_catalog
from advisor.cli import run
from advisor.predict.limits import clock_bound_frac
from advisor.predict.serving import Run, replay
from advisor.predict.simulate import Client, simulate
from advisor.predict.step import StepCost
from advisor.predict.traffic import draw
from advisor.recommend.ask import Question, ask
from advisor.recommend.one import deployment_of
from advisor.schema import ClosedLoad, FixedLengths, PoissonLoad, Request, Workload

Cli = Callable[..., tuple[int, str, str]]
SMALL = ("power", "--model", "llama-3.1-8b", "--gpus", "1xh100-sxm-80gb")
FIXED = ("--prompt-tokens", "1000", "--output-tokens", "100", "--rate", "4")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*words: str) -> tuple[int, str, str]:
        code = run(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def report(cli: Cli, *words: str) -> dict[str, Any]:
    code, out, err = cli(*SMALL, *words, "--json")
    assert (code, err) == (0, "")
    form: dict[str, Any] = json.loads(out)
    assert form["schema_version"] == "1"
    return form


def value(form: dict[str, Any], group: str, name: str) -> float:
    return float(form[group][name]["value"])


def test_it_prints_every_part_within_100_columns(cli: Cli) -> None:
    extra = ("--grid", "france", "--pue", "1.2", "--rack-kw", "40", "--hosted-in", "0.2", "--hosted-out", "0.8")
    code, out, err = cli(*SMALL, *FIXED, *extra)
    assert (code, err) == (0, "")
    for part in ("Boards:", "compute", "whole nodes", "prefill, per request", "emissions, a month", "Money: rent"):
        assert part in out
    for part in ("a year", "hosted API", "Power limits", "ttft_p99 <=", "A rack of 40.0 kW", "Notes"):
        assert part in out
    assert max(len(line) for line in out.splitlines()) <= 100


def test_energy_agrees_with_itself_and_with_predict(cli: Cli) -> None:
    form = report(cli, *FIXED, "--grid", "0.5", "--pue", "1.25")
    watts = value(form, "energy", "power_w")
    assert sum(p["value"] for p in form["board_power"]["parts"]) == pytest.approx(watts)
    assert value(form, "energy", "energy_j_per_request") == pytest.approx(watts / 4)
    assert value(form, "energy", "energy_wh_per_1000_requests") == pytest.approx(watts / 4 / 3.6)
    by_phase = value(form, "energy", "prefill_energy_j_per_request")
    by_phase += 100 * value(form, "energy", "decode_energy_j_per_output_token")
    assert by_phase == pytest.approx(watts / 4)
    assert value(form, "energy", "facility_kwh_per_month") == pytest.approx(watts * 1.25 * 730 / 1000)
    kg = watts / 400 / 3.6 * 1.25 * 0.5  # J/token / 3.6 = kWh per million tokens
    assert value(form, "energy", "kgco2e_per_million_output_tokens") == pytest.approx(kg)
    assert value(form, "node_energy", "power_w") == pytest.approx(watts + 360)
    code, out, _ = cli("predict", *SMALL[1:], *FIXED, "--grid", "0.5", "--pue", "1.25", "--json")
    found = json.loads(out)["prediction"]
    assert code == 0
    for name in ("energy_j_per_output_token", "energy_j_per_request", "kgco2e_per_million_output_tokens"):
        assert found[name] == form["energy"][name]
    assert found["kgco2e_per_h"]["value"] == pytest.approx(watts * 1.25 / 1000 * 0.5)


def test_a_country_stands_for_its_grid(cli: Cli) -> None:
    by_name = report(cli, *FIXED, "--grid", "France")
    by_number = report(cli, *FIXED, "--grid-carbon", str(0.04144))
    assert by_name["energy"]["kgco2e_per_month"] == by_number["energy"]["kgco2e_per_month"]


def test_rent_and_hosted_price_by_hand(cli: Cli) -> None:
    hosted = ("--hosted-in", "0.5", "--hosted-out", "2", "--utilisation", "0.25")
    form = report(cli, *FIXED, "--price", "3.6", *hosted)
    assert value(form, "money", "usd_per_month") == pytest.approx(3.6 * 730)
    assert value(form, "money", "usd_per_1000_requests") == pytest.approx(3.6 / (4 * 0.25 * 3600) * 1000)
    # 4000 tokens/s in at $0.5, 400 tokens/s out at $2 a million, a quarter of the time
    api_per_h = 0.25 * 3600 * (4000 * 0.5 + 400 * 2) / 1e6
    assert value(form, "money", "hosted_usd_per_month") == pytest.approx(api_per_h * 730)
    assert value(form, "money", "break_even_load_frac") == pytest.approx(3.6 / api_per_h)
    split = 4000 * value(form, "money", "split_usd_per_million_input_tokens")
    split += 400 * value(form, "money", "split_usd_per_million_output_tokens")
    assert split * 0.25 * 3600 / 1e6 == pytest.approx(3.6)
    whole = value(form, "money", "usd_per_million_output_tokens")
    assert whole == pytest.approx(3.6e6 / (400 * 0.25 * 3600))


def test_own_hardware_is_its_price_over_its_life_plus_electricity_of_the_node(cli: Cli) -> None:
    own = ("--capex-per-gpu", "35040", "--years", "4", "--electricity-price", "0.2", "--pue", "1.5", "--price", "5")
    form = report(cli, *FIXED, *own)
    running = value(form, "node_energy", "power_w") / 1000 * 1.5 * 0.2
    assert value(form, "node_energy", "electricity_usd_per_h") == pytest.approx(running)
    assert value(form, "money", "usd_per_h") == pytest.approx(1.0 + running)  # 35040 USD / (4 x 8760 h) = 1 USD/h
    assert value(form, "money", "pay_back_years") == pytest.approx(35040 / 8760 / (5 - running))


def test_a_lower_limit_never_draws_more_and_never_speeds_up(cli: Cli) -> None:
    form = report(cli, *FIXED)
    rows = form["limits"]
    assert len(rows) > 5
    for low, high in pairwise(rows):
        assert low["limit_w"] < high["limit_w"]
        assert low["speed_frac"] <= high["speed_frac"]
        assert low["board_power_w"] <= high["board_power_w"] * (1 + 1e-9)
        assert low["energy_j_per_output_token"] <= high["energy_j_per_output_token"] * (1 + 1e-9)
    assert all(r["board_power_w"] <= r["limit_w"] for r in rows)
    own = rows[-1]
    assert own["limit_w"] == 700
    assert own["board_power_w"] == pytest.approx(value(form, "energy", "power_w"))
    assert own["latency_s"]["tpot_p99_s"] == form["plan"]["prediction"]["tpot_p99_s"]["value"]
    best = next(r for r in rows if r["limit_w"] == form["best_slo_limit_w"])
    assert best["meets_slo"]
    assert best["clock_frac"] >= 0.76, "limits below measured clocks are shown but not recommended"
    assert best["node_energy_j_per_output_token"] < own["node_energy_j_per_output_token"]


def test_targets_and_load_decide_which_limit_is_recommended(cli: Cli) -> None:
    base = {r["limit_w"]: r["latency_s"]["tpot_p99_s"] for r in report(cli, *FIXED)["limits"]}
    form = report(cli, *FIXED, "--slo", f"tpot_p99={1.02 * base[700.0]}")
    kept = {r["limit_w"] for r in form["limits"] if r["meets_slo"]}
    assert kept == {w for w, tpot in base.items() if tpot <= 1.02 * base[700.0]}
    assert 0 < len(kept) < len(base)
    assert form["best_slo_limit_w"] in kept
    none = report(cli, *FIXED, "--slo", "tpot_p99=1us")
    assert none["best_slo_limit_w"] is None
    code, out, _ = cli(*SMALL, *FIXED, "--slo", "tpot_p99=1us")
    assert code == 0
    assert "the targets are missed at the boards' own limit" in out


def test_clients_in_a_closed_loop_slow_down_with_the_boards(cli: Cli) -> None:
    rows = report(cli, "--concurrency", "64", "--prompt-tokens", "1000", "--output-tokens", "100")["limits"]
    own = rows[-1]
    for row in rows:
        assert row["requests_per_s"] == pytest.approx(own["requests_per_s"] * row["speed_frac"])
        assert row["latency_s"]["e2e_p50_s"] == pytest.approx(own["latency_s"]["e2e_p50_s"] / row["speed_frac"])
    assert rows[0]["speed_frac"] < 0.95


def test_a_rack_reserves_the_rating_of_a_node(cli: Cli) -> None:
    code, out, _ = cli("power", "--model", "8b", "--gpus", "8xH100", "--dp", "4", "--rack-kw", "40", "--json")
    rack = json.loads(out)["rack"]
    assert code == 0
    assert rack["node_reserve_w"] == pytest.approx(10_200)  # rating of an 8 x H100 node (Latif et al. 2025)
    assert (rack["n_nodes"], rack["n_deployments"]) == (3, 6)
    code, out, _ = cli(
        "power", "--model", "8b", "--gpus", "8xH100", "--tp", "1", "--dp", "6", "--rack-kw", "40", "--json"
    )
    assert json.loads(out)["rack"]["n_deployments"] == 3, "24 GPUs, but a deployment of 6 stays in one node of 8"


def test_deepspeed_has_a_sum_but_no_parts(cli: Cli) -> None:
    words = ("--backend", "deepspeed-zero-inference", "--offload", "cpu", "--concurrency", "8")
    form = report(cli, *words)
    assert form["board_power"] is None
    assert form["limits"] == []
    assert value(form, "energy", "energy_j_per_output_token") > 0
    assert any("no power limits" in note["text"] for note in form["notes"])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--grid", "frnace"), "did you mean france"),
        (("--grid", "50"), "between 0 and 10"),
        (("--grid", "nan"), "between 0 and 10"),
        (("--grid", "us", "--grid-carbon", "0.3"), "not both"),
        (("--hosted-in", "1"), "both --hosted-in and --hosted-out"),
        (("--hosted-in", "0", "--hosted-out", "0"), "never beaten"),
        (("--hosted-in", "-1", "--hosted-out", "2"), "must not be negative"),
        (("--years", "3"), "--capex-per-gpu"),
        (("--capex-per-gpu", "-1"), "above 0"),
        (("--capex-per-gpu", "1", "--years", "0"), "at most 50"),
        (("--utilisation", "1.5"), "at most 1"),
        (("--rack-kw", "0"), "above 0"),
        (("--pue", "0.9"), "--pue"),
    ],
)
def test_a_mistake_is_one_sentence(cli: Cli, words: tuple[str, ...], part: str) -> None:
    code, out, err = cli(*SMALL, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert part in err


def test_the_library_gives_what_the_command_prints(cli: Cli) -> None:
    load = {"prompt_tokens": 1000, "output_tokens": 100, "rate": 4}
    asked = Request.model_validate({"model": "llama-3.1-8b", "gpus": "1xh100-sxm-80gb"} | load)
    found = advisor.power(asked, {"max_num_seqs": 64})
    printed = report(cli, *FIXED, "--max-num-seqs", "64")
    assert printed["energy"] == {name: q.model_dump() for name, q in found.energy.items()}
    assert printed["best_slo_limit_w"] == found.best_slo_limit_w


def question() -> Question:
    return ask(Request(model="llama-3.1-8b", gpus="1xh100-sxm-80gb"), load_catalog())


def ran(workload: Workload) -> Run:
    asked = question()
    assert asked.vllm is not None
    d = deployment_of(asked, {})
    return replay(asked.model, asked.pools[0].cluster, d, workload, asked.vllm, facts=asked.facts)


def loaded(prompt: int, output: int, clients: int) -> Workload:
    load = ClosedLoad(concurrency=clients, n_requests=4 * clients)
    return Workload(name="t", lengths=FixedLengths(prompt_tokens=prompt, output_tokens=output), load=load)


def test_prompts_follow_the_clock_and_one_decoding_client_does_not() -> None:
    prefill, decode = ran(loaded(4000, 2, 32)), ran(loaded(16, 400, 1))
    assert clock_bound_frac(prefill.replica.stages, prefill.simulation) > 0.8
    assert clock_bound_frac(decode.replica.stages, decode.simulation) < 0.05


def slowed(stage: StepCost, speed: float) -> StepCost:
    """Return the stage with every rate divided and every time multiplied: all of its steps take longer."""
    changes: dict[str, Any] = {}
    for field in fields(stage):
        if field.name.endswith("_per_s"):
            changes[field.name] = getattr(stage, field.name) * speed
        elif field.name.endswith("_s"):
            changes[field.name] = getattr(stage, field.name) / speed
    return replace(stage, **changes)


def test_slow_boards_serve_as_fast_ones_do_with_closer_arrivals() -> None:
    speed = 0.8
    load = PoissonLoad(arrivals_per_s=6.0, n_requests=150)
    workload = Workload(name="t", lengths=FixedLengths(prompt_tokens=900, output_tokens=80), load=load)
    base = ran(workload)
    client = base.replica.client
    # no clock throttling in either: that depends on the power of a step, which slow boards draw less of
    free = [replace(s, dynamic_power_w=1e9) for s in base.replica.stages]
    late = Client(
        **{
            name: tuple(x / speed for x in delay) if isinstance(delay, tuple) else delay / speed
            for name, delay in asdict(client).items()
        }
    )
    limits = base.replica.limits
    limits = replace(limits, pace_s=limits.pace_s / speed)
    slow = simulate([slowed(s, speed) for s in free], limits, draw(workload, 0, prefix_caching=True), late)
    closer = workload.model_copy(update={"load": PoissonLoad(arrivals_per_s=6.0 / speed, n_requests=150)})
    fast = simulate(free, base.replica.limits, draw(closer, 0, prefix_caching=True), client)
    assert np.allclose(slow.ttft_s, fast.ttft_s / speed, rtol=1e-6)
    assert np.allclose(slow.tpot_s, fast.tpot_s / speed, rtol=1e-6)


def test_idle_hours_are_paid_at_idle_power(cli: Cli) -> None:
    """A deployment that is on in a quarter of the hours draws its load's power in those and idles in the others."""
    price, pue = 0.25, 1.4
    words = (*SMALL, *FIXED, "--electricity-price", str(price), "--pue", str(pue), "--capex-per-gpu", "30000", "--json")
    full, quarter = (json.loads(cli(*words, "--utilisation", u)[1]) for u in ("1", "0.25"))
    hardware = 30000 / (4 * 8760)
    loaded_w = full["node_energy"]["power_w"]["value"]
    rest_w = loaded_w - full["energy"]["power_w"]["value"]
    idle_w = load_catalog().gpu("h100").idle_power_w + rest_w
    for form, share in ((full, 1.0), (quarter, 0.25)):
        mean_kw = (share * loaded_w + (1 - share) * idle_w) / 1000
        assert form["money"]["usd_per_h"]["value"] == pytest.approx(hardware + mean_kw * pue * price)
    assert full["money"]["usd_per_h"]["value"] > quarter["money"]["usd_per_h"]["value"]
