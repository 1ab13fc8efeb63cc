"""The two paces of a host, and the launches that they are read from."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog import load_catalog
from advisor.fit.parameters import BY_NAME
from advisor.predict.engine import Engine
from advisor.predict.engine_state import EngineLimits, Sequence_
from advisor.predict.pace import paces
from advisor.predict.shapes import shapes_of
from advisor.predict.step import StepCost, step_cost
from advisor.predict.transfer import transferred
from advisor.schema import Deployment


def stage_of_8b() -> StepCost:
    catalog = load_catalog()
    gpu = catalog.gpu("h100-sxm-80gb")
    deployment = Deployment(backend="vllm", model="llama-3.1-8b", gpu=gpu.name)
    values = transferred(catalog.coefficients("vllm"), gpu)
    return step_cost(shapes_of(catalog.model("llama-3.1-8b")[0]), gpu, deployment, values)


LAUNCHES = Path(__file__).parents[2] / "data" / "runs" / "launches" / "vllm-0.26.0_h200-3.jsonl.gz"


@given(st.floats(1.0, 3.0), st.floats(0.0, 1.0), st.floats(0.0, 0.999))
def test_invariant_the_mean_pace_is_one_wherever_the_pattern_begins(factor: float, frac: float, phase: float) -> None:
    found = np.array(paces(factor, frac, phase))
    assert found.mean() == pytest.approx(1.0, abs=0.01)
    assert len(set(found.tolist())) <= 2


def test_oracle_two_turns_of_four() -> None:
    # slow where the fraction of k times the golden ratio is below a half: 0, 0.618, 0.236, 0.854
    assert paces(2.0, 0.5)[:4] == pytest.approx((4 / 3, 2 / 3, 4 / 3, 2 / 3))


def test_few_turns_in_a_row_have_nearly_their_share_of_slow_ones() -> None:
    slow = np.array(paces(1.5, 0.4)) > 1.0
    shares = np.convolve(slow, np.ones(10) / 10, "valid")
    assert 0.3 <= shares.min() <= 0.4 <= shares.max() <= 0.5


def test_edge_a_host_of_one_pace() -> None:
    assert set(paces(1.5, 0.0)) == {1.0}
    assert set(paces(1.5, 1.0)) == {1.0}
    assert set(paces(1.0, 0.4)) == {1.0}


def test_measured_launches_have_two_paces_and_the_coefficients_are_theirs() -> None:
    ratios, shares = [], []
    with gzip.open(LAUNCHES, "rt", encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            assert entry["columns"] == ["at_s", "launch_s", "n_tokens", "n_new", "loop_s"]
            launch_s, n_tokens, n_new, loop_s = np.array(entry["rows"]).T[1:]
            is_slow = loop_s > 33e-6
            assert ((loop_s > 29e-6) & (loop_s < 37e-6)).mean() < 0.08  # between the two paces lies little
            is_large = (n_tokens > 512) & (n_new > 0)
            ratios.append(np.median(launch_s[is_large & is_slow]) / np.median(launch_s[is_large & ~is_slow]))
            shares.append(is_slow.mean())
    assert BY_NAME["slow_launch_factor"].start == pytest.approx(np.median(ratios), abs=0.05)
    assert BY_NAME["slow_launch_frac"].start == pytest.approx(np.mean(shares), abs=0.05)


def test_only_prompts_that_join_decodes_are_launched_at_the_hosts_pace() -> None:
    stage = stage_of_8b()

    def first_tokens(pace: tuple[float, ...], n_decodes: int) -> float:
        limits = EngineLimits(8192, 64, 10_000, blocks_on_launch=True, launch_paces=pace, pace_s=1e9)
        engine = Engine([stage], limits)
        for k in range(n_decodes):
            engine.enqueue(Sequence_(k, 16, 500))
        engine.advance(0.3)
        late = Sequence_(99, 700, 2)  # larger than any CUDA graph: launched kernel by kernel, longer than it runs
        engine.idle_until(0.3)
        begin_s = engine.now_s
        engine.enqueue(late)
        while late.first_token_s < 0:
            engine.advance(1e9)
        return late.first_token_s - begin_s

    assert first_tokens((2.0,), 0) == first_tokens((1.0,), 0)
    assert first_tokens((2.0,), 4) > 1.2 * first_tokens((1.0,), 4)
    assert first_tokens((1.0,), 4) == first_tokens((), 4)
