"""What is kept between answers: nothing is replayed twice, and no answer depends on what was asked before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from advisor.predict import serving
from advisor.recommend import answer, flips_load, forecast, kept, recommend
from advisor.schema import Recommendation, Request, Slo, Target

REQUEST = Request(model="llama-3.1-8b", gpus="2xL40S", n_finalists=3)
SLO = Slo(
    targets=(Target(metric="ttft", statistic="p99", max_s=0.8), Target(metric="tpot", statistic="p99", max_s=0.2))
)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The replays of a test, by their number of requests; it starts and leaves with nothing kept."""
    kept.forget()
    made: list[int] = []
    real = serving.simulate

    def counted(*given: Any, **more: Any) -> Any:
        made.append(len(given[2].prompt_tokens))
        return real(*given, **more)

    monkeypatch.setattr(serving, "simulate", counted)
    yield made
    kept.forget()


def shown(answer: Recommendation) -> dict[str, Any]:
    return answer.model_dump(mode="json")


def counted(replays: list[int], changed: Request) -> tuple[int, int]:
    """Return the replays of a question asked after `REQUEST`, and in a fresh process; both answers must be the same."""
    recommend(REQUEST)
    replays.clear()
    after = recommend(changed)
    n_after = len(replays)
    kept.forget()
    replays.clear()
    assert shown(recommend(changed)) == shown(after)
    return n_after, len(replays)


def test_the_same_question_replays_nothing_again(replays: list[int]) -> None:
    first = recommend(REQUEST)
    assert replays
    replays.clear()
    assert shown(recommend(REQUEST)) == shown(first)
    assert not replays


@pytest.mark.parametrize(
    "change",
    [{"slo": SLO}, {"price_usd_per_gpu_h": 9.0}, {"electricity_usd_per_kwh": 0.3}, {"objective": "throughput"}],
)
def test_what_no_replay_depends_on_replays_only_new_plans(replays: list[int], change: dict[str, Any]) -> None:
    """The answer is the one of a fresh process; replays come only from plans or loads that were not looked at."""
    n_after, n_fresh = counted(replays, REQUEST.model_copy(update=change))
    assert n_after < n_fresh


@pytest.mark.parametrize("change", [{"seed": 7}, {"model": "llama-3.2-1b"}, {"engine_version": "0.11.0"}])
def test_what_a_replay_depends_on_is_replayed_anew(replays: list[int], change: dict[str, Any]) -> None:
    n_after, n_fresh = counted(replays, REQUEST.model_copy(update=change))
    assert n_after == n_fresh


def test_few_results_are_kept_the_ones_used_last_and_no_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "N_VALUES", 2)
    some = kept.Kept()
    assert some.get(1, lambda: 10) == 10
    assert some.get(2, lambda: 20) == 20
    assert some.get(1, lambda: 0) == 10
    assert some.get(3, lambda: 30) == 30
    assert some.get(1, lambda: 0) == 10, "used after 2"
    assert some.get(2, lambda: 0) == 0, "given up for 3"

    def fail() -> int:
        raise ValueError

    with pytest.raises(ValueError):
        some.get(9, fail)
    assert some.get(9, lambda: 1) == 1


def test_what_is_large_is_given_and_not_kept() -> None:
    some = kept.Kept()
    assert some.get("a", lambda: 9, lambda made: made < 5) == 9
    assert some.get("a", lambda: 3, lambda made: made < 5) == 3
    assert some.get("a", lambda: 4) == 3


def test_a_long_replay_is_not_kept(replays: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "MAX_KEPT_REQUESTS", 10)
    first = recommend(REQUEST)
    n = len(replays)
    assert shown(recommend(REQUEST)) == shown(first)
    assert len(replays) == 2 * n


def test_few_models_are_kept() -> None:
    kept.forget()
    first = kept.kept_for("a", (1, 2))
    assert kept.kept_for("a", (1, 2)) is first
    others = [kept.kept_for(n) for n in range(kept.N_BASES)]
    assert kept.kept_for(kept.N_BASES - 1) is others[-1]
    assert kept.kept_for("a", (1, 2)) is not first
    kept.forget()


@pytest.mark.parametrize(("model", "gpus"), [("70b", "8xA100"), ("llama-3.1-8b", "4xA100")])
def test_replaying_the_cheapest_first_finds_the_same_changes(
    replays: list[int], monkeypatch: pytest.MonkeyPatch, model: str, gpus: str
) -> None:
    request = Request(model=model, gpus=gpus, n_finalists=3)
    few = recommend(request)
    n_few = len(replays)
    kept.forget()
    replays.clear()
    monkeypatch.setattr(flips_load._Rivals, "_by_price", lambda self, rows, workload: [[*rows]])
    monkeypatch.setattr(flips_load, "MAX_REPLAYS", 40)
    assert answer.recommend(request).flips == few.flips
    assert n_few <= len(replays)
