"""The mixed plan's invariants: never over budget, work conserved, deadlines met or the shortfall stated."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.errors import DomainError
from advisor.recommend.hybrid import daily_load, fewest_gpus, plan_mixed, replicas_needed, schedule
from advisor.recommend.offline import worked_how
from advisor.schema.mixed import HOURS, MixedPlan, OfflineJob, OnlineNeed, Way
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
def job_lists(draw: st.DrawFn, most: int = 3) -> list[OfflineJob]:
    return [
        OfflineJob(
            name=f"job{i}",
            kind=draw(st.sampled_from(["batch", "train"])),
            ways=tuple(
                Way(
                    backend=f"way{k}",
                    n_gpus=draw(st.integers(1, 8)),
                    tokens_per_s=draw(st.floats(10, 1e5)),
                    board_power_w_per_gpu=600,
                )
                for k in range(draw(st.integers(1, 3)))
            ),
            total_tokens=draw(st.floats(1e3, 1e10)),
            max_groups=draw(st.sampled_from([1, 2, 8, 10**6])),
            deadline_hour=draw(st.integers(1, 72)),
        )
        for i in range(draw(st.integers(0, most)))
    ]


def with_engine(jobs: list[OfflineJob], need: OnlineNeed) -> list[OfflineJob]:
    """Return the jobs, of the first the first way that of the serving engines."""
    if not jobs:
        return jobs
    first = jobs[0].ways[0].model_copy(update={"n_gpus": need.gpus_per_replica, "is_serving_engine": True})
    return [jobs[0].model_copy(update={"ways": (first, *jobs[0].ways[1:])}), *jobs[1:]]


def check(plan: MixedPlan, need: OnlineNeed, jobs: list[OfflineJob], n_gpus: int) -> None:
    for hour in plan.hours:
        assert hour.serving_gpus + sum(hour.job_gpus.values()) + hour.idle_gpus == n_gpus
        assert hour.idle_gpus >= 0
        for job in jobs:
            groups = hour.job_groups[job.name]
            assert hour.job_gpus[job.name] == sum(n * w.n_gpus for n, w in zip(groups, job.ways, strict=True))
            assert sum(groups) <= job.max_groups
            assert hour.job_starts[job.name] <= sum(groups)
            most = sum(n * w.tokens_per_s for n, w in zip(groups, job.ways, strict=True)) * HOUR_S
            assert hour.job_tokens[job.name] <= most * (1 + 1e-9)
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
    jobs = with_engine(jobs, need)
    plan = schedule(n_gpus, need, jobs, mode, idle_power_w=70)  # type: ignore[arg-type]
    check(plan, need, jobs, n_gpus)


@settings(max_examples=40)
@given(need=needs(), jobs=job_lists(1), n_gpus=st.integers(1, 64))
def test_sharing_serves_as_much_and_with_free_restarts_works_no_less_and_costs_no_more(
    need: OnlineNeed, jobs: list[OfflineJob], n_gpus: int
) -> None:
    jobs = with_engine(jobs, need)
    share, split = (schedule(n_gpus, need, jobs, m, switch_s=0.0) for m in ("share", "split"))
    assert sum(h.unserved_requests_per_s for h in share.hours) == pytest.approx(
        sum(h.unserved_requests_per_s for h in split.hours), abs=1e-9
    )
    for job in jobs:
        assert share.shortfall_tokens[job.name] <= split.shortfall_tokens[job.name] * (1 + 1e-9) + 1e-6
    fewest = [fewest_gpus(need, jobs, m, switch_s=0.0, highest=256) for m in ("share", "split")]
    if fewest[1] is not None:
        assert fewest[0] is not None
        assert fewest[0] <= fewest[1]


@settings(max_examples=40)
@given(need=needs(), jobs=job_lists(1), n_gpus=st.integers(1, 64), switch_s=st.floats(0, 3600))
def test_a_job_with_more_ways_does_no_less_by_its_deadline(
    need: OnlineNeed, jobs: list[OfflineJob], n_gpus: int, switch_s: float
) -> None:
    for job in with_engine(jobs, need):
        fewer = job.model_copy(update={"ways": job.ways[:1]})
        late = [
            schedule(n_gpus, need, [j], "share", switch_s=switch_s).shortfall_tokens[job.name] for j in (job, fewer)
        ]
        if job.deadline_hour <= HOURS:
            assert late[0] <= late[1] * (1 + 1e-9) + 1e-6


NEED = OnlineNeed(requests_per_s=daily_load(40.0), gpus_per_replica=4, capacity_requests_per_s=6.0)
ENGINE = Way(backend="vllm", plan="4 GPUs (TP 4)", n_gpus=4, tokens_per_s=1500, is_serving_engine=True)
BATCH = OfflineJob(name="batch", ways=(ENGINE,), total_tokens=3e8)
STEPS = (20.0,) * 8 + (40.0,) * 16
"""A night of eight hours at half the day's load."""


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


