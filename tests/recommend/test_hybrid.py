"""The mixed plan's invariants: never over budget, work conserved, deadlines met or the shortfall stated."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.errors import DomainError
from advisor.recommend.hybrid import daily_load, fewest_gpus, plan_mixed, replicas_needed, schedule, slo_capacity
from advisor.schema.mixed import HOURS, MixedPlan, OfflineJob, OnlineNeed
from advisor.units import HOUR_S

RATES = st.lists(st.floats(0, 50), min_size=HOURS, max_size=HOURS).map(tuple)


@st.composite
def needs(draw: st.DrawFn) -> OnlineNeed:
    return OnlineNeed(
        requests_per_s=draw(RATES),
        gpus_per_replica=draw(st.sampled_from([1, 2, 4, 8])),
        capacity_requests_per_s=draw(st.floats(0.5, 20)),
        headroom_frac=draw(st.floats(0, 0.5)),
        min_replicas=draw(st.integers(0, 2)),
        board_power_w_per_gpu=500,
    )


@st.composite
def job_lists(draw: st.DrawFn) -> list[OfflineJob]:
    return [
        OfflineJob(
            name=f"job{i}",
            kind=draw(st.sampled_from(["batch", "train"])),
            backend="deepspeed-train",
            total_tokens=draw(st.floats(1e3, 1e10)),
            gpus_per_group=draw(st.integers(1, 8)),
            tokens_per_s_per_group=draw(st.floats(10, 1e5)),
            max_groups=draw(st.integers(1, 8)),
            deadline_hour=draw(st.integers(1, 72)),
            board_power_w_per_gpu=600,
        )
        for i in range(draw(st.integers(0, 3)))
    ]


def check(plan: MixedPlan, need: OnlineNeed, jobs: list[OfflineJob], n_gpus: int) -> None:
    for hour in plan.hours:
        assert hour.serving_gpus + sum(hour.job_gpus.values()) + hour.idle_gpus == n_gpus
        assert hour.idle_gpus >= 0
        for job in jobs:
            groups, rest = divmod(hour.job_gpus[job.name], job.gpus_per_group)
            assert rest == 0
            assert groups <= job.max_groups
            assert hour.job_tokens[job.name] <= groups * job.tokens_per_s_per_group * HOUR_S * (1 + 1e-9)
        load = need.requests_per_s[hour.hour % HOURS]
        served = hour.n_replicas * need.capacity_requests_per_s
        assert hour.unserved_requests_per_s == pytest.approx(max(0.0, load - served))
    for job in jobs:
        done = sum(h.job_tokens[job.name] for h in plan.hours)
        by_deadline = sum(h.job_tokens[job.name] for h in plan.hours[: job.deadline_hour])
        assert done <= job.total_tokens * (1 + 1e-9)
        assert plan.shortfall_tokens[job.name] == pytest.approx(job.total_tokens - by_deadline, rel=1e-6, abs=1e-3)
        if plan.finish_hour[job.name] is not None:
            assert done == pytest.approx(job.total_tokens, rel=1e-6)
    late = any(v > 0 for v in plan.shortfall_tokens.values())
    over = any(h.unserved_requests_per_s > 0 for h in plan.hours)
    assert plan.meets_all == (not late and not over)
    assert bool([n for n in plan.notes if n.level == "error"]) == (not plan.meets_all)
    assert plan.energy_j == pytest.approx(sum(h.energy_j for h in plan.hours))


@settings(max_examples=60)
@given(need=needs(), jobs=job_lists(), n_gpus=st.integers(1, 64), mode=st.sampled_from(["share", "split"]))
def test_budget_work_and_deadlines(need: OnlineNeed, jobs: list[OfflineJob], n_gpus: int, mode: str) -> None:
    plan = schedule(n_gpus, need, jobs, mode, idle_power_w=70)  # type: ignore[arg-type]
    check(plan, need, jobs, n_gpus)


@settings(max_examples=30)
@given(need=needs(), jobs=job_lists(), n_gpus=st.integers(1, 64))
def test_sharing_never_serves_less_and_without_switching_never_works_less(
    need: OnlineNeed, jobs: list[OfflineJob], n_gpus: int
) -> None:
    share, split = (schedule(n_gpus, need, jobs, m, switch_s=0.0) for m in ("share", "split"))
    assert sum(h.unserved_requests_per_s for h in share.hours) == pytest.approx(
        sum(h.unserved_requests_per_s for h in split.hours), abs=1e-9
    )
    one = jobs[:1]
    alone = [schedule(n_gpus, need, one, m, switch_s=0.0) for m in ("share", "split")]
    if one:
        assert alone[0].shortfall_tokens["job0"] <= alone[1].shortfall_tokens["job0"] + 1e-6


NEED = OnlineNeed(requests_per_s=daily_load(40.0), gpus_per_replica=4, capacity_requests_per_s=6.0)
BATCH = OfflineJob(name="batch", backend="vllm", total_tokens=3e8, gpus_per_group=4, tokens_per_s_per_group=1500)


def test_the_fewest_gpus_meet_all_and_one_less_does_not() -> None:
    for mode in ("share", "split"):
        n = fewest_gpus(NEED, [BATCH], mode)  # type: ignore[arg-type]
        assert n is not None
        assert schedule(n, NEED, [BATCH], mode).meets_all  # type: ignore[arg-type]
        peak = max(replicas_needed(NEED, h) for h in range(HOURS)) * NEED.gpus_per_replica
        assert n == peak or not schedule(n - 1, NEED, [BATCH], mode).meets_all  # type: ignore[arg-type]
    heavy = BATCH.model_copy(update={"total_tokens": 1.2e9})
    n = fewest_gpus(NEED, [heavy], "share")
    assert n is not None
    assert n > peak
    assert not schedule(n - 1, NEED, [heavy], "share").meets_all


def test_a_daily_curve_makes_sharing_cheaper_and_a_flat_one_does_not() -> None:
    answer = plan_mixed(64, NEED, [BATCH], usd_per_gpu_h=2.0, idle_power_w=70)
    assert answer.best == "share"
    assert answer.plan("share").min_gpus < answer.plan("split").min_gpus  # type: ignore[operator]
    assert any("saves" in line and "$" in line for line in answer.why)
    flat = NEED.model_copy(update={"requests_per_s": (40.0,) * HOURS})
    assert plan_mixed(64, flat, [BATCH]).best == "split"


def test_cost_and_energy_by_hand() -> None:
    need = OnlineNeed(
        requests_per_s=(1.0,) * HOURS,
        gpus_per_replica=1,
        capacity_requests_per_s=2.0,
        headroom_frac=0.0,
        board_power_w_per_gpu=500,
    )
    plan = schedule(2, need, [], "split", usd_per_gpu_h=3.0, idle_power_w=100)
    # one GPU serves at half its capacity (300 W), one idles (100 W), for a day
    assert plan.usd == 2 * 3.0 * 24
    assert plan.energy_j == pytest.approx(400 * 24 * HOUR_S)
    assert plan.idle_gpu_hours == 24


def test_the_earlier_deadline_goes_first() -> None:
    short = BATCH.model_copy(update={"total_tokens": 5e7})
    late, soon = (short.model_copy(update={"name": n, "deadline_hour": d}) for n, d in (("late", 24), ("soon", 6)))
    plan = schedule(40, NEED, [late, soon], "share")
    assert plan.finish_hour["soon"] < plan.finish_hour["late"]  # type: ignore[operator]


def test_risks_are_said() -> None:
    tuning = BATCH.model_copy(update={"name": "tune", "kind": "train"})
    notes = " ".join(n.text for n in schedule(48, NEED, [tuning], "share").notes)
    assert "checkpoint" in notes
    assert "change" in notes


@given(st.floats(0.01, 1000))
def test_the_slo_capacity_is_found_within_two_percent(limit: float) -> None:
    found = slo_capacity(lambda rate: rate <= limit, 1000.0)
    assert limit * 0.97 - 0.03 <= found <= limit or found == 1000.0 >= limit


def test_bad_input_is_named() -> None:
    with pytest.raises(DomainError, match="at least one GPU"):
        schedule(0, NEED, [], "share")
    with pytest.raises(DomainError, match="names must differ"):
        schedule(8, NEED, [BATCH, BATCH], "share")
    with pytest.raises(DomainError, match="night_frac"):
        daily_load(1.0, night_frac=2.0)
    with pytest.raises(DomainError, match="headroom"):
        replicas_needed(NEED.model_copy(update={"headroom_frac": 1.0}), 0)
