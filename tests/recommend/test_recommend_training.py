"""The choice of a training job: legal, fitting, ranked, explained."""

from __future__ import annotations

import shlex

import pytest

from advisor.catalog import load_catalog
from advisor.emit.deepspeed_training import training_config
from advisor.errors import DomainError
from advisor.predict.deepspeed_config import check_ds_config
from advisor.predict.train import feasible_train
from advisor.recommend.training import complexity, recommend_training, training_jobs
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


def test_flips_say_how_far_the_other_kinds_are_behind() -> None:
    flips = answer("llama-2-7b").flips
    assert any("ZeRO-3" in line for line in flips)
    assert any("a pipeline" in line for line in flips)
    assert all("%" in line for line in flips)


def test_energy_is_another_objective() -> None:
    by_energy = answer("llama-2-7b", objective="energy").best
    assert by_energy is not None
    others = answer("llama-2-7b").plans
    least = min(p.prediction["energy_j_per_token"] for p in others)
    assert by_energy.prediction["energy_j_per_token"] <= least * 1.03


def test_bad_input_is_named() -> None:
    three = Cluster(gpu=CATALOG.gpu("h100-sxm-80gb"), gpus_per_node=3)
    with pytest.raises(DomainError, match="use 9"):
        answer("llama-2-7b", three, global_batch=7)
    with pytest.raises(DomainError, match="use at most 4096"):
        answer("llama-2-7b", sequence_length=8192)
    with pytest.raises(DomainError, match="must be positive"):
        answer("llama-2-7b", global_batch=0)