def night(**more: Any) -> tuple[OnlineNeed, OfflineJob]:
    """Return one replica of 4 GPUs by night and two by day, and a queue that never ends."""
    need = OnlineNeed(requests_per_s=STEPS, gpus_per_replica=4, capacity_requests_per_s=25.0, headroom_frac=0.0)
    return need, BATCH.model_copy(update={"total_tokens": 1e12} | more)


def test_engines_that_the_load_lets_go_work_without_a_restart() -> None:
    need, job = night(deadline_hour=48)
    hours = schedule(8, need, [job], "share", switch_s=600).hours
    # by hand: 4 GPUs are free in hours 0 to 7 and 24 to 31; only the very first engine starts
    assert [h.hour for h in hours if h.job_gpus["batch"]] == [*range(8), *range(24, 32)]
    assert hours[0].job_tokens["batch"] == pytest.approx(1500 * 3000)
    assert all(h.job_tokens["batch"] == pytest.approx(1500 * 3600) for h in hours[1:8] + hours[24:32])
    assert sum(h.job_starts["batch"] for h in hours) == 1


def test_another_plan_is_taken_where_its_gain_pays_the_restarts_and_its_way_back_is_counted() -> None:
    faster = Way(backend="vllm", plan="2 GPUs (TP 2)", n_gpus=2, tokens_per_s=1000)
    need, job = night(ways=(ENGINE, faster), deadline_hour=48)
    # by hand, a night: the engine does 8 h x 1500; two groups of 2 GPUs do 8 h x 2000 less one start, and less
    # the time in which replicas start for hour 8 on their GPUs
    plan = schedule(8, need, [job], "share", switch_s=600)
    night_two = plan.hours[24:32]
    assert {h.job_groups["batch"] for h in night_two} == {(0, 2)}
    assert sum(h.job_tokens["batch"] for h in night_two) == pytest.approx(2000 * (8 * 3600 - 2 * 600))
    assert any("33% more compared with the engines that serve" in line for line in worked_how(plan, job, 600))
    # with 50 min a start nothing is gained: 8 h x 1500 of an engine without a start against 6.33 h x 1800
    slower = job.model_copy(update={"ways": (ENGINE, faster.model_copy(update={"tokens_per_s": 900}))})
    later = need.model_copy(update={"requests_per_s": STEPS[8:12] + STEPS[:8] + STEPS[12:]})
    slow = schedule(8, later, [slower], "share", switch_s=3000)
    assert {h.job_groups["batch"] for h in slow.hours[4:12]} == {(1, 0)}
    assert any("does not pay 50.0 min a start" in line for line in worked_how(slow, slower, 3000))


def test_gpus_too_few_for_a_replica_work_in_a_plan_of_their_own() -> None:
    alone = Way(backend="deepspeed-zero-inference", plan="1 GPU (weights on cpu)", n_gpus=1, tokens_per_s=20)
    need, job = night(ways=(ENGINE, alone))
    plan = schedule(11, need, [job], "split")
    assert {h.job_groups["batch"] for h in plan.hours} == {(0, 3)}
    assert any("deepspeed-zero-inference" in line and "too few GPUs" in line for line in worked_how(plan, job, 300))


def test_training_takes_another_number_of_gpus_where_the_night_frees_them() -> None:
    ways = tuple(Way(backend="deepspeed-train-zero2", n_gpus=n, tokens_per_s=1000.0 * n) for n in (1, 2, 4, 8))
    need, job = night(name="tune", kind="train", ways=ways, max_groups=1)
    plan = schedule(12, need, [job], "share", switch_s=300)
    assert [h.job_gpus["tune"] for h in plan.hours] == [8] * 8 + [4] * 16
    assert "universal checkpoint" in " ".join(n.text for n in plan.notes)
    assert "universal checkpoint" not in " ".join(n.text for n in schedule(12, need, [job], "split").notes)


def test_a_job_that_never_runs_says_what_it_lacks() -> None:
    need, job = night()
    plan = schedule(8, need, [job], "split")
    assert worked_how(plan, job, 300) == ["batch does not run: it needs 4 GPUs at once, none is ever free"]


def test_bad_input_is_named() -> None:
    with pytest.raises(DomainError, match="at least one GPU"):
        schedule(0, NEED, [], "share")
    with pytest.raises(DomainError, match="names must differ"):
        schedule(8, NEED, [BATCH, BATCH], "share")
    with pytest.raises(DomainError, match="night_frac"):
        daily_load(1.0, night_frac=2.0)
    with pytest.raises(DomainError, match="headroom"):
        replicas_needed(NEED.model_copy(update={"headroom_frac": 1.0}), 0)
