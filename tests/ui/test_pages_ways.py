"""What the API knows of ways of working stands on the pages: offline work by the hour, 4-bit weights, a moved cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from advisor.recommend.day import Day, Offline, plan_day
from advisor.recommend.offline import ways_used
from advisor.schema import Deployment, Request
from advisor.ui import charts, parts, shifts
from advisor.ui.text import plain

Open = Callable[..., AppTest]
Words = Callable[[AppTest], str]
ASKED = {"model": "llama-3.1-8b", "gpus": "4xH100", "peak": "5", "offline": "both", "train_gpus": "2"}
INT4 = {"model": "qwen3-32b", "gpus": "1xL40S", "workload": "batch", "weights": "int4"}


def table(test: AppTest, head: str) -> Any:
    return next(d.value for d in (*test.dataframe, *test.table) if head in d.value.columns)


def test_capacity_says_which_engine_runs_each_job_in_which_hours_and_why(open_page: Open, words: Words) -> None:
    test = open_page("capacity", **ASKED)
    day = Day(peak_requests_per_s=5.0, night_frac=0.2, peak_hour=14.0, headroom_frac=0.2)
    wanted = Offline(batch_tokens=50_000_000, train_tokens=100_000_000, train_gpus=2, train_model="llama-3.1-8b")
    request = Request(model="llama-3.1-8b", gpus="4xH100", max_plans=40, rate=5.0)
    found = plan_day(request, day, wanted)
    plan, rows, text = found.answer.plan(found.answer.best), table(test, "in hours"), words(test)
    assert set(rows["job"]) == {"batch", "training"}
    for job in found.jobs:
        used = [u for u in ways_used(plan, job, day.restart_s) if u.gpu_hours]
        mine = rows[rows["job"] == job.name]
        assert list(mine["GPU hours"]) == [u.gpu_hours for u in used]
        # by hand: GPU hours are the GPUs of each hour, summed
        assert sum(mine["GPU hours"]) == sum(h.job_gpus[job.name] for h in plan.hours)
        busy = [h.hour for h in plan.hours if h.job_gpus[job.name]]
        assert f"{busy[0]}" in next(iter(mine["in hours"])).split()
        for u in ways_used(plan, job, day.restart_s):
            assert not u.why or plain(u.why) in text
    assert f"done at hour {plan.finish_hour['batch']:.1f}, due at hour 24" in text
    # told once, not again as sentences
    assert "GPU hour by vllm" not in text
    assert not test.exception


@pytest.mark.parametrize("mode", ["shared by the hour", "split for the day"])
def test_the_hours_of_ways_add_up_to_those_of_their_jobs(mode: str) -> None:
    day = Day(peak_requests_per_s=9.0, night_frac=0.1, peak_hour=14.0, headroom_frac=0.2)
    found = plan_day(Request(model="llama-3.1-8b", gpus="4xL40S", n_finalists=1), day, Offline(batch_tokens=10**8))
    plan = found.answer.plan("share" if mode.startswith("shared") else "split")
    by_way = shifts.gpus_by_way(plan, found.jobs)
    for i, hour in enumerate(plan.hours):
        assert sum(counts[i] for counts in by_way.values()) == hour.job_gpus["batch"]


def test_the_hours_of_a_job_are_told_in_spans() -> None:
    assert shifts.hours_text([0, 1, 1, 0, 0, 1]) == "1 to 2, 5"
    assert shifts.hours_text([2, 2, 1, 0]) == "0 to 1 (2 groups), 2 (1 group)"
    assert shifts.hours_text([0, 0]) == ""


def test_4_bit_plans_are_found_and_named(open_page: Open, words: Words) -> None:
    test = open_page("recommend", **INT4)
    row = table(test, "targets").iloc[0]
    assert (row["weights"], row[parts.OFF_GPU]) == ("int4", "weights in host memory")
    text = words(test)
    assert "int4 · weights in host memory" in text
    assert "Not on the GPU: weights in host memory. That takes 101 GB" in text.replace("\\", "")
    assert "--weight-dtype int4" in test.code[-1].value


def test_the_cache_of_zero_inference_moves_to_the_host_on_the_page(open_page: Open, words: Words) -> None:
    before, after = (open_page("recommend", **INT4, **more) for more in ({}, {"cache": "in host memory"}))
    assert "weights and KV cache in host memory" not in words(before)
    assert "weights and KV cache in host memory · batch 128" in words(after)
    assert "--kv-offload cpu" in after.code[-1].value
    assert 'cache_implementation="offloaded"' in "".join(c.value for c in after.code)
    assert not after.exception


def test_where_weights_and_cache_rest_is_named() -> None:
    base = Deployment(backend="deepspeed-zero-inference", model="m", gpu="g", static_batch=8)
    named = {
        ("none", "none"): "",
        ("cpu", "none"): "weights in host memory",
        ("cpu", "cpu"): "weights and KV cache in host memory",
        ("nvme", "cpu"): "weights on NVMe, KV cache in host memory",
        ("none", "cpu"): "KV cache in host memory",
    }
    for (offload, cache), text in named.items():
        d = base.model_copy(update={"offload": offload, "kv_offload": cache})
        assert charts.held_off_gpu(d) == text
        assert text in charts.layout(d)


def test_compare_shows_host_memory_only_where_some_is_taken(open_page: Open) -> None:
    taken, none = open_page("compare", **INT4), open_page("compare", model="8b", gpus="2xL40S", load="rate", rate="2")
    assert "Host memory per GPU" in set(table(taken, "quantity")["quantity"])
    assert "Host memory per GPU" not in set(table(none, "quantity")["quantity"])
