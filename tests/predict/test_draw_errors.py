"""The part of an interval that comes from one drawn replay: as wide as several draws differ, or nothing."""

from __future__ import annotations

import numpy as np
import pytest

from advisor.catalog import load_catalog
from advisor.predict.draw_error import draw_errors
from advisor.predict.serving import replay
from advisor.predict.traffic import draw, mean_lengths
from advisor.recommend.ask import ask
from advisor.recommend.one import deployment_of
from advisor.schema import (
    ClosedLoad,
    ConstantLoad,
    FixedLengths,
    PoissonLoad,
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
    # ten seeds know a spread to a quarter; the errors are rather too large, as prompts explain what they take as chance
    assert 0.65 <= float(np.exp(np.mean(np.log(ratios)))) <= 2.0
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


def test_a_replay_s_lengths_are_those_of_the_long_run() -> None:
    """Drawn one by one, some hundred heavy-tailed lengths have means that are 5 to 10 % off, and so has the load."""
    question = ask(Request(model="70b", gpus="8xA100"), load_catalog())
    prompt, output = mean_lengths(question.workload.lengths)
    workload = question.workload.model_copy(update={"load": PoissonLoad(arrivals_per_s=5.5, n_requests=330)})
    for seed in range(5):
        even = draw(workload, seed, prefix_caching=False, is_even=True)
        assert even.prompt_tokens.mean() == pytest.approx(prompt, rel=0.005)
        assert even.output_tokens.mean() == pytest.approx(output, rel=0.005)
        assert abs(np.corrcoef(even.prompt_tokens, even.output_tokens)[0, 1]) < 0.2, "independent of each other"
    drawn = [float(draw(workload, seed, prefix_caching=False).prompt_tokens.mean()) for seed in range(20)]
    assert np.std(drawn) > 0.02 * prompt
