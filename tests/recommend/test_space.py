"""The search space: what is legal, what fits, why the rest does not."""

from __future__ import annotations

import contextlib
import itertools
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.catalog import load_catalog
from advisor.errors import DomainError
from advisor.recommend.ask import Question, ask, fit_context, parse_power_w, parse_slo, workload_of
from advisor.recommend.feasible import Rejections, fitting, smallest_fit, what_would_fit
from advisor.recommend.space import engine_settings, format_fault, layouts, legal_tp, replicas, weight_dtypes
from advisor.schema import ClosedLoad, Cluster, EngineFacts, FixedLengths, LognormalLengths, PoissonLoad, Request

CATALOG = load_catalog()


@lru_cache
def question(model: str, gpus: str, **fields: object) -> Question:
    return ask(Request.model_validate({"model": model, "gpus": gpus} | fields), CATALOG)


@pytest.mark.parametrize(
    ("model", "per_node", "expected"),
    [
        ("llama-3.3-70b", 8, [1, 2, 4, 8]),  # 64 heads, 8 KV heads
        ("qwen2.5-14b", 8, [1, 2, 4, 8]),  # 40 heads, 8 KV heads: 5 divides the heads, but no KV head
        ("opt-175b", 8, [1, 2, 3, 4, 6, 8]),  # 96 heads, each with its own KV head
        ("falcon-7b", 8, [1]),  # 71 heads: a prime
        ("llama-3.3-70b", 2, [1, 2]),
    ],
)
def test_tensor_degrees_divide_heads_and_stay_in_a_node(model: str, per_node: int, expected: list[int]) -> None:
    cluster = Cluster(gpu=CATALOG.gpu("h100"), gpus_per_node=per_node)
    assert legal_tp(CATALOG.model(model)[0], cluster) == expected


