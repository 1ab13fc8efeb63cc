"""The choice of a training job: legal, fitting, ranked, explained."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest

from advisor.catalog import load_catalog
from advisor.emit.deepspeed_training import training_config
from advisor.errors import DomainError
from advisor.predict.deepspeed_config import check_ds_config
from advisor.predict.train import feasible_train
from advisor.recommend.training import complexity, recommend_training, training_jobs
from advisor.recommend.training_flips import is_tight
from advisor.schema import Cluster
from advisor.schema.training import TrainAnswer

CATALOG = load_catalog()
COEFFICIENTS = CATALOG.coefficients("deepspeed")
H100 = Cluster(gpu=CATALOG.gpu("h100-sxm-80gb"), gpus_per_node=8)


def answer(model: str, cluster: Cluster = H100, **more: object) -> TrainAnswer:
    settings = {"global_batch": 64} | more
    return recommend_training(CATALOG.model(model)[0], cluster, COEFFICIENTS, **settings)  # type: ignore[arg-type]


def test_every_job_is_one_that_deepspeed_takes() -> None:
    model = CATALOG.model("llama-2-7b")[0]
    jobs = list(training_jobs(model, H100, global_batch=64, sequence_length=2048))
    assert len(jobs) > 200
    for job in jobs:
        assert job.n_gpus == 8
        assert job.train_batch_size == 64
        assert check_ds_config(training_config(job), world_size=8, tp=job.tp * job.pp) == []


def test_plans_fit_are_ordered_and_runnable() -> None:
    got = answer("llama-2-7b", usd_per_gpu_h=2.0, total_tokens=10**9)
    assert got.best is not None
    times = [p.prediction["step_s"] for p in got.plans]
    assert times[0] <= min(times) * 1.03
    model = CATALOG.model("llama-2-7b")[0]
    for plan in got.plans:
        assert feasible_train(model, H100, plan.job, COEFFICIENTS) is None
        assert shlex.split(plan.command)[0] == "deepspeed"
        assert plan.usd_per_million_tokens == pytest.approx(16 / 3600 / plan.prediction["tokens_per_s"] * 1e6)
    assert "$" in got.why[-1]
    assert sum(r.count for r in got.rejected) + len(got.plans) <= got.n_considered


def test_equal_speed_goes_to_the_simpler_job() -> None:
    got = answer("llama-2-7b")
    assert got.best is not None
    near = [p for p in got.plans if p.prediction["step_s"] <= got.plans[0].prediction["step_s"]]
    assert complexity(got.best.job) == min(complexity(p.job) for p in near)


def test_a_model_that_only_fits_with_offload_gets_offload() -> None:
    got = answer("llama-2-70b", global_batch=16)
    assert got.best is not None
    assert got.best.job.offload_optimizer != "none"
    assert any("optimizer" in line for line in got.why)
    assert got.rejected


def test_lora_needs_no_offload_on_one_consumer_card() -> None:
    card = Cluster(gpu=CATALOG.gpu("rtx-4090"), gpus_per_node=1)
    got = answer("llama-3.1-8b", card, global_batch=8, lora_rank=16)
    assert got.best is not None
    assert got.best.job.offload_optimizer == "none"
    full = answer("llama-3.1-8b", card, global_batch=8)
    assert full.best is None or full.best.job.offload_optimizer != "none"


def test_alternatives_say_how_far_the_other_kinds_are_behind_and_where() -> None:
    got = answer("llama-2-7b")
    assert any("Best with ZeRO-3" in line for line in got.alternatives)
    assert any("Best with a pipeline" in line for line in got.alternatives)
    assert got.best is not None
    third = next(p for p in answer("llama-2-7b", fixed={"zero_stage": 3}).plans)
    more = got.best.prediction["tokens_per_s"] / third.prediction["tokens_per_s"] - 1
    line = next(x for x in got.alternatives if "Best with ZeRO-3" in x)
    assert f"{more:.0%} more time a token, mostly" in line


def test_flips_are_where_the_best_plan_stops_fitting() -> None:
    got = answer("llama-3.1-8b")
    assert got.best is not None
    longest = int(re.search(r"above ([\d,]+) tokens", " ".join(got.flips))[1].replace(",", ""))  # type: ignore[index]
    model = CATALOG.model("llama-3.1-8b")[0]
    for length, fits in ((longest, True), (longest + 128, False)):
        job = got.best.job.model_copy(update={"sequence_length": length})
        assert (feasible_train(model, H100, job, COEFFICIENTS) is None) == fits
    layers = int(re.search(r"\((\d+) layers\)", " ".join(got.flips))[1])  # type: ignore[index]
    for n, fits in ((layers, True), (layers + 1, False)):
        deeper = model.model_copy(update={"n_layers": n})
        assert (feasible_train(deeper, H100, got.best.job, COEFFICIENTS) is None) == fits
    half = answer("llama-3.1-8b", H100.model_copy(update={"gpus_per_node": 4})).best
    assert half is not None
    ratio = half.prediction["step_s"] / got.best.prediction["step_s"]
    assert any(x.startswith("On 4 of these GPUs") and f"{ratio:.2f} times" in x for x in got.flips)


def test_where_nothing_fits_what_would_is_said() -> None:
    got = answer("llama-3.1-405b")  # 16 bytes a parameter are 6.5 TB: neither 8 GPUs nor their host or drives hold it
    assert got.best is None
    assert got.rejected
    more = re.match(r"(\d+) nodes of (\d+) h100-sxm-80gb would do", got.why[0])
    assert more is not None
    enough = H100.model_copy(update={"n_nodes": int(more[1]), "gpus_per_node": int(more[2])})
    assert answer("llama-3.1-405b", enough).best is not None
    assert "lora_rank 16" in got.why[1]
    assert answer("llama-3.1-405b", lora_rank=16).best is not None
    one = Cluster(gpu=CATALOG.gpu("l4"), gpus_per_node=1)
    none = answer("llama-3.1-405b", one, global_batch=8, fixed={"zero_stage": 0, "tp": 1, "pp": 1})
    assert "No number of these GPUs" in none.why[0]


def test_what_may_run_out_of_memory_says_so_and_ranks_behind_what_surely_fits() -> None:
    room = H100.gpu.device_memory_bytes
    one = H100.model_copy(update={"gpus_per_node": 1})
    got = answer("llama-3.1-8b", one)
    tight = [is_tight(p.prediction, room) for p in got.plans]
    assert tight == sorted(tight)
    assert not tight[0]
    # by hand: the plan that fills the card is faster, and told, with the gigabytes that make it doubtful
    fuller = answer(
        "llama-3.1-8b", one, fixed={"is_checkpointed": False, "offload_param": "none", "micro_batch_size": 4}
    )
    assert fuller.best is not None
    assert is_tight(fuller.best.prediction, room)
    assert any("may run out of memory" in line for line in fuller.why)
    least = 1 - got.plans[0].prediction["tokens_per_s"] / fuller.best.prediction["tokens_per_s"]
    assert least > 0
    assert any(line.startswith(f"{least:.0%} less time a token, but it may run out") for line in got.alternatives)
    for plan in (*got.plans, *fuller.plans):
        memory = plan.prediction.quantities["memory_bytes_per_gpu"]
        assert memory.high <= room
        warned = any("expandable_segments" in line for line in plan.reasons)
        assert warned == (memory.high == pytest.approx(room) or is_tight(plan.prediction, room))


def test_the_second_copy_of_the_weights_can_be_switched_off() -> None:
    two = H100.model_copy(update={"n_nodes": 2})
    jobs = [
        list(training_jobs(CATALOG.model("llama-2-7b")[0], two, global_batch=64, sequence_length=2048, fixed=f))
        for f in ({}, {"hpz_ranks": 0}, {"hpz_ranks": 8})
    ]
    assert {j.hpz_ranks for j in jobs[0]} == {0, 8}
    assert {j.hpz_ranks for j in jobs[1]} == {0}
    assert {j.zero_stage for j in jobs[1]} == {0, 1, 2, 3}
    assert {j.hpz_ranks for j in jobs[2]} == {8}


@pytest.mark.parametrize(
    ("fixed", "says"),
    [
        ({"zero_stage": 3, "pp": 4}, "refuses pipeline parallelism; use stage 1 with pp 4"),
        ({"zero_stage": 2, "offload_param": "cpu"}, "works with stage 3 only"),
        ({"zero_stage": 0, "offload_optimizer": "cpu"}, "needs stage 1, 2 or 3"),
        ({"pp": 4, "stage_layers": (7, 8, 8, 10)}, "sum to 33, the model has 32 layers; use 8,8,8,8"),
        ({"pp": 4, "n_chunks": 2}, "no interleaved schedule"),
        ({"hpz_ranks": 3}, "does not divide dp 8; use 2"),
        ({"lora_rank": 100_000}, "less than or equal to 65536"),
        ({"lora_rank": 8192}, "use at most 4,096"),
    ],
    ids=str,
)
def test_what_no_memory_would_cure_is_one_sentence(fixed: dict[str, Any], says: str) -> None:
    with pytest.raises(DomainError, match=says):
        answer("llama-2-7b", fixed=fixed)


def test_volta_trains_in_fp16_unless_bf16_is_asked_for() -> None:
    volta = Cluster(gpu=CATALOG.gpu("v100-sxm-32gb"), gpus_per_node=8)
    got = answer("llama-2-7b", volta)
    assert got.best is not None
    assert {p.job.dtype for p in got.plans} == {"fp16"}
    assert any("no bf16 arithmetic" in n.text for n in got.best.prediction.notes)
    with pytest.raises(DomainError, match="no bf16 arithmetic; use dtype fp16"):
        answer("llama-2-7b", volta, fixed={"dtype": "bf16"})


def test_energy_is_another_objective() -> None:
    by_energy = answer("llama-2-7b", objective="energy").best
    assert by_energy is not None
    others = answer("llama-2-7b").plans
    least = min(p.prediction["energy_j_per_token"] for p in others)
    assert by_energy.prediction["energy_j_per_token"] <= least * 1.03


def test_bad_input_is_named() -> None:
    three = Cluster(gpu=CATALOG.gpu("h100-sxm-80gb"), gpus_per_node=3)
    with pytest.raises(DomainError, match="use global_batch 9"):
        answer("llama-2-7b", three, global_batch=7)
    with pytest.raises(
        DomainError, match=r"is no multiple of 8 data-parallel GPUs x .* use global_batch 4096 or micro_batch_size 8"
    ):
        answer("llama-2-7b", fixed={"micro_batch_size": 512})
    with pytest.raises(DomainError, match="use at most 4096"):
        answer("llama-2-7b", sequence_length=8192)
    with pytest.raises(DomainError, match="must be positive"):
        answer("llama-2-7b", global_batch=0)
