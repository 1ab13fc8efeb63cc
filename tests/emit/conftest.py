"""Plans that the artefact tests write down: one node, several replicas, several nodes, experts, hostile names."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from advisor.emit import Launch
from advisor.schema import (
    Cluster,
    Deployment,
    EngineFacts,
    FixedLengths,
    Gpu,
    Interval,
    Model,
    Moe,
    Plan,
    PoissonLoad,
    Prediction,
    Slo,
    Source,
    Target,
    Workload,
)

ENGINES = Path(__file__).resolve().parents[2] / "data" / "engines" / "vllm.toml"
SOURCE = (Source(field="*", title="test"),)


def facts(version: str = "0.26.0") -> EngineFacts:
    return EngineFacts.from_table(tomllib.loads(ENGINES.read_text()), version)


def gpu(name: str = "h100-sxm-80gb", capability: str = "9.0", memory_bytes: float = 85.0e9, **changes: Any) -> Gpu:
    fields: dict[str, Any] = {
        "name": name,
        "label": name.upper(),
        "vendor": "nvidia",
        "family": "hopper",
        "compute_capability": capability,
        "memory_bytes": memory_bytes,
        "device_memory_bytes": memory_bytes,
        "memory_bandwidth_bytes_per_s": 3.35e12,
        "peak_flops_per_s": {"bf16": 9.9e14, "fp16": 9.9e14},
        "board_power_w": 700,
        "idle_power_w": 70,
        "link": "nvlink",
        "link_bytes_per_s": 4.5e11,
        "host_link_bytes_per_s": 6.4e10,
        "sources": SOURCE,
    }
    return Gpu.model_validate(fields | changes)


def model(**changes: Any) -> Model:
    fields: dict[str, Any] = {
        "name": "llama-3.1-8b",
        "family": "llama",
        "architecture": "LlamaForCausalLM",
        "hf_id": "meta-llama/Llama-3.1-8B",
        "n_layers": 32,
        "d_model": 4096,
        "n_heads": 32,
        "n_kv_heads": 8,
        "d_head": 128,
        "d_ff": 14336,
        "vocab_size": 128256,
        "max_context_tokens": 131072,
    }
    return Model.model_validate(fields | changes)


def moe_model() -> Model:
    moe = Moe(n_experts=8, n_experts_per_token=2, d_ff_expert=14336)
    return model(name="mixtral-8x7b", hf_id="mistralai/Mixtral-8x7B-v0.1", family="mixtral", moe=moe)


def launch(
    *,
    version: str = "0.26.0",
    of: Model | None = None,
    card: Gpu | None = None,
    gpus_per_node: int = 8,
    n_nodes: int = 1,
    **deployment: Any,
) -> Launch:
    subject, card = of or model(), card or gpu()
    settings = {"model": subject.name, "gpu": card.name, "engine_version": version} | deployment
    prediction = Prediction(quantities={"ttft_p99_s": Interval(value=0.2, low=0.1, high=0.3)})
    plan = Plan(
        rank=1,
        backend="vllm",
        deployment=Deployment.model_validate(settings),
        prediction=prediction,
        meets_slo=True,
        usd_per_h=2.0,
        score=1.0,
        command="",
    )
    return Launch(
        plan=plan,
        model=subject,
        cluster=Cluster(gpu=card, n_nodes=n_nodes, gpus_per_node=gpus_per_node),
        workload=Workload(
            name="chat",
            lengths=FixedLengths(prompt_tokens=512, output_tokens=128),
            load=PoissonLoad(arrivals_per_s=4, duration_s=60),
        ),
        slo=Slo(
            targets=(
                Target(metric="ttft", statistic="p99", max_s=0.5),
                Target(metric="tpot", statistic="mean", max_s=0.05),
                Target(metric="e2e", statistic="p95", max_s=10),
                Target(metric="itl", statistic="p90", max_s=0.1),
            )
        ),
        facts=facts(version),
    )


PLANS: dict[str, dict[str, Any]] = {
    "one gpu": {},
    "tensor parallel": {"tp": 4, "max_num_seqs": 64, "max_num_batched_tokens": 2048},
    "replicas": {"tp": 2, "dp": 4, "prefix_caching": True, "kv_dtype": "fp8", "weight_dtype": "fp8"},
    "old release": {"version": "0.9.2", "tp": 2},
    "newest release": {"version": "0.33.0", "tp": 8, "enforce_eager": True, "kv_block_tokens": 32},
    "experts": {"of": moe_model(), "tp": 2, "dp": 4, "ep": 8},
}
WIDE: dict[str, dict[str, Any]] = {
    "two nodes": {"tp": 8, "pp": 2, "n_nodes": 4, "version": "0.26.0"},
    "two nodes, newest": {"tp": 8, "pp": 2, "n_nodes": 2, "version": "0.33.0"},
}


@pytest.fixture(params=PLANS, ids=str)
def narrow(request: pytest.FixtureRequest) -> Launch:
    """A plan whose replica fits one node."""
    return launch(**PLANS[request.param])


@pytest.fixture(params=[*PLANS, *WIDE], ids=str)
def any_plan(request: pytest.FixtureRequest) -> Launch:
    """Any plan."""
    return launch(**(PLANS | WIDE)[request.param])


class Make:
    """The builders above, for tests that vary their inputs."""

    facts = staticmethod(facts)
    gpu = staticmethod(gpu)
    model = staticmethod(model)
    moe_model = staticmethod(moe_model)
    launch = staticmethod(launch)


@pytest.fixture(scope="session")
def make() -> Make:
    return Make()
