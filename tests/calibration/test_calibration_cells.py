import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog import hf_layers
from advisor.predict.engine_state import head_of
from calibration.cells import Cell, arrivals, default_requests, parse_cell, requests
from calibration.errors import JobError
from calibration.session import EXPERT_BATCHES, EXPERT_COUNTS, RUNNING, head_asks, warmups


def test_text_and_object_name_the_same_cell():
    text = parse_cell("c,1024,256,8,16")
    assert text == parse_cell(
        {"kind": "closed", "prompt_tokens": 1024, "output_tokens": 256, "concurrency": 8, "n_requests": 16}
    )
    assert parse_cell("p,512,128,r4.5,30,0.6").arrivals_per_s == 4.5
    assert parse_cell("p,512,128,0.9,30").rate_frac == 0.9


def test_name_of_a_cell_ignores_its_limits_only():
    cell = {"kind": "closed", "prompt_tokens": 64, "output_tokens": 8, "concurrency": 2}
    names = [parse_cell(cell | more).cell_id() for more in ({}, {"guard_s": 5}, {"repeat": 1}, {"n_requests": 9})]
    assert names[0] == names[1]
    assert len(set(names)) == 3


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("c,1024", "PROMPT,OUTPUT"),
        ("x,1,2,3", "PROMPT,OUTPUT"),
        ({"kind": "closed", "prompt_tokens": 1, "output_tokens": 1, "speed": 3}, "no field 'speed'"),
        ({"kind": "open", "prompt_tokens": 1, "output_tokens": 1}, "'closed' or 'poisson'"),
        ({"kind": "poisson", "prompt_tokens": 9, "output_tokens": 9, "duration_s": 5}, "one of arrivals_per_s and"),
        ({"kind": "closed", "prompt_tokens": 9, "output_tokens": 9}, "concurrency must be"),
        ("c,4000,200,1", "exceed max_model_len 4096"),
        (
            {"kind": "closed", "prompt_tokens": 8, "output_tokens": 8, "concurrency": 1, "shared_prefix_tokens": 8},
            "below",
        ),
    ],
)
def test_a_bad_cell_is_refused_with_its_rule(spec, says):
    with pytest.raises(JobError, match=says):
        parse_cell(spec, 4096)


def test_poisson_arrivals_and_lengths_have_the_means_that_were_asked():
    cell = parse_cell("p,800,200,r20,400,0.6")
    drawn = list(arrivals(cell, 20.0, seed=3))
    n = len(drawn)
    # a Poisson count has the standard deviation sqrt(n): 4 of them is one case in 16 000
    assert abs(n - 8000) < 4 * math.sqrt(8000)
    gaps = [b[0] - a[0] for a, b in itertools.pairwise(drawn)]
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.06)  # exponential: deviation = mean
    # mean of lognormvariate(-s^2/2, s) is 1; clipping takes little away here
    assert statistics.mean(d[1] for d in drawn) == pytest.approx(800, rel=0.03)
    assert statistics.median(d[1] for d in drawn) == pytest.approx(800 * math.exp(-0.18), rel=0.04)
    assert all(8 <= p <= 3500 and 4 <= o <= 1500 for _, p, o in drawn)
    assert drawn[-1][0] >= 400 > drawn[-2][0]


@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), vocab=st.integers(300, 200_000))
def test_prompts_stay_inside_the_vocabulary_and_replay(seed, n, vocab):
    cell = Cell("closed", 50, 4, concurrency=2, n_requests=n)
    asks = requests(cell, 0, seed, vocab)
    assert len(asks) == n
    assert all(len(a.prompt) == 50 and min(a.prompt) >= 100 and max(a.prompt) < vocab - 100 for a in asks)
    assert [a.prompt for a in requests(cell, 0, seed, vocab)] == [a.prompt for a in asks]


def test_shared_prefixes_are_equal_within_a_group_and_end_where_they_should():
    cell = Cell("closed", 100, 4, concurrency=2, n_requests=6, shared_prefix_tokens=64, n_prefixes=2)
    prompts = [a.prompt for a in requests(cell, 0, 1, 50_000)]
    assert prompts[0][:64] == prompts[2][:64] == prompts[4][:64]
    assert prompts[1][:64] == prompts[3][:64] != prompts[0][:64]
    assert len({tuple(p[64:]) for p in prompts}) == 6


def test_a_draw_beyond_the_models_length_is_refused():
    cell = parse_cell("p,1024,256,r50,20,1.0", 2048)
    with pytest.raises(JobError, match="max_model_len is 2048"):
        requests(cell, 50.0, 1, 32000, 2048)


def test_default_requests_fill_a_cell():
    assert [default_requests(c) for c in (1, 8, 127, 128, 256)] == [4, 24, 381, 256, 512]


def test_engines_with_experts_compile_their_kernels_before_the_first_cell():
    assert EXPERT_COUNTS == hf_layers.EXPERT_COUNTS
    dense = warmups({"hidden_size": 64}, 8192)
    assert [(c.prompt_tokens, c.concurrency) for c in dense] == [(256, 8)]
    assert warmups({}, 100)[0].prompt_tokens == 84  # prompt and output fit the model's length
    experts = warmups({"num_experts": 128}, 8192)
    sizes = [c.prompt_tokens for c in experts[1:]]
    assert set(EXPERT_BATCHES) <= set(sizes)
    assert any(n % 16 for n in sizes if n > 16)
    assert max(c.prompt_tokens for c in warmups({"num_local_experts": 8}, 1000)) < 1000
    assert all(c.output_tokens == 1 and c.n_requests == 1 for c in experts[1:])


def test_a_warm_up_meets_every_kernel_of_the_head():
    asks = head_asks(32000, 8192)
    assert len(asks) == 192
    assert {len(ask.prompt) for ask in asks} == {16}
    # once all have begun, so many are running at each step: every number that is wanted, for two steps
    first = min(ask.n_output for ask in asks)
    running = [sum(ask.n_output > step for ask in asks) for step in range(first - 2, max(ask.n_output for ask in asks))]
    assert running == [n for n in RUNNING for _ in range(2)]
    assert {head_of(n) for n in RUNNING} == {head_of(n) for n in range(1, 257)}
    assert all(len(ask.prompt) + ask.n_output <= 64 for ask in head_asks(32000, 64))
