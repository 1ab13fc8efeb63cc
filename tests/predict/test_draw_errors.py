"""The part of an interval that comes from one drawn replay: as wide as several draws differ, or nothing."""

from __future__ import annotations

import numpy as np
import pytest

from advisor.catalog import load_catalog
from advisor.predict.serving import draw_errors, replay
from advisor.recommend.ask import ask
from advisor.recommend.one import deployment_of
from advisor.schema import (
    ClosedLoad,
    ConstantLoad,
    FixedLengths,
    Request,
    TraceLengths,
    TraceLoad,
    Workload,
)


@pytest.mark.parametrize(("rate", "lengths"), [(12.0, "chat"), (2.5, "rag")])
def test_the_error_of_one_draw_is_the_spread_of_several(rate: float, lengths: str) -> None:
    """Seeds are draws: the standard error that one of them reports is how far they lie apart."""
    catalog = load_catalog()
    logs: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    for seed in range(10):
        question = ask(Request(model="8b", gpus="1xH100", workload=lengths, rate=rate, seed=seed), catalog)
        assert question.vllm is not None
        deployment = deployment_of(question, {"tp": 1})
        cluster = question.pools[0].cluster
        run = replay(
            question.model, cluster, deployment, question.workload, question.vllm, seed=seed, facts=question.facts
        )
        drawn = draw_errors(run.simulation, run.workload)
        for name in ("ttft_p50", "ttft_p95", "ttft_p99", "tpot_p50", "tpot_p99", "e2e_p50", "e2e_mean"):
            logs.setdefault(name, []).append(np.log(run.simulation.latency(*name.split("_"))))
            errors.setdefault(name, []).append(drawn[name])
    ratios = [float(np.sqrt(np.mean(np.square(errors[n]))) / np.std(logs[n], ddof=1)) for n in logs]
    # ten seeds know a spread to a quarter; a burst in one of them moves a tail further
    assert 0.65 <= float(np.exp(np.mean(np.log(ratios)))) <= 1.5
    assert min(ratios) > 0.3
    assert max(ratios) < 3


def test_what_is_not_drawn_has_no_error_of_a_draw() -> None:
    lengths = FixedLengths(prompt_tokens=100, output_tokens=20)
    trace = TraceLengths(prompt_tokens=(100, 50), output_tokens=(20, 10))
    loads = [
        (lengths, ClosedLoad(concurrency=4, n_requests=40)),
        (lengths, ConstantLoad(arrivals_per_s=5.0, n_requests=40)),
        (trace, TraceLoad(arrival_s=tuple(i / 10 for i in range(40)))),
    ]
    question = ask(Request(model="8b", gpus="1xH100", rate=1), load_catalog())
    assert question.vllm is not None
    deployment = deployment_of(question, {"tp": 1})
    for shape, load in loads:
        workload = Workload(lengths=shape, load=load)
        run = replay(question.model, question.pools[0].cluster, deployment, workload, question.vllm)
        assert draw_errors(run.simulation, workload) == {}
