"""Days on one budget: the training job takes the GPUs that serve the day best."""

from __future__ import annotations

import pytest

from advisor.catalog import load_catalog
from advisor.errors import DomainError
from advisor.recommend import day, ways
from advisor.recommend.answer import recommend
from advisor.recommend.ask import ask
from advisor.recommend.day import Day, DayPlan, Offline, plan_day, replicas_for
from advisor.recommend.kept import forget
from advisor.schema import Request

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
