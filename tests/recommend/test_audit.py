"""The audit: known truths and falsehoods, contradictions, and claims files that are wrong themselves."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from advisor.catalog import load_catalog
from advisor.errors import AdvisorError, DomainError, UnknownName
from advisor.predict.shapes import shapes_of
from advisor.recommend.audit import audit
from advisor.recommend.audit_figures import fastest_s
from advisor.schema import Cluster, Deployment, Interval, Model, Prediction, Workload
from advisor.schema.base import first_error
from advisor.schema.claims import AuditReport, ClaimsFile, Finding

ROOT = Path(__file__).resolve().parents[2]
CATALOG = load_catalog()
A100 = {"model": "llama-2-70b", "gpu": "a100-sxm-80gb", "n_gpus": 8}


@cache
def article() -> AuditReport:
    with (ROOT / "data/claims/vllm-vs-deepspeed-2025.toml").open("rb") as file:
        return audit(ClaimsFile.model_validate(tomllib.load(file)), CATALOG)


def verdicts(*claims: dict[str, Any], statements: bool = False, **file: Any) -> dict[str, str]:
    key = "statements" if statements else "figures"
    document = {"title": "t", "setup": A100, key: claims} | file
    return {f.id: f.verdict for f in audit(ClaimsFile.model_validate(document), CATALOG, no_model).findings}


def no_model(model: Model, cluster: Cluster, deployment: Deployment, workload: Workload) -> Prediction:
    raise DomainError("only physics and rules are tested here")


def figure(quantity: str, value: float, **more: Any) -> dict[str, Any]:
    return {"id": quantity, "text": quantity, "quantity": quantity, "value": value} | more


def statement(rule: str, **subject: Any) -> dict[str, Any]:
    return {"id": rule, "text": rule, "rule": rule, "subject": subject}


def test_the_article_s_statements() -> None:
    found = {f.id: f for f in article().findings}
    wrong = (
        "vllm-only-dp",
        "memory-exponential",
        "zero-1",
        "zero-3",
        "one-over-n",
        "one-config",
        "gradient-accumulation",
    )
    assert {i: found[i].verdict for i in wrong} == dict.fromkeys(wrong, "wrong")
    assert found["pipeline-bubbles"].verdict == "wrong"
    assert found["deepspeed-500b"].verdict == "wrong"
    assert found["vllm-needs-ray"].verdict == "stale"
    assert found["vllm-175b"].verdict == "stale"
    assert found["zero-2"].verdict == "consistent"
    assert found["awq"].verdict == "consistent"
    assert all(f.why and f.source for f in found.values())


def test_the_article_s_figures_contradict_each_other() -> None:
    found = {f.id: f for f in article().findings}
    # 32 requests a batch at 8.7 a second: a batch lasts 3.7 s, so no request returns within 0.28 s
    joint = found["deepspeed-qps+deepspeed-p99"]
    assert joint.verdict == "impossible"
    assert "3.68 s" in joint.why
    assert found["deepspeed-memory+deepspeed-utilisation"].verdict == "wrong"
    assert found["power-gain"].verdict == "consistent"  # 2.8 / 2.4 kW is 16.7 %
    assert found["vllm-memory+vllm-utilisation"].verdict == "consistent"


def test_the_serving_model_judges_vllm_s_figures() -> None:
    found = {f.id: f for f in article().findings}
    assert found["vllm-qps"].verdict == "consistent"
    assert "512 prompt" in found["vllm-qps"].scenario or "128 prompt" in found["vllm-qps"].scenario
    assert found["vllm-p99"].verdict == "implausible"
    assert "time to first token" in found["vllm-p99"].scenario
    # each alone is possible; no length and load of ordinary traffic gives both, the latency read as what it says
    joint = found["vllm-qps+vllm-p99"]
    assert joint.verdict == "implausible"
    assert "with the latency as" in joint.why or "none with ordinary lengths" in joint.why
    assert not joint.scenario or joint.scenario.startswith("latency as ")
    assert found["hybrid"].ours is not None


def test_latency_as_time_to_first_token_is_offered_as_the_reading_that_works() -> None:
    finding = {f.id: f for f in article().findings}["deepspeed-p99"]
    assert finding.verdict == "implausible"
    assert "time to first token" in finding.scenario
    assert finding.ours is not None
    assert finding.ours.low > 0.325


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        (figure("e2e_p99_s", 0.005), "impossible"),  # one token of a 70B takes 8.5 ms on all eight cards
        (figure("memory_bytes_per_gpu", 90e9), "impossible"),
        (figure("memory_bytes_per_gpu", 10e9), "impossible"),  # weights alone are 17 GB a card
        (figure("board_power_w", 4000), "impossible"),  # 8 x 400 W
        (figure("board_power_w", 2000), "consistent"),
        (figure("board_power_w_per_gpu", 20), "impossible"),  # below idle
        (figure("requests_per_s", 1e6), "impossible"),
        (figure("memory_utilization_frac", 1.2), "impossible"),
        (figure("memory_utilization_frac", 0.9), "consistent"),
        (figure("memory_saving_frac", 0.9), "impossible"),
        (figure("throughput_gain_frac", 0.4), "undecided"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_physics_without_any_fitted_model(claim: dict[str, Any], verdict: str) -> None:
    claim["setup"] = A100 | {"backend": "vllm"}
    assert verdicts(claim)[claim["id"]] == verdict


def test_the_bound_is_weight_bytes_over_bandwidth() -> None:
    cluster = Cluster(gpu=CATALOG.gpu("a100-sxm-80gb"), gpus_per_node=8)
    model = CATALOG.model("llama-2-70b")[0]
    by_hand = 68.98e9 * 2 / (8 * 2039e9)
    assert fastest_s(shapes_of(model), cluster, "fp16", 0, 2) == pytest.approx(by_hand, rel=0.002)


def serve(ttft: float, tpot: float, rate: float) -> Any:
    """A stand-in for the serving model that answers the same to everything."""

    def answer(model: Model, cluster: Cluster, deployment: Deployment, workload: Workload) -> Prediction:
        tokens = workload.lengths.output_tokens  # type: ignore[union-attr]
        values = {
            "ttft_p99_s": ttft,
            "tpot_p99_s": tpot,
            "e2e_p99_s": ttft + tpot * (tokens - 1),
            "requests_per_s": rate,
        }
        near = {k: Interval(value=v, low=v * 0.9, high=v * 1.1) for k, v in values.items()}
        return Prediction(quantities=near)

    return answer


def test_a_figure_inside_our_interval_in_an_ordinary_scenario_is_consistent() -> None:
    setup = A100 | {"backend": "vllm"}
    file = ClaimsFile.model_validate(
        {"title": "t", "setup": setup, "figures": [figure("requests_per_s", 12.3), figure("ttft_p99_s", 0.12)]}
    )
    report = audit(file, CATALOG, serve(0.12, 0.02, 12.0))
    assert report.count("consistent") == 2
    assert all("prompt" in f.scenario for f in report.findings)
    slow = audit(file, CATALOG, serve(5.0, 0.02, 2.0))
    assert slow.count("impossible") == 2


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        (statement("zero_shards", stage=1, what="optimizer states"), "consistent"),
        (statement("zero_shards", stage=3, what="parameters"), "consistent"),
        (statement("kv_growth", growth="linear"), "consistent"),
        (statement("kv_growth", growth="quadratic"), "wrong"),
        (statement("kv_growth", growth="exponential", from_tokens=10**9), "wrong"),
        (statement("supports", engine="vllm", feature="pipeline_parallel", claimed=True), "consistent"),
        (statement("supports", engine="vllm", feature="pipeline_parallel", claimed=False), "wrong"),
        (statement("ds_config", config='{"zero_optimization": {"stage": 2}}'), "consistent"),
        (statement("gradient_accumulation", context="training"), "consistent"),
        (statement("fits_one_node", n_params=2e12, direction="up_to"), "impossible"),
        (statement("fits_one_node", n_params=280e9, direction="up_to"), "consistent"),
        (statement("maintained", backend="deepspeed-fastgen"), "stale"),
        (statement("batching_gain", low_frac=2.0, high_frac=3.0, batch=32), "consistent"),
        (statement("batching_gain", low_frac=0.0, high_frac=0.05, batch=32), "implausible"),
    ],
    ids=lambda x: str(x)[:70],
)
def test_rules_on_truths_and_falsehoods(claim: dict[str, Any], verdict: str) -> None:
    assert verdicts(claim, statements=True)[claim["id"]] == verdict


def test_no_sharding_means_no_batching_gain_at_batch_one() -> None:
    claim = statement("batching_gain", low_frac=0.3, high_frac=0.5, batch=1)
    assert verdicts(claim, statements=True) == {"batching_gain": "implausible"}


@pytest.mark.parametrize(
    ("claim", "says"),
    [
        (statement("zero_shard", stage=1), "did you mean zero_shards"),
        (statement("supports", engine="vllm", feature="tensor_paralel"), "did you mean vllm.tensor_parallel"),
        (statement("zero_shards"), "needs subject.stage|must be a number"),
        (statement("ds_config", config="{not json"), "not JSON"),
        (statement("kv_growth", growth="cubic"), "growth"),
        (statement("kv_growth", growth="exponential", from_tokens=-1), "from 1 to"),
        (statement("batching_gain", low_frac=0.1, high_frac=0.2, batch=10**9), "from 1 to 1024"),
        (statement("ds_config", config="[" * 100_000), "nested too deeply|not JSON"),
        (statement("fits_one_node", n_params="many", direction="up_to"), "must be a number"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_a_bad_claims_file_gets_a_sentence(claim: dict[str, Any], says: str) -> None:
    with pytest.raises(AdvisorError, match=says):
        verdicts(claim, statements=True)


def test_unknown_models_and_duplicate_ids_are_named() -> None:
    with pytest.raises(UnknownName, match="llama"):
        verdicts(figure("requests_per_s", 1.0, setup=A100 | {"model": "llama-2-71b"}))
    with pytest.raises(ValidationError, match="appears twice"):
        ClaimsFile.model_validate({"title": "t", "figures": [figure("ttft_p99_s", 1.0)] * 2})


def crowd(most: float) -> Any:
    """A stand-in whose rate grows with its clients, up to the sequences that run together."""

    def answer(model: Model, cluster: Cluster, deployment: Deployment, workload: Workload) -> Prediction:
        clients = min(workload.load.concurrency, deployment.max_num_seqs)  # type: ignore[union-attr]
        rate = most * clients / 1024
        quantities = {k: Interval(value=rate, low=rate * 0.9, high=rate * 1.1) for k in ("requests_per_s",)}
        return Prediction(quantities=quantities)

    return answer


def test_a_rate_is_out_of_reach_only_where_a_crowd_does_not_reach_it_either() -> None:
    setup = {"model": "llama-3.1-8b", "gpu": "h100-sxm-80gb", "n_gpus": 1, "backend": "vllm", "weight_dtype": "bf16"}

    def judged(value: float) -> Finding:
        file = ClaimsFile.model_validate({"title": "t", "setup": setup, "figures": [figure("requests_per_s", value)]})
        return audit(file, CATALOG, crowd(100.0)).findings[0]

    # the grid ends at 128 clients, that is at 12.5 requests/s; 512 and 1024 running ones give 50 and 100
    assert judged(12.5).verdict == "consistent"
    assert judged(98.0).verdict == "consistent"
    assert judged(30.0).verdict == "consistent"
    assert "up to 512 clients" in judged(30.0).scenario
    assert judged(150.0).verdict == "impossible"


def test_weights_that_no_gpu_holds_make_a_rate_impossible() -> None:
    card = {"model": "llama-3.1-405b", "gpu": "rtx-4090", "n_gpus": 1}
    file = ClaimsFile.model_validate({"title": "t", "setup": card, "figures": [figure("requests_per_s", 3.0)]})
    finding = audit(file, CATALOG).findings[0]
    assert finding.verdict == "impossible"
    assert "812 GB" in finding.why


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"figures": [{"id": "a", "text": "t", "quantity": "requests_per_s", "value": -5}]}, "cannot be negative"),
        ({"figures": [{"id": "a", "text": "t", "quantity": "e2e_p99_s", "value": 2, "high": 1}]}, "below its value"),
        ({}, "holds no claim"),
        ({"figures": [{"id": "a", "text": "t", "quantity": "e2e_p99_s", "value": float("nan")}]}, "finite"),
    ],
)
def test_figures_that_mean_nothing_are_refused(form: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says) as caught:
        ClaimsFile.model_validate({"title": "t"} | form)
    assert "Value error" not in first_error(caught.value)


def test_a_rule_that_does_not_exist_is_answered_with_those_that_do() -> None:
    with pytest.raises(UnknownName, match=r"Known: .*zero_shards"):
        verdicts(statement("os.system"), statements=True)
