"""Every page in every state, second part: the views that a user goes to from the first one."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from advisor.schema import Request

Open = Callable[..., AppTest]
Answers = Callable[..., list[Request]]
Words = Callable[[AppTest], str]
Metrics = Callable[[AppTest], dict[str, str]]
Codes = Callable[[AppTest], list[str]]


def test_explore_starts_from_the_recommended_plan(
    answers: Answers, open_page: Open, metrics: Metrics, codes: Codes
) -> None:
    from advisor.recommend.look import plan_for
    from advisor.ui.text import show

    answers()
    test = open_page("explore", gpus="8xA100", model="llama-3.1-70b")
    assert not test.exception
    command = next(c for c in codes(test) if c.startswith("advisor predict"))
    for flag in ("--tp 4", "--dp 2", "--weight-dtype bf16", "--max-num-seqs 256"):
        assert flag in command
    request = Request(model="llama-3.1-70b", gpus="8xA100", max_plans=40)
    ours = plan_for(request, {"tp": 4, "pp": 1, "dp": 2, "max_num_seqs": 256, "max_num_batched_tokens": 8192})
    assert metrics(test)["TPOT P99"] == show("tpot_p99_s", ours.prediction["tpot_p99_s"])


def test_explore_shows_the_roofline_of_the_api(open_page: Open) -> None:
    from advisor.recommend.look import look_for
    from advisor.ui.pages.explore import limit_of

    test = open_page(
        "explore", model="8b", gpus="1xH100", load="rate", rate="4", at_tp="1", prompt="2048", output="256"
    )
    assert not test.exception
    request = Request(model="8b", gpus="1xH100", rate=4.0, prompt_tokens=2048, output_tokens=256, max_plans=40)
    found = look_for(request, {"tp": 1}).roofline
    frame: Any = next(d.value for d in test.dataframe if "phase" in d.value.columns)
    rows = frame.set_index("phase")
    for point in found.points:
        assert rows.loc[point.name, "FLOP/byte"] == pytest.approx(point.flops_per_byte)
        assert rows.loc[point.name, "one GPU"] == pytest.approx(point.flops_per_s)
    assert [limit_of(p, found) for p in found.points[:2]] == ["arithmetic", "memory bandwidth"]
    assert rows.loc["decode", "limited by"] == "memory bandwidth"


def test_explore_keeps_a_typed_length_among_the_stops_of_its_slider(open_page: Open, codes: Codes) -> None:
    test = open_page("explore", model="8b", gpus="1xH100", at_tp="1", prompt="900", at_max_num_seqs="48")
    assert not test.exception
    for line in codes(test)[-1].splitlines():
        assert "--prompt-tokens 900" in line
        assert "--max-num-seqs 48" in line


def test_compare_shows_any_two_plans_as_a_diff(answers: Answers, open_page: Open, codes: Codes) -> None:
    answers()
    test = open_page("compare", b="2. vLLM · a100-sxm-80gb · TP 8 · DP 1 · bf16")
    assert not test.exception
    diff = next(c for c in codes(test) if c.startswith("--- plan 1"))
    assert "-  --tensor-parallel-size 4" in diff
    assert "+  --tensor-parallel-size 8" in diff
    test.selectbox(key="b").set_value(test.selectbox(key="a").value).run()
    assert "the same" in test.info[0].value


def test_compare_forgets_a_plan_that_the_new_answer_does_not_have(answers: Answers, open_page: Open) -> None:
    answers()
    test = open_page("compare", a="17. vLLM on cards of yesterday")
    assert not test.exception
    assert test.selectbox(key="a").value.startswith("1. vLLM")


def test_train_says_which_stage_deepspeed_refuses_and_draws_the_pipeline_of_the_others(
    open_page: Open, words: Words, codes: Codes
) -> None:
    test = open_page("train", gpus="8xH100", train_pp="4", stage="3: + parameters")
    assert not test.exception
    assert "DeepSpeed refuses this job" in test.error[0].value
    # the page keeps its parts: they are of the highest stage that runs, and say so
    assert "under ZeRO-1" in test.error[0].value
    assert "does not run" in words(test)
    assert any("--zero-stage 1" in code for code in codes(test))
    test = open_page("train", gpus="8xH100", train_pp="4", stage="1: optimizer states")
    assert not test.exception
    assert not test.error
    assert "hatched is waiting" in words(test)
    test = open_page("train", gpus="8xH100,8xA100")
    assert "runs on one pool" in test.error[0].value


CAPACITY = {"model": "8b", "gpus": "4xH100", "peak": "20", "offline": "none"}


def test_capacity_needs_no_offline_work(open_page: Open, metrics: Metrics, codes: Codes) -> None:
    test = open_page("capacity", **CAPACITY)
    assert not test.exception
    assert not test.error
    assert "--batch-tokens" not in codes(test)[-1]
    assert "serves" not in metrics(test)


def test_capacity_money_is_the_month_of_the_api(open_page: Open, words: Words, metrics: Metrics) -> None:
    from advisor.recommend.day import Day, Offline, plan_day
    from advisor.recommend.month import month_of
    from advisor.ui.text import show

    test = open_page("capacity", view="Money", kwh="0.2", hosted_in="0.5", hosted_out="1.5", use="0.5", **CAPACITY)
    assert not test.exception
    request = Request(model="8b", gpus="4xH100", rate=20.0, electricity_usd_per_kwh=0.2, max_plans=40)
    day = Day(peak_requests_per_s=20.0, night_frac=0.2, peak_hour=14.0, headroom_frac=0.2)
    found = month_of(request, plan_day(request, day, Offline()))
    assert metrics(test)["Cheapest rent, a month"] == show("usd", found.bills[0].usd_per_month)
    assert found.electricity_usd is not None
    assert metrics(test)["Electricity, a month"] == show("usd", found.electricity_usd.value)
    frame: Any = next(d.value for d in test.dataframe if "provider" in d.value.columns)
    assert list(frame["a month, day and night"]) == [b.usd_per_month for b in found.bills]
    assert "hosted API" in words(test)
    # a kind of price that nobody publishes for the card: the table stays and says so
    costs: Any = open_page("capacity", view="Money", price="reserved", **CAPACITY).table[0].value
    assert set(costs["cost"]) == {"no such price known"}


def test_capacity_power_is_the_report_of_the_api(open_page: Open, words: Words, metrics: Metrics, codes: Codes) -> None:
    from advisor.cli.commands import build_parser
    from advisor.cli.parse import request_fields
    from advisor.cli.power import _terms
    from advisor.cli.serve import chosen
    from advisor.recommend.power import power

    test = open_page(
        "capacity", view="Power and energy", grid="germany", pue="1.3", rack="40", watts="9000", **CAPACITY
    )
    assert not test.exception
    command = codes(test)[-1].splitlines()[-1]
    args = build_parser().parse_args(shlex.split(command)[1:])
    assert args.command == "power"
    request = Request.model_validate(request_fields(args))
    assert request.grid_kgco2e_per_kwh == pytest.approx(0.32965)
    report = power(request, chosen(args), _terms(args))
    assert report.rack is not None
    assert metrics(test)["Nodes of 4 GPUs"] == f"{report.rack.n_nodes:,}"
    assert metrics(test)["Such deployments"] == f"{report.rack.n_deployments:,}"
    from advisor.ui.bills import advice
    from advisor.ui.text import sentence

    assert sentence(advice(report)) in words(test)
    assert "kg CO2e" in metrics(test)["Emissions, a month"]


def test_capacity_says_that_a_hosted_price_is_missing(open_page: Open) -> None:
    test = open_page("capacity", view="Money", hosted_in="0.5", **CAPACITY)
    assert not test.exception
    assert "two prices" in test.info[0].value


def report_with_cells() -> dict[str, Any]:
    """The shipped accuracy report with two left-out cells beside it."""
    from advisor.catalog import load_catalog

    regime = {"load": "closed, 1 client", "lengths": "fixed", "model": "qwen3-32b", "gpu": "h200-sxm-141gb"}
    where = {"load": "kind=closed", "lengths": "kind=fixed", "regime": regime}
    values = {"ttft_s.p50": [0.1, 0.12], "requests_per_s": [4.0, 3.0]}
    cells = [{"run_id": "r__h200__32b", "cell": i, **where, "values": values} for i in range(2)]
    return load_catalog().held_out() | {"cells": cells}


def test_trust_groups_left_out_cells_by_model_and_gpu(open_page: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_with_cells()
    monkeypatch.setattr("advisor.catalog.Catalog.held_out", lambda self: report)
    test = open_page("trust", held_row="qwen3-32b · h200-sxm-141gb", held_metric="Requests/s")
    assert not test.exception
    assert test.selectbox(key="held_by").value == "model and GPU"
    assert test.selectbox(key="held_row").value == "qwen3-32b · h200-sxm-141gb"
    assert test.selectbox(key="held_metric").value == "Requests/s"


def test_trust_without_left_out_cells_predicts_a_start_now(
    open_page: Open, monkeypatch: pytest.MonkeyPatch, words: Words
) -> None:
    report = {k: v for k, v in report_with_cells().items() if k != "cells"}
    monkeypatch.setattr("advisor.catalog.Catalog.held_out", lambda self: report)
    test = open_page("trust")
    assert not test.exception
    assert test.selectbox(key="held_by").value == "engine start"
    assert "1 of these 1 engine starts" in words(test)


def test_trust_shows_peers_and_coverage(open_page: Open) -> None:
    test = open_page("trust")
    assert not test.exception
    peers: Any = next(d.value for d in test.dataframe if "predictor" in d.value.columns)
    assert any("aiconfigurator" in p for p in peers["predictor"])
    assert any("advisor" in p for p in peers["predictor"])
    held: Any = next(d.value for d in test.dataframe if "measured values inside" in d.value.columns)
    assert (held["measured values inside"] > 0.8).all()
    kernels: Any = next(d.value for d in test.dataframe if "kernels of a step" in d.value.columns)
    assert {"matrices", "attention", "vocabulary head"} <= set(kernels["kernels of a step"])
    assert (kernels["steps"] > 0).all()
    assert 0 < kernels["median error"].min() < 0.05
    test.multiselect(key="origin").set_value(["published source"]).run()
    frame: Any = next(d.value for d in test.dataframe if "coefficient" in d.value.columns)
    assert 0 < len(frame) < 10


def test_audit_judges_one_figure_of_a_form_as_the_command_line_does(open_page: Open, words: Words) -> None:
    import tomllib

    from advisor.catalog import load_catalog
    from advisor.recommend.audit import audit
    from advisor.schema.claims import ClaimsFile

    query = {"claims": "one figure", "model": "8b", "gpus": "1xH100", "figure": "Board power, one GPU [W]"}
    test = open_page("audit", value="5000", **query)
    assert not test.exception
    assert not test.error
    text = """title = "One figure"
