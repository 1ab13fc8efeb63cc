"""Days on one budget: the training job takes the GPUs that serve the day best."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from advisor.catalog import load_catalog
from advisor.errors import DomainError
from advisor.recommend import day, ways
from advisor.recommend.answer import recommend
from advisor.recommend.ask import ask
from advisor.recommend.day import Day, DayPlan, Offline, plan_day, replicas_for
from advisor.recommend.kept import forget
from advisor.recommend.restart import PAGEABLE_SHARE, restart_s
from advisor.schema import Deployment, Request
from advisor.schema.mixed import START_S

RUNS = Path(__file__).resolve().parents[2] / "data" / "runs"

DAY = Day(peak_requests_per_s=20.0, night_frac=0.2, peak_hour=14.0, headroom_frac=0.2)
TOKENS = 200_000_000


def plan(**more: int) -> DayPlan:
    request = Request(model="llama-3.1-8b", gpus="8xH100", rate=20, n_finalists=1)
    return plan_day(request, DAY, Offline.model_validate({"train_tokens": TOKENS} | more))


def test_training_does_not_ask_for_a_whole_node_that_serving_never_leaves() -> None:
    found = plan()
    best = found.answer.plan(found.answer.best)
    (job,) = found.jobs
    assert best.meets_all
    used = {h.job_gpus["training"] for h in best.hours} - {0}
    assert used
    assert max(used) < 8
    assert all("ZeRO-" in way.plan for way in job.ways)
    # by hand: the work is done in the hours in which the job has its GPUs
    done = sum(hour.job_tokens["training"] for hour in best.hours)
    assert done == pytest.approx(TOKENS)
    assert used <= {way.n_gpus for way in job.ways}
    assert max(hour.serving_gpus + hour.job_gpus["training"] for hour in best.hours) <= 8
    whole = plan(train_gpus=8)
    assert not whole.answer.plan(whole.answer.best).meets_all


def test_more_gpus_than_a_node_are_refused_with_the_most_that_are_taken() -> None:
    with pytest.raises(DomainError, match="got 16; use at most 8"):
        plan(train_gpus=16)


def records(pattern: str) -> list[dict]:
    return [json.loads(line) for path in sorted(RUNS.glob(pattern)) for line in path.read_text().splitlines()]


def test_a_start_takes_what_nine_of_ten_of_our_starts_took() -> None:
    found = {r["run_id"]: s for r in records("vllm-*.jsonl") if (s := r.get("startup") or {}).get("startup_s")}
    waits = [s["startup_s"] - (s.get("weights_load_s") or 0.0) for s in found.values()]
    assert pytest.approx(np.quantile(waits, 0.9), rel=0.1) == START_S


def test_weights_leave_host_memory_at_the_measured_rate() -> None:
    rates = [
        r["measured"]["bytes_per_s"]
        for r in records("micro-*.jsonl")
        if r["load"].get("what") == "host_to_device" and not r["load"]["is_pinned"]
    ]
    catalog = load_catalog()
    gpu, (model, _) = catalog.gpu("h100-sxm-80gb"), catalog.model("llama-3.1-70b")
    assert pytest.approx(np.median(rates), rel=0.05) == PAGEABLE_SHARE * gpu.host_link_bytes_per_s
    # by hand: a quarter of 70.55e9 parameters of two bytes at 16 GB/s a GPU
    whole = restart_s(model, Deployment(model=model.name, gpu=gpu.name, tp=4), gpu)
    assert whole - START_S == pytest.approx(70.55e9 / 4 * 2 / 16e9, rel=0.01)


def test_the_answer_says_what_a_start_is_made_of_unless_the_user_said_it() -> None:
    found = plan(train_gpus=2)
    assert sum("a start is counted with 95" in line for line in found.answer.why) == 1
    request = Request(model="llama-3.1-8b", gpus="8xH100", rate=20, n_finalists=1)
    own = plan_day(request, DAY.model_copy(update={"restart_s": 40.0}), Offline(train_tokens=TOKENS, train_gpus=2))
    assert not any("a start is counted" in line for line in own.answer.why)
    assert any("starts of 40.0 s counted" in line or "start of 40.0 s counted" in line for line in own.answer.why)


def test_another_night_replays_nothing_and_changes_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(model="llama-3.1-8b", gpus="4xH100", n_finalists=1)
    wanted = Offline(batch_tokens=TOKENS, train_tokens=TOKENS)
    forget()
    darker = DAY.model_copy(update={"night_frac": 0.5})
    fresh = plan_day(request, darker, wanted)
    forget()
    first = plan_day(request, DAY, wanted)
    made: list[str] = []
    for module, name in ((day, "max_rate"), (ways, "best_job"), (ways, "forecast")):
        monkeypatch.setattr(module, name, lambda *_, _name=name, **__: made.append(_name))
    second = plan_day(request, darker, wanted)
    assert made == []
    assert second == fresh
    assert (second.jobs, second.replica) == (first.jobs, first.replica)
    assert second.answer != first.answer


def test_a_day_asks_for_no_more_than_its_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(model="llama-3.1-8b", gpus="2xH100", rate=4, n_finalists=1)
    best = recommend(request.model_copy(update={"backends": ("vllm",)})).best
    assert best is not None
    monkeypatch.setattr("advisor.recommend.answer.flips", lambda *_: pytest.fail("nobody reads what would flip it"))
    first, *smaller = replicas_for(ask(request, load_catalog()))
    assert first == best.deployment.model_copy(update={"dp": 1})
    assert all(d.n_gpus < first.n_gpus for d in smaller)