@given(
    n_nodes=st.integers(1, 9), per_node=st.integers(1, 8), model=st.sampled_from(["8b", "70b", "mixtral", "opt-66b"])
)
@settings(max_examples=60)
def test_every_layout_fits_on_the_gpus_there_are(n_nodes: int, per_node: int, model: str) -> None:
    cluster = Cluster(gpu=CATALOG.gpu("a100"), n_nodes=n_nodes, gpus_per_node=per_node)
    found = list(layouts(CATALOG.model(model)[0], cluster))
    assert found
    for at in found:
        assert at.max_dp >= 1
        assert at.tp * at.pp * at.max_dp <= cluster.n_gpus
        assert at.n_nodes * at.max_dp <= n_nodes or at.n_nodes == 1
        assert at.tp <= per_node
        # the stages of a replica are spread so that none is cut by the edge of a node, as many on each
        assert at.pp <= at.n_nodes * (per_node // at.tp)
        assert at.pp % at.n_nodes == 0


@given(st.integers(1, 100_000))
def test_replica_counts_start_at_one_and_end_at_all(most: int) -> None:
    counts = replicas(most)
    assert counts[0] == 1
    assert counts[-1] == most
    assert counts == sorted(set(counts))
    assert len(counts) < 150
    assert all(b <= max(a + 1, 1.1 * a + 1) for a, b in itertools.pairwise(counts))


def test_formats_follow_checkpoint_and_card() -> None:
    v100, h100, a100 = (CATALOG.gpu(name) for name in ("v100", "h100", "a100"))
    llama, deepseek = CATALOG.model("8b")[0], CATALOG.model("deepseek-v3")[0]
    assert weight_dtypes(llama, h100, ()) == ["bf16"]
    assert weight_dtypes(llama, v100, ()) == ["fp16"]
    assert weight_dtypes(deepseek, h100, ()) == ["fp8"]
    facts = question("8b", "1xH100").facts
    assert format_fault(llama, h100, "fp8", "bf16", facts) is None
    fault = format_fault(llama, a100, "fp8", "bf16", facts)
    assert fault is not None
    assert "no fp8 matrix units" in fault[0]
    assert "published as fp8" in (format_fault(deepseek, h100, "bf16", "bf16", facts) or ("",))[0]
    assert "7.5" in (format_fault(llama, v100, "fp16", "fp16", facts) or ("",))[0]
    # a checkpoint without another format needs another card: "fp16 weights" sent its user in a circle
    older = EngineFacts.from_table(CATALOG.engine("vllm"), "0.18.1")
    oss = CATALOG.model("gpt-oss-20b")[0]
    assert (format_fault(oss, v100, "mxfp4", "fp16", older) or ("", ""))[
        1
    ] == "a card of compute capability 8.0 or newer"
    assert (format_fault(llama, v100, "awq-int4", "fp16", older) or ("", ""))[1] == "--weight-dtype fp16"


def test_an_old_card_gets_the_newest_release_that_runs_on_it() -> None:
    asked = question("8b", "1xV100")
    assert asked.facts.version != Request.model_fields["engine_version"].default
    assert format_fault(asked.model, asked.pools[0].cluster.gpu, "fp16", "fp16", asked.facts) is None
    assert any("no longer runs on v100" in n.text for n in asked.notes)
    pinned = question("8b", "1xV100", engine_version="0.29.0")
    assert pinned.facts.version == "0.29.0"


def test_engine_settings_begin_with_the_releases_defaults_and_are_legal() -> None:
    asked = question("8b", "1xH100")
    gpu = asked.pools[0].cluster.gpu
    found = engine_settings(gpu, asked.facts, 8192)
    # 0.26.0 on an H100: 1024 sequences and 8192 tokens for the server (data/engines/vllm.toml cites the lines)
    assert found[0] == (1024, 8192)
    assert all(seqs <= tokens for seqs, tokens in found)
    assert len(found) == len(set(found)) > 3


def test_a_plan_that_fits_never_exceeds_memory_and_one_that_does_not_says_why() -> None:
    asked, rejections = question("70b", "8xA100"), Rejections()
    fits = fitting(asked, asked.pools[0], rejections)
    assert fits.deployments
    assert all(d.n_gpus <= 8 for d in fits.deployments)
    assert all(d.tp * d.pp > 1 for d in fits.deployments), "141 GB of weights cannot fit one 80 GB card"
    (rejected,) = rejections.all()
    assert "exceed" in rejected.reason
    assert "GPUs a replica" in rejected.nearest
    assert rejected.count == 48, "8 numbers of replicas of one GPU, times 6 engine settings"


def test_what_would_fit_names_more_cards_fewer_bits_and_other_cards() -> None:
    asked = question("70b", "1xL4")
    text = " ".join(what_would_fit(asked, CATALOG.gpus()))
    assert "8xl4" in text
    assert "awq-int4" in text
    assert "h200" in text
    smallest = smallest_fit(asked, asked.model, CATALOG.gpu("h200"), "bf16")
    assert smallest is not None
    assert smallest.n_gpus == 2, "141 GB of weights need more than the 138 GB that vLLM may use of one H200"


def test_lengths_that_are_given_must_fit_and_a_presets_tail_is_cut() -> None:
    model = CATALOG.model("opt-175b")[0]
    preset = Request(model="opt-175b", gpus="8xA100")
    workload, length, fault, notes = fit_context(workload_of(preset, CATALOG), model, preset)
    assert fault is None
    assert length == model.max_context_tokens == 2048
    assert isinstance(workload.lengths, LognormalLengths)
    assert workload.lengths.prompt_clip[1] + workload.lengths.output_clip[1] <= 2048
    assert "cut to" in notes[0].text
    own = Request(model="opt-175b", gpus="8xA100", prompt_tokens=4000, output_tokens=100)
    fault = fit_context(workload_of(own, CATALOG), model, own)[2]
    assert fault is not None
    assert "4,100 tokens" in fault[0]
    assert "--prompt-tokens 1998" in fault[1]


def test_own_lengths_and_loads_override_the_preset() -> None:
    fixed = workload_of(Request(model="8b", gpus="1xH100", prompt_tokens=100, output_tokens=7, rate=3), CATALOG)
    assert fixed.lengths == FixedLengths(prompt_tokens=100, output_tokens=7)
    assert fixed.load == PoissonLoad(arrivals_per_s=3)
    spread = workload_of(Request(model="8b", gpus="1xH100", length_sigma=0.5, concurrency=9), CATALOG)
    assert isinstance(spread.lengths, LognormalLengths)
    assert spread.lengths.sigma == 0.5
    assert spread.load == ClosedLoad(concurrency=9)
    assert workload_of(Request(model="8b", gpus="1xH100", task="batch"), CATALOG).name == "batch"


def test_targets_and_powers_are_read_with_units() -> None:
    slo = parse_slo("ttft_p99=500ms, TPOT_mean<=0.05,e2e_p95=2min")
    assert [(t.name, t.max_s) for t in slo.targets] == [("ttft_p99", 0.5), ("tpot_mean", 0.05), ("e2e_p95", 120.0)]
    assert parse_power_w("2.4kW") == 2400
    assert parse_power_w(" 700 ") == 700


@given(st.text(max_size=40))
def test_text_that_is_no_target_or_power_is_refused_without_a_crash(text: str) -> None:
    for read in (parse_slo, parse_power_w):
        with contextlib.suppress(DomainError):
            assert read(text) is not None


@pytest.mark.parametrize(
    "text", ["ttft_p99=0ms", "ttft_p99=nan", "ttft_p98=1s", "ttft=1s", "ttft_p99=1e999s", "a_p99=1"]
)
def test_a_target_must_be_one(text: str) -> None:
    with pytest.raises(DomainError, match="cannot read target"):
        parse_slo(text)


def test_a_target_given_twice_is_refused() -> None:
    with pytest.raises(DomainError, match="twice"):
        parse_slo("ttft_p99=1s,ttft_p99=2s")