[setup]
model = "llama-3.1-8b"
gpu = "h100-sxm-80gb"
n_gpus = 1
weight_dtype = "bf16"
backend = "vllm"
[[figures]]
id = "figure"
text = "x"
quantity = "board_power_w_per_gpu"
value = 5000.0
"""
    (found,) = audit(ClaimsFile.model_validate(tomllib.loads(text)), load_catalog()).findings
    assert found.verdict in words(test)
    assert found.verdict != "consistent"
    assert "5.00 kW" in words(test)


def test_audit_shows_one_claim_or_one_verdict(open_page: Open, words: Words) -> None:
    test = open_page("audit")
    every = words(test)
    one = next(o for o in test.selectbox(key="claim").options if o.startswith("vllm-qps"))
    test.selectbox(key="claim").set_value(one).run()
    assert not test.exception
    assert "12.3 requests/s" in words(test)
    assert len(words(test)) < 0.3 * len(every)
    test.multiselect(key="verdicts").set_value(["impossible"]).run()
    assert "No claim has this verdict" in test.info[0].value


def upload(test: AppTest, name: str, content: bytes) -> AppTest:
    test.file_uploader(key="records").set_value((name, content, "application/jsonl")).run()
    return test


def records(n: int) -> bytes:
    from advisor.catalog.files import data_root

    file = data_root() / "runs" / "vllm-0.26.0_h100-2.jsonl"
    return b"".join(file.read_bytes().splitlines(keepends=True)[:n])


def test_calibrate_refits_an_upload_and_shows_what_changed(
    open_page: Open, words: Words, metrics: Metrics, codes: Codes
) -> None:
    import hashlib

    from advisor.ui import jobs

    test = upload(open_page("calibrate"), "mine.jsonl", records(4))
    assert not test.exception
    assert "TTFT P50, median error" in metrics(test)
    commands = codes(test)[-1].splitlines()
    assert commands == ["advisor validate mine.jsonl", "advisor fit mine.jsonl --out ."]
    test.button(key="refit").click().run()
    assert not test.exception
    job = jobs.find(hashlib.sha256(records(4)).hexdigest() + "this host: 2 factors")
    assert job is not None
    found = job.result()
    test.run()
    assert not test.exception
    frame: Any = next(d.value for d in test.dataframe if "as shipped" in d.value.columns)
    assert len(frame) >= 3  # four short cells have no throughput of their own
    assert f"on {found.n_cells} cells" in words(test)
    changes: Any = next(d.value for d in test.dataframe if "after low" in d.value.columns)
    assert list(changes["after"]) == [c.after for c in found.changes]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"not json", "line 1 is not one whole JSON object"),
        (b'{"schema": 1}', "field required"),
        (b"\xff\xfe", "not UTF-8"),
        (b"", "no run record"),
    ],
)
def test_calibrate_answers_a_bad_upload_with_a_sentence(open_page: Open, content: bytes, why: str) -> None:
    test = upload(open_page("calibrate"), "<b>x.jsonl", content)
    assert not test.exception
    assert why in test.error[0].value.replace("\\", "")
    assert "<b>" not in test.error[0].value.replace("\\<", "")


def test_calibrate_leaves_large_files_to_the_command_line(open_page: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advisor.ui.pages.calibrate.MAX_REFIT_CELLS", 2)
    test = upload(open_page("calibrate"), "mine.jsonl", records(3))
    assert not test.exception
    assert "too many for a quick refit" in test.info[0].value
    assert not test.button
